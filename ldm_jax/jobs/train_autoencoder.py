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
from ldm_jax.files import absolute
from ldm_jax.interop import pretrained
from ldm_jax.models import autoencoder
from ldm_jax.runs.build import build
from ldm_jax.runs.first_stage import load_first_stage, tree_hash
from ldm_jax.runs.reconstruction import compile_lpips, evaluation_hook
from ldm_jax.runs.settings import AutoencoderRun
from ldm_jax.runs.training import fit
from ldm_jax.runs.workdir import check_run, open_run, read_run
from ldm_jax.sharding import check_batch, make_mesh
from ldm_jax.train.checkpoint import has_checkpoint
from ldm_jax.train.hooks import check_keep_best
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
    frozen, start_from = {}, None
    if config.loss.perceptual_weight:
        frozen["lpips"] = pretrained.load("lpips", config.loss.perceptual_file)
        data["perceptual_hash"] = tree_hash(frozen["lpips"])
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
    trainer = build(config, None, mesh)
    hooks = []
    if config.eval_every:
        lpips = compile_lpips(frozen["lpips"]) if frozen else None
        hooks.append(evaluation_hook(config, mesh, lpips))
    check_keep_best(config.keep_best, hooks)
    record = check_run(workdir, "train-autoencoder", config, mesh, data)

    def read(indices: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": source.read(indices, positions)["image"]}

    return fit(
        config,
        workdir,
        trainer,
        read,
        Order(len(source), config.seed),
        record=record,
        frozen=frozen,
        start_from=None if start_from is None else (start_from, {}),
        hooks=hooks,
    )


def absolute_paths(config: AutoencoderRun) -> AutoencoderRun:
    """The same with places that hold from any folder."""
    file = absolute(config.loss.perceptual_file)
    loss = dataclasses.replace(config.loss, perceptual_file=file)
    return dataclasses.replace(config, init_from=absolute(config.init_from), loss=loss)


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
    fields["levels that attend"] = model.attends
    if model.latent == "vq":
        fields["codebook_size"] = model.quantizer.codebook_size
    return fields
