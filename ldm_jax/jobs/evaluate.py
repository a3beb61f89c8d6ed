"""`ldm evaluate`: figures of a first stage, of a denoiser's samples, or of a set of images."""

import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.data import images
from ldm_jax.errors import InputError
from ldm_jax.eval import evaluation as image_evaluation
from ldm_jax.eval import judge as image_judge
from ldm_jax.eval import published
from ldm_jax.eval.first_stage import measure
from ldm_jax.eval.image_sets import open_set
from ldm_jax.interop import pretrained
from ldm_jax.runs import rebuilt as reconstruction_evaluation
from ldm_jax.runs.config_files import build
from ldm_jax.runs.denoiser import load_model
from ldm_jax.runs.digit_judge import open_judge, sample_figures
from ldm_jax.runs.first_stage import load_first_stage
from ldm_jax.runs.reconstruction import compile_lpips, compile_reconstruction, spread
from ldm_jax.runs.settings import AutoencoderRun, DenoiserRun
from ldm_jax.runs.workdir import read_run
from ldm_jax.sampling import judged as sample_evaluation
from ldm_jax.sampling.draw import check_options, draw_images
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sharding import MeshConfig, make_mesh
from ldm_jax.train.first_stage import AutoencoderLoss

Figures = dict[str, float]
# Measured where --num does not say: samples by the digits' judge, by others, and reconstructions.
NUM_DIGITS, NUM_SAMPLES, NUM_RECONSTRUCTIONS = 1000, 50_000, 10_000
RESULTS = "evaluation.jsonl"
OF_SETS = ("unconditional", "class-conditional", "text-to-image")  # published of sets of images


@dataclasses.dataclass(frozen=True)
class Asked:
    """What of an evaluation is not the sampling."""

    judge: image_judge.JudgeOptions | None = None  # None: what suits the run, see `run`
    labels: str = "balanced"  # of samples: "balanced" | "random"
    keep: str = ""  # folder that every sample is written into; "" = none is
    dataset: str = ""  # whose published figures are printed beside ours; "" = none


def run(workdir: Path, settings: SampleOptions, asked: Asked = Asked()) -> Figures:
    """Measures, prints and appends to `evaluation.jsonl`; what is measured depends on the run.

    Without a judge in `asked`, a first stage is measured by its reconstructions' PSNR, SSIM and
    LPIPS, samples of the digits by a classifier, those of anything else by preset "adm". With one,
    reconstructions against their originals are measured too.
    """
    record = read_run(workdir)
    if record["job"] == "train-autoencoder":
        rows = _published(asked, "reconstruction")
        figures = _first_stage(workdir, settings, asked, record)
    else:
        run = build(DenoiserRun, record["config"])
        conditional = bool(run.model.conditions)
        rows = _published(asked, "class-conditional" if conditional else "unconditional")
        source = read_run(Path(run.autoencoder))["config"].get("images", {}).get("source")
        if asked.judge is None and source == "digits":
            if (asked.labels, asked.keep) != ("balanced", ""):
                raise InputError(
                    "--labels and --keep belong to frozen networks, and these digits are measured "
                    "by a classifier; leave them out, or add --extractor=random-conv"
                )
            settings = dataclasses.replace(settings, num=settings.num or NUM_DIGITS)
            figures = digit_figures(workdir, settings)
            _note(workdir, record["job"], dataclasses.asdict(settings), figures)
        else:
            figures = image_figures(workdir, settings, asked)
    _show(figures, rows)
    return figures


def evaluate_set(path: str, out: Path, settings: SampleOptions, asked: Asked) -> Figures:
    """Figures of a folder of images or an .npz; OUT/evaluation.jsonl takes them."""
    refuse_sampling(settings, asked, "a set of images is measured whole")
    judge, rows = asked.judge or image_judge.JudgeOptions(), _published(asked, *OF_SETS)
    images = open_set(path)
    evaluation = image_evaluation.prepare(
        judge, mesh=make_mesh(MeshConfig()), folder=Path(out) / "evaluation", num=images.num
    )
    figures = image_evaluation.evaluate(evaluation, images, Path(out) / RESULTS)
    _show(figures, rows)
    return figures


def write_statistics(path: str, out: Path, settings: SampleOptions, asked: Asked) -> None:
    """Writes the statistics of a folder of images or an .npz as OUT.npz, for --reference."""
    refuse_sampling(settings, asked, "a set of images is measured whole")
    judge = asked.judge or image_judge.JudgeOptions()
    if judge.reference or judge.metrics or asked.dataset:
        raise InputError(
            "--stats-only compares with nothing; leave --reference, --metrics and --dataset out"
        )
    if out.suffix != ".npz" or out.exists():
        raise InputError(f"--out={out} must be a new file that ends in .npz; give another")
    mesh = make_mesh(MeshConfig())
    image_evaluation.write_statistics(judge, open_set(path), mesh=mesh, out=out)


