"""Arms over seeds: contrasts, their intervals, and what is said of them."""

import math

import numpy as np
import pytest
from scipy import stats

from ldm_jax.eval import comparison
from ldm_jax.eval.comparison import contrast_table, contrasts, interval, summary, table, verdict

WAY = {"sampler": "ddim", "steps": 8, "guidance": 1.0}


def row(arm, seed, value, **more):
    return {"arm": arm, "seed": seed, **WAY, "frechet_samples": value, **more}


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_is_students(n):
    values = np.random.default_rng(n).normal(3.0, 2.0, n)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(interval(values), [expected.low, expected.high], rtol=1e-12)


def test_a_contrast_is_summed_seed_by_seed():
    rows = [row("a", s, v) for s, v in ((0, 1.0), (1, 5.0), (2, 9.0))]
    rows += [row("b", s, v) for s, v in ((2, 8.5), (0, 0.0), (1, 4.5))]
    (found,) = contrasts(rows, {"a - b": {"a": 1, "b": -1}})
    differences = [1.0, 0.5, 0.5]
    assert found["contrast"] == "a - b" and found["figure"] == "frechet_samples"
    assert {name: found[name] for name in WAY} == WAY and found["seeds"] == 3
    assert found["mean"] == pytest.approx(np.mean(differences))
    # Far narrower than the seeds' own scatter, which the pairs share.
    expected = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))


def test_an_interaction_has_four_arms():
    values = {"mean-lpl": 7.0, "mean-control": 4.0, "sample-lpl": 3.0, "sample-control": 1.0}
    rows = [row(arm, 0, value) for arm, value in values.items()]
    signs = {"mean-lpl": 1, "mean-control": -1, "sample-lpl": -1, "sample-control": 1}
    (found,) = contrasts(rows, {"interaction": signs})
    assert (found["mean"], found["seeds"]) == (1.0, 1)
    assert found["verdict"] == "one seed: no interval" and "low" not in found


def test_only_what_every_arm_has_is_compared():
    rows = [row("a", 0, 1.0), row("a", 1, 3.0), row("b", 1, 1.0), row("b", 2, 9.0)]
    rows.append(row("a", 1, 50.0) | {"steps": 16})  # a way that b has not
    rows.append({"arm": "a", "seed": 1, **WAY, "ssim": 0.5})  # a figure that b has not
    found = contrasts(rows, {"a - b": {"a": 1, "b": -1}, "c": {"c": 1}})
    assert [(f["figure"], f["steps"], f["seeds"], f["mean"]) for f in found] == [
        ("frechet_samples", 8, 1, 2.0)
    ]


def test_what_is_resampled_is_held_against_what_has_no_spread():
    mean, again = {"decode": "mean"}, {"decode": "resampled"}
    rows = [row("both", 0, 5.0, **mean), row("both", 0, 4.0, **again), row("one", 0, 1.0, **mean)]
    rows += [row("two", 0, 1.5, **mean)]
    found = contrasts(rows, {"a": {"both": 1, "one": -1}, "b": {"two": 1, "one": -1}})
    assert [(f["contrast"], f["decode"], f["mean"]) for f in found] == [
        ("a", "mean", 4.0), ("a", "resampled", 3.0), ("b", "mean", 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.1, 2.0, "higher"),
        (-2.0, -0.1, "lower"),
        (-0.5, 0.25, "no difference larger than 0.5"),
        (-0.1, 1234.0, "no difference larger than 1.23e+03"),
        (0.0, 0.0, "no difference larger than 0"),
    ],
)
def test_the_verdict_is_of_the_interval(low, high, words):
    assert verdict(low, high) == words


def test_a_figure_that_is_not_finite_makes_no_verdict():
    for value in (math.inf, math.nan):
        found = summary([1.0, value])
        assert found["verdict"] == "not finite" and "low" not in found


def test_tables_name_the_ways_that_differ():
    rows = [
        row("a", s, v, decode=d) for s, v in ((0, 1.0), (1, 2.0)) for d in ("mean", "resampled")
    ]
    head = table(rows).head
    assert head == ["sampler", "steps", "decode", "arm", "seeds", "frechet_samples"]
    found = contrast_table(contrasts(rows, {"a": {"a": 1}}))
    assert found.head[:4] == ["contrast", "sampler", "steps", "decode"]
    assert [line[3] for line in found.rows] == ["mean", "resampled"]
    assert found.rows[0][-2] == "-4.85 .. 7.85"


def test_a_way_in_words_leaves_out_the_usual():
    usual = {"spacing": "auto", "weights": "auto", "decode": "mean"}
    assert comparison.way_name(WAY | usual) == "ddim 8"
    assert comparison.way_name(WAY | {"guidance": 2.0, "weights": "ema"}) == (
        "ddim 8 guidance=2.0 weights=ema"
    )
    name = comparison.picture_name(WAY | {"weights": "ema/0.5 x"})
    assert name == "samples-ddim-8-weights=ema-0.5-x.png"
