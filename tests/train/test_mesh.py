"""One program on any mesh: same data, same draws, same losses, states that are really sharded."""

import dataclasses

import jax
import numpy as np
import pytest

from ldm_jax.data import stream
from ldm_jax.data.records.reader import open_cache
from ldm_jax.diffusion.perceptual import PerceptualConfig
from ldm_jax.jobs import train_autoencoder, train_denoiser
from ldm_jax.runs.build import denoising_of, facts_of_config
from ldm_jax.sharding import (
    MeshConfig,
    host_array,
    make_mesh,
    placed,
    process_slice,
    put_batch,
    use_mesh,
)
from ldm_jax.train.checkpoint import Checkpoints
from ldm_jax.train.log import read_metrics
from tests import tiny
from tests.train.test_denoiser import drawn

MESHES = {
    "1 device": (MeshConfig(1, 1, 1), 1),
    "8 data": (MeshConfig(8, 1, 1), 8),
    "2x4 data, fsdp": (MeshConfig(2, 4, 1), 8),
    "2x2x2 data, fsdp, tensor": (MeshConfig(2, 2, 2), 8),
}

# Of 16 rows 5 are decoded, which no mesh but the first divides.
LPL = PerceptualConfig(target_ratio=0.25, calibration_steps=2, start_step=2, share=0.3)


def run(stage, mesh, workdir, first_stage, num_steps=10):
    config, count = MESHES[mesh]
    devices = jax.devices()[:count]
    length = {"num_steps": num_steps, "checkpoint_every": num_steps}
    if stage == "autoencoder":
        settings = dataclasses.replace(tiny.AUTOENCODER, mesh=config, **length)
        return train_autoencoder.run(settings, workdir, devices)
    settings = dataclasses.replace(
        tiny.DENOISER, mesh=config, autoencoder=str(first_stage), lpl=LPL, **length
    )
    return train_denoiser.run(settings, workdir, devices)


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir) if "loss" in line]


@pytest.fixture(scope="module", params=["autoencoder", "denoiser"])
def runs(request, tmp_path_factory, first_stage):
    """Ten steps of a stage on every mesh: name -> (final state, workdir)."""
    root = tmp_path_factory.mktemp(request.param)
    done = {}
    for name in MESHES:
        workdir = root / name.replace(" ", "_")
        done[name] = (run(request.param, name, workdir, first_stage), workdir)
    return request.param, done


def test_first_ten_losses_are_equal_on_every_mesh(runs):
    _, done = runs
    reference = losses(done["1 device"][1])
    assert len(reference) == 10
    assert len(set(reference)) == 10
    for name in MESHES:
        np.testing.assert_allclose(losses(done[name][1]), reference, rtol=1e-5, err_msg=name)


def test_the_adversary_is_equal_on_every_mesh(runs):
    """Its losses, its weight, and batch statistics: those of the global batch."""
    stage, done = runs
    if stage == "denoiser":
        return
    reference = read_metrics(done["1 device"][1])
    statistics = host(done["1 device"][0].extra["discriminator"]["statistics"])
    started = tiny.AUTOENCODER.adversarial.start
    assert all((line["discriminator"] > 0) == (line["step"] > started) for line in reference)
    for name in MESHES:
        for got, want in zip(read_metrics(done[name][1]), reference, strict=True):
            for metric in ("discriminator", "generator", "adversarial_weight"):
                np.testing.assert_allclose(
                    got[metric], want[metric], rtol=1e-4, err_msg=f"{name}, {metric}"
                )
        got = host(done[name][0].extra["discriminator"]["statistics"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, statistics
        )


def host(tree):
    return jax.tree.map(host_array, tree)


def test_state_is_really_sharded_over_fsdp(runs):
    _, done = runs
    state = done["2x4 data, fsdp"][0]

    def bytes_on_first_device(tree):
        leaves = jax.tree.leaves(tree)
        device = jax.devices()[0]
        held = sum(
            s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == device
        )
        return held, sum(x.nbytes for x in leaves)

    for part in (state.params, state.averages["ema"], state.opt_state):
        held, whole = bytes_on_first_device(part)
        # A quarter, and what is too small to divide.
        assert held < 0.35 * whole


RING = list(zip(MESHES, [*MESHES][1:] + [*MESHES][:1], strict=True))


@pytest.mark.parametrize(("old", "new"), RING)
def test_a_checkpoint_of_one_mesh_restores_on_another(runs, old, new):
    """Round the ring of meshes: each is left once and entered once."""
    state, workdir = runs[1][old]
    checkpoints = Checkpoints(workdir, read_only=True)
    other = runs[1][new][0]
    restored, _ = checkpoints.restore(10, placed(other, jax.tree.map(lambda x: x.sharding, other)))
    checkpoints.close()
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(host_array(got), host_array(want))
    where = jax.tree.map(lambda x: x.sharding, restored)
    assert where == jax.tree.map(lambda x: x.sharding, other)


def test_a_checkpoint_of_many_devices_continues_on_one(runs, first_stage, tmp_path):
    stage, done = runs
    workdir = done["2x2x2 data, fsdp, tensor"][1]
    run(stage, "1 device", workdir, first_stage, num_steps=12)
    run(stage, "1 device", tmp_path, first_stage, num_steps=12)
    np.testing.assert_allclose(losses(workdir), losses(tmp_path), rtol=1e-5)


HALF = dataclasses.replace(
    tiny.DENOISER,
    seed=3,
    whitening="none",
    loss=dataclasses.replace(tiny.DENOISER.loss, condition_dropout=0.5),
)


def batches_and_draws(mesh, first_stage, num_steps=3):
    """Host copies of the first batches and of every draw of their steps, as the mesh sees them."""
    cache = open_cache(first_stage / "latents" / "train")
    of = denoising_of(HALF, facts_of_config(HALF, tiny.AUTOENCODER.model))
    index, count = process_slice(16, mesh)

    def read(indices, positions):
        return cache.read(indices, positions, flip=True, seed=3)

    @jax.jit
    def draw(batch, step):
        with use_mesh(mesh):
            return drawn(of, batch, step)

    out = []
    source = stream.batches(read, cache.order(3), 16, shard_index=index, shard_count=count)
    for step, local in zip(range(num_steps), source, strict=False):
        batch = put_batch({k: local[k] for k in ("moments", "label")}, mesh, 16)
        out.append(jax.tree.map(host_array, {"batch": batch, "draws": draw(batch, step)}))
    source.close()
    return out


def test_batches_and_draws_are_bit_equal_on_every_mesh(first_stage):
    reference = None
    for config, count in MESHES.values():
        got = batches_and_draws(make_mesh(config, jax.devices()[:count]), first_stage)
        reference = reference or got
        jax.tree.map(np.testing.assert_array_equal, got, reference)
    first, second = reference[:2]
    assert not np.array_equal(first["draws"]["noise"], second["draws"]["noise"])
    assert not np.array_equal(first["draws"]["noise"][0], first["draws"]["noise"][1])
    assert len(np.unique(first["draws"]["t"])) > 8
    kept = [d["draws"]["label"] == d["batch"]["label"] for d in reference]
    assert 0 < np.mean(kept) < 1 and not np.array_equal(kept[0], kept[1])
