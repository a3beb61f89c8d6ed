"""Averages against their closed forms in f64, and any width from snapshots of two."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.train import ema
from ldm_jax.train.ema import WIDEST, coefficients, gamma_of, inner


def parameters(k):
    """What the parameters are after update k; k = 0 is their start."""
    rng = np.random.default_rng(k)
    return {"a": rng.normal(size=(3,)).astype(np.float32), "b": {"c": np.float32(rng.normal())}}


def averaged(config, updates):
    average = jax.tree.map(jnp.asarray, parameters(0))
    for n in range(1, updates + 1):
        average = ema.update(average, parameters(n), ema.decay_at(config, n))
    return average


def closed_form(decays):
    """sum_k (1 - d_k) prod_{j > k} d_j theta_k, and prod_j d_j of the start."""
    total = jax.tree.map(lambda x: np.prod(decays) * np.float64(x), parameters(0))
    for k in range(1, len(decays) + 1):
        weight = (1 - decays[k - 1]) * np.prod(decays[k:])
        total = jax.tree.map(lambda t, x, w=weight: t + w * np.float64(x), total, parameters(k))
    return total


@pytest.mark.parametrize("updates", [1, 2, 30])
def test_constant_decay_is_its_closed_form(updates):
    got = averaged(ema.EmaConfig(decay=0.9, warmup=False), updates)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6),
        got,
        closed_form(np.full(updates, 0.9)),
    )


@pytest.mark.parametrize("updates", [1, 2, 30])
def test_warm_up_is_its_closed_form_with_n_starting_at_one(updates):
    decays = np.array([min(0.7, (1 + n) / (10 + n)) for n in range(1, updates + 1)])
    assert decays[0] == 2 / 11
    if updates == 30:
        assert decays[-1] == 0.7 and (decays < 0.7).sum() == 19
    got = averaged(ema.EmaConfig(decay=0.7), updates)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6),
        got,
        closed_form(decays),
    )


# min(decay, (1 + n) / (10 + n)), as in LDM's LitEma, where n is 1 at the first update.
WARM_UP = {1: 2 / 11, 2: 3 / 12, 3: 4 / 13, 8: 1 / 2, 17: 2 / 3, 90: 0.91, 890: 0.99, 8990: 0.999}


@pytest.mark.parametrize("decay, last", [(0.9999, 89_990), (0.5, 8), (0.0, 0)])
def test_decay_warms_up_by_the_published_rule_and_stays(decay, last):
    config = ema.EmaConfig(decay=decay)
    compiled = jax.jit(ema.decay_at, static_argnums=0)
    for n, rule in {**WARM_UP, 89_990: 0.9999, 10**6: 0.9999}.items():
        want = rule if n <= last else decay
        np.testing.assert_allclose(ema.decay_at(config, n), want, rtol=1e-6)
        np.testing.assert_allclose(compiled(config, jnp.int32(n)), want, rtol=1e-6)


def test_without_warm_up_the_decay_is_the_same_from_the_first_update_on():
    config = ema.EmaConfig(decay=0.9, warmup=False)
    assert [float(ema.decay_at(config, n)) for n in (1, 2, 100)] == [float(np.float32(0.9))] * 3


def test_decay_zero_follows_the_parameters():
    got = averaged(ema.EmaConfig(decay=0.0), 3)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6), got, parameters(3))


def test_average_of_what_does_not_move_does_not_move():
    """Exactly: no drift over a long run of updates with a decay near 1."""
    params = parameters(0)
    average = jax.tree.map(jnp.asarray, params)
    for n in range(1, 50):
        average = ema.update(average, params, ema.decay_at(ema.EmaConfig(decay=0.999), n))
    jax.tree.map(np.testing.assert_array_equal, average, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(average)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5])
def test_decay_outside_of_its_range_is_refused(decay):
    with pytest.raises(
        InputError, match=rf"ema decay {decay} must be in \[0, 1\); 0 keeps no average"
    ):
        ema.EmaConfig(decay=decay)


WIDTHS = [0.02, 0.05, 0.1, 0.15, 0.25]


@pytest.mark.parametrize("width", [0.01, *WIDTHS, WIDEST])
def test_a_profile_of_the_exponent_has_the_width(width):
    """EDM2, eq. 10: the standard deviation of the profile as a share of t."""
    gamma = gamma_of(width)
    found = ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5
    np.testing.assert_allclose(found, width, rtol=1e-10)


def test_published_exponents():
    # EDM2, section 3.1: 5 % and 10 % are gamma 16.97 and 6.94.
    np.testing.assert_allclose([gamma_of(0.05), gamma_of(0.1)], [16.97, 6.94], atol=5e-3)


@pytest.mark.parametrize("width", WIDTHS)
def test_width_is_the_spread_of_the_profile(width):
    tau = (np.arange(200_000) + 0.5) / 200_000
    p = (gamma_of(width) + 1) * tau ** gamma_of(width) / 200_000
    mean = (p * tau).sum()
    np.testing.assert_allclose(np.sqrt((p * (tau - mean) ** 2).sum()), width, rtol=1e-6)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3, float("nan")])
def test_widths_that_no_profile_has_are_refused(width):
    with pytest.raises(InputError, match=r"ema width .* must be in \(0, 0.2887\]"):
        gamma_of(width)


def track(width, trajectory, at=()):
    """The average after the last update, by the definition in f64; and those after steps `at`."""
    gamma, average, seen = gamma_of(width), np.zeros_like(trajectory[0]), {}
    for n, p in enumerate(trajectory, 1):
        average = average + (1 - (1 - 1 / n) ** (gamma + 1)) * (p - average)
        if n in at:
            seen[n] = average
    return average, seen


@pytest.mark.parametrize("width", [0.05, 0.2, WIDEST])
def test_update_is_the_closed_form_of_its_telescoping_weights(width):
    """Of p_k the share ((k)^(g+1) - (k-1)^(g+1)) / n^(g+1); of the start nothing."""
    config, count = ema.EmaConfig(decay=0.0, power=(width,)), 40
    name, start = ema.power_name(width), {"w": jnp.array([7.0, -50.0])}
    averages, power = {name: start}, gamma_of(width) + 1

    @jax.jit
    def step(averages, n):
        k = n.astype(jnp.float32)
        return ema.advance(config, averages, {"w": jnp.stack([k, jnp.sin(k)])}, n)

    for n in range(1, count + 1):
        averages = step(averages, jnp.int32(n))
    k = np.arange(1.0, count + 1)
    shares = (k**power - (k - 1) ** power) / count**power
    want = [shares @ k, shares @ np.sin(k)]
    np.testing.assert_allclose(averages[name]["w"], want, rtol=2e-5)


@pytest.mark.parametrize("n", [1, 2, 1000, 10**6, 10**7])
def test_the_weight_of_an_update_keeps_its_digits_late_in_training(n):
    power = gamma_of(0.1) + 1
    want = 1.0 if n == 1 else -np.expm1(power * np.log1p(-1 / n))
    np.testing.assert_allclose(ema.power_weight(gamma_of(0.1), n), want, rtol=1e-6)


def test_several_averages_are_each_what_they_are_alone():
    config = ema.EmaConfig(decay=0.9, more=(0.99, 0.5), power=(0.05, 0.1))
    names = ema.average_names(config)
    assert names == ["ema", "ema-0.99", "ema-0.5", "ema-power-0.05", "ema-power-0.1"]
    params = [{"w": jnp.float32(np.random.default_rng(i).normal(size=3))} for i in range(12)]
    averages = {name: params[0] for name in names}
    alone = {decay: params[0] for decay in (0.9, 0.99, 0.5)}
    for n, p in enumerate(params[1:], 1):
        averages = ema.advance(config, averages, p, n)
        assert list(averages) == names
        alone = {
            d: ema.update(a, p, ema.decay_at(ema.EmaConfig(decay=d), n)) for d, a in alone.items()
        }
    for name, decay in (("ema", 0.9), ("ema-0.99", 0.99), ("ema-0.5", 0.5)):
        np.testing.assert_array_equal(averages[name]["w"], alone[decay]["w"])
    trajectory = [np.float64(p["w"]) for p in params[1:]]
    for width in (0.05, 0.1):
        want, _ = track(width, trajectory)
        np.testing.assert_allclose(averages[f"ema-power-{width}"]["w"], want, rtol=1e-4)


def test_without_a_decay_there_is_no_main_average():
    assert ema.average_names(ema.EmaConfig(decay=0.0)) == []
    assert ema.average_names(ema.EmaConfig(decay=0.0, power=(0.1,))) == ["ema-power-0.1"]
    assert ema.advance(ema.EmaConfig(decay=0.0), {}, {"w": 1.0}, 1) == {}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"more": (1.0,)}, r"1.0 must be in \(0, 1\)"),
        ({"more": (0.99, 0.99)}, "must differ"),
        ({"power": (0.3,)}, "ema width 0.3"),
        ({"snapshot_every": 5}, "0 without ema power"),
        ({"power": (0.1,), "snapshot_every": -1}, "at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        ema.EmaConfig(**fields)


leggauss = functools.cache(np.polynomial.legendre.leggauss)


def quadrature(gamma_a, t_a, gamma_b, t_b, nodes=150):
    """The integral of both profiles by Gauss-Legendre, in the logarithm of tau."""
    x, w = leggauss(nodes)
    end = np.log(min(t_a, t_b))
    low = end - 40.0
    u = low + (x + 1) * (end - low) / 2

    def profile(g, t):
        return (g + 1) / t * np.exp(g * (u - np.log(t)))

    return float((w * profile(gamma_a, t_a) * profile(gamma_b, t_b) * np.exp(u)).sum()) * 20.0


KEPT = [(s, w) for s in (25, 50, 75, 100) for w in (0.05, 0.1)]


def test_coefficients_are_those_of_an_independent_solve_by_quadrature():
    gammas = [(gamma_of(w), s) for s, w in KEPT]
    gram = np.array([[quadrature(*a, *b) for b in gammas] for a in gammas])
    g, t = np.array(gammas).T
    np.testing.assert_allclose(inner(g[:, None], t[:, None], g[None], t[None]), gram, rtol=1e-9)
    for step, width in ((100, 0.12), (100, 0.2), (90, 0.08)):
        wanted = np.array([quadrature(*a, gamma_of(width), step) for a in gammas])
        want = np.linalg.solve(gram, wanted)
        got, _ = coefficients(KEPT, step, width)
        np.testing.assert_allclose(got, want / want.sum(), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(got.sum(), 1, rtol=1e-12)


def test_a_kept_average_is_itself():
    for index, (step, width) in enumerate(KEPT):
        x, error = coefficients(KEPT, step, width)
        np.testing.assert_allclose(x, np.arange(len(KEPT)) == index, atol=1e-8)
        assert error < 1e-6


def test_more_snapshots_come_closer_and_doubles_do_no_harm():
    errors = []
    for count in (1, 4, 16):
        kept = [(s, w) for s in range(1600 // count, 1601, 1600 // count) for w in (0.05, 0.1)]
        errors.append(coefficients(kept, 1600, 0.15)[1])
    assert errors[0] > 2 * errors[1] and errors[1] > 5 * errors[2]
    x, error = coefficients([*KEPT, KEPT[-1]], 100, 0.12)
    y, want = coefficients(KEPT, 100, 0.12)
    np.testing.assert_allclose(error, want, rtol=1e-3)
    np.testing.assert_allclose(x[:-2], y[:-1], atol=1e-6)


@pytest.mark.parametrize("width, bound", [(0.07, 4e-3), (0.12, 4e-3), (0.15, 5e-3), (0.2, 2e-2)])
def test_a_third_width_is_the_one_tracked_directly_on_a_random_walk(width, bound):
    """Relative to how far that average is from the nearest one that was kept."""
    rng = np.random.default_rng(0)
    trajectory = list(np.cumsum(rng.normal(size=(1600, 200)), axis=0))
    at = range(100, 1601, 100)
    seen = {w: track(w, trajectory, at)[1] for w in (0.05, 0.1)}
    kept = [(s, w) for s in at for w in seen]
    x, error = coefficients(kept, 1600, width)
    got = sum(c * seen[w][s] for c, (s, w) in zip(x, kept, strict=True))
    want, _ = track(width, trajectory)
    nearest = min(np.linalg.norm(seen[w][1600] - want) for w in seen)
    off = np.linalg.norm(got - want) / nearest
    print(f"width {width}: profile off by {error:.2e}, average by {off:.2e} of the way")
    assert off < bound
