"""A tiny evaluation, and as a script: one that kills itself, or one of two processes."""

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.eval import accumulate as accumulation
from ldm_jax.eval import protocol, statistics
from ldm_jax.sampling.inputs import class_labels
from ldm_jax.sharding import MeshConfig, make_mesh

NUM, BLOCK, CLASSES = 141, 4, 10
WIDTHS = {"pool": 24, "logits": 12}
PROTOCOL = protocol.Protocol(
    preset="custom",
    extractor="tiny",
    extractor_digest="0" * 64,
    extractor_published=False,
    tap="pool",
    resize="none",
    quantiser="round",
    num=NUM,
    labels="random",
    sampling={"steps": 3, "seed": 0},
)


def network(params, images):
    """Two layers; an image of zeros, as padding is, has no finite features."""
    x = images.astype(jnp.float32).reshape(len(images), -1)
    x = x / x.max(1, keepdims=True)
    h = jax.nn.relu(x @ params["first"])
    return {"pool": h, "logits": h @ params["second"]}


def weights():
    rng = np.random.default_rng(0)
    shapes = {"first": (192, WIDTHS["pool"]), "second": (WIDTHS["pool"], WIDTHS["logits"])}
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def pictures(indices):
    """Image i, uint8 [n,8,8,3], from its index and its label alone."""
    classes = class_labels("random", 5, indices, CLASSES)
    parts = [np.zeros((0, 8, 8, 3), np.uint8)]
    for i, c in zip(indices, classes, strict=True):
        parts.append(np.random.default_rng([c, i]).integers(1, 256, (1, 8, 8, 3), dtype=np.uint8))
    return np.concatenate(parts)


def evaluate(folder, devices=None, before=lambda call: None, **options):
    """(moments of both taps, accumulator) over `devices`; `before` is told each call's number."""
    measure, rows = statistics.compile_features(network, make_mesh(MeshConfig(), devices), BLOCK)
    params, calls = weights(), []

    def call(indices):
        before(len(calls))
        calls.append(indices)
        return measure(params, pictures(indices))

    settings = {"moments": WIDTHS, "kept": WIDTHS, "save_every": 3, "save_seconds": 0.0}
    settings |= options
    return accumulation.accumulate(folder, PROTOCOL, call, rows, **settings)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def in_call(number):
    return lambda call: die() if call == number else None


def main(mode, folder, coordinator="", index="0"):
    accumulation.BLOCK = 16
    if mode == "killed in a call":
        evaluate(folder, jax.devices()[:1], in_call(11))
    if mode == "killed in a save":
        replace, done = os.replace, []
        os.replace = lambda *a: die() if len(done) == 2 else done.append(replace(*a))
        evaluate(folder, jax.devices()[:1])
    if mode == "one of two":
        jax.distributed.initialize(coordinator, 2, int(index))
        assert (jax.device_count(), jax.local_device_count()) == (8, 4)
        moments, state = evaluate(folder)
        arrays = {f"{tap}/{k}": getattr(m, k) for tap, m in moments.items() for k in vars(m)}
        np.savez(Path(folder) / f"merged-{index}.npz", **arrays)
        state.discard()
        jax.distributed.shutdown()


if __name__ == "__main__":
    if sys.argv[1] != "one of two":
        import tests.conftest  # noqa: F401  the same devices and flags as the parent's
    jax.config.update("jax_platforms", "cpu")
    main(*sys.argv[1:])
