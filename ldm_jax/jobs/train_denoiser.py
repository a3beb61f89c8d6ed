"""`ldm train-denoiser`: cached latents to a denoiser."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from ldm_jax.data import latent_cache
from ldm_jax.data.latent_manifest import Manifest
from ldm_jax.diffusion import objective
from ldm_jax.diffusion.process import make_process
from ldm_jax.errors import InputError
from ldm_jax.models import denoiser, latents
from ldm_jax.runs import held_out as denoiser_evaluation
from ldm_jax.runs.first_stage import load_first_stage
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.runs.training import check_traces, fit
from ldm_jax.runs.workdir import open_run
from ldm_jax.sampling import judged as sample_figures
from ldm_jax.sharding import check_batch, make_mesh
from ldm_jax.train import optim, uncertainty
from ldm_jax.train.state import TrainState
from ldm_jax.train.steps import denoiser_loss, denoiser_losses, make_step


def run(
    config: DenoiserRun, workdir: Path, devices: Sequence[jax.Device] | None = None
) -> TrainState:
    """Trains, or goes on, in `workdir`, on `devices` (None: all); refusals precede any writing."""
    mesh = make_mesh(config.mesh, devices)
    check_batch(config.batch_size, mesh, parts=config.accumulate)
    config = resolve_paths(config)
    process = make_process(config.process)
    objective.check(process, config.objective)
    first_stage = load_first_stage(config.autoencoder, mesh)
    cache = latent_cache.open_cache(
        Path(config.latents) / "train", expect={"encoder_hash": first_stage.encoder_hash}
    )
    manifest = cache.manifest
    check_model(config, manifest)
    if config.flip and not manifest.mirrored:
        raise InputError(
            f"flip is set, but the latent cache {config.latents} holds no mirrored images; cache "
            "them with `ldm cache-latents --mirrored` or set --config.flip=False"
        )
    whitening = latents.whitening(
        config.whitening,
        manifest.mean,
        manifest.std,
        manifest.global_std,
        config.scale_factor,
        config.shift_factor,
    )
    data = {
        "manifest_hash": manifest.hash(),
        "encoder_hash": manifest.encoder_hash,
        "num_examples": manifest.num_examples,
        "latent_shape": list(manifest.latent_shape),
        "whitening": {"shift": list(whitening.shift), "scale": list(whitening.scale)},
    }
    losses = lambda loss, seed: denoiser_losses(  # noqa: E731
        config.model, loss, process, whitening, seed, config.objective
    )
    loss = denoiser_loss(losses(config.loss, config.seed), config.loss_bins)
    needed = {"moments", *denoiser.condition_names(config.model)}
    shapes = {
        "moments": jax.ShapeDtypeStruct((config.batch_size, *manifest.moments_shape), "float32"),
        "label": jax.ShapeDtypeStruct((config.batch_size,), "int32"),
    }
    check_traces(lambda key, batch: loss(denoiser.init(config.model, key), batch, 0), shapes)
    evaluate = None
    if config.eval_every:
        held_out = latent_cache.open_cache(
            Path(config.latents) / "held_out", expect={"encoder_hash": first_stage.encoder_hash}
        )
        conditional = dataclasses.replace(config.loss, label_dropout=0.0)
        judged = losses(conditional, denoiser_evaluation.SEED)
        evaluate = denoiser_evaluation.make_evaluation(config, mesh, held_out, needed, judged)
    if config.samples.num:
        shape = tuple(manifest.latent_shape)
        run_samples = sample_figures.make_evaluation(
            config, workdir, mesh, first_stage, whitening, shape
        )
        evaluate = sample_figures.joined(evaluate, run_samples)
    open_run(workdir, "train-denoiser", config, mesh, data)

    def read(indices: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        batch = cache.read(indices, positions, flip=config.flip, seed=config.seed)
        return {name: batch[name] for name in needed}

    optimizer = optim.make_optimizer(config.optim, config.num_steps)
    learning_rate = optim.learning_rate(config.optim, config.num_steps)
    width = config.objective.uncertainty
    return fit(
        "train-denoiser",
        config,
        workdir,
        mesh,
        init=lambda key: denoiser.init(config.model, key),
        axes=denoiser.axes(config.model),
        optimizer=optimizer,
        make_step=lambda shardings: make_step(
            loss, optimizer, learning_rate, config.ema, mesh, shardings, config.accumulate
        ),
        read=read,
        order=cache.order(config.seed),
        init_extra=lambda _: {"uncertainty": uncertainty.init(width)} if width else {},
        extra_axes={"uncertainty": uncertainty.axes()} if width else {},
        train_extra=True,
        evaluate=evaluate,
    )


def resolve_paths(config: DenoiserRun) -> DenoiserRun:
    """Absolute places of the first stage and of the latents, so that any folder may resume."""
    if not config.autoencoder:
        raise InputError("config.autoencoder is empty; give the workdir of a trained first stage")
    absolute = lambda p: p if "://" in p else str(Path(p).absolute())  # noqa: E731
    autoencoder = absolute(config.autoencoder)
    cache = absolute(config.latents) if config.latents else f"{autoencoder}/latents"
    return dataclasses.replace(config, autoencoder=autoencoder, latents=cache)


def check_model(config: DenoiserRun, manifest: Manifest) -> None:
    """Raises InputError unless the denoiser's sizes are those of the latents and their labels."""
    channels = manifest.latent_shape[-1]
    backbone, conditioner = config.model.backbone, config.model.conditioner
    double = 2 if config.objective.learned_variance else 1
    for name, want in (("in_channels", channels), ("out_channels", double * channels)):
        if getattr(backbone, name) != want:
            twice = ", twice with learned_variance" if want != channels else ""
            raise InputError(
                f"config.model.backbone.{name} is {getattr(backbone, name)}, but the cached "
                f"latents have {channels} channels{twice}; set it to {want}"
            )
    if conditioner.kind == "class" and conditioner.num_classes != manifest.num_classes:
        raise InputError(
            f"config.model.conditioner.num_classes is {conditioner.num_classes}, but the latent "
            f"cache has {manifest.num_classes} classes; set it to {manifest.num_classes}"
        )
