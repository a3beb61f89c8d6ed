"""Samples of a denoiser as images to judge: drawn when they are measured, written only if asked."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax.diffusion.process import make_process
from ldm_jax.errors import InputError
from ldm_jax.eval.evaluation import check_keep, evaluate, prepare
from ldm_jax.eval.image_sets import ImageStream, open_split
from ldm_jax.eval.images_out import png_bytes
from ldm_jax.eval.judge import JudgeOptions
from ldm_jax.eval.statistics import over_local_rows, rows_per_process
from ldm_jax.models.latents import Codec
from ldm_jax.runs.denoiser import Model
from ldm_jax.runs.first_stage import FirstStage, tree_hash
from ldm_jax.runs.reconstruction import RESULTS
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sampling.draw import check_options
from ldm_jax.sampling.inputs import conditional, label_table, sample_rows
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sampling.program import compile_sampler, numbers_of, weights_of
from ldm_jax.train.hooks import Hook, Report
from ldm_jax.train.state import TrainState

# What of the options does not belong to the protocol: how many at a time, and which weights.
APART = ("num", "batch_size", "step", "weights")
Draw = Callable[[Model, Path | None], ImageStream]


def compile_samples(model: Model, options: SampleOptions, labels: str) -> Draw:
    """draw(model, keep) -> `options.num` samples of this model with any weights, as images.

    Sample i depends on its index and the options alone. `labels` is "balanced" or "random", over
    `options.classes` or all. Every process must call `draw`. With `keep`, a folder, each is
    written there too, as INDEX.png. Raises InputError for what the model cannot do.
    """
    options = check_options(options, model)
    refuse_files(options)
    rows = rows_per_process(options.batch_size, model.mesh)
    label_of, program = label_table(options, labels), compile_sampler(model, options)
    numbers = numbers_of(options, make_process(model.run.process))

    def draw(model: Model, keep: Path | None) -> ImageStream:
        weights = weights_of(model)

        def images(batch: dict[str, Any]) -> jax.Array:
            return program(weights, numbers, batch)[0]

        def read(indices: np.ndarray) -> np.ndarray:
            batch = sample_rows(model.run, indices, label_of(indices))
            pictures = over_local_rows(images, batch, model.mesh, options.batch_size)
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                for i, picture in zip(indices, pictures, strict=True):
                    (keep / f"{i:06d}.png").write_bytes(png_bytes(picture))
            return pictures

        made_by = f"{model.which} of step {model.step}, weights {tree_hash(weights)[:16]}"
        return ImageStream(options.num, lambda rows: read, "samples", made_by, rows, keep)

    return draw


def refuse_files(options: SampleOptions) -> None:
    """InputError for samples that depend on files, which no protocol names."""
    for name in ("noise", "init_images"):
        if getattr(options, name):
            raise InputError(f"{name} {getattr(options, name)!r} is of `ldm sample`; leave it out")


def labels_kind(run: DenoiserRun, labels: str) -> str:
    """What the protocol says of the labels."""
    return labels if conditional(run) else "none"


def sampling(options: SampleOptions, model: Model) -> dict[str, Any]:
    """What of the sampling the protocol names: everything that changes a sample but the weights."""
    default = SampleOptions()
    changed = {
        name: value
        for name, value in dataclasses.asdict(options).items()
        if name not in APART and value != getattr(default, name)
    }
    basic = {name: getattr(options, name) for name in ("sampler", "steps", "guidance", "seed")}
    if model.guide:  # which the options may leave to what is newest
        changed |= {"guide_step": model.guide.step, "guide_weights": model.guide.which}
    return {**changed, **basic, "weights": model.which}


def reference_of(judge: JudgeOptions, first_stage: FirstStage) -> ImageStream | None:
    """What samples are held against where no reference is named: what the first stage has seen.

    As it saw them but for crops and flips. None, with nothing opened, where one is named.
    """
    return None if judge.reference else open_split(first_stage.run.images, "train")


def prepare_figures(
    model: Model,
    options: SampleOptions,
    judge: JudgeOptions,
    workdir: Path,
    *,
    labels: str = "balanced",
    keep: Path | None = None,
) -> tuple[Callable[[Model], dict[str, float]], tuple[str, ...]]:
    """(model with any weights) -> figures of its samples, which WORKDIR/evaluation.jsonl takes.

    And the figures' names up to their hash.

    Compiled, and the reference measured, once; `labels` and `keep` as for `compile_samples`. Raises
    InputError, before anything is drawn, for what cannot be drawn or judged. Every process must
    call both.
    """
    options = check_options(options, model)
    draw, sampled = compile_samples(model, options, labels), sampling(options, model)
    evaluation = prepare(
        judge,
        mesh=model.mesh,
        folder=Path(workdir) / "evaluation",
        num=options.num,
        reference=reference_of(judge, model.first_stage),
    )

    def figures(model: Model) -> dict[str, float]:
        images = draw(model, keep)
        check_keep(evaluation, images)
        return evaluate(
            evaluation,
            images,
            Path(workdir) / RESULTS,
            labels=labels_kind(model.run, labels),
            sampling=sampled,
            record={"step": model.step},
        )

    return figures, evaluation.figure_names(options.num)


def hook(
    config: DenoiserRun, workdir: Path, mesh: Mesh, first_stage: FirstStage, codec: Codec
) -> Hook:
    """Every `eval_every` steps the figures of samples of the averaged weights, or the raw ones.

    See `prepare_figures`.
    """
    samples = config.samples
    model = Model(
        run=config,
        params={},
        step=0,
        which=config.weights_named("auto"),
        first_stage=first_stage,
        codec=codec,
        latent_shape=first_stage.config.latent_shape,
        mesh=mesh,
    )
    options = SampleOptions(
        num=samples.num,
        steps=samples.steps,
        sampler=samples.sampler,
        spacing=samples.spacing,
        guidance=samples.guidance,
        batch_size=samples.batch_size,
        seed=samples.seed,
    )
    figures, names = prepare_figures(model, options, samples.judge, workdir, labels=samples.labels)

    def judge(state: TrainState, step: int) -> Report:
        return Report(figures(dataclasses.replace(model, params=state.weights, step=step)))

    return Hook(config.eval_every, judge, figures=names)
