"""Every optimizer: it descends, it is the published one, its state is sharded, saved, restored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.models import autoencoder, denoiser
from ldm_jax.sharding import MeshConfig, host_array, key_name, make_mesh
from ldm_jax.train import optim
from ldm_jax.train.checkpoint import Checkpoints
from ldm_jax.train.state import abstract_like, init_state
from tests import tiny

AXES = {
    "conv_in": {
        "kernel": (None, None, "in_channels", "out_channels"),
        "bias": ("out_channels",),
    },
    "hidden": {"kernel": ("in_channels", "out_channels"), "bias": ("out_channels",)},
    "large": {"kernel": ("in_channels", "out_channels")},
    "embedding": ("vocab", "in_channels"),
}
SHAPES = {
    "conv_in": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "hidden": {"kernel": (8, 6), "bias": (6,)},
    "large": {"kernel": (128, 128)},  # from this size on Adafactor factors
    "embedding": (11, 8),
}


def drawn(seed):
    flat, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [rng.normal(size=s).astype(np.float32) for s in flat])


PARAMS, GRADS = drawn(0), drawn(1)


def one_update(config):
    optimizer = optim.make_optimizer(config, 10)
    return optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)[0]


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimizer_lowers_a_quadratic(name):
    optimizer = optim.make_optimizer(optim.OptimConfig(name=name, lr=0.05), 30)
    loss = lambda p: sum(jnp.square(x).sum() for x in jax.tree.leaves(p))  # noqa: E731

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, 30)[0][0]  # noqa: E731
    end = jax.jit(run)(PARAMS)
    for before, after in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(end), strict=True):
        assert np.square(after).sum() < 0.8 * np.square(before).sum()


def newton_schulz(g):
    """Jordan et al., 2024, in f64: five steps of the quintic iteration on G / ||G||_F."""
    x = g / np.linalg.norm(g)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def first_adam(g):
    return -0.1 * g / (np.abs(g) + 1e-8)


def first_muon(g):
    return -0.1 * 0.2 * np.sqrt(max(g.shape)) * newton_schulz(g)


def first_adafactor(g):
    """Without momentum: Shazeer & Stern, 2018, algorithm 4, at its first step, where decay is 0."""
    square = np.square(g)
    if g.ndim == 2 and min(g.shape) >= 128:
        v = square.mean(1, keepdims=True) * square.mean(0, keepdims=True) / square.mean()
    else:
        v = square
    u = g / np.sqrt(v)
    return -0.1 * u / max(1.0, np.sqrt(np.square(u).mean()))


FIRST = {
    "adamw": first_adam,
    "adam": first_adam,
    "lion": lambda g: -0.1 * np.sign(g),
    "adafactor": first_adafactor,
    "muon": first_adam,
}


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_first_update_is_the_published_one(name):
    config = optim.OptimConfig(name=name, lr=0.1, b1=0.0 if name == "adafactor" else 0.9)
    want = jax.tree.map(lambda g: FIRST[name](g.astype(np.float64)), GRADS)
    if name == "muon":
        for layer in ("hidden", "large"):
            want[layer]["kernel"] = first_muon(GRADS[layer]["kernel"].astype(np.float64))
    tolerance = 2e-4 if name == "muon" else 1e-5
    jax.tree.map(
        lambda got, w: np.testing.assert_allclose(got, w, rtol=tolerance, atol=tolerance),
        one_update(config),
        want,
    )


def test_orthogonal_update_has_the_size_of_adamws():
    """So that the learning rate carries over: 0.2, which is what AdamW's settle at."""
    update = one_update(optim.OptimConfig(name="muon", lr=1.0))["large"]["kernel"]
    assert 0.14 < np.sqrt(np.square(update).mean()) < 0.26


