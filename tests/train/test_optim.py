"""Optimizers and schedules against their formulas in f64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.errors import InputError
from ldm_jax.models import autoencoder, denoiser
from ldm_jax.sharding import key_name
from ldm_jax.train import optim
from tests import tiny

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


EDGES = ("conv_in",)
SHAPES = {
    "conv_in": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "hidden": {"kernel": (8, 6), "bias": (6,)},
    "large": {"kernel": (128, 128)},  # from this size on Adafactor factors
    "embedding": (11, 8),
}


def random_tree(seed):
    flat, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [rng.normal(size=s).astype(np.float32) for s in flat])


TREE, SLOPES = random_tree(0), random_tree(1)


def one_update(config):
    optimizer = optim.make_optimizer(config, 10, EDGES)
    return optimizer.update(SLOPES, optimizer.init(TREE), TREE)[0]


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimizer_lowers_a_quadratic(name):
    optimizer = optim.make_optimizer(optim.OptimConfig(name=name, lr=0.05), 30, EDGES)

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda x: 2 * x, params)  # of the sum of squares
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        return jax.lax.scan(step, (params, optimizer.init(params)), None, 30)[0][0]

    end = run(TREE)
    for before, after in zip(jax.tree.leaves(TREE), jax.tree.leaves(end), strict=True):
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
    want = jax.tree.map(lambda g: FIRST[name](g.astype(np.float64)), SLOPES)
    if name == "muon":
        for layer in ("hidden", "large"):
            want[layer]["kernel"] = first_muon(SLOPES[layer]["kernel"].astype(np.float64))
    tolerance = 2e-4 if name == "muon" else 1e-5
    jax.tree.map(
        lambda got, w: np.testing.assert_allclose(got, w, rtol=tolerance, atol=tolerance),
        one_update(config),
        want,
    )


def second_update(config, slopes):
    """The update of the gradients `slopes`, after that of SLOPES."""
    optimizer = optim.make_optimizer(config, 10, EDGES)
    state = optimizer.update(SLOPES, optimizer.init(TREE), TREE)[1]
    return optimizer.update(slopes, state, TREE)[0]


@pytest.mark.parametrize("momentum", [0.5, 0.95])
def test_muons_momentum_is_nesterovs_with_its_bias_corrected(momentum):
    """Of the momentum of the next step and the gradient of this one (Dozat, 2016)."""
    config = optim.OptimConfig(name="muon", lr=0.1, momentum=momentum)
    other = random_tree(2)
    got = second_update(config, other)["hidden"]["kernel"]
    g1, g2 = (np.float64(tree["hidden"]["kernel"]) for tree in (SLOPES, other))
    m = (1 - momentum) * (momentum * g1 + g2)
    look = momentum * m / (1 - momentum**3) + (1 - momentum) * g2 / (1 - momentum**2)
    np.testing.assert_allclose(got, first_muon(look), rtol=2e-4, atol=2e-4)


def test_lions_two_decays_are_of_its_step_and_of_its_memory():
    """Chen et al., 2023, algorithm 2: the sign of b1 m + (1 - b1) g, then m = b2 m + (1 - b2) g."""
    against = jax.tree.map(lambda g: -0.3 * g, SLOPES)
    for b2, sign in ((0.5, 1), (0.99, -1)):  # 0.45 - 0.03, and 0.009 - 0.03
        update = second_update(optim.OptimConfig(name="lion", lr=0.1, b2=b2), against)
        jax.tree.map(
            lambda u, g, s=sign: np.testing.assert_allclose(u, -0.1 * s * np.sign(g), rtol=1e-6),
            update,
            SLOPES,
        )


def test_adafactors_momentum_takes_its_share_of_the_first_update():
    whole, tenth = (one_update(optim.OptimConfig(name="adafactor", b1=b1)) for b1 in (0.0, 0.9))
    jax.tree.map(lambda w, t: np.testing.assert_allclose(t, 0.1 * w, rtol=1e-5), whole, tenth)


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
        shares = jax.tree.map(lambda _, k=kernels: 0.03 * k, TREE)
        for layer in ("conv_in", "hidden", "large"):
            shares[layer]["kernel"] = 0.03
        jax.tree.map(
            lambda d, p, x, share: np.testing.assert_allclose(p - d, share * x, atol=1e-6),
            decayed,
            plain,
            TREE,
            shares,
        )


def paths_of(tree, wanted=lambda leaf: True):
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: x is None or isinstance(x, optim.MuonDimensionNumbers)
    )
    return {"/".join(key_name(k) for k in path) for path, leaf in leaves if wanted(leaf)}


def hidden(model, init, edges):
    """Paths of what Muon takes of a model."""
    shapes = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    return paths_of(optim.muon_dimensions(shapes, edges), lambda d: d is not None)


def test_muon_takes_the_hidden_matrices_of_our_models():
    model = tiny.DENOISER.model
    got = hidden(model, denoiser.init, model.network.edges)
    block = "backbone/mid_attention/block0_"
    for layer in ("self/q", "cross/v", "self/out", "feed_forward/in", "feed_forward/out"):
        assert f"{block}{layer}/kernel" in got
    assert "backbone/down0_block0/time/kernel" in got
    assert "backbone/up0_block0/shortcut/kernel" in got  # a 1x1 convolution is a dense layer
    assert all(p.endswith("/kernel") for p in got)
    for word in ("conv", "time_in", "embedding", "sample"):
        assert not [p for p in got if word in p]
    assert "backbone/time_in/kernel" in hidden(model, denoiser.init, ())
    got = hidden(tiny.AUTOENCODER.model, autoencoder.init, autoencoder.EDGES)
    assert {p.split("/")[-2] for p in got} == {"q", "k", "v", "out", "shortcut"}
