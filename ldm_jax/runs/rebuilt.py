"""Reconstructions of a first stage as images to judge: rFID and its kin."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from ldm_jax.data import images
from ldm_jax.eval import evaluation
from ldm_jax.eval.image_sets import ImageStream, open_split
from ldm_jax.eval.judge import JudgeOptions
from ldm_jax.eval.statistics import local_rows, pad_rows
from ldm_jax.runs.first_stage import load_first_stage, tree_hash
from ldm_jax.runs.reconstruction import compile_forward, spread
from ldm_jax.sharding import process_slice, put_batch

BATCH = 128  # images rebuilt at a time over all devices, rounded up to the mesh


def prepare(
    workdir: Path,
    settings: JudgeOptions,
    results: Path,
    mesh: Mesh,
    *,
    limit: int,
    step: int,
    weights: str,
) -> Callable[[], dict[str, float]]:
    """() -> figures, prefixed r, of `limit` reconstructions of held-out images spread over them.

    They are held against their originals, or the reference of the settings. Raises InputError for
    what cannot be judged; every process must call both.
    """
    first_stage = load_first_stage(workdir, mesh, step=step, weights=weights)
    config = first_stage.run.images
    chosen = spread(len(images.open_images(config, "held_out", augment=False)), limit)
    originals = open_split(config, "held_out", chosen)
    prepared = evaluation.prepare(
        settings,
        mesh=mesh,
        folder=workdir / "evaluation",
        num=originals.num,
        reference=originals,
    )
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-min(BATCH, originals.num) // ways) * ways
    rows = size // process_slice(size, mesh)[1]
    forward, source = compile_forward(first_stage.config, mesh), originals.open(rows)

    def read(indices: np.ndarray) -> np.ndarray:
        pictures = put_batch(pad_rows(source(indices), rows), mesh, size)
        return local_rows(forward(first_stage.params, pictures))[: len(indices)]

    which = "ema" if first_stage.run.ema.decay else "params"
    which = which if weights == "auto" else weights
    digest = f"{originals.digest} by {tree_hash(first_stage.params)[:16]}"
    rebuilt = ImageStream(originals.num, lambda rows: read, "the reconstructions", digest, rows)

    def figures() -> dict[str, float]:
        return evaluation.evaluate(
            prepared,
            rebuilt,
            results,
            sampling={"images": originals.digest, "weights": which},
            prefix="r",
            record={"step": first_stage.step},
        )

    return figures