def image_figures(workdir: Path, settings: SampleOptions, asked: Asked) -> Figures:
    """Figures of a denoiser's samples by a frozen network, against its training images."""
    settings = dataclasses.replace(settings, num=settings.num or NUM_SAMPLES)
    judge = asked.judge or image_judge.JudgeOptions()
    model = load_model(workdir, settings.which)
    settings = check_options(settings, model)
    evaluation = image_evaluation.prepare(
        judge,
        mesh=model.mesh,
        folder=Path(workdir) / "evaluation",
        num=settings.num,
        reference=sample_evaluation.reference_of(judge, model.first_stage),
    )
    draw = sample_evaluation.compile_samples(model, settings, asked.labels)
    images = draw(model, Path(asked.keep) if asked.keep else None)
    image_evaluation.check_keep(evaluation, images)
    return image_evaluation.evaluate(
        evaluation,
        images,
        Path(workdir) / RESULTS,
        labels=sample_evaluation.labels_kind(model.run, asked.labels),
        sampling=sample_evaluation.sampling(settings, model),
        record={"step": model.step},
    )


def _first_stage(
    workdir: Path, settings: SampleOptions, asked: Asked, record: dict[str, Any]
) -> Figures:
    how = first_stage_settings(settings, asked)
    judged = None
    if asked.judge is not None:
        mesh, results = make_mesh(MeshConfig()), Path(workdir) / RESULTS
        judged = reconstruction_evaluation.prepare(Path(workdir), asked.judge, results, mesh, **how)
    lpips = find_lpips(build(AutoencoderRun, record["config"]).loss)
    figures = reconstruction_figures(workdir, **how, lpips=lpips)
    _note(workdir, record["job"], how, figures)
    return figures | judged() if judged else figures


def _note(workdir: Path, job: str, how: dict[str, Any], figures: Figures) -> None:
    """A line of figures that stand outside of any protocol."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = {"job": job, "time": now, "settings": how, "figures": figures}
    if jax.process_index() == 0:
        with (Path(workdir) / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _published(asked: Asked, *tasks: str) -> list[published.Row]:
    """What was published of the data set that was named; InputError for one nobody published of."""
    if not asked.dataset:
        return []
    rows = [row for task in tasks for row in published.lookup(asked.dataset, task)]
    if not rows:
        known = sorted({name for task in tasks for name in published.datasets(task)})
        raise InputError(
            f"dataset {asked.dataset!r} has no published {' or '.join(tasks)} figures; there are "
            f"those of {known}"
        )
    return rows


def _show(figures: Figures, rows: list[published.Row]) -> None:
    """Ours, then the published ones."""
    if jax.process_index() == 0:
        for name, value in figures.items():
            print(f"{name:40s} {value:.4f}")
        for row in rows:
            print(published.describe(row))


def refuse_sampling(
    settings: SampleOptions, asked: Asked, what: str, known: Container[str] = ()
) -> None:
    """InputError for flags, but those `known`, that are about samples and not about `what`."""
    given = dataclasses.asdict(settings) | {"labels": asked.labels, "keep": asked.keep}
    neutral = dataclasses.asdict(SampleOptions(num=0))
    neutral |= {"labels": Asked.labels, "keep": Asked.keep}
    for name, value in given.items():
        if name not in known and value != neutral[name]:
            raise InputError(
                f"--{name.replace('_', '-')} {value!r} is about samples, and {what}; leave it out"
            )


def first_stage_settings(settings: SampleOptions, asked: Asked = Asked()) -> dict[str, Any]:
    """What of the flags a first stage knows; InputError for those that only samples have."""
    refuse_sampling(settings, asked, "this workdir holds a first stage", {"num", "step", "weights"})
    if settings.num < 0:
        raise InputError(f"num {settings.num} must be at least 1")
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
    )
    return figures | {"step": float(first_stage.step)}


def digit_figures(workdir: Path, settings: SampleOptions) -> Figures:
    """Figures of a denoiser's samples, see `digit_evaluation`; WORKDIR/classifier.npz judges."""
    model = load_model(workdir, settings.which)
    judge = open_judge(model.first_stage, model.mesh, Path(workdir) / "classifier.npz")
    figures = sample_figures(judge, *draw_images(model, settings))
    return figures | {"step": float(model.step)}
