"""How long the runs of an experiment take: equal time, and what is left.

WORKDIR/times.json holds the seconds of each run, and of what runs share; WORKDIR/steps.json the
steps of arms that are trained as long as others.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import fmean, median

import jax

from ldm_jax.errors import InputError
from ldm_jax.files import read_json, write_json
from ldm_jax.runs.plan import Arm
from ldm_jax.sharding import wait_for_all
from ldm_jax.train.log import read_metrics

TIMES, STEPS = "times.json", "steps.json"
SPEED = "time/images_per_second"


def rate(workdir: Path) -> float:
    """Examples a second of a run: the median of its lines but the first, which has compilation."""
    rates = [line[SPEED] for line in read_metrics(workdir) if SPEED in line]
    if not rates:
        raise InputError(f"workdir {workdir} has no line of metrics with a speed; train it anew")
    return median(rates[1:] or rates)


def equal_steps(arm: Arm, other: Arm, steps: int, other_rate: float, yardstick_rate: float) -> int:
    """The steps of `arm` that take, at the yardstick's rate, as long as `steps` of `other` did."""
    seconds = steps * other.run.batch_size / other_rate
    return max(1, round(seconds * yardstick_rate / arm.run.batch_size))


def find_steps(workdir: Path, arms: Mapping[str, Arm], name: str, seed: int) -> int:
    """The steps of an arm; those of `as_long_as` are found once, of the runs of `seed`, and kept.

    Every process must call it, when the arms that this one waits for are trained.
    """
    arm, path = arms[name], Path(workdir) / STEPS
    if not arm.as_long_as:
        return arm.run.num_steps
    wait_for_all(f"trained what {name} waits for")
    known = _read(path)
    if name not in known and jax.process_index() == 0:
        other, yardstick = arm.as_long_as
        rates = [rate(Path(workdir) / f"{one}-seed{seed}") for one in arm.as_long_as]
        steps = known.get(other, arms[other].run.num_steps)
        known[name] = equal_steps(arm, arms[other], steps, *rates)
        write_json(path, known)
        print(
            f"{name}: {known[name]} steps take as long as the {steps} of {other} "
            f"({rates[0]:.1f} examples/s, {yardstick} {rates[1]:.1f})"
        )
    wait_for_all(f"found the steps of {name}")
    return _read(path)[name]


def known_steps(workdir: Path, arms: Mapping[str, Arm]) -> dict[str, int]:
    """Steps of every arm; before they are found, those of the arm that takes the same time."""
    found = _read(Path(workdir) / STEPS)

    def steps(name: str) -> int:
        other = arms[name].as_long_as
        return found.get(name) or (steps(other[0]) if other else arms[name].run.num_steps)

    return {name: steps(name) for name in arms}


def read_times(workdir: Path) -> dict[str, float]:
    """Name -> seconds, in the order in which they were spent."""
    return _read(Path(workdir) / TIMES)


@contextlib.contextmanager
def timed(workdir: Path, name: str) -> Iterator[None]:
    """Adds the time of the block to the seconds of `name`, also where it fails or is stopped."""
    start = time.perf_counter()
    try:
        yield
    finally:
        if jax.process_index() == 0:
            times = read_times(workdir)
            times[name] = times.get(name, 0.0) + time.perf_counter() - start
            write_json(Path(workdir) / TIMES, times)


def seconds_left(
    times: Mapping[str, float],
    steps: Mapping[str, int],
    done: Iterable[tuple[str, int]],
    left: Iterable[tuple[str, int]],
) -> float:
    """What runs (arm, seed) will take: by each arm's seconds a step, or those of all that are done.

    0 where nothing is done yet.
    """
    known = [(arm, seed) for arm, seed in done if f"{arm}-seed{seed}" in times]
    if not known:
        return 0.0
    a_step: dict[str, list[float]] = {}
    for arm, seed in known:
        a_step.setdefault(arm, []).append(times[f"{arm}-seed{seed}"] / steps[arm])
    total = sum(times[f"{arm}-seed{seed}"] for arm, seed in known)
    mean = total / sum(steps[arm] for arm, _ in known)
    return sum(steps[arm] * (fmean(a_step[arm]) if arm in a_step else mean) for arm, _ in left)


def in_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _read(path: Path) -> dict:
    return read_json(path) if path.exists() else {}
