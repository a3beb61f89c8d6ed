"""From a run's settings to its trainer, by specs alone: no disk, no data, no array.

    facts = facts_of_config(run, first_stage)   # or facts_of_manifest, facts_of_record
    trainer = build(run, facts, mesh)
    trainer.step.lower(trainer.abstract_state, trainer.abstract_frozen, trainer.batch_spec)

lowers the very program that training runs.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from ldm_jax.data.records.manifest import Manifest
from ldm_jax.data.records.parts import Part
from ldm_jax.diffusion import objective
from ldm_jax.diffusion.perceptual import capacity, gated_share
from ldm_jax.diffusion.process import make_process
from ldm_jax.errors import InputError
from ldm_jax.models import autoencoder, conditions, denoiser
from ldm_jax.models.autoencoder import AutoencoderConfig
from ldm_jax.models.frozen import lpips
from ldm_jax.models.latents import (
    Codec,
    Whitening,
    make_codec,
    parts_of,
    standardisation,
    whitening,
)
from ldm_jax.runs.settings import AutoencoderRun, DenoiserRun
from ldm_jax.sharding import check_batch
from ldm_jax.train import adversarial, first_stage, optim, perceptual, uncertainty
from ldm_jax.train.denoiser import INDEX, Denoising, per_example, training_loss
from ldm_jax.train.step import Trainer, Training, make_trainer


@dataclasses.dataclass(frozen=True)
class LatentFacts:
    """What a denoiser is trained on, as specs: latents with their statistics, and conditions."""

    latent_shape: tuple[int, int, int]  # (H, W, C) of the first stage
    posterior: str  # "gaussian" | "point": what the moments are
    whitening: Whitening  # of the denoiser's latents
    # Field -> shape of one example, beside the moments; None: whatever the conditions ask for.
    fields: Mapping[str, tuple[int, ...]] | None = None
    num_classes: int = 0  # of the labels; 0 = not known
    first_stage: AutoencoderConfig | None = None  # whose decoder a perceptual loss asks

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.latent_shape
        return (height, width, (2 if self.posterior == "gaussian" else 1) * channels)


def facts_of_manifest(
    run: DenoiserRun,
    manifest: Manifest,
    parts: Mapping[str, Part] = MappingProxyType({}),
    first_stage: AutoencoderConfig | None = None,
) -> LatentFacts:
    """Of a latent cache, the statistics of the `parts_of` the run's codec, and its first stage."""
    names = parts_of(run.codec, manifest.posterior)
    mean = parts[names[0]] if names else manifest
    spread = parts[names[1]] if names[1:] else None
    return LatentFacts(
        manifest.latent_shape,
        manifest.posterior,
        _whitening(run, mean, spread),
        {field.name: field.shape for field in manifest.table if field.name != "moments"},
        manifest.num_classes,
        first_stage,
    )


def _whitening(run: DenoiserRun, latents: Part | Manifest, spread: Part | None = None) -> Whitening:
    first = whitening(
        run.whitening,
        latents.mean,
        latents.std,
        latents.global_std,
        run.scale_factor,
        run.shift_factor,
    )
    return first.beside(standardisation(**vars(spread))) if spread else first


def facts_of_record(record: dict[str, Any], posterior: str) -> LatentFacts:
    """Of the run.json of a denoiser's run, and the posterior of its first stage."""
    data = record["data"]
    white = {name: tuple(values) for name, values in data["whitening"].items()}
    return LatentFacts(tuple(data["latent_shape"]), posterior, Whitening(**white))


def facts_of_config(run: DenoiserRun, model: AutoencoderConfig) -> LatentFacts:
    """Of configurations alone: statistics that only a cache knows are those of white latents."""
    ones = (1.0,) * model.latent_channels
    zeros = (0.0,) * model.latent_channels
    white = Part(zeros, ones, 1.0, zeros, ones)
    halves = max(1, len(parts_of(run.codec, model.posterior)))
    white = _whitening(run, *[white] * halves)
    return LatentFacts(model.latent_shape, model.posterior, white, first_stage=model)


