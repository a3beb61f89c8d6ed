"""The smallest first stage and denoiser that have every kind of block, and how to run them."""

import dataclasses
import functools
from pathlib import Path

from ldm_jax.data.images import ImagesConfig
from ldm_jax.jobs import cache_latents, train_autoencoder
from ldm_jax.models import autoencoder, conditions, denoiser, discriminator, unet
from ldm_jax.runs.settings import AutoencoderRun, DenoiserRun
from ldm_jax.train import adversarial, ema, optim
from ldm_jax.train.first_stage import AutoencoderLoss

AUTOENCODER = AutoencoderRun(
    batch_size=16,
    num_steps=6,
    log_every=1,
    checkpoint_every=3,
    images=ImagesConfig(source="digits", resolution=8, held_out_fraction=0.9),
    model=autoencoder.AutoencoderConfig(
        resolution=8,
        width=8,
        width_multipliers=(1, 2),
        num_res_blocks=1,
        z_channels=2,
        latent_channels=2,
        norm_groups=4,
    ),
    loss=AutoencoderLoss(perceptual_weight=0.0),
    adversarial=adversarial.AdversarialConfig(
        weight=0.5, start=2, discriminator=discriminator.DiscriminatorConfig(width=8, num_layers=1)
    ),
    optim=optim.OptimConfig(lr=1e-3, warmup_steps=2),
    ema=ema.EmaConfig(decay=0.9),
)

DENOISER = DenoiserRun(
    batch_size=16,
    num_steps=6,
    log_every=1,
    checkpoint_every=3,
    whitening="channel",
    model=denoiser.DenoiserConfig(
        backbone=unet.UNetConfig(
            in_channels=2,
            out_channels=2,
            width=8,
            width_multipliers=(1, 2),
            num_res_blocks=1,
            attention_factors=(),  # the middle attends in any case
            num_heads=2,
            norm_groups=4,
        ),
        conditions={"class": conditions.ClassCondition(num_classes=10, context_dim=8)},
    ),
    optim=optim.OptimConfig(lr=1e-3, warmup_steps=2, clip_norm=1.0, weight_decay=0.01),
    ema=ema.EmaConfig(decay=0.99),
)

AVERAGES = ema.EmaConfig(decay=0.99, more=(0.9,), power=(0.05, 0.1), snapshot_every=3)


@functools.cache
def trained_autoencoder(root: Path) -> Path:
    """The workdir of a first stage with its latents cached, made once for each `root`."""
    workdir = Path(root) / "autoencoder"
    train_autoencoder.run(dataclasses.replace(AUTOENCODER, num_steps=3), workdir)
    cache_latents.run(workdir, cache_latents.CacheOptions(batch_size=64, pack=8, shard_examples=64))
    return workdir


def overrides(run: AutoencoderRun | DenoiserRun) -> list[str]:
    """Command-line arguments that turn any configuration into `run`."""

    def walk(value, path):
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield from walk(getattr(value, field.name), f"{path}.{field.name}")
        elif isinstance(value, dict):
            for name, row in value.items():
                yield from walk(row, f"{path}.{name}")
        elif isinstance(value, tuple) and len(value) == 1:
            yield f"--{path}=({value[0]},)"
        elif value != "":
            yield f"--{path}={value}"

    return list(walk(run, "config"))
