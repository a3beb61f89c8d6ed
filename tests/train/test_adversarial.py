"""The adversary: its losses against their formulas, its weight, its turn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.models import discriminator
from ldm_jax.train import adversarial


def test_discriminator_losses_are_their_formulas():
    real, fake = np.random.default_rng(0).normal(size=(2, 4, 3, 3, 1)).astype(np.float32) * 2
    hinges = np.maximum(1 - real, 0) + np.maximum(1 + fake, 0)
    np.testing.assert_allclose(adversarial.hinge(real, fake), hinges.mean() / 2, rtol=1e-6)
    cross_entropy = np.log1p(np.exp(-real)) + np.log1p(np.exp(fake))
    np.testing.assert_allclose(adversarial.vanilla(real, fake), cross_entropy.mean() / 2, rtol=1e-5)


def test_adaptive_weight_is_clamped():
    one = jnp.ones((2, 2))
    weight = adversarial.adaptive_weight
    np.testing.assert_allclose(weight(3 * one, one, 1e4), 3 * 2 / (2 + 1e-4), rtol=1e-6)
    assert weight(one, 0 * one, 1e4) == 1e4
    assert weight(one, one, 0.5) == 0.5


@pytest.mark.parametrize(
    "norm, loss, more",
    [("act", "vanilla", dict(lecam_weight=0.01)), ("none", "hinge", dict(gradient_penalty=0.1))],
)
def test_discriminator_learns_to_tell(norm, loss, more):
    """On one batch of images and blurred ones, whatever its norm and regulariser."""
    network = discriminator.DiscriminatorConfig(width=8, num_layers=1, norm=norm)
    config = adversarial.AdversarialConfig(
        weight=1.0, start=1, loss=loss, discriminator=network, **more
    )
    optimizer = optax.adam(3e-3)
    carried = before = adversarial.start(config, jax.random.key(0), optimizer, 3)
    x = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 3)).astype(np.float32)
    blurred = x.mean((1, 2), keepdims=True) + 0 * x

    @jax.jit
    def turn(carried, step):
        return adversarial.discriminator_turn(config, optimizer, carried, x, blurred, step)

    carried, _ = turn(carried, 0)
    jax.tree.map(np.testing.assert_array_equal, carried, before)
    losses = []
    for n in range(30):
        carried, metrics = turn(carried, n + 1)
        losses.append(float(metrics["discriminator"]))
    assert losses[-1] < 0.6 * losses[0]
    assert float(metrics["logit_fake"]) < 0 < float(metrics["logit_real"])
    if more.get("lecam_weight"):
        assert carried["lecam"]["real"] > 0 > carried["lecam"]["fake"]


@pytest.fixture
def by_hand(monkeypatch):
    """A discriminator of one multiplication; gives a turn's loss and what is carried after it."""
    monkeypatch.setattr(
        adversarial.discriminator, "apply", lambda config, p, x: (p["w"] * x[..., :1], {})
    )
    optimizer = optax.set_to_zero()
    network = discriminator.DiscriminatorConfig(norm="none")

    def turn(x, x_hat, step, lecam=None, **fields):
        config = adversarial.AdversarialConfig(weight=1.0, start=3, discriminator=network, **fields)
        params = {"w": jnp.float32(2)}
        carried = {"params": params, "optimizer": optimizer.init(params)}
        carried |= {"lecam": lecam} if lecam else {}
        carried, metrics = adversarial.discriminator_turn(
            config, optimizer, carried, x, x_hat, jnp.int32(step)
        )
        return float(metrics["discriminator"]), carried.get("lecam")

    return turn


X, X_HAT = np.random.default_rng(0).normal(size=(2, 4, 3, 5, 3)).astype(np.float32)


def test_lecam_pulls_to_the_other_sides_anchor_from_the_second_turn_on(by_hand):
    """Tseng et al., CVPR 2021: E[D(x) - a_F]_+^2 + E[a_R - D(G)]_+^2, anchors of decay 0.99."""
    real, fake = 2 * X[..., 0], 2 * X_HAT[..., 0]
    plain, _ = by_hand(X, X_HAT, 3)
    nothing = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
    first, anchors = by_hand(X, X_HAT, 3, nothing, lecam_weight=0.5)
    assert first == pytest.approx(plain, rel=1e-6)
    np.testing.assert_allclose(anchors["real"], real.mean(), rtol=1e-5)
    np.testing.assert_allclose(anchors["fake"], fake.mean(), rtol=1e-5)

    before = {"real": jnp.float32(0.75), "fake": jnp.float32(-0.25)}
    second, anchors = by_hand(X, X_HAT, 4, before, lecam_weight=0.5)
    pull = np.square(np.maximum(real + 0.25, 0)).mean()
    pull += np.square(np.maximum(0.75 - fake, 0)).mean()
    assert second == pytest.approx(plain + 0.5 * pull, rel=1e-5)
    np.testing.assert_allclose(anchors["real"], 0.99 * 0.75 + 0.01 * real.mean(), rtol=1e-5)
    np.testing.assert_allclose(anchors["fake"], 0.99 * -0.25 + 0.01 * fake.mean(), rtol=1e-5)


def test_gradient_penalty_is_half_of_gamma_times_the_squared_slope_at_real_images(by_hand):
    """Mescheder et al., ICML 2018, eq. 9. The slope by each of 15 pixels of a channel is 2 / 15."""
    plain, _ = by_hand(X, X_HAT, 3)
    penalised, _ = by_hand(X, X_HAT, 3, gradient_penalty=10.0)
    assert penalised - plain == pytest.approx(10 / 2 * 15 * (2 / 15) ** 2, rel=1e-4)
