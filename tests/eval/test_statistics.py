import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval import accumulate, statistics
from ldm_jax.eval.frechet import Moments
from tests.eval import statistics_worker as tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulate, "BLOCK", 16)
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(moments, folder) of one process with one device."""
    folder = tmp_path_factory.mktemp("unbroken")
    return tiny.evaluate(folder, jax.devices()[:1])[0], folder


def bits(moments):
    return {
        tap: (m.count, m.total.tobytes(), m.outer.tobytes()) for tap, m in sorted(moments.items())
    }


def kept(folder):
    return {tap: np.array(accumulate.read_features(folder, tap)) for tap in tiny.WIDTHS}


def assert_same_features(a, b):
    for tap, features in kept(a).items():
        assert features.shape == (tiny.NUM, tiny.WIDTHS[tap])
        assert features.tobytes() == kept(b)[tap].tobytes()


def test_statistics_are_those_of_every_sample_once(unbroken):
    moments, folder = unbroken
    params, images = tiny.weights(), tiny.pictures(np.arange(tiny.NUM))
    with jax.default_matmul_precision("highest"):
        want = jax.device_get(tiny.network(params, images))
    for tap, features in kept(folder).items():
        np.testing.assert_allclose(features, want[tap], rtol=1e-5, atol=1e-5)
        exact = Moments.of(features)
        assert moments[tap].count == tiny.NUM
        np.testing.assert_allclose(moments[tap].total, exact.total, rtol=1e-12)
        np.testing.assert_allclose(moments[tap].outer, exact.outer, rtol=1e-12)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_statistics_are_the_same_bits_on_any_number_of_devices(devices, unbroken, tmp_path):
    moments, _ = tiny.evaluate(tmp_path, jax.devices()[:devices])
    assert bits(moments) == bits(unbroken[0])
    assert_same_features(tmp_path, unbroken[1])


def run_worker(mode, *arguments, environment=os.environ):
    return subprocess.Popen(
        ["timeout", "-s", "KILL", "120", sys.executable, tiny.__file__, mode, *map(str, arguments)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_killed_twice_and_resumed_equals_unbroken(unbroken, tmp_path):
    """SIGKILL between two saves, then within one; what was saved is not measured again."""
    for mode, position in (("killed in a call", 36), ("killed in a save", 60)):
        process = run_worker(mode, tmp_path)
        output = process.communicate()[0]
        # `timeout` ends as its child did.
        assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), output[-3000:]
        (saved,) = tmp_path.glob("partial-*.npz")
        assert saved.stem.endswith(f"-{position:010d}")
        with pytest.raises(InputError, match="has no whole features"):
            accumulate.read_features(tmp_path, "pool")
    assert list(tmp_path.glob(".*.part"))
    calls = []
    moments, state = tiny.evaluate(tmp_path, jax.devices()[:1], calls.append)
    assert len(calls) == -(-(tiny.NUM - 60) // tiny.BLOCK)
    assert bits(moments) == bits(unbroken[0])
    assert_same_features(tmp_path, unbroken[1])
    assert not list(tmp_path.glob(".*.part"))
    # Killed after its end: the figures come again without any work, until they are safe.
    moments, state = tiny.evaluate(tmp_path, jax.devices()[:1], tiny.in_call(0))
    assert bits(moments) == bits(unbroken[0])
    state.discard()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "features-logits-00000-of-00001.npy",
        "features-pool-00000-of-00001.npy",
        "features.json",
    ]


def test_two_processes_equal_one(unbroken, tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4 "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    }
    processes = [
        run_worker("one of two", tmp_path, f"localhost:{port}", i, environment=environment)
        for i in range(2)
    ]
    outputs = [p.communicate()[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    merged = [np.load(tmp_path / f"merged-{i}.npz") for i in range(2)]
    for tap, one in unbroken[0].items():
        for name in ("count", "total", "outer"):
            mine, other = (m[f"{tap}/{name}"] for m in merged)
            assert mine.tobytes() == other.tobytes()
            np.testing.assert_allclose(mine, getattr(one, name), rtol=1e-12)
    assert_same_features(tmp_path, unbroken[1])
    assert not list(tmp_path.glob("partial-*"))


def test_parts_of_all_processes_are_the_samples():
    for num, processes in ((141, 2), (5, 8), (8, 8), (1, 3)):
        parts = [statistics.process_rows(num, p, processes) for p in range(processes)]
        assert [i for part in parts for i in part] == list(range(num))
        assert max(map(len, parts)) == len(parts[0])


@pytest.fixture
def begun(tmp_path):
    """A folder with an evaluation that stopped after its first save."""
    with pytest.raises(KeyboardInterrupt):
        tiny.evaluate(tmp_path, jax.devices()[:1], stop_at(4))
    (saved,) = tmp_path.glob("partial-*.npz")
    return tmp_path, saved


def test_saves_wait_until_they_are_worth_their_time(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tiny.evaluate(tmp_path, jax.devices()[:1], stop_at(8), save_seconds=1e6)
    assert not list(tmp_path.glob("partial-*"))


def slowed(monkeypatch, before):
    """`before` is called in each sum that the accumulator's thread makes."""
    add = Moments.add

    def slow(self, features):
        if threading.current_thread() is not threading.main_thread():
            before()
        return add(self, features)

    monkeypatch.setattr(Moments, "add", slow)


