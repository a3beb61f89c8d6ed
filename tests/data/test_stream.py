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


def echo(indices, positions):
    return {"position": positions, "twice": 2 * indices}


def take(count, batch_size=8, order=None, **options):
    stream = batches(echo, order or Order(10, 0), batch_size, **options)
    out = [next(stream) for _ in range(count)]
    stream.close()
    return out


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


def draw_masks(seed, positions):
    """Masks [b, 4, 4] of a share of the pixels that is drawn too."""
    drawn = draws.uniforms(seed, "mask", positions, 17).astype(np.float32)
    return (drawn[:, 1:] < drawn[:, :1]).astype(np.float32).reshape(-1, 4, 4)


def test_drawn_masks_depend_on_seed_and_position_alone_whatever_the_batches():
    def masks(batch_size, count, shards=1, seed=3):
        def read(indices, positions):
            return {**echo(indices, positions), "mask": draw_masks(seed, positions)}

        parts = []
        for shard in range(shards):
            stream = batches(
                read,
                Order(10, 0),
                batch_size,
                shard_index=shard,
                shard_count=shards,
            )
            parts.append([next(stream) for _ in range(count)])
            stream.close()
        order = [part[step] for step in range(count) for part in parts]
        return {name: np.concatenate([batch[name] for batch in order]) for name in order[0]}

    whole = masks(24, 1)
    assert (
        set(whole) == {"position", "twice", "index", "mask"} and whole["mask"].dtype == np.float32
    )
    for other in (masks(8, 3), masks(12, 2, shards=2), masks(24, 1, shards=4)):
        np.testing.assert_array_equal(other["mask"], whole["mask"])
        np.testing.assert_array_equal(other["position"], whole["position"])
    assert len(np.unique(whole["mask"], axis=0)) > 15  # an example's mask differs by epoch
    assert not np.array_equal(masks(24, 1, seed=4)["mask"], whole["mask"])


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
