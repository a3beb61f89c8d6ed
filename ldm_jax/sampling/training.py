"""Samples judged while a denoiser trains: figures like those of `ldm evaluate`, on the way."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from ldm_jax.eval import evaluation as image_evaluation
from ldm_jax.models.latents import SampleCodec
from ldm_jax.runs.denoiser import Model
from ldm_jax.runs.first_stage import FirstStage
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sampling import judged as sample_evaluation
from ldm_jax.sampling.draw import check_options
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.train.hooks import Hook, Report
from ldm_jax.train.state import TrainState


def hook(
    config: DenoiserRun, workdir: Path, mesh: Mesh, first_stage: FirstStage, codec: SampleCodec
) -> Hook:
    """Every `eval_every` steps the figures of samples of the averaged weights, or the raw ones.

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
        codec=codec,
        latent_shape=first_stage.config.latent_shape,
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

    def judge(state: TrainState, step: int) -> Report:
        trained = dataclasses.replace(model, params=state.weights, step=step)
        figures = image_evaluation.evaluate(
            evaluation,
            draw(trained, None),
            Path(workdir) / "evaluation.jsonl",
            labels=sample_evaluation.labels_kind(config, how.labels),
            sampling=sampling,
            record={"step": step},
        )
        return Report(figures)

    return Hook(config.eval_every, judge)
