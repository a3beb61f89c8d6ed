"""From plain config files to the dataclasses of `settings`.

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

from ldm_jax.errors import InputError
from ldm_jax.runs.settings import Run
from ldm_jax.runs.workdir import default_fields


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
