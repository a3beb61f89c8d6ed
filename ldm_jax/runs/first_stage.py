"""A trained first stage as later jobs need it: settings, weights and what identifies them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax.files import digest_of
from ldm_jax.models import autoencoder
from ldm_jax.runs.config_files import build
from ldm_jax.runs.settings import AutoencoderRun
from ldm_jax.runs.workdir import read_run
from ldm_jax.sharding import (
    abstract_params,
    batch_sharding,
    fitting_batch,
    host_array,
    over_batches,
    use_mesh,
)
from ldm_jax.train.checkpoint import load_weights

BATCH = 64  # images encoded or decoded at a time
Encode = Callable[[np.ndarray], dict[str, np.ndarray]]  # images uint8 [n,H,W,3] -> moments by name


@dataclasses.dataclass(frozen=True)
class FirstStage:
    run: AutoencoderRun
    params: Any
    step: int
    encoder_hash: str  # sha256 of the encoder's weights: names what its latents mean

    @property
    def config(self) -> autoencoder.AutoencoderConfig:
        return self.run.model


def load_first_stage(
    workdir: str | Path, mesh: Mesh, *, step: int = -1, weights: str = "auto"
) -> FirstStage:
    """The weights of an autoencoder run, on the mesh.

    Those of the checkpoint `step`, -1 = the newest: "ema", "params", or "auto", the average when
    there is one.
    """
    run = build(AutoencoderRun, read_run(workdir, "train-autoencoder")["config"])
    if run.model.latent == "identity":
        params = {"encoder": {}, "decoder": {}}
        return FirstStage(run, params, 0, tree_hash(params["encoder"]))
    axes = autoencoder.axes(run.model)
    like = abstract_params(lambda key: autoencoder.init(run.model, key), axes, mesh)
    which, at = run.weights_named(weights), None if step == -1 else step
    found = load_weights(Path(workdir), like, which=which, step=at)
    return FirstStage(run, found.params, found.step, tree_hash(found.params["encoder"]))


def compile_encoder(first_stage: FirstStage, mesh: Mesh, batch_size: int, mirrored: bool) -> Encode:
    """Images uint8 [n,H,W,3] to host arrays: moments f32 [n,h,w,2C or C].

    Also of the mirrored images where `mirrored` is set. `batch_size` images at a time, which
    divides by the mesh.
    """

    def encode(params, image):
        with use_mesh(mesh):
            x = autoencoder.to_unit(image)
            moments = {"moments": autoencoder.encode(first_stage.config, params, x)}
            if mirrored:
                mirror = autoencoder.encode(first_stage.config, params, x[:, :, ::-1])
                moments["moments_mirrored"] = mirror
            return moments

    compiled = jax.jit(encode, out_shardings=batch_sharding(mesh))
    on_batch = functools.partial(compiled, first_stage.params)
    return lambda images: over_batches(on_batch, images, mesh, batch_size)


def encode_images(first_stage: FirstStage, mesh: Mesh, images: np.ndarray) -> np.ndarray:
    """Images uint8 [N,H,W,3] -> moments f32 [N,h,w,2C or C], BATCH at a time over the mesh.

    Mean and log-variance of a Gaussian posterior, or the latent itself.
    """
    size = fitting_batch(min(BATCH, len(images)), mesh)
    return compile_encoder(first_stage, mesh, size, False)(images)["moments"]


def decode_latents(first_stage: FirstStage, mesh: Mesh, z: np.ndarray) -> np.ndarray:
    """Latents f32 [N,h,w,C], as the encoder gives them -> images uint8 [N,H,W,3].

    BATCH at a time over the mesh.
    """

    def decode(params, z):
        with use_mesh(mesh):
            return autoencoder.to_uint8(autoencoder.decode(first_stage.config, params, z))

    compiled = jax.jit(decode, out_shardings=batch_sharding(mesh))
    size = fitting_batch(min(BATCH, len(z)), mesh)
    return over_batches(functools.partial(compiled, first_stage.params), z, mesh, size)


def tree_hash(params: Any) -> str:
    """sha256 over names, shapes and values, in the order of the names."""

    def parts() -> Iterator[str | bytes]:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
            array = np.ascontiguousarray(host_array(leaf))
            yield f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n"
            yield array.tobytes()

    return digest_of(parts())
