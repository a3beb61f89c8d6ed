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
from ldm_jax.eval import digits, frechet
from ldm_jax.eval.first_stage import measure
from ldm_jax.interop import pretrained
from ldm_jax.jobs import sample
from ldm_jax.jobs.first_stage import load_first_stage
from ldm_jax.jobs.first_stage_evaluation import (
    compile_lpips,
    compile_reconstruction,
    reconstruct,
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


def all_images(source: images.Images) -> tuple[np.ndarray, np.ndarray]:
    """A whole split: uint8 [N,H,W,3] and labels [N]. For small data sets."""
    indices = np.arange(len(source), dtype=np.int64)
    batch = source.read(indices, indices)
    return batch["image"], batch["label"]


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
    """Accuracy and Fréchet distance of samples, by a classifier trained on the real digits.

    The classifier is kept as `classifier.npz` in the workdir. The Fréchet distance is to all real
    digits; beside it stand its two natural yardsticks, that between halves of the real digits and
    that of their reconstructions by the first stage alone.
    """
    model = sample.load_model(workdir, settings)
    config = model.first_stage.run.images
    if config.source != "digits":
        raise InputError(
            f"this denoiser was trained on {config.source!r}; `ldm evaluate` judges samples of the "
            "digits only, others need a pretrained network; use `ldm sample` and your own tool"
        )
    train_images, train_labels = all_images(images.open_images(config, "train", augment=False))
    held_out, held_out_labels = all_images(images.open_images(config, "held_out", augment=False))
    judge = digit_judge(Path(workdir) / "classifier.npz", train_images, train_labels)
    real = np.concatenate([train_images, held_out])
    real_labels = np.concatenate([train_labels, held_out_labels])

    pictures, labels = sample.sample(model, settings)
    rebuilt = reconstruct(model.first_stage, real, model.mesh)
    real_features = digits.features(judge, real)
    to_real = lambda p: frechet.distance(  # noqa: E731
        frechet.Moments.of(digits.features(judge, p)), frechet.Moments.of(real_features)
    )
    halves = digits.half_distance(real_features, real_labels, seed=0)
    return {
        "classifier_held_out_accuracy": digits.evaluate(judge, held_out, held_out_labels),
        "sample_accuracy": digits.evaluate(judge, pictures, labels),
        "frechet_samples": to_real(pictures),
        "frechet_autoencoder_alone": to_real(rebuilt),
        "frechet_halves_of_real": halves.mean,
        "frechet_halves_of_real_std": halves.spread,
        "num_samples": float(len(pictures)),
        "step": float(model.step),
    }


def digit_judge(path: Path, train_images: np.ndarray, train_labels: np.ndarray) -> Any:
    """The classifier at `path`, trained and saved there when there is none."""
    if path.exists():
        return digits.load(path)
    judge = digits.train_classifier(train_images, train_labels, seed=0)
    digits.save(judge, path)
    return judge
