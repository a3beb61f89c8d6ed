"""One of the two processes of `test_processes.py`: trains both stages, writes what it drew."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")


def main(first_stage: Path, out: Path, coordinator: str, index: int) -> None:
    jax.distributed.initialize(coordinator, 2, index)
    import numpy as np

    from ldm_jax.errors import InputError
    from ldm_jax.jobs import cache_latents, train_autoencoder, train_denoiser
    from ldm_jax.sharding import MeshConfig, make_mesh
    from ldm_jax.train import loop
    from tests import judged, tiny
    from tests.train.test_mesh import LPL, batches_and_draws

    assert jax.device_count() == 8
    assert jax.local_device_count() == 4
    held = loop.lock_workdir(out / "held") if index == 0 else None
    with pytest.raises(InputError):  # on both, and neither waits for the other
        loop.lock_for_all(out / "held")
    if held:
        held.close()
    drawn = jax.tree.leaves(batches_and_draws(make_mesh(MeshConfig(2, 4, 1)), first_stage))
    if index == 0:
        np.savez(out / "draws.npz", *drawn)
    mesh = MeshConfig(2, 4, 1)
    autoencoder = dataclasses.replace(
        tiny.AUTOENCODER,
        mesh=mesh,
        num_steps=10,
        checkpoint_every=10,
        eval_every=10,
        eval_images=21,
    )
    train_autoencoder.run(autoencoder, out / "autoencoder")
    denoiser = dataclasses.replace(
        tiny.DENOISER,
        mesh=mesh,
        num_steps=10,
        checkpoint_every=10,
        autoencoder=str(first_stage),
        lpl=LPL,
    )
    train_denoiser.run(denoiser, out / "denoiser")
    figures = judged.evaluate_trained(out, step=10)
    if index == 1:  # all processes get them
        (out / "figures.json").write_text(json.dumps(figures))
    settings = cache_latents.CacheOptions(batch_size=64, pack=8, shard_examples=64)
    cache_latents.run(first_stage, settings, out / "latents")
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
