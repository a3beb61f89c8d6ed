"""Equal time, and what is left of an experiment."""

import json

import pytest

from ldm_jax.errors import InputError
from ldm_jax.runs import pace
from ldm_jax.runs.plan import Arm
from tests import tiny

ARMS = {
    "base": Arm(tiny.DENOISER),  # 6 steps of 16
    "lpl": Arm(tiny.DENOISER, start="base"),
    "time": Arm(tiny.DENOISER, as_long_as=("lpl", "base")),
    "longer": Arm(tiny.DENOISER, as_long_as=("time", "base")),
}


def logged(workdir, name, *rates):
    folder = workdir / name
    folder.mkdir()
    lines = [{"step": i, pace.SPEED: rate} for i, rate in enumerate(rates)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_speed_is_the_median_without_the_line_that_has_compilation(tmp_path):
    logged(tmp_path, "a", 1.0, 90.0, 110.0, 100.0)
    assert pace.rate(tmp_path / "a") == 100.0
    logged(tmp_path, "b", 7.0)
    assert pace.rate(tmp_path / "b") == 7.0
    logged(tmp_path, "c")
    with pytest.raises(InputError, match="no line of metrics with a speed"):
        pace.rate(tmp_path / "c")


def test_an_arm_has_the_steps_that_take_as_long_as_another(tmp_path, capsys):
    logged(tmp_path, "base-seed4", 1.0, 100.0)
    logged(tmp_path, "lpl-seed4", 1.0, 20.0)
    assert pace.find_steps(tmp_path, ARMS, "lpl", 4) == 6
    # 6 steps at a fifth of the speed.
    assert pace.find_steps(tmp_path, ARMS, "time", 4) == 30
    assert "time: 30 steps take as long as the 6 of lpl" in capsys.readouterr().out
    logged(tmp_path, "time-seed4", 1.0, 50.0)
    assert pace.find_steps(tmp_path, ARMS, "longer", 4) == 60
    # Found once: the other seeds, and a run that was stopped, have as many.
    logged(tmp_path, "lpl-seed5", 1.0, 50.0)
    assert pace.find_steps(tmp_path, ARMS, "time", 5) == 30
    assert capsys.readouterr().out.count("take as long") == 1


def test_equal_steps_count_examples():
    small = Arm(tiny.DENOISER)
    big = Arm(type(tiny.DENOISER)(batch_size=32, autoencoder="x", latents=""))
    assert pace.equal_steps(small, big, 10, other_rate=40.0, yardstick_rate=80.0) == 40
    assert pace.equal_steps(big, small, 1, other_rate=1000.0, yardstick_rate=1.0) == 1


def test_steps_that_are_not_found_yet_are_those_of_the_arm_of_equal_time(tmp_path):
    assert pace.known_steps(tmp_path, ARMS) == {"base": 6, "lpl": 6, "time": 6, "longer": 6}
    (tmp_path / pace.STEPS).write_text(json.dumps({"time": 30}))
    known = pace.known_steps(tmp_path, ARMS)
    assert (known["time"], known["longer"]) == (30, 30)


def test_what_is_left_goes_by_each_arms_seconds_a_step():
    times = {"autoencoder": 500.0, "a-seed0": 10.0, "b-seed0": 60.0}
    steps = {"a": 10, "b": 20, "c": 5}
    done = [("a", 0), ("b", 0)]
    assert pace.seconds_left(times, steps, done, [("a", 1)]) == 10.0
    assert pace.seconds_left(times, steps, done, [("b", 1), ("b", 2)]) == 120.0
    # c's pace is not known: that of all, 70 seconds in 30 steps.
    assert pace.seconds_left(times, steps, done, [("c", 0)]) == pytest.approx(5 * 70 / 30)
    assert pace.seconds_left(times, steps, [], [("a", 0)]) == 0.0
    assert pace.seconds_left({}, steps, [("a", 0)], [("a", 1)]) == 0.0


def test_time_adds_up_over_tries_also_those_that_fail(tmp_path, monkeypatch):
    seconds = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(seconds))
    with pytest.raises(KeyboardInterrupt), pace.timed(tmp_path, "a"):
        raise KeyboardInterrupt
    with pace.timed(tmp_path, "a"):
        pass
    assert pace.read_times(tmp_path) == {"a": 5.0}


@pytest.mark.parametrize(("seconds", "words"), [(89.4, "89 s"), (90.0, "2 min"), (3600, "60 min")])
def test_seconds_in_words(seconds, words):
    assert pace.in_words(seconds) == words
