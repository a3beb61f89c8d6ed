"""From plain config files to the dataclasses of `settings`.

`configs/*.py` hold sparse ConfigDicts. Here they meet the defaults, the command line's overrides
and the types; past this door nobody sees a ConfigDict, and a misspelt field has been refused.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import json
import keyword
import typing
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from ldm_jax.errors import InputError, choose
from ldm_jax.runs.settings import Run, todays, todays_override


def kinds_of(field: dataclasses.Field) -> dict[str, type] | None:
    """Kind -> dataclass, of a field whose value is a row of a table; None of any other."""
    kinds = field.metadata.get("kinds")
    return kinds() if kinds else None


def plain(value: Any) -> Any:
    """A config dataclass as nested dicts. A row of a table has its `kind` beside its fields."""
    if not dataclasses.is_dataclass(value):
        return value
    return {f.name: _plain_field(f, getattr(value, f.name)) for f in dataclasses.fields(value)}


def _plain_field(field: dataclasses.Field, value: Any) -> Any:
    kinds = kinds_of(field)
    if kinds is None:
        return plain(value)

    def row(value: Any) -> dict[str, Any]:
        kind = next(k for k, cls in kinds.items() if type(value) is cls)
        return {"kind": kind, **plain(value)}

    if field.metadata.get("several"):
        return {name: row(v) for name, v in value.items()}
    return row(value)


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as values of JSON: what run.json holds."""
    return json.loads(json.dumps(plain(config)))


def default_fields(cls: type) -> dict[str, Any]:
    """The defaults of a config dataclass, groups of fields as dicts."""
    out = {}
    for field in dataclasses.fields(cls):
        made = field.default_factory is not dataclasses.MISSING
        out[field.name] = _plain_field(field, field.default_factory() if made else field.default)
    return out


def _check_names(cls: type, values: dict[str, Any], where: str) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {sorted(names)}"
            raise InputError(f"{where}.{name} is not a field; {hint}")


def group(value: Any, where: str) -> dict[str, Any]:
    """The value; InputError unless it is a group of fields."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {value!r}; it must be a group of fields")
    return value


def _row(kinds: dict[str, type], values: Any, name: str, where: str) -> tuple[str, dict[str, Any]]:
    """(kind, fields) of a row; one among several is of the kind of its name where it says none."""
    fields = dict(group(values, where))
    if name and name not in kinds and "kind" not in fields:
        raise InputError(
            f"{where} says no kind, and {name!r} is none of {list(kinds)}; name the row after its "
            f"kind, or give it one with --{where}.kind"
        )
    kind = fields.pop("kind", name or next(iter(kinds)))
    choose(f"{where}.kind", kind, kinds)
    return kind, fields


def _without_none(rows: Any, known: Collection[str], where: str) -> dict[str, Any]:
    """Rows but for those of kind "none": so the command line leaves out one of `known`."""
    rows = group(rows, where)
    gone = [n for n, v in rows.items() if isinstance(v, dict) and v.get("kind") == "none"]
    for name in gone:
        if name not in known:
            raise InputError(
                f"{where}.{name}.kind 'none' leaves out a row that is not there; choose one of "
                f"{sorted(known)}"
            )
    return {n: v for n, v in rows.items() if n not in gone}


def build(cls: type, values: dict[str, Any], where: str = "config") -> Any:
    """A dataclass from nested plain values; InputError for unknown fields and wrong types."""
    values = todays(cls, group(values, where))
    _check_names(cls, values, where)
    hints, built = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value, place = values[field.name], f"{where}.{field.name}"
        kinds = kinds_of(field)
        if kinds and field.metadata.get("several"):
            rows = _without_none(value, kinds, place)
            built[field.name] = {
                n: _build_row(kinds, v, n, f"{place}.{n}") for n, v in rows.items()
            }
        elif kinds:
            built[field.name] = _build_row(kinds, value, "", place)
        elif dataclasses.is_dataclass(hints[field.name]):
            built[field.name] = build(hints[field.name], value, place)
        else:
            built[field.name] = _typed(hints[field.name], value, place)
    return cls(**built)


def _build_row(kinds: dict[str, type], values: Any, name: str, where: str) -> Any:
    kind, fields = _row(kinds, values, name, where)
    return build(kinds[kind], fields, where)


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
        filled = _fill(cls, filled, todays(cls, group(values, "config")), "config")
    return ml_collections.ConfigDict(filled, convert_dict=True)


def _fill(cls: type, defaults: dict[str, Any], values: dict[str, Any], where: str) -> dict:
    _check_names(cls, values, where)
    hints, filled = typing.get_type_hints(cls), dict(defaults)
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value, place = values[field.name], f"{where}.{field.name}"
        before, kinds = defaults[field.name], kinds_of(field)
        if kinds and field.metadata.get("several"):
            rows = _without_none(value, {**before, **kinds}, place)
            gone = value.keys() - rows.keys()
            kept = {n: v for n, v in before.items() if n not in gone}
            value = kept | {
                n: _fill_row(kinds, before.get(n), v, n, f"{place}.{n}") for n, v in rows.items()
            }
        elif kinds:
            value = _fill_row(kinds, before, value, "", place)
        elif dataclasses.is_dataclass(hints[field.name]):
            value = _fill(hints[field.name], before, group(value, place), place)
        elif isinstance(before, tuple) and isinstance(value, list):  # as JSON has them
            value = tuple(value)
        elif isinstance(before, float) and type(value) is int:
            value = float(value)
        filled[field.name] = value
    return filled


def _fill_row(kinds: dict[str, type], before: Any, values: Any, name: str, where: str) -> dict:
    """A row with every field it has; those of `before` where that is of the same kind."""
    before = before or {}
    kind, fields = _row(kinds, {**_kind_of(before), **group(values, where)}, name, where)
    filled = default_fields(kinds[kind]) if before.get("kind") != kind else dict(before)
    filled.pop("kind", None)
    return {"kind": kind, **_fill(kinds[kind], filled, fields, where)}


def _kind_of(row: dict[str, Any]) -> dict[str, Any]:
    return {"kind": row["kind"]} if "kind" in row else {}


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
    if not (module_spec and module_spec.loader):
        raise InputError(f"config file {file} is not Python; give --config=FILE.py:VARIANT")
    module = importlib.util.module_from_spec(module_spec)
    with _reading(file):
        module_spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise InputError(f"config file {file} has no function get_config; define it there")
    if variant and not inspect.signature(module.get_config).parameters:
        raise InputError(f"config {file} has no variants, and so none {variant!r}; give {file}")
    with _reading(file):
        try:
            config = module.get_config(*([variant] if variant else []))
        except KeyError as error:
            if error.args != (variant,):
                raise
            known = ", ".join(getattr(module, "VARIANTS", ()))
            raise InputError(
                f"config {file} has no variant {variant!r}; it has: {known}"
            ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(
            f"get_config of {file} returns {type(config).__name__}; it must be an "
            "ml_collections.ConfigDict"
        )
    return config.to_dict()


@contextlib.contextmanager
def _reading(file: str) -> Iterator[None]:
    """InputError for whatever the code of a config file raises."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        what = " ".join(str(error).split())
        raise InputError(
            f"config file {file} fails with {type(error).__name__}: {what}; mend the file "
            "(LDM_TRACEBACK=1 shows where)"
        ) from error