def build(run: AutoencoderRun | DenoiserRun, facts: LatentFacts | None, mesh: Mesh) -> Trainer:
    """The trainer of a run on a mesh; `facts` are of a denoiser's latents, None for a first stage.

    The mesh may be of devices that are not here. Raises InputError for settings that do not fit
    each other, the facts or the mesh.
    """
    check_batch(run.batch_size, mesh, parts=run.accumulate)
    if isinstance(run, DenoiserRun):
        if facts is None:
            raise TypeError("a denoiser's trainer needs the facts of its latents, not None")
        return make_trainer(denoiser_training(run, facts), mesh)
    if facts is not None:
        raise TypeError("a first stage's trainer takes no facts of latents; give None")
    return make_trainer(first_stage_training(run), mesh)


def codec_of(run: DenoiserRun, facts: LatentFacts) -> Codec:
    """What lies between the cached moments and the denoiser's latent."""
    return make_codec(run.codec, facts.posterior, facts.whitening)


def resolve_widths(run: DenoiserRun, facts: LatentFacts) -> DenoiserRun:
    """The run with the numbers that 0 channels of its backbone stand for."""
    backbone = run.model.backbone
    wants = _widths(run, codec_of(run, facts).channels)
    given = {name: getattr(backbone, name) or want for name, want in wants.items()}
    model = dataclasses.replace(run.model, backbone=dataclasses.replace(backbone, **given))
    return dataclasses.replace(run, model=model)


def _widths(run: DenoiserRun, channels: int) -> dict[str, int]:
    double = 2 if run.objective.learned_variance else 1
    return {"in_channels": channels, "out_channels": double * channels}


def denoising_of(run: DenoiserRun, facts: LatentFacts) -> Denoising:
    """The run's loss as it is described; InputError where its parts do not fit each other."""
    run = resolve_widths(run, facts)
    process, codec = make_process(run.process), codec_of(run, facts)
    objective.check(process, run.objective)
    check_model(run, facts, codec.channels)
    return Denoising(run.model, process, run.objective, codec, run.loss, run.seed)


def denoiser_training(run: DenoiserRun, facts: LatentFacts) -> Training:
    run = resolve_widths(run, facts)
    denoising, width = denoising_of(run, facts), run.objective.uncertainty
    losses, edges = per_example(denoising), run.model.network.edges
    lpl = perceptual_of(run, facts, denoising)
    entries = {"moments": jax.ShapeDtypeStruct(facts.moments_shape, "float32")}
    entries |= conditions.entries(run.model.conditions)
    if codec_of(run, facts).draws == "example":
        entries[INDEX] = jax.ShapeDtypeStruct((), "int32")
    return Training(
        init=lambda key: denoiser.init(run.model, key),
        axes=denoiser.axes(run.model),
        loss=perceptual.training_loss(losses, lpl, run.loss_bins)
        if lpl
        else training_loss(losses, run.loss_bins),
        optimizer=optim.make_optimizer(run.optim, run.num_steps, edges),
        learning_rate=optim.learning_rate(run.optim, run.num_steps),
        # A kept average is past its warm-up.
        average=dataclasses.replace(run.ema, warmup=run.ema.warmup and run.init_averages != "keep"),
        batch=in_batches(entries, run.batch_size),
        seed=run.seed,
        accumulate=run.accumulate,
        init_extra=lambda _: (
            ({"uncertainty": uncertainty.init(width)} if width else {})
            | ({perceptual.STATE: perceptual.init_state(run.lpl)} if lpl else {})
        ),
        extra_axes={"uncertainty": uncertainty.axes()} if width else {},
        trained_extra=("uncertainty",) if width else (),
        after_update=perceptual.after_update(run.lpl) if lpl else None,
        frozen=_decoder_shapes(lpl.first_stage) if lpl else {},
        frozen_axes=_decoder_axes(lpl.first_stage) if lpl else {},
    )


