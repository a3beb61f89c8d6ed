"""What a denoiser's training begins with when it begins with another's: `init_from`."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax

from ldm_jax.errors import InputError
from ldm_jax.models import denoiser
from ldm_jax.models.denoiser import DenoiserConfig
from ldm_jax.runs.denoiser import load_params, read_denoiser
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.train import ema
from ldm_jax.train.checkpoint import Checkpoints, load_weights
from ldm_jax.train.step import Trainer


def load_initial(
    config: DenoiserRun, data: dict[str, Any], trainer: Trainer
) -> tuple[Any, dict[str, Any]]:
    """The parameters of `init_from` and what is kept of its training, for `Trainer.init_from`.

    Of its newest checkpoint. A latent of more channels than that run's has zeros for the new ones
    at both ends of the network, which then predicts the old ones as before. `data` is what run.json
    will say of the latents. Raises InputError for another architecture or other latents, and for
    what that run did not keep; differences in what is predicted are noted only.
    """
    where = Path(config.init_from)
    run, its_data = read_denoiser(where)
    check_same_model(config, run)
    check_kept(config, run)
    if its_data["encoder_hash"] != data["encoder_hash"]:
        raise InputError(
            f"init_from {where} was trained on latents of another first stage, of encoder_hash "
            f"{its_data['encoder_hash'][:12]} and not {data['encoder_hash'][:12]}; give a run on "
            "the same one"
        )
    _note_differences(config, data, run, its_data)
    found = load_params(where, run, config.init_weights, -1, trainer.mesh)
    abstract = trainer.abstract_state
    groups = 2 if config.objective.learned_variance else 1
    params = denoiser.widened(config.model, found.params, abstract.params, groups)
    kept = {}
    if config.init_averages == "keep":
        for name in ema.average_names(config.ema):
            like = jax.tree.map(_like, found.params)
            tree = load_weights(where, like, which=name, step=found.step).params
            kept[name] = denoiser.widened(config.model, tree, abstract.params, groups)
    if config.init_optimizer == "keep":
        checkpoints = Checkpoints(where, read_only=True)
        try:
            kept["optimizer"] = checkpoints.restore_item(
                found.step, "optimizer", abstract.opt_state
            )
        finally:
            checkpoints.close()
    return params, kept


def check_same_model(config: DenoiserRun, run: DenoiserRun) -> None:
    """Raises InputError unless `run` has this architecture, or this one of fewer channels."""
    have, want = _architecture(run.model), _architecture(config.model)
    different = [n for n in sorted(have | want) if have.get(n) != want.get(n)]
    if different:
        name = different[0]
        raise InputError(
            f"init_from {config.init_from} holds another architecture: {name} is "
            f"{have.get(name)!r} there and {want.get(name)!r} in config.model; give the same"
        )
    learned = config.objective.learned_variance, run.objective.learned_variance
    if learned[0] != learned[1]:
        raise InputError(
            f"init_from {config.init_from} has objective.learned_variance {learned[1]}, and so "
            f"another output than this run's {learned[0]}; give the same"
        )
    ours, theirs = config.model.backbone.in_channels, run.model.backbone.in_channels
    if ours != theirs and (theirs > ours or config.init_optimizer == "keep"):
        remedy = (
            "choose a codec of as many"
            if theirs > ours
            else "set --config.init_optimizer=restart: moments of new channels would be none"
        )
        raise InputError(
            f"init_from {config.init_from} denoises latents of {theirs} channels, and this run "
            f"{ours}; {remedy}"
        )


def check_kept(config: DenoiserRun, run: DenoiserRun) -> None:
    """Raises InputError where what is kept of `run` is no optimizer or average of this run's."""
    if config.init_optimizer == "keep" and config.optim.name != run.optim.name:
        raise InputError(
            f"init_optimizer 'keep' of {config.init_from}: its optimizer is {run.optim.name} and "
            f"this run's {config.optim.name}; set --config.optim.name={run.optim.name}, or "
            "--config.init_optimizer=restart"
        )
    if config.init_averages == "keep" and config.ema.decay != run.ema.decay:
        raise InputError(
            f"init_averages 'keep' of {config.init_from}: its average has decay "
            f"{run.ema.decay} and this run's {config.ema.decay}; give both the same, or set "
            "--config.init_averages=restart"
        )


def _architecture(model: DenoiserConfig) -> dict[str, Any]:
    """What of a model its weights belong to, but for the channels at its ends."""
    fields = {f"backbone.{n}": v for n, v in dataclasses.asdict(model.backbone).items()}
    for name in ("in_channels", "out_channels", "compute_dtype"):
        fields.pop(f"backbone.{name}", None)
    rows = {f"conditions.{n}": (type(c).__name__, c) for n, c in model.conditions.items()}
    return {"backbone": type(model.backbone).__name__, **fields, **rows}


def _note_differences(
    config: DenoiserRun, data: dict[str, Any], run: DenoiserRun, its_data: dict[str, Any]
) -> None:
    for name, theirs, ours in (
        ("process", run.process, config.process),
        ("parameterisation", run.objective.parameterisation, config.objective.parameterisation),
        ("codec", run.codec, config.codec),
        ("whitening", its_data["whitening"], data["whitening"]),
    ):
        if theirs != ours and jax.process_index() == 0:
            which = f"{name} {theirs}, this run has {ours}"
            if isinstance(theirs, dict):  # of a number a channel
                which = f"another {name} than this run's"
            print(f"note: init_from {config.init_from} was trained with {which}", file=sys.stderr)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