def test_blocks_are_summed_while_the_next_features_come(unbroken, tmp_path, monkeypatch):
    """The sums of a block wait until the last call of the next block has begun."""
    begun, in_time = threading.Semaphore(0), []
    slowed(monkeypatch, lambda: in_time.append(begun.acquire(timeout=10)))

    def each(call):
        if call > 3 and call % 4 == 3:
            begun.release(2)

    moments, _ = tiny.evaluate(tmp_path, jax.devices()[:1], each, save_seconds=1e6)
    assert in_time == [True] * 16
    assert bits(moments) == bits(unbroken[0])


def test_a_save_waits_for_the_sums(unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        slowed(patch, lambda: time.sleep(0.2))
        tiny.evaluate(tmp_path, jax.devices()[:1], stop_at(4), save_every=4)
    assert bits(tiny.evaluate(tmp_path, jax.devices()[:1])[0]) == bits(unbroken[0])


def stop_at(number):
    def before(call):
        if call == number:
            raise KeyboardInterrupt

    return before


def begin(folder, how=tiny.PROTOCOL, **options):
    settings = {"moments": tiny.WIDTHS, "kept": tiny.WIDTHS} | options
    return accumulate.Accumulator(folder, how, **settings)


def test_processes_go_on_from_the_last_position_that_all_have(tmp_path, monkeypatch):
    """One was killed before another had saved: the sums before stay until all have the next."""
    latest_of_other, waiting = [0], []

    def wait(name):
        if waiting:
            raise KeyboardInterrupt

    def gather(latest):
        return np.array([latest, latest_of_other])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(accumulate, "wait_for_all", wait)
    monkeypatch.setattr(accumulate, "gather_exact", gather)
    rng, state = np.random.default_rng(0), begin(tmp_path)
    parts = [{t: rng.random((8, w), np.float32) for t, w in tiny.WIDTHS.items()} for _ in range(2)]
    state.add(parts[0], 8)
    state.save()
    state.add(parts[1], 8)
    waiting.append(True)
    with pytest.raises(KeyboardInterrupt):
        state.save()
    latest_of_other[0] = 8
    state = begin(tmp_path)
    assert state.position == state.filled == 8
    np.testing.assert_array_equal(state.held["pool"][:8], parts[0]["pool"])
    latest_of_other[0] = 4
    with pytest.raises(InputError, match=r"lacks partial-00000-of-00002-0000000004\.npz"):
        begin(tmp_path)


def test_partial_statistics_of_another_protocol_are_refused(begun, unbroken):
    other = dataclasses.replace(tiny.PROTOCOL, sampling={"steps": 4, "seed": 0})
    for folder in (begun[0], unbroken[1]):
        before = {p: p.read_bytes() for p in folder.iterdir()}
        with pytest.raises(InputError, match=r"sampling\.steps is 3 there but 4 here"):
            begin(folder, other)
        assert before == {p: p.read_bytes() for p in folder.iterdir()}
    assert begin(begun[0]).position == 12


@pytest.mark.parametrize(
    "options, match",
    [
        ({"moments": {"pool": 24}}, "has sums of"),
        ({"moments": {"pool": 24, "logits": 13}}, "'logits' has 12 features"),
        ({"kept": {"pool": 24, "logits": 12, "more": 3}}, "features-more.*missing or damaged"),
        ({"kept": {"pool": 25}}, "features-pool.*missing or damaged"),
    ],
)
def test_partial_statistics_of_other_taps_are_refused(begun, options, match):
    with pytest.raises(InputError, match=match):
        begin(begun[0], **options)


def test_damaged_partial_statistics_are_refused(begun):
    folder, saved = begun
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-40])
    with pytest.raises(InputError, match=r"not a whole \.npz"):
        begin(folder)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    saved.write_bytes(flipped)
    with pytest.raises(InputError, match=r"not a whole \.npz"):
        begin(folder)
    saved.write_bytes(whole)
    saved.rename(folder / saved.name.replace("of-00001", "of-00004"))
    with pytest.raises(InputError, match="another number of processes"):
        begin(folder)


def test_features_that_are_not_finite_are_refused_and_change_nothing(begun):
    state = begin(begun[0])
    features = {t: np.ones((8, w), np.float32) for t, w in tiny.WIDTHS.items()}
    features["logits"][3, 2] = np.inf
    with pytest.raises(InputError, match="'logits' of image 15 are not finite"):
        state.add(features, 8)
    assert state.position == 12 and state.sums["pool"].count + state.filled == 12


def test_missing_or_unfinished_features_are_refused(unbroken, tmp_path):
    for path in unbroken[1].glob("features*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="no whole features 'other'"):
        accumulate.read_features(tmp_path, "other")
    shard = tmp_path / "features-pool-00000-of-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(InputError, match=f"is not {tiny.NUM} rows of 24"):
        accumulate.read_features(tmp_path, "pool")
    content = json.loads((tmp_path / "features.json").read_text())
    assert content["protocol"] == tiny.PROTOCOL.to_json()
    # A new evaluation in the folder: until it is done, they are not whole.
    begin(tmp_path)
    with pytest.raises(InputError, match="no whole features"):
        accumulate.read_features(tmp_path, "logits")
