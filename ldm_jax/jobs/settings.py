"""What a run is told: one frozen dataclass per kind of training, filled from plain config files.

`configs/*.py` hold sparse ConfigDicts. Here they meet the defaults, the command line's overrides
and the types; past this door nobody sees a ConfigDict, and a misspelt field has been refused.
"""

import dataclasses
import difflib
import importlib.util
import inspect
import typing
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from ldm_jax.data.images import Config as ImagesConfig
from ldm_jax.diffusion.objective import Objective
from ldm_jax.diffusion.process import ProcessConfig
from ldm_jax.errors import InputError
from ldm_jax.models.autoencoder import Config as AutoencoderConfig
from ldm_jax.models.denoiser import Config as DenoiserConfig
from ldm_jax.sharding import MeshConfig
from ldm_jax.train.adversarial import Config as AdversarialConfig
from ldm_jax.train.autoencoder_step import accumulates
from ldm_jax.train.ema import Config as EmaConfig
from ldm_jax.train.first_stage_loss import AutoencoderLoss, Recipe
from ldm_jax.train.loop import Config as LoopConfig
from ldm_jax.train.optim import Config as OptimConfig
from ldm_jax.train.run_dir import default_fields
from ldm_jax.train.steps import DenoiserLoss


@dataclasses.dataclass(frozen=True)
class AutoencoderRun:
    """`ldm train-autoencoder`."""

    seed: int = 0
    batch_size: int = 32  # images per step, over all devices
    accumulate: int = 1  # micro-batches, one after the other, that a step's batch is taken in
    num_steps: int = 1000
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_every: int = 0
    max_bad_steps: int = 10  # in a row, not finite, that are skipped before the run is stopped
    eval_every: int = 0  # steps between evaluations on held-out images; 0 = none
    eval_images: int = 256  # of them, spread over the split, in each evaluation
    data_threads: int = 2  # that prepare batches ahead, per process
    images: ImagesConfig = ImagesConfig()
    model: AutoencoderConfig = AutoencoderConfig()
    loss: AutoencoderLoss = AutoencoderLoss()
    adversarial: AdversarialConfig = AdversarialConfig()
    train: str = "all"  # "all" | "decoder": fine-tune it, and latents already cached stay valid
    init_from: str = ""  # workdir of a first stage whose weights to begin with; empty = random
    optim: OptimConfig = OptimConfig(b1=0.5, b2=0.9)
    ema: EmaConfig = EmaConfig(decay=0.0)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        loop_config(self)
        if self.accumulate > 1 and not accumulates(self.recipe):
            raise InputError(
                f"accumulate {self.accumulate}: an adversary and a codebook are trained on the "
                "whole batch of a step; set --config.accumulate=1, or --config.adversarial.weight=0"
                " with a KL model"
            )
        if self.train not in ("all", "decoder"):
            raise InputError(f"train {self.train!r} is unknown; choose one of ('all', 'decoder')")
        if self.model.image_channels != 3:
            raise InputError(
                f"model.image_channels {self.model.image_channels} must be 3: images are RGB"
            )
        # EQ-VAE decodes at a quarter of the size too.
        smallest = 64 if self.loss.equivariance_weight else 16
        if self.loss.perceptual_weight and self.model.resolution < smallest:
            raise InputError(
                f"model.resolution {self.model.resolution}: the perceptual loss sees images of at "
                f"least 16 pixels a side, which takes {smallest} here; set "
                "--config.loss.perceptual_weight=0"
            )
        if self.adversarial.gradient_penalty and self.adversarial.discriminator.norm == "batch":
            raise InputError(
                f"adversarial.gradient_penalty {self.adversarial.gradient_penalty}: batch norm "
                "would couple the images whose slopes it penalises; set "
                "--config.adversarial.discriminator.norm=act or none"
            )
        layers = self.adversarial.discriminator.num_layers
        if self.adversarial.weight and self.model.resolution < 3 * 2**layers:
            raise InputError(
                f"model.resolution {self.model.resolution}: a discriminator of {layers} layers "
                f"sees images of at least {3 * 2**layers} pixels a side; use larger images or "
                "--config.adversarial.discriminator.num_layers=2"
            )
        if self.eval_images < 1:
            raise InputError(f"eval_images {self.eval_images} must be at least 1")
        if self.images.resolution != self.model.resolution:
            raise InputError(
                f"images.resolution {self.images.resolution} must equal model.resolution "
                f"{self.model.resolution}; set both"
            )

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.model, self.loss, self.adversarial, self.seed, self.train)


@dataclasses.dataclass(frozen=True)
class DenoiserRun:
    """`ldm train-denoiser`."""

    seed: int = 0
    batch_size: int = 64  # latents per step, over all devices
    accumulate: int = 1  # micro-batches, one after the other, that a step's batch is taken in
    num_steps: int = 1000
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_every: int = 0
    max_bad_steps: int = 10  # in a row, not finite, that are skipped before the run is stopped
    loss_bins: int = 0  # equal intervals of time whose losses are logged apart; 0 = none
    eval_every: int = 0  # steps between losses of held-out latents, on fixed draws; 0 = none
    eval_examples: int = 1024  # of them, spread over the split, in each evaluation
    data_threads: int = 2
    autoencoder: str = ""  # workdir of the first stage
    latents: str = ""  # latent cache; empty = AUTOENCODER/latents
    flip: bool = False  # train on mirrored images half of the time
    whitening: str = "global"  # "global" 1/std | "channel" mean and std of each | "none" | "fixed"
    scale_factor: tuple[float, ...] = ()  # "fixed": (z - shift_factor) * scale_factor,
    shift_factor: tuple[float, ...] = ()  # one number or one a channel
    model: DenoiserConfig = DenoiserConfig()
    process: ProcessConfig = ProcessConfig()
    objective: Objective = Objective()
    loss: DenoiserLoss = DenoiserLoss()
    optim: OptimConfig = OptimConfig(weight_decay=0.01)
    ema: EmaConfig = EmaConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        loop_config(self)
        if self.eval_examples < 1:
            raise InputError(f"eval_examples {self.eval_examples} must be at least 1")
        if self.loss_bins < 0:
            raise InputError(f"loss_bins {self.loss_bins} must be at least 0, which logs none")


