"""`ldm train-autoencoder`: images to a first stage."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax.data.images import open_images
from ldm_jax.data.order import Order
from ldm_jax.errors import InputError
from ldm_jax.interop import pretrained
from ldm_jax.models import autoencoder
from ldm_jax.runs.first_stage import load_first_stage, tree_hash
from ldm_jax.runs.reconstruction import compile_lpips, make_evaluation
from ldm_jax.runs.settings import AutoencoderRun
from ldm_jax.runs.training import check_traces, fit
from ldm_jax.runs.workdir import open_run, read_run
from ldm_jax.sharding import check_batch, make_mesh, replicated
from ldm_jax.train import adversarial, optim
from ldm_jax.train.autoencoder_step import make_autoencoder_step, start_extra
from ldm_jax.train.checkpoint import has_checkpoint
from ldm_jax.train.first_stage_loss import autoencoder_loss
from ldm_jax.train.state import TrainState


def run(
    config: AutoencoderRun, workdir: Path, devices: Sequence[jax.Device] | None = None
) -> TrainState | None:
    """Trains, or goes on, in `workdir`, on `devices` (None: all); refusals precede any writing.

    An identity first stage has nothing to train: its workdir is made, and None is given back.
    """
    mesh = make_mesh(config.mesh, devices)
    check_batch(config.batch_size, mesh, parts=config.accumulate)
    if config.train == "decoder" and not config.init_from:
        raise InputError(
            "train 'decoder' needs the weights of a trained encoder; name its workdir with "
            "--config.init_from=DIR"
        )
    config = absolute_paths(config)
    source = open_images(config.images, "train", augment=True, seed=config.seed)
    data: dict[str, Any] = {"listing": source.listing(), "num_examples": len(source)}
    if config.model.latent == "identity":
        open_run(workdir, "train-autoencoder", config, mesh, data)
        print("an identity first stage has nothing to train; its workdir is made", file=sys.stderr)
        return None
    perceptual = start_from = None
    if config.loss.perceptual_weight:
        perceptual = pretrained.load("lpips", config.loss.perceptual_file)
        data["perceptual_hash"] = tree_hash(perceptual)
    if config.init_from:
        if has_checkpoint(workdir):  # it holds all that is needed, wherever the weights came from
            data["init_from_hash"] = read_run(workdir)["data"].get("init_from_hash")
        else:
            start_from = initial_weights(config, mesh)
            data["init_from_hash"] = tree_hash(start_from)
    if config.adversarial.weight and config.adversarial.start >= config.num_steps:
        print(
            f"note: the adversary starts at step {config.adversarial.start}, and the run ends at "
            f"{config.num_steps}: it will not play",
            file=sys.stderr,
        )
    recipe = config.recipe
    optimizer, discriminator_optimizer = optimizers(config)
    learning_rate = optim.learning_rate(config.optim, config.num_steps)
    init = lambda key: autoencoder.init(config.model, key)  # noqa: E731
    init_extra = lambda params: start_extra(recipe, params, discriminator_optimizer)  # noqa: E731

    def compute(key, batch):
        params = init(key)
        adversary = init_extra(params).get("discriminator", {}).get("params")
        return autoencoder_loss(recipe, params, batch, np.int32(0), adversary, perceptual)

    side, channels = config.model.resolution, config.model.image_channels
    shape = jax.ShapeDtypeStruct((config.batch_size, side, side, channels), "uint8")
    check_traces(compute, {"image": shape})
    open_run(workdir, "train-autoencoder", config, mesh, data)

    def read(indices: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": source.read(indices, positions)["image"]}

    return fit(
        "train-autoencoder",
        config,
        workdir,
        mesh,
        init=init,
        axes=autoencoder.axes(config.model),
        optimizer=optimizer,
        make_step=lambda shardings: make_autoencoder_step(
            recipe,
            optimizer,
            discriminator_optimizer,
            learning_rate,
            config.ema,
            mesh,
            shardings,
            jax.device_put(perceptual, replicated(mesh)),
            config.accumulate,
        ),
        read=read,
        order=Order(len(source), config.seed),
        init_extra=init_extra,
        extra_axes=adversarial.axes(config.adversarial, channels),
        start_from=start_from,
        evaluate=make_evaluation(
            config, mesh, lpips=compile_lpips(perceptual) if perceptual else None
        ),
    )


def absolute_paths(config: AutoencoderRun) -> AutoencoderRun:
    """The same with places that hold from any folder."""
    absolute = lambda path: str(Path(path).absolute()) if path else path  # noqa: E731
    loss = dataclasses.replace(config.loss, perceptual_file=absolute(config.loss.perceptual_file))
    return dataclasses.replace(config, init_from=absolute(config.init_from), loss=loss)


def optimizers(config: AutoencoderRun):
    """The autoencoder's optimizer and the discriminator's, whose steps count from its start."""
    factor = config.adversarial.lr_factor
    of_discriminator = dataclasses.replace(config.optim, lr=factor * config.optim.lr)
    turns = max(1, config.num_steps - config.adversarial.start)
    return (
        optim.make_optimizer(config.optim, config.num_steps),
        optim.make_optimizer(of_discriminator, turns),
    )


def initial_weights(config: AutoencoderRun, mesh: Mesh) -> Any:
    """The parameters of `init_from`; InputError unless its architecture is the one to train."""
    first_stage = load_first_stage(config.init_from, mesh)
    have, want = architecture(first_stage.config), architecture(config.model)
    different = [name for name in want if have[name] != want[name]]
    if different:
        name = different[0]
        raise InputError(
            f"init_from {config.init_from} holds another architecture: {name} is {have[name]!r} "
            f"there and {want[name]!r} in config.model; give the same fields"
        )
    return first_stage.params


def architecture(model: autoencoder.AutoencoderConfig) -> dict[str, Any]:
    """What of a model its weights belong to: not its resolution, its dtype or its training."""
    fields = dataclasses.asdict(model)
    for name in ("resolution", "compute_dtype", "attention_resolutions", "quantizer"):
        fields.pop(name)
    sides = [model.resolution // 2**i for i in range(len(model.width_multipliers))]
    fields["levels that attend"] = [side in model.attention_resolutions for side in sides]
    if model.latent == "vq":
        fields["codebook_size"] = model.quantizer.codebook_size
    return fields
