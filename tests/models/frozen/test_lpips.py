"""LPIPS keeps the laws of a distance, and its gradient is finite where a network sees nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.frozen import lpips as perceptual_net
from tests.models.test_layers import np_conv

X, Y = np.tanh(np.random.default_rng(0).standard_normal((2, 2, 16, 16, 3))).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """The same network with fewer channels: the laws are the same, and the tests are fast."""
    with pytest.MonkeyPatch.context() as patch:
        blocks = tuple(tuple(min(w // 16, 16) for w in widths) for widths in perceptual_net.BLOCKS)
        patch.setattr(perceptual_net, "BLOCKS", blocks)
        yield


@pytest.fixture(scope="module")
def params():
    """Kernels that keep the size of activations, small biases, positive lines."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        if len(leaf.shape) == 4:
            return values * np.float32((2 / np.prod(leaf.shape[:3])) ** 0.5)
        return np.abs(values) if path[0].key.startswith("lin") else 0.1 * values

    return jax.tree_util.tree_map_with_path(draw, perceptual_net.shapes())


@pytest.fixture(scope="module")
def answers(narrow):
    """Distances [B] and the gradient of their sum with respect to the first images."""

    @jax.jit
    def compute(params, x, y):
        distances, pullback = jax.vjp(lambda x: perceptual_net.lpips(params, x, y), x)
        return distances, pullback(jnp.ones_like(distances))[0]

    return compute


def test_an_image_is_at_no_distance_from_itself(answers, params):
    distances, gradient = answers(params, X, X)
    assert np.abs(distances).max() < 1e-9
    assert np.abs(gradient).max() < 1e-6


def test_distance_is_positive_symmetric_and_of_each_pair_alone(answers, params):
    distances, _ = answers(params, X, Y)
    assert distances.shape == (2,)
    assert (distances > 1e-2).all()
    np.testing.assert_allclose(distances, answers(params, Y, X)[0], rtol=1e-5)
    np.testing.assert_allclose(distances, answers(params, X[::-1], Y[::-1])[0][::-1], rtol=1e-5)


def test_distance_depends_on_the_direction_of_features_alone(answers, params):
    doubled = params | {"conv4_2": {k: 2 * v for k, v in params["conv4_2"].items()}}
    for a, b in zip(answers(params, X, Y), answers(doubled, X, Y), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_distance_is_the_sum_of_what_the_lines_say(answers, params):
    lines = [name for name in params if name.startswith("lin")]
    parts = []
    for name in lines:
        alone = {n: p if n == name else np.zeros_like(p) for n, p in params.items() if n in lines}
        parts.append(answers(params | alone, X, Y)[0])
    assert min(part.min() for part in parts) > 1e-5
    np.testing.assert_allclose(answers(params, X, Y)[0], sum(parts), rtol=1e-5)


def published_features(params, x):
    """VGG16's last activations of each block, before its pooling, each pixel's of length 1."""
    # torchvision's, for images in [0, 1].
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    h, out = ((x + 1) / 2 - mean) / deviation, []
    for block, count in enumerate((2, 2, 3, 3, 3)):
        if block:
            h = np.max([h[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)
        for layer in range(count):
            h = np.maximum(np_conv(h, params[f"conv{block}_{layer}"]), 0)
        out.append(h / (np.linalg.norm(h, axis=-1, keepdims=True) + 1e-10))
    return out


def published(params, x, y):
    """Zhang et al., CVPR 2018, eq. 1, in f64."""
    pairs = zip(published_features(params, x), published_features(params, y), strict=True)
    return sum(((a - b) ** 2 @ params[f"lin{i}"]).mean((1, 2)) for i, (a, b) in enumerate(pairs))


def test_distance_is_the_published_arithmetic(answers, params):
    wide = (np.asarray(a, np.float64) for a in (X, Y))
    np.testing.assert_allclose(answers(params, X, Y)[0], published(params, *wide), rtol=1e-4)


@pytest.mark.parametrize("block", [0, 2, 4])
def test_gradient_is_finite_where_features_are_zero(answers, params, block):
    name = f"conv{block}_0"
    bias = np.full_like(params[name]["bias"], -1e6)
    dead = params | {name: params[name] | {"bias": bias}}
    distances, gradient = answers(dead, X, Y)
    assert np.isfinite(distances).all()
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).max() > 0) == (block > 0)  # what still sees still teaches


def test_directions_have_a_finite_gradient_at_zero():
    """By themselves: behind a ReLU, XLA's gradient happens to drop what is not a number."""
    unit, pullback = jax.vjp(perceptual_net._unit, jnp.zeros((1, 2, 2, 4)))
    assert np.isfinite(pullback(jnp.ones_like(unit))[0]).all()


def test_gradient_is_finite_where_one_image_has_no_features(answers, params):
    """Without biases the mean colour excites nothing."""
    silent = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.zeros_like(leaf) if path[-1].key == "bias" else leaf, params
    )
    mean = np.broadcast_to(np.float32(perceptual_net.SHIFT), X.shape)
    for images in ((mean, Y), (Y, mean)):
        distances, gradient = answers(silent, *images)
        assert (distances > 0).all()
        assert np.isfinite(gradient).all()