Run = AutoencoderRun | DenoiserRun


def loop_config(run: Run) -> LoopConfig:
    """The loop's part of a run; raises InputError for a seed or a pace out of range."""
    if not 0 <= run.seed < 2**32:
        raise InputError(f"seed {run.seed} must be in 0..2**32 - 1")
    if run.accumulate < 1:
        raise InputError(f"accumulate {run.accumulate} must be at least 1")
    if run.data_threads < 1:
        raise InputError(f"data_threads {run.data_threads} must be at least 1")
    names = [f.name for f in dataclasses.fields(LoopConfig) if hasattr(run, f.name)]
    return LoopConfig(**{name: getattr(run, name) for name in names})


def _check_names(cls: type, values: dict[str, Any], where: str) -> None:
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(name, hints, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {sorted(hints)}"
            raise InputError(f"{where}.{name} is not a field; {hint}")


def build(cls: type, values: dict[str, Any], where: str = "config") -> Any:
    """A dataclass from nested plain values; InputError for unknown fields and wrong types."""
    _check_names(cls, values, where)
    hints = typing.get_type_hints(cls)
    built = {}
    for name, value in values.items():
        kind = hints[name]
        field = f"{where}.{name}"
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise InputError(f"{field} is {value!r}; it must be a group of fields")
            built[name] = build(kind, value, field)
        else:
            built[name] = _typed(kind, value, field)
    return cls(**built)


def _typed(kind: Any, value: Any, field: str) -> Any:
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        if not isinstance(value, list | tuple):
            raise InputError(f"{field} is {value!r}; it must be a tuple of {element.__name__}")
        return tuple(_typed(element, v, field) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{field} is {value!r}; it must be of type {kind.__name__}")
    return value


def config_dict(cls: type, *layers: dict[str, Any]) -> ml_collections.ConfigDict:
    """The defaults of `cls` with a config file's values, and others, on top: every field there is.

    Values are not checked yet: the command line may still mend them.
    """
    filled = default_fields(cls)
    for values in layers:
        filled = _fill(cls, filled, values, "config")
    return ml_collections.ConfigDict(filled, convert_dict=True)


def _fill(cls: type, defaults: dict[str, Any], values: dict[str, Any], where: str) -> dict:
    _check_names(cls, values, where)
    hints, filled = typing.get_type_hints(cls), dict(defaults)
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise InputError(f"{where}.{name} is {value!r}; it must be a group of fields")
            value = _fill(hints[name], defaults[name], value, f"{where}.{name}")
        filled[name] = value
    return filled


def load_config_file(spec: str) -> dict[str, Any]:
    """`FILE` or `FILE:VARIANT` -> the values that its get_config returns.

    FILE is looked for from the current folder, then beside the package.
    """
    file, _, variant = spec.partition(":")
    package = Path(__file__).resolve().parents[1]
    places = [Path(file), package.parent / file, package / file]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise InputError(f"config file {file} does not exist; give --config=FILE:VARIANT")
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    arguments = [variant] if variant and inspect.signature(module.get_config).parameters else []
    try:
        return module.get_config(*arguments).to_dict()
    except KeyError as error:
        known = ", ".join(getattr(module, "VARIANTS", ()))
        raise InputError(f"config {file} has no variant {variant!r}; it has: {known}") from error


def load_run(cls: type[Run], spec: str, overrides: list[str]) -> Run:
    """A run's settings from a config file and `--config.field=value` overrides."""
    return apply_overrides(cls, load_config_file(spec), overrides)


def apply_overrides(cls: type[Run], values: dict[str, Any], overrides: list[str]) -> Run:
    """The settings in `values`, defaults filled in, changed by `--config.field=value` arguments."""
    config = config_dict(cls, values)
    holder = flags.FlagValues()
    arguments = ["ldm", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=holder, sys_argv=arguments)
        rest = holder(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(_override_error(cls, overrides, error)) from error
    if len(rest) > 1:
        raise InputError(
            f"argument {rest[1]!r} is not understood; overrides are --config.field=value"
        )
    return build(cls, holder.config.to_dict())


def _override_error(cls: type, overrides: list[str], error: Exception) -> str:
    known = _paths(cls)
    for argument in overrides:
        name = argument.removeprefix("--").removeprefix("no").split("=")[0].removeprefix("config.")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
            hint = (
                f"did you mean --config.{close[0]}?"
                if close
                else "see the config file for its fields"
            )
            return f"config.{name} is not a field; {hint}"
    return str(error).splitlines()[0]


def _paths(cls: type, prefix: str = "") -> list[str]:
    found = []
    for name, kind in typing.get_type_hints(cls).items():
        path = f"{prefix}{name}"
        found += [path, *_paths(kind, f"{path}.")] if dataclasses.is_dataclass(kind) else [path]
    return found
