"""AdamW, clipping and schedules against their formulas in f64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.errors import InputError
from ldm_jax.train import optim

PARAMS = {"w": np.array([1.0, -2.0, 0.5], np.float32), "b": np.array([3.0], np.float32)}
GRADS = [
    {"w": np.array([0.3, -0.1, 4.0], np.float32), "b": np.array([-2.0], np.float32)},
    {"w": np.array([-1.3, 0.2, 1.0], np.float32), "b": np.array([0.7], np.float32)},
]


def trained(config, num_steps=10, grads=GRADS):
    optimizer = optim.make_optimizer(config, num_steps)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
    return params


def adamw(config, rates, grads=GRADS):
    """Loshchilov & Hutter (2019), algorithm 2, weight decay times the learning rate as in optax."""
    out = {}
    for name in PARAMS:
        p = PARAMS[name].astype(np.float64)
        m = v = np.zeros_like(p)
        for i, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
            g = g[name].astype(np.float64)
            m = config.b1 * m + (1 - config.b1) * g
            v = config.b2 * v + (1 - config.b2) * g * g
            m_hat, v_hat = m / (1 - config.b1**i), v / (1 - config.b2**i)
            p = p - lr * (m_hat / (np.sqrt(v_hat) + config.eps) + config.weight_decay * p)
        out[name] = p
    return out


def assert_close(got, want, rtol=2e-6):
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=rtol, err_msg=name)


@pytest.mark.parametrize(
    "config",
    [
        optim.OptimConfig(lr=0.1),
        optim.OptimConfig(lr=0.1, b1=0.5, b2=0.9),
        optim.OptimConfig(lr=0.1, weight_decay=0.3),
        optim.OptimConfig(lr=0.1, eps=0.5),
    ],
    ids=["defaults", "betas", "weight decay", "eps"],
)
def test_two_steps_are_the_published_algorithm(config):
    assert_close(trained(config), adamw(config, [0.1, 0.1]), rtol=1e-5)


def test_weight_decay_is_decoupled_from_the_gradient():
    """The decay shrinks parameters by lr * weight_decay, whatever the gradient's size."""
    config = optim.OptimConfig(lr=0.1, weight_decay=0.3)
    for factor in (1.0, 1000.0):
        grads = [jax.tree.map(lambda g, f=factor: g * np.float32(f), GRADS[0])]
        decayed = trained(config, grads=grads)
        plain = trained(optim.OptimConfig(lr=0.1), grads=grads)
        difference = jax.tree.map(lambda d, p: p - d, decayed, plain)
        assert_close(difference, {k: 0.03 * v for k, v in PARAMS.items()}, rtol=1e-4)


def test_clipping_scales_all_gradients_by_one_norm():
    # A large eps, so that AdamW's step keeps the gradient's scale and clipping shows.
    config = optim.OptimConfig(lr=0.1, eps=10.0, clip_norm=1.0)
    norms = [np.sqrt(sum(np.square(x).sum() for x in g.values())) for g in GRADS]
    assert min(norms) > 1
    scaled = [{k: x / n for k, x in g.items()} for g, n in zip(GRADS, norms, strict=True)]
    assert_close(trained(config), adamw(config, [0.1, 0.1], scaled), rtol=1e-5)
    loose = optim.OptimConfig(lr=0.1, eps=10.0, clip_norm=100.0)
    assert_close(trained(loose), adamw(loose, [0.1, 0.1]), rtol=1e-5)


def rates(config, num_steps):
    schedule = optim.learning_rate(config, num_steps)
    return np.array([schedule(n) for n in range(num_steps)])


def test_constant_rate_is_the_rate():
    np.testing.assert_allclose(rates(optim.OptimConfig(lr=0.3), 5), np.full(5, 0.3), rtol=1e-6)


def test_warm_up_is_linear_reaches_the_rate_and_already_moves_at_the_first_update():
    got = rates(optim.OptimConfig(lr=0.3, warmup_steps=4), 8)
    np.testing.assert_allclose(got, 0.3 * np.array([1, 2, 3, 4, 4, 4, 4, 4]) / 4, rtol=1e-6)
    moved = trained(optim.OptimConfig(lr=0.3, warmup_steps=4), grads=GRADS[:1])
    assert all(np.all(np.asarray(moved[k]) != PARAMS[k]) for k in PARAMS)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_cosine_falls_to_the_final_fraction(warmup, fraction):
    steps = 12
    config = optim.OptimConfig(
        lr=0.3, schedule="cosine", warmup_steps=warmup, final_lr_fraction=fraction
    )
    got = rates(config, steps)
    share = np.clip((np.arange(steps) - warmup) / (steps - warmup), 0, 1)
    want = 0.3 * (fraction + (1 - fraction) * 0.5 * (1 + np.cos(np.pi * share)))
    want[:warmup] = 0.3 * np.arange(1, warmup + 1) / max(warmup, 1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        optim.learning_rate(config, steps)(steps), 0.3 * fraction, rtol=1e-5, atol=1e-8
    )
    assert got[-1] > 0.3 * fraction  # the last update is not wasted


def test_rsqrt_halves_after_three_times_its_steps():
    config = optim.OptimConfig(lr=0.3, schedule="rsqrt", decay_steps=5, warmup_steps=2)
    rate = optim.learning_rate(config, 100)
    np.testing.assert_allclose([rate(0), rate(1), rate(2)], [0.15, 0.3, 0.3], rtol=1e-6)
    np.testing.assert_allclose([rate(2 + 15), rate(2 + 75)], [0.15, 0.075], rtol=1e-6)


def test_edm2_is_flat_up_to_its_steps_and_falls_with_their_root():
    config = optim.OptimConfig(lr=0.3, schedule="edm2", decay_steps=8, warmup_steps=4)
    rate = optim.learning_rate(config, 100)
    np.testing.assert_allclose([rate(n) for n in range(4)], [0.075, 0.15, 0.225, 0.3], rtol=1e-6)
    np.testing.assert_allclose([rate(8), rate(32), rate(72)], [0.3, 0.15, 0.1], rtol=1e-6)
    without = optim.learning_rate(optim.OptimConfig(lr=0.3, schedule="edm2", decay_steps=8), 100)
    np.testing.assert_allclose([without(0), without(32)], [0.3, 0.15], rtol=1e-6)
    slow = optim.OptimConfig(lr=0.3, schedule="edm2", decay_steps=2, warmup_steps=16)
    np.testing.assert_allclose(optim.learning_rate(slow, 100)(7), 0.15 * (2 / 7) ** 0.5, rtol=1e-6)


def test_step_uses_the_rate_of_the_schedule():
    config = optim.OptimConfig(lr=0.1, warmup_steps=2, schedule="cosine")
    assert_close(trained(config), adamw(config, rates(config, 10)[:2]), rtol=1e-5)


def test_unknown_choices_are_refused_with_the_known_ones():
    with pytest.raises(
        InputError, match=r"optim schedule 'step' is unknown; choose one of .*'cosine'"
    ):
        optim.OptimConfig(schedule="step")
    with pytest.raises(InputError, match=r"optim name 'sgd' is unknown; choose one of .*'muon'"):
        optim.OptimConfig(name="sgd")
    with pytest.raises(InputError, match="optim weight_decay_mask 'some' is unknown"):
        optim.OptimConfig(weight_decay_mask="some")
    with pytest.raises(InputError, match="optim decay_steps 0 must be at least 1"):
        optim.OptimConfig(decay_steps=0)
    with pytest.raises(InputError, match="'adam' has no weight decay, weight_decay is"):
        optim.OptimConfig(name="adam", weight_decay=0.1)
