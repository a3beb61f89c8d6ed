"""The one error class for bad input, and the rules that most inputs are held to."""

import math
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Something the user gave breaks a rule.

    The message is one line that names the value, the rule and the remedy. The command line prints
    it without a traceback and exits with status 2; anything else is a defect and keeps its trace.
    """


def choose(name: str, value: Any, known: Iterable[Any]) -> None:
    """Raises InputError unless `value` is one of `known`."""
    known = list(known)
    if value not in known:
        raise InputError(f"{name} {value!r} is unknown; choose one of {known}")


def within(name: str, value: float, interval: str, remedy: str = "") -> None:
    """Raises InputError unless the number lies in an interval, such as "[0, 1)" or "(0, inf)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        if high == math.inf:
            least = "at least" if interval[0] == "[" else "above"
            rule = f"{least} {low:g}" + (" and finite" if value == math.inf else "")
        else:
            rule = f"in {interval}"
        raise InputError(f"{name} {value} must be {rule}" + (f"; {remedy}" if remedy else ""))


def divides(name: str, value: int, by: int, what: str) -> None:
    """Raises InputError unless `value` is positive and divides by `by`, which is `what`."""
    if value < 1 or value % by:
        nearest = max(1, round(value / by)) * by
        raise InputError(f"{name} {value} must divide by {by}, {what}; nearest: {nearest}")
