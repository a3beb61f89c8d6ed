"""Reconstructions of a first stage on the mesh, and the evaluation of one that is in training."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax.data.images import open_images
from ldm_jax.eval.first_stage import measure
from ldm_jax.eval.images_out import grid
from ldm_jax.eval.reconstruction import psnr
from ldm_jax.models import autoencoder
from ldm_jax.models.frozen import lpips as perceptual_net
from ldm_jax.runs.first_stage import FirstStage
from ldm_jax.runs.settings import AutoencoderRun
from ldm_jax.sharding import batch_sharding, host_array, process_slice, put_batch, use_mesh
from ldm_jax.train.hooks import Hook, Report
from ldm_jax.train.state import TrainState

Reconstruct = Callable[[Any, np.ndarray], np.ndarray]  # (parameters, uint8 [N,H,W,3]) -> the same

# (originals, reconstructions), uint8 [B,H,W,3] each -> f32 [B]
Lpips = Callable[[np.ndarray, np.ndarray], np.ndarray]

SHOWN = 8  # examples in a grid
LPIPS_BATCH = 16


def compile_forward(
    config: autoencoder.AutoencoderConfig, mesh: Mesh
) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, uint8 [B,H,W,3]) -> the same through encoder, most likely latent and decoder.

    Rounded and clipped; both batches over the mesh.
    """

    def forward(params, image):
        with use_mesh(mesh):
            x = autoencoder.to_unit(image)
            z = autoencoder.mode(config, autoencoder.encode(config, params, x))
            return autoencoder.to_uint8(autoencoder.decode(config, params, z))

    return jax.jit(forward, out_shardings=batch_sharding(mesh))


def compile_reconstruction(
    config: autoencoder.AutoencoderConfig, mesh: Mesh, batch_size: int
) -> Reconstruct:
    """(params, uint8 [N,H,W,3]) -> the same, see `compile_forward`.

    `batch_size` images at a time, rounded up to the mesh, so that one program serves any N. Every
    process must call it, with the same images, and gets all of them.
    """
    forward = compile_forward(config, mesh)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-batch_size // ways) * ways
    index, count = process_slice(size, mesh)
    own = np.arange(size).reshape(count, -1)[index]

    def reconstruct(params, pictures):
        out = []
        for start in range(0, len(pictures), size):
            # The last batch is filled up with copies.
            rows = np.minimum(start + own, len(pictures) - 1)
            image = put_batch(pictures[rows], mesh, size)
            out.append(host_array(forward(params, image)))
        return np.concatenate(out)[: len(pictures)]

    return reconstruct


def reconstruct(
    first_stage: FirstStage, pictures: np.ndarray, mesh: Mesh, batch_size: int = 100
) -> np.ndarray:
    """uint8 [N,H,W,3] through encoder, most likely latent and decoder, rounded and clipped."""
    forward = compile_reconstruction(first_stage.config, mesh, min(batch_size, len(pictures)))
    return forward(first_stage.params, pictures)


def compile_lpips(params: Any) -> Lpips:
    """(originals, reconstructions), uint8 [B,H,W,3] each -> LPIPS f32 [B], on one device.

    LPIPS_BATCH images at a time: at 256 pixels each takes tens of megabytes of features.
    """

    @jax.jit
    def distance(p, x, y):
        with jax.default_matmul_precision("highest"):  # else accelerators round to bf16 or TF32
            return perceptual_net.lpips(p, autoencoder.to_unit(x), autoencoder.to_unit(y))

    def lpips(x, y):
        out = []
        for start in range(0, len(x), LPIPS_BATCH):
            rows = np.minimum(np.arange(start, start + LPIPS_BATCH), len(x) - 1)
            out.append(np.asarray(distance(params, x[rows], y[rows])))
        return np.concatenate(out)[: len(x)]

    return lpips


def spread(count: int, limit: int) -> np.ndarray:
    """At most `limit` indices int64 of `count`, evenly spaced: folders are sorted by class."""
    return np.linspace(0, count - 1, min(limit, count)).round().astype(np.int64)


def evaluation_hook(config: AutoencoderRun, mesh: Mesh, lpips: Lpips | None = None) -> Hook:
    """Every `eval_every` steps the figures and pictures of held-out reconstructions.

    Of the averaged weights, or the raw ones without an average, on `eval_images` held-out images
    spread over the split; pictures with originals over reconstructions: `fixed`, the same examples
    every time, and `worst`, those of the lowest PSNR. Raises InputError when there are no such
    images.
    """
    source = open_images(config.images, "held_out", augment=False)
    indices = spread(len(source), config.eval_images)
    pictures = source.read(indices, indices)["image"]
    size = min(config.batch_size, len(pictures))
    batches = [pictures[i : i + size] for i in range(0, len(pictures), size)]
    forward = compile_reconstruction(config.model, mesh, size)
    fixed = np.linspace(0, len(pictures) - 1, min(SHOWN, len(pictures))).round().astype(int)

    def evaluate(state: TrainState, step: int) -> Report:
        parts = []

        def rebuild(batch):
            parts.append(forward(state.weights, batch))
            return parts[-1]

        figures = measure(rebuild, batches, lpips=lpips)
        rebuilt = np.concatenate(parts)
        worst = np.argsort(psnr(pictures, rebuilt), kind="stable")[:SHOWN]
        shown = {"fixed": fixed, "worst": worst}
        return Report(
            figures,
            {
                name: grid(np.concatenate([pictures[rows], rebuilt[rows]]), len(rows))
                for name, rows in shown.items()
            },
        )

    return Hook(config.eval_every, evaluate)