def load_run(cls: type[Run], spec: str, overrides: list[str]) -> Run:
    """A run's settings from a config file and `--config.field=value` overrides."""
    return apply_overrides(cls, load_config_file(spec), overrides)


def apply_overrides(cls: type[Run], values: dict[str, Any], overrides: list[str]) -> Run:
    """The settings in `values`, defaults filled in, changed by `--config.field=value` arguments."""
    overrides = [todays_override(cls, argument) for argument in overrides]
    # Which kind a row is decides what fields there are, so that is looked at first.
    layers, overrides = _kinds_first(cls, overrides)
    overrides = _last(overrides)
    filled = config_dict(cls, values, *layers)
    holder, arguments = flags.FlagValues(), ["ldm", *map(_in_brackets, overrides)]
    try:
        config_flags.DEFINE_config_dict("config", filled, flag_values=holder, sys_argv=arguments)
        rest = holder(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(_override_error(filled.to_dict(), overrides, error)) from error
    if len(rest) > 1:
        raise InputError(
            f"argument {rest[1]!r} is not understood; overrides are --config.field=value"
        )
    return build(cls, holder.config.to_dict())


def _last(overrides: list[str]) -> list[str]:
    """The last argument of each field: those of tuples would be joined."""
    paths = [a.partition("=")[0].removeprefix("--").removeprefix("no") for a in overrides]
    return [a for i, a in enumerate(overrides) if paths[i] not in paths[i + 1 :]]


def _in_brackets(argument: str) -> str:
    """`conditions.class.x=value` as `conditions["class"].x=value`: paths are parsed as Python."""
    path, equals, value = argument.partition("=")
    first, *names = path.split(".")
    names = [f'["{name}"]' if keyword.iskeyword(name) else f".{name}" for name in names]
    return first + "".join(names) + equals + value


def _kinds_first(cls: type, overrides: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """What overrides say of kinds, and which rows they name, as values; and all other overrides."""
    said: dict[str, dict[str, Any]] = {}  # by the path of a row, in the order of the line
    others, rows = [], _row_fields(cls)
    for argument in overrides:
        path, _, value = argument.removeprefix("--config.").partition("=")
        table = next((row for row in rows if path.startswith(f"{row}.")), "")
        name, _, field = path[len(table) + 1 :].partition(".") if table else ("", "", "")
        if table and rows[table] and field:  # one among several
            row = said.setdefault(f"{table}.{name}", {})
            if field == "kind":
                row["kind"] = value
            else:
                others.append(argument)
        elif table and not rows[table] and name == "kind":
            said[table] = {"kind": value}
        else:
            others.append(argument)
    for argument in others:
        for row in said:
            if argument.startswith(f"--config.{row}.") and said[row].get("kind") == "none":
                raise InputError(
                    f"{argument} is of a row that --config.{row}.kind=none leaves out; drop one "
                    "of the two"
                )
    return [_nested(row, values) for row, values in said.items()], others


def _row_fields(cls: type, prefix: str = "") -> dict[str, bool]:
    """Path of every field whose value is a row of a table -> whether it holds several."""
    found, hints = {}, typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        if kinds_of(field):
            found[path] = bool(field.metadata.get("several"))
        elif dataclasses.is_dataclass(hints[field.name]):
            found |= _row_fields(hints[field.name], f"{path}.")
    return found


def _nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def _override_error(filled: dict[str, Any], overrides: list[str], error: Exception) -> str:
    known = _paths(filled)
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
        if isinstance(known[name], dict) and "ConfigDict" in str(error):
            return f"{argument}: config.{name} is a group; set its fields {sorted(known[name])}"
    return str(error).splitlines()[0]


def _paths(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Path -> value of every field and group."""
    found = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        found |= {path: value, **(_paths(value, f"{path}.") if isinstance(value, dict) else {})}
    return found
