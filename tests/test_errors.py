"""The rules name the value, the rule and the remedy, and let through what keeps them."""

import pytest

from ldm_jax.errors import InputError, choose, divides, within


def test_what_keeps_a_rule_passes():
    choose("kind", "a", {"a": 1, "b": 2})
    within("share", 0, "[0, 1)")
    within("rate", 1e9, "(0, inf)")
    divides("side", 24, 8, "the factor")


@pytest.mark.parametrize(
    "check, words",
    [
        (lambda: choose("kind", "c", {"a": 1, "b": 2}), r"kind 'c' is unknown; .* \['a', 'b'\]"),
        (lambda: within("share", 1, "[0, 1)", "try 0.5"), r"share 1 must be in \[0, 1\); try 0.5"),
        (lambda: within("rate", 0, "(0, inf)"), "rate 0 must be above 0"),
        (lambda: within("count", 0, "[1, inf)"), "count 0 must be at least 1"),
        (lambda: within("rate", float("inf"), "[0, inf)"), "at least 0 and finite"),
        (lambda: within("rate", float("nan"), "[0, inf)"), "rate nan must be at least 0"),
        (lambda: divides("side", 20, 8, "the factor"), "divide by 8, the factor; nearest: 16"),
        (lambda: divides("side", 0, 8, "the factor"), "side 0 must divide by 8"),
    ],
)
def test_what_breaks_a_rule_is_refused(check, words):
    with pytest.raises(InputError, match=words):
        check()
