"""`ldm evaluate`: figures of a trained first stage, or of a denoiser's samples of the digits."""

import dataclasses
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.data import images
from ldm_jax.errors import InputError
from ldm_jax.eval.first_stage import measure
from ldm_jax.interop import pretrained
from ldm_jax.jobs import sample
from ldm_jax.jobs.digit_evaluation import open_judge, sample_figures
from ldm_jax.jobs.first_stage import load_first_stage
from ldm_jax.jobs.first_stage_evaluation import (
    compile_lpips,
    compile_reconstruction,
    spread,
)
from ldm_jax.jobs.settings import AutoencoderRun, build
from ldm_jax.sharding import MeshConfig, make_mesh
from ldm_jax.train.first_stage_loss import AutoencoderLoss
from ldm_jax.train.run_dir import read_run

Figures = dict[str, float]
NUM_SAMPLES, NUM_RECONSTRUCTIONS = 1000, 10_000  # measured where --num does not say


def run(workdir: Path, settings: sample.Settings) -> Figures:
    """Measures, prints and appends to `evaluation.jsonl`; what is measured depends on the run."""
    record = read_run(workdir)
    job = record["job"]
    how = dataclasses.asdict(settings)
    if job == "train-autoencoder":
        how = first_stage_settings(settings)
        lpips = find_lpips(build(AutoencoderRun, record["config"]).loss)
        figures = reconstruction_figures(workdir, **how, lpips=lpips)
    else:
        settings = dataclasses.replace(settings, num=settings.num or NUM_SAMPLES)
        figures = digit_figures(workdir, settings)
    if jax.process_index() == 0:
        for name, value in figures.items():
            print(f"{name:32s} {value:.4f}")
    line = {
        "job": job,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": how,
        "figures": figures,
    }
    if jax.process_index() == 0:
        with (Path(workdir) / "evaluation.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return figures


def first_stage_settings(settings: sample.Settings) -> dict[str, Any]:
    """What of the flags a first stage knows; InputError for those that only samples have."""
    known = {"num", "step", "weights"}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name not in known and value != field.default:
            raise InputError(
                f"--{field.name.replace('_', '-')} {value!r} is about samples, and this workdir "
                "holds a first stage; leave it out"
            )
    limit = settings.num or NUM_RECONSTRUCTIONS
    return {"limit": limit, "step": settings.step, "weights": settings.weights}


def find_lpips(
    loss: AutoencoderLoss,
) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """LPIPS where a run names its weights or they are where it looks; else None, and says so."""
    file = loss.perceptual_file if loss.perceptual_weight else ""
    if not file and not pretrained.default_path("lpips").is_file():
        print("lpips is left out: `ldm weights lpips` fetches its weights", file=sys.stderr)
        return None
    return compile_lpips(pretrained.load("lpips", file))


def reconstruction_figures(
    workdir: Path,
    limit: int = NUM_RECONSTRUCTIONS,
    *,
    step: int = -1,
    weights: str = "auto",
    lpips: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    features: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Figures:
    """Figures of at most `limit` images spread over the held-out split.

    Of the checkpoint `step`, -1 = the newest; see `eval.first_stage.measure` for what they are.
    """
    mesh = make_mesh(MeshConfig())
    first_stage = load_first_stage(workdir, mesh, step=step, weights=weights)
    source = images.open_images(first_stage.run.images, "held_out", augment=False)
    chosen = spread(len(source), limit)
    count = len(chosen)
    forward = compile_reconstruction(first_stage.config, mesh, min(100, count))

    def batches():
        for start in range(0, count, 500):
            indices = chosen[start : start + 500]
            yield source.read(indices, indices)["image"]

    figures = measure(
        lambda pictures: forward(first_stage.params, pictures),
        batches(),
        lpips=lpips,
        features=features,
    )
    return figures | {"step": float(first_stage.step)}


def digit_figures(workdir: Path, settings: sample.Settings) -> Figures:
    """Figures of a denoiser's samples, see `digit_evaluation`; WORKDIR/classifier.npz judges."""
    model = sample.load_model(workdir, settings)
    judge = open_judge(model.first_stage, model.mesh, Path(workdir) / "classifier.npz")
    figures = sample_figures(judge, *sample.sample(model, settings))
    return figures | {"step": float(model.step)}
