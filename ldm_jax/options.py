"""Flags of the command line from dataclasses: a field is an option, with its default and help."""

import argparse
import dataclasses
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from ldm_jax.errors import within


class Group(NamedTuple):
    """Flags that `--help` shows together, under a title and a text."""

    title: str
    text: str = ""


def option(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    group: Group | None = None,
    choices: Sequence[str] | None = None,
    syntax: str = "",
    interval: str = "",
    remedy: str = "",
) -> Any:
    """A field of a dataclass that is a flag too, named after it.

    `syntax` completes "VALUE must be ..." for tuples of numbers: what they are, and an example.
    `interval` and `remedy` are `errors.within`'s for `check_intervals`; the default need not lie
    there, where it stands for another.
    """
    shown = {"help": help, "metavar": metavar, "choices": choices}
    metadata = {"flag": shown, "group": group, "syntax": syntax, "within": (interval, remedy)}
    return dataclasses.field(default=default, metadata=metadata)


def add_flags(parser: argparse.ArgumentParser, cls: type, but: Collection[str] = ()) -> None:
    """Adds a flag for each `option` of the dataclass `cls`, except for the fields in `but`.

    Tuples are lists with commas, empty text the empty one. A bool that is true has --no-FLAG, one
    that is false takes no value. Fields that no flag names keep their defaults.
    """
    sections: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if "flag" not in field.metadata or field.name in but:
            continue
        group, flag = field.metadata["group"], f"--{field.name.replace('_', '-')}"
        if group and group.title not in sections:
            sections[group.title] = parser.add_argument_group(group.title, group.text or None)
        section = sections[group.title] if group else parser
        shown = {k: v for k, v in field.metadata["flag"].items() if v is not None}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
        else:
            kind = {"type": _reader(field)}
        section.add_argument(flag, default=field.default, **kind, **shown)


def read_flags(cls: type, arguments: argparse.Namespace, but: Collection[str] = ()) -> Any:
    """The dataclass `cls` of what `add_flags`, with the same `but`, has added flags for."""
    names = {f.name for f in dataclasses.fields(cls)} - set(but)
    return cls(**{name: value for name, value in vars(arguments).items() if name in names})


def check_intervals(options: Any) -> None:
    """Raises InputError for an `option` of this dataclass outside its interval."""
    for field in dataclasses.fields(options):
        interval, remedy = field.metadata.get("within", ("", ""))
        value = getattr(options, field.name)
        if interval and value != field.default:
            within(field.name.replace("_", "-"), value, interval, remedy)


def _reader(field: dataclasses.Field) -> Callable[[str], Any]:
    """Text -> value of the field's type; ArgumentTypeError for a list that is none."""
    if typing.get_origin(field.type) is not tuple:
        return typing.cast(Callable[[str], Any], field.type)
    item, syntax = typing.get_args(field.type)[0], field.metadata["syntax"]

    def read(text: str) -> tuple:
        try:
            return tuple(item(part) for part in text.split(",")) if text else ()
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} must be {syntax}") from error

    return read
