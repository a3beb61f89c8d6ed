"""Reconstructions of a first stage on the mesh, and their figures, also while it trains."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax.data.images import open_images
from ldm_jax.eval.evaluation import evaluate, prepare
from ldm_jax.eval.first_stage import measure
from ldm_jax.eval.image_sets import ImageStream, open_split
from ldm_jax.eval.images_out import grid
from ldm_jax.eval.judge import JudgeOptions
from ldm_jax.eval.reconstruction import psnr
from ldm_jax.eval.statistics import over_local_rows, rows_per_process
from ldm_jax.interop import pretrained
from ldm_jax.models import autoencoder
from ldm_jax.models.frozen import lpips as perceptual_net
from ldm_jax.runs.first_stage import FirstStage, load_first_stage, tree_hash
from ldm_jax.runs.settings import AutoencoderRun
from ldm_jax.sharding import (
    MeshConfig,
    batch_sharding,
    fitting_batch,
    make_mesh,
    over_batches,
    use_mesh,
)
from ldm_jax.train.first_stage import AutoencoderLoss
from ldm_jax.train.hooks import Hook, Report
from ldm_jax.train.state import TrainState

Reconstruct = Callable[[Any, np.ndarray], np.ndarray]  # (parameters, uint8 [N,H,W,3]) -> the same
Lpips = Callable[[np.ndarray, np.ndarray], np.ndarray]  # two of uint8 [B,H,W,3] -> f32 [B]

SHOWN = 8  # examples in a grid
LPIPS_BATCH = 16
RESULTS = "evaluation.jsonl"
NUM = 10_000  # held-out images that are measured by default
JUDGED_BATCH = 128  # images rebuilt at a time for judges, over all devices, rounded up to the mesh


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
    forward, size = compile_forward(config, mesh), fitting_batch(batch_size, mesh)

    def reconstruct(params, pictures):
        return over_batches(functools.partial(forward, params), pictures, mesh, size)

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

    names = tuple(measure(np.copy, [pictures[:1]], lpips=lpips)) if config.keep_best else None
    return Hook(config.eval_every, evaluate, figures=names)


def find_lpips(loss: AutoencoderLoss) -> Lpips | None:
    """LPIPS where a run names its weights or they are where it looks; else None, and says so."""
    file = loss.perceptual_file if loss.perceptual_weight else ""
    if not file and not pretrained.default_path("lpips").is_file():
        print("lpips is left out: `ldm weights lpips` fetches its weights", file=sys.stderr)
        return None
    return compile_lpips(pretrained.load("lpips", file))


def reconstruction_figures(
    workdir: Path,
    limit: int = NUM,
    *,
    step: int = -1,
    weights: str = "auto",
    lpips: Lpips | None = None,
) -> dict[str, float]:
    """Figures of at most `limit` images spread over the held-out split.

    Of the checkpoint `step`, -1 = the newest; see `eval.first_stage.measure` for what they are.
    """
    mesh = make_mesh(MeshConfig())
    first_stage = load_first_stage(workdir, mesh, step=step, weights=weights)
    source = open_images(first_stage.run.images, "held_out", augment=False)
    chosen = spread(len(source), limit)
    count = len(chosen)
    forward = compile_reconstruction(first_stage.config, mesh, min(100, count))

    def batches():
        for start in range(0, count, 500):
            indices = chosen[start : start + 500]
            yield source.read(indices, indices)["image"]

    def rebuild(pictures):
        return forward(first_stage.params, pictures)

    figures = measure(rebuild, batches(), lpips=lpips)
    return figures | {"step": float(first_stage.step)}


def prepare_judged(
    workdir: Path,
    judge: JudgeOptions,
    mesh: Mesh,
    *,
    limit: int,
    step: int,
    weights: str,
) -> Callable[[], dict[str, float]]:
    """() -> figures, prefixed r, of `limit` reconstructions of held-out images spread over them.

    They are held against their originals, or the reference of the judge; WORKDIR/evaluation.jsonl
    takes them. Raises InputError for what cannot be judged; every process must call both.
    """
    first_stage = load_first_stage(workdir, mesh, step=step, weights=weights)
    config = first_stage.run.images
    chosen = spread(len(open_images(config, "held_out", augment=False)), limit)
    originals = open_split(config, "held_out", chosen)
    evaluation = prepare(
        judge,
        mesh=mesh,
        folder=Path(workdir) / "evaluation",
        num=originals.num,
        reference=originals,
    )
    size = fitting_batch(min(JUDGED_BATCH, originals.num), mesh)
    rows = rows_per_process(size, mesh)
    forward = functools.partial(compile_forward(first_stage.config, mesh), first_stage.params)
    source = originals.open(rows)

    def read(indices: np.ndarray) -> np.ndarray:
        return over_local_rows(forward, source(indices), mesh, size)

    which = first_stage.run.weights_named(weights)
    digest = f"{originals.digest} by {tree_hash(first_stage.params)[:16]}"
    rebuilt = ImageStream(originals.num, lambda rows: read, "the reconstructions", digest, rows)

    def figures() -> dict[str, float]:
        return evaluate(
            evaluation,
            rebuilt,
            Path(workdir) / RESULTS,
            sampling={"images": originals.digest, "weights": which},
            prefix="r",
            record={"step": first_stage.step},
        )

    return figures
