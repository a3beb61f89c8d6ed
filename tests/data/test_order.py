import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from ldm_jax.data import draws
from ldm_jax.data.order import Order
from ldm_jax.data.stream import batches
from ldm_jax.errors import InputError

SHAPES = [(10, 1, 64), (103, 8, 3), (103, 8, 64), (96, 8, 3), (7, 32, 2), (103, 8, 1), (97, 4, 2)]


def echo(indices, positions):
    return {"position": positions, "twice": 2 * indices}


def take(count, batch_size=8, order=None, **options):
    stream = batches(echo, order or Order(10, 0), batch_size, **options)
    out = [next(stream) for _ in range(count)]
    stream.close()
    return out


@pytest.mark.parametrize(("n", "block", "window"), SHAPES)
def test_order_is_a_permutation_in_each_epoch(n, block, window):
    order = Order(n, 5, block, window)
    for epoch in range(4):
        got = order.examples(np.arange(epoch * n, (epoch + 1) * n))
        np.testing.assert_array_equal(np.sort(got), np.arange(n))


@pytest.mark.parametrize(("n", "block", "window"), SHAPES)
def test_order_differs_by_epoch_and_by_seed(n, block, window):
    first, second = Order(n, 5, block, window).examples(np.arange(2 * n)).reshape(2, n)
    assert not np.array_equal(first, second)
    other = Order(n, 6, block, window).examples(np.arange(n))
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("n", "block", "window"), SHAPES)
def test_order_is_a_function_of_each_position_alone(n, block, window):
    order = Order(n, 5, block, window)
    whole = order.examples(np.arange(3 * n))
    asked = np.random.default_rng(0).permutation(3 * n)[:20]
    np.testing.assert_array_equal(order.examples(asked), whole[asked])


def test_order_stays_inside_windows_of_records_when_examples_are_packed():
    n, block, window = 1000, 8, 4
    got = Order(n, 5, block, window).examples(np.arange(n))
    for start in range(0, n - window * block, window * block):
        # The last record (125 of them, none short) may stand anywhere.
        assert len(np.unique(got[start : start + window * block] // block)) == window


def test_order_shuffles_inside_windows_when_examples_are_packed():
    got = Order(1024, 5, 32, 8).examples(np.arange(1024))
    neighbours = np.mean(np.diff(got) == 1)
    assert neighbours < 0.02
    records = got.reshape(4, 256) // 32
    assert not np.array_equal(np.unique(records[0]), np.arange(8))  # records are permuted as well


def test_order_keeps_its_first_places_across_versions():
    # A change here changes the data order of every run that resumes.
    assert Order(10, 0).examples(np.arange(10)).tolist() == [8, 7, 4, 6, 3, 5, 0, 2, 9, 1]
    packed = Order(21, 0, 4, 2).examples(np.arange(8)).tolist()
    assert packed == [18, 19, 13, 14, 17, 16, 12, 15]


def test_order_refuses_an_empty_data_set():
    with pytest.raises(InputError, match=r"num_examples 0"):
        Order(0, 0)


def test_uniforms_depend_on_the_position_alone_and_fill_the_unit_interval():
    positions = np.arange(5000)
    whole = draws.uniforms(1, "flip", positions, 2)
    some = np.array([4999, 3, 255, 256, 1 << 40])
    np.testing.assert_array_equal(draws.uniforms(1, "flip", some, 2)[:4], whole[some[:4]])
    assert len(np.unique(whole)) == whole.size
    assert abs(whole.mean() - 0.5) < 0.02 and whole.min() >= 0 and whole.max() < 1
    assert abs(np.corrcoef(whole.T)[0, 1]) < 0.05
    assert not np.array_equal(whole, draws.uniforms(2, "flip", positions, 2))
    assert not np.array_equal(whole, draws.uniforms(1, "augment", positions, 2))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_stream_joined_over_processes_is_the_same_for_every_process_count(count):
    order = Order(103, 3, 8, 3)
    whole = take(30, order=order)
    parts = [take(30, order=order, shard_index=i, shard_count=count) for i in range(count)]
    for step in range(30):
        for key in ("index", "position", "twice"):
            joined = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(joined, whole[step][key])


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 1), (3, 8)])
def test_stream_from_a_later_step_equals_skipping(threads, prefetch):
    whole = take(12)
    late = take(5, start_step=7, num_threads=threads, prefetch=prefetch)
    for a, b in zip(whole[7:], late, strict=True):
        np.testing.assert_array_equal(a["index"], b["index"])
        np.testing.assert_array_equal(a["position"], b["position"])


def test_stream_covers_every_example_once_an_epoch():
    seen = np.concatenate([b["index"] for b in take(5)])  # 40 places: four epochs of ten
    assert np.bincount(seen).tolist() == [4] * 10
    assert seen.dtype == np.int64


@pytest.mark.parametrize("prefetch", [0, 4])
def test_stream_hands_an_input_error_on_at_its_batch(prefetch):
    def read(indices, positions):
        if positions[0] == 16:
            raise InputError("the file x.png is broken")
        return {}

    stream = batches(read, Order(10, 0), 8, prefetch=prefetch)
    next(stream), next(stream)
    with pytest.raises(InputError, match=r"x\.png"):
        next(stream)


def test_stream_leaves_no_thread_when_closed():
    before = set(threading.enumerate())
    stream = batches(echo, Order(10, 0), 8)
    next(stream)
    mine = set(threading.enumerate()) - before
    assert mine
    stream.close()
    for thread in mine:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_stream_left_open_lets_the_program_end():
    code = (
        "from ldm_jax.data.order import Order; from ldm_jax.data.stream import batches;"
        "s = batches(lambda i, p: {}, Order(9, 0), 4); next(s); print('end')"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"end\n", b"")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 9, "shard_count": 2},
            "batch_size 9 must divide by 2, the number of processes; nearest: 8",
        ),
        ({"batch_size": 0}, "batch_size 0"),
        ({"shard_index": 2, "shard_count": 2}, r"shard_index 2 must be in \[0, 2\)"),
        ({"start_step": -1}, "start_step -1"),
        ({"num_threads": -1}, "num_threads -1"),
    ],
)
def test_stream_refuses_sizes_that_do_not_fit_at_once(options, message):
    with pytest.raises(InputError, match=message):
        batches(echo, Order(10, 0), **{"batch_size": 8, **options})


def test_data_floor_imports_neither_flax_nor_tensorflow():
    code = (
        "import sys, ldm_jax.data.images, ldm_jax.data.records.reader, ldm_jax.data.records.writer;"
        "print([m for m in ('flax', 'tensorflow', 'tensorflow_datasets') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)
    assert done.stdout == b"[]\n", done.stderr
