"""Flags say what the fields say: names, defaults, types and groups; what is no list is refused."""

import argparse
import dataclasses

import pytest

from ldm_jax.errors import InputError
from ldm_jax.options import Group, add_flags, check_intervals, option, read_flags

SIZES = Group("sizes", "In pixels.")


@dataclasses.dataclass(frozen=True)
class Options:
    num_steps: int = option(5, "steps to take", metavar="N")
    sides: tuple[int, ...] = option(
        (2, 3), "of images", group=SIZES, syntax="numbers separated by commas, as 3,4"
    )
    names: tuple[str, ...] = option((), "of splits", group=SIZES)
    mirrored: bool = option(True, "mirrored ones too")
    few: bool = option(False, "of few images")
    kind: str = option("a", "of two", choices=("a", "b"))
    silent: int = 7


def read(*flags, but=()):
    parser = argparse.ArgumentParser()
    add_flags(parser, Options, but)
    return read_flags(Options, parser.parse_args(flags), but)


def test_without_flags_all_fields_have_their_defaults():
    assert read() == Options()


def test_every_flag_reaches_its_field():
    flags = ["--num-steps=9", "--sides=4", "--names=x,y", "--no-mirrored", "--few", "--kind=b"]
    assert read(*flags) == Options(9, (4,), ("x", "y"), False, True, "b")
    assert read("--sides=").sides == ()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--sides=2x3", "'2x3' must be numbers separated by commas, as 3,4"),
        ("--num-steps=few", "invalid int value: 'few'"),
        ("--kind=c", "invalid choice: 'c'"),
        ("--silent=3", "unrecognized arguments: --silent=3"),
    ],
)
def test_what_is_no_value_is_refused(capsys, flag, words):
    with pytest.raises(SystemExit):
        read(flag)
    assert words in capsys.readouterr().err


def test_fields_that_are_left_out_have_no_flag_and_keep_their_defaults(capsys):
    assert read("--num-steps=9", but=("sides",)) == Options(9)
    with pytest.raises(SystemExit):
        read("--sides=4", but=("sides",))
    assert "--sides" in capsys.readouterr().err


def test_help_shows_groups_with_their_texts():
    parser = argparse.ArgumentParser()
    add_flags(parser, Options)
    text = " ".join(parser.format_help().split())
    assert "--kind {a,b} of two sizes: In pixels. --sides SIDES of images --names NAMES" in text
    assert "--num-steps N steps to take" in text and "--mirrored, --no-mirrored" in text


def test_a_number_outside_its_interval_is_refused_unless_it_is_the_default():
    @dataclasses.dataclass(frozen=True)
    class Noise:
        share_kept: float = option(-1, "", interval="[0, 1]", remedy="leave it out for all")

    check_intervals(Noise())
    check_intervals(Noise(1.0))
    for wrong in (-0.5, 1.5, float("nan")):
        with pytest.raises(InputError, match=rf"^share-kept {wrong} .*\[0, 1\]; leave it out"):
            check_intervals(Noise(wrong))