def perceptual_of(
    run: DenoiserRun, facts: LatentFacts, denoising: Denoising
) -> perceptual.Perceptual | None:
    """The run's latent perceptual loss; None where it has none."""
    if not run.lpl.active:
        return None
    if facts.first_stage is None:
        raise TypeError("a perceptual loss needs the first stage of the latents, not None")
    perceptual.check(run.lpl, facts.first_stage)
    process, levels = denoising.process, run.objective.noise_levels
    if not gated_share(process, levels, run.lpl.nsr_max):
        raise InputError(
            f"lpl.nsr_max {run.lpl.nsr_max}: no noise level that is trained on is as low; the "
            "paper's is 3"
        )
    count = capacity(run.lpl, process, levels, run.batch_size // run.accumulate)
    return perceptual.Perceptual(run.lpl, facts.first_stage, denoising, count)


def _decoder_shapes(model: AutoencoderConfig) -> dict[str, Any]:
    shapes = jax.eval_shape(lambda: autoencoder.init(model, jax.random.key(0)))
    return {perceptual.FROZEN: perceptual.decoder_of(shapes)}


def _decoder_axes(model: AutoencoderConfig) -> dict[str, Any]:
    return {perceptual.FROZEN: perceptual.decoder_of(autoencoder.axes(model))}


def first_stage_training(run: AutoencoderRun) -> Training:
    recipe, model = run.recipe, run.model
    optimizer, discriminator_optimizer = optimizers(run)
    image = jax.ShapeDtypeStruct(
        (model.resolution, model.resolution, model.image_channels), "uint8"
    )
    perceptual = bool(run.loss.perceptual_weight)
    return Training(
        init=lambda key: autoencoder.init(model, key),
        axes=autoencoder.axes(model),
        loss=first_stage.training_loss(recipe),
        optimizer=optimizer,
        learning_rate=optim.learning_rate(run.optim, run.num_steps),
        average=run.ema,
        batch=in_batches({"image": image}, run.batch_size),
        seed=run.seed,
        accumulate=run.accumulate,
        init_extra=lambda params: first_stage.start_extra(recipe, params, discriminator_optimizer),
        extra_axes=adversarial.axes(run.adversarial, model.image_channels),
        take_turn=first_stage.discriminators_turn(recipe, discriminator_optimizer),
        after_update=first_stage.after_update(recipe),
        frozen={"lpips": lpips.shapes()} if perceptual else {},
        frozen_axes={"lpips": lpips.axes()} if perceptual else {},
    )


def optimizers(
    run: AutoencoderRun,
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The autoencoder's optimizer and the discriminator's, whose steps count from its start."""
    lr = run.adversarial.lr_factor * run.optim.lr
    turns = max(1, run.num_steps - run.adversarial.start)
    return (
        optim.make_optimizer(run.optim, run.num_steps, autoencoder.EDGES),
        optim.make_optimizer(dataclasses.replace(run.optim, lr=lr), turns),
    )


def in_batches(
    entries: Mapping[str, jax.ShapeDtypeStruct], size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Specs of batches, from those of one example."""
    return {n: jax.ShapeDtypeStruct((size, *s.shape), s.dtype) for n, s in entries.items()}


def check_model(run: DenoiserRun, facts: LatentFacts, channels: int) -> None:
    """Raises InputError unless the denoiser's sizes are those of the latents and their fields."""
    backbone = run.model.backbone
    for name, want in _widths(run, channels).items():
        if getattr(backbone, name) != want:
            twice = ", twice with learned_variance" if want != channels else ""
            raise InputError(
                f"config.model.backbone.{name} is {getattr(backbone, name)}, but the cached "
                f"latents by codec {run.codec!r} have {channels} channels{twice}; set it to {want},"
                " or to 0 for what fits"
            )
    for name, condition in run.model.conditions.items():
        classes = getattr(condition, "num_classes", facts.num_classes)
        if facts.num_classes and classes != facts.num_classes:
            raise InputError(
                f"config.model.conditions.{name}.num_classes is {classes}, but the latent cache "
                f"has {facts.num_classes} classes; set it to {facts.num_classes}"
            )
    if facts.fields is None:
        return
    entries = conditions.entries(run.model.conditions)
    for name, condition in run.model.conditions.items():
        for field in condition.fields:
            have, want = facts.fields.get(field), entries.get(field)
            if have is None:
                raise InputError(
                    f"config.model.conditions.{name} reads {field!r} of an example, and the latent "
                    f"cache holds {sorted(facts.fields)}; cache it with the latents, or leave the "
                    f"condition out with --config.model.conditions.{name}.kind=none"
                )
            if want is not None and have != want.shape:
                raise InputError(
                    f"config.model.conditions.{name} reads {field!r} of shape {want.shape}, and "
                    f"the latent cache holds {have}; give the condition that size"
                )
