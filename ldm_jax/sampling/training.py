"""Samples judged while a denoiser trains: figures like those of `ldm evaluate`, on the way."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from ldm_jax.eval import evaluation as image_evaluation
from ldm_jax.models.latents import Whitening
from ldm_jax.runs.denoiser import Model
from ldm_jax.runs.first_stage import FirstStage
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sampling import judged as sample_evaluation
from ldm_jax.sampling.draw import check_options
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.train.loop import Evaluate
from ldm_jax.train.state import TrainState

Figures = Callable[[TrainState, int], dict[str, float]]


def joined(evaluate: Evaluate | None, figures: Figures) -> Evaluate:
    """Both one after the other, in one line of figures."""

    def both(state: TrainState, step: int):
        before, pictures = evaluate(state, step) if evaluate else ({}, {})
        return before | figures(state, step), pictures

    return both


def make_evaluation(
    config: DenoiserRun,
    workdir: Path,
    mesh: Mesh,
    first_stage: FirstStage,
    whitening: Whitening,
    latent_shape: tuple[int, int, int],
) -> Figures:
    """(state, step) -> figures of samples of the averaged weights, or the raw ones without any.

    Compiled, and the reference measured, once; every process must call both. Raises InputError for
    samples that this model cannot give or that cannot be judged.
    """
    how = config.samples
    which = "ema" if config.ema.decay else "params"
    model = Model(
        run=config,
        params={},
        step=0,
        which=which,
        first_stage=first_stage,
        whitening=whitening,
        latent_shape=latent_shape,
        mesh=mesh,
    )
    settings = SampleOptions(
        num=how.num,
        steps=how.steps,
        sampler=how.sampler,
        spacing=how.spacing,
        guidance=how.guidance,
        batch_size=how.batch_size,
        seed=how.seed,
    )
    draw = sample_evaluation.compile_samples(model, settings, how.labels)
    evaluation = image_evaluation.prepare(
        how.judge,
        mesh=mesh,
        folder=Path(workdir) / "evaluation",
        num=how.num,
        reference=sample_evaluation.reference_of(how.judge, first_stage),
    )
    sampling = sample_evaluation.sampling(check_options(settings, model), model)

    def figures(state: TrainState, step: int) -> dict[str, float]:
        trained = dataclasses.replace(model, params=state.ema or state.params, step=step)
        return image_evaluation.evaluate(
            evaluation,
            draw(trained, None),
            Path(workdir) / "evaluation.jsonl",
            labels=sample_evaluation.labels_kind(config, how.labels),
            sampling=sampling,
            record={"step": step},
        )

    return figures
