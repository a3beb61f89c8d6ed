"""The average against its closed form in f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.train import ema


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


def test_decay_of_published_runs_warms_up_and_stays():
    config = ema.EmaConfig()
    for n, want in ((1, 2 / 11), (90, 91 / 100), (89_990, 0.9999), (10**6, 0.9999)):
        np.testing.assert_allclose(ema.decay_at(config, n), want, rtol=1e-6)
        np.testing.assert_allclose(
            jax.jit(ema.decay_at, static_argnums=0)(config, n), want, rtol=1e-6
        )


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