@pytest.mark.parametrize("name", [n for n in optim.OPTIMIZERS if n != "adam"])
def test_decay_is_the_rate_times_the_decay_and_the_mask_leaves_out_all_but_kernels(name):
    config = optim.OptimConfig(name=name, lr=0.1)
    plain = one_update(config)
    for mask in optim.MASKS:
        decayed = one_update(dataclasses.replace(config, weight_decay=0.3, weight_decay_mask=mask))
        kernels = mask == "all"
        shares = jax.tree.map(lambda _, k=kernels: 0.03 * k, PARAMS)
        for layer in ("conv_in", "hidden", "large"):
            shares[layer]["kernel"] = 0.03
        jax.tree.map(
            lambda d, p, x, share: np.testing.assert_allclose(p - d, share * x, atol=1e-6),
            decayed,
            plain,
            PARAMS,
            shares,
        )


def paths_of(tree, wanted=lambda leaf: True):
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: x is None or isinstance(x, optim.MuonDimensionNumbers)
    )
    return {"/".join(key_name(k) for k in path) for path, leaf in leaves if wanted(leaf)}


def test_muon_takes_the_hidden_matrices_of_our_models():
    shapes = jax.eval_shape(lambda: denoiser.init(tiny.DENOISER.model, jax.random.key(0)))
    got = paths_of(optim.muon_dimensions(shapes), lambda d: d is not None)
    block = "backbone/mid_attention/block0_"
    for layer in ("self/q", "cross/v", "self/out", "feed_forward/in", "feed_forward/out"):
        assert f"{block}{layer}/kernel" in got
    assert "backbone/down0_block0/time/kernel" in got
    assert "backbone/up0_block0/shortcut/kernel" in got  # a 1x1 convolution is a dense layer
    assert all(p.endswith("/kernel") for p in got)
    for word in ("conv", "time_in", "embedding", "sample"):
        assert not [p for p in got if word in p]
    shapes = jax.eval_shape(lambda: autoencoder.init(tiny.AUTOENCODER.model, jax.random.key(0)))
    got = paths_of(optim.muon_dimensions(shapes), lambda d: d is not None)
    assert {p.split("/")[-2] for p in got} == {"q", "k", "v", "out", "shortcut"}


def made(name, config=MeshConfig(2, 2, 2)):
    optimizer = optim.make_optimizer(optim.OptimConfig(name=name, lr=0.1, warmup_steps=2), 10)
    state, shardings = init_state(
        lambda: jax.tree.map(jnp.asarray, PARAMS),
        AXES,
        optimizer,
        make_mesh(config),
        with_ema=False,
    )

    def step(state):
        updates, opt_state = optimizer.update(GRADS, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)

    return state, jax.jit(step, out_shardings=shardings)


def bytes_on_a_device(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_state_is_sharded_as_the_parameters_are(name):
    state, _ = made(name)
    of_params = bytes_on_a_device(state.params)
    assert of_params < 0.3 * sum(x.nbytes for x in jax.tree.leaves(PARAMS))
    whole = {"adamw": 2, "adam": 2, "lion": 1}.get(name)
    if whole:
        assert 0 <= bytes_on_a_device(state.opt_state) - whole * of_params <= 16  # the counts
    by_path = {p: s for p, s in _specs(state.params)}
    for path, spec in _specs(state.opt_state):
        same = [s for p, s in by_path.items() if path[0].endswith(p[0]) and path[1] == p[1]]
        assert not same or spec == same[0], path
        assert same or spec == (), path


def _specs(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(key_name(k) for k in path)
        spec = leaf.sharding.spec
        yield (name, leaf.shape), tuple(spec) if any(spec) else ()


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_restored_state_goes_on_bit_for_bit(name, tmp_path):
    state, step = made(name)
    state = step(step(state))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(2, abstract_like(made(name)[0]))
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for got, want in zip(
        jax.tree.leaves(step(restored)), jax.tree.leaves(step(state)), strict=True
    ):
        np.testing.assert_array_equal(host_array(got), host_array(want))
