"""Each layer against numpy in f64, written from its formula and not from our code."""

import math
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.models import layers
from ldm_jax.models.layers import (
    Conv,
    Dense,
    GroupNorm,
    LayerNorm,
    attend,
    check_groups,
    declarations,
    downsample,
    draw_parameters,
    parameter_axes,
    resolve_dtype,
    upsample_nearest,
)
from ldm_jax.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    param_shardings,
    platform,
    replicated,
    use_mesh,
)


def np_conv(x, p, stride=1, padding=((1, 1), (1, 1))):
    """[B,H,W,C] by a sum over the kernel's positions; `p` holds `kernel` [k,k,C,D] and `bias`."""
    kernel = np.asarray(p["kernel"], np.float64)
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    size = kernel.shape[0]
    height, width = ((n - size) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((x.shape[0], height, width, kernel.shape[-1]))
    for i in range(size):
        for j in range(size):
            rows = slice(i, i + stride * (height - 1) + 1, stride)
            columns = slice(j, j + stride * (width - 1) + 1, stride)
            out += x[:, rows, columns] @ kernel[i, j]
    return out + np.asarray(p["bias"], np.float64)


def np_dense(x, p):
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p.get("bias", 0.0), np.float64)


def np_group_norm(x, p, groups, epsilon):
    out = np.empty(x.shape)
    size = x.shape[-1] // groups
    for b in range(x.shape[0]):
        for g in range(groups):
            part = np.asarray(x[b, ..., g * size : (g + 1) * size], np.float64)
            out[b, ..., g * size : (g + 1) * size] = (part - part.mean()) / np.sqrt(
                part.var() + epsilon
            )
    return out * np.asarray(p["scale"], np.float64) + np.asarray(p["bias"], np.float64)


def np_layer_norm(x, p, epsilon=1e-5):
    x = np.asarray(x, np.float64)
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return y * np.asarray(p["scale"], np.float64) + np.asarray(p["bias"], np.float64)


def np_attend(q, k, v):
    """[B,T,N,K]: softmax(q k^T / sqrt(K)) v, head by head."""
    out = np.empty(q.shape)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            logits = q[b, :, n] @ k[b, :, n].T / math.sqrt(q.shape[-1])
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[b, :, n] = weights / weights.sum(-1, keepdims=True) @ v[b, :, n]
    return out


def np_swish(x):
    return x / (1 + np.exp(-x))


def np_upsample(x):
    return x.repeat(2, axis=1).repeat(2, axis=2)


def random_parameters(shapes, seed=0):
    """Values without any zero or one, so that no parameter can hide; gains stay near 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        width = 0.3 if len(leaf.shape) == 1 else 1 / math.sqrt(math.prod(leaf.shape[:-1]))
        offset = 1.0 if path[-1].key == "scale" else 0.0
        return (offset + width * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def module_parameters(module, *inputs, seed=0):
    declared = declarations(module, *inputs)
    return random_parameters(jax.eval_shape(draw_parameters, declared, jax.random.key(0)), seed)


def initial_parameters(module, *inputs):
    """Values by the law that each parameter declares, drawn by numpy: nothing is compiled."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (leaf.offset + leaf.scale * rng.uniform(-1, 1, leaf.value.shape)).astype("f4"),
        declarations(module, *inputs),
        is_leaf=lambda x: hasattr(x, "names"),
    )


def apply(module, params, *inputs):
    return jax.jit(module.apply)({"params": params}, *inputs)


def run(module, *inputs, seed=0):
    """The module's output under random parameters, and these."""
    params = module_parameters(module, *inputs, seed=seed)
    return apply(module, params, *inputs), params


draw = jax.jit(draw_parameters)


def normal(*shape, seed=0, scale=1.0, shift=0.0):
    x = np.random.default_rng(seed).normal(size=shape) * scale + shift
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [
        (3, 1, ((1, 1), (1, 1))),
        (3, 2, ((1, 1), (1, 1))),
        (3, 2, ((0, 1), (0, 1))),
        (1, 1, ((0, 0), (0, 0))),
    ],
)
def test_conv_is_a_sum_over_the_kernel(size, stride, padding):
    x = normal(2, 6, 8, 3)
    y, p = run(Conv(5, size, stride, padding), x)
    np.testing.assert_allclose(y, np_conv(x, p, stride, padding), atol=1e-5)


@pytest.mark.parametrize(("symmetric", "seen"), [(False, [0, 1, 2]), (True, [0, 1])])
def test_downsample_pads_right_and_bottom_only_unless_symmetric(symmetric, seen):
    """The first output sees its own position and two more; padded all around, one more only."""
    module = downsample(4, symmetric=symmetric, dtype=jnp.float32, name=None)
    x = normal(1, 8, 8, 3)
    params = module_parameters(module, x)

    def out(x):
        return jnp.square(apply(module, params, x)[0, 0, 0]).sum()

    slope = jax.jit(jax.grad(out))(x)
    for axis in (1, 2):
        rows = np.abs(slope).max(tuple({0, 1, 2, 3} - {axis}))
        assert list(np.flatnonzero(rows)) == seen


def test_upsample_repeats_every_pixel():
    x = normal(2, 3, 4, 5)
    np.testing.assert_array_equal(upsample_nearest(x), np_upsample(np.asarray(x)))


@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_is_linear_in_the_last_axis(use_bias):
    x = normal(2, 4, 3)
    y, p = run(Dense(5, use_bias=use_bias), x)
    assert ("bias" in p) == use_bias
    np.testing.assert_allclose(y, np_dense(np.asarray(x, np.float64), p), atol=1e-5)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
def test_group_norm_has_its_statistics_per_group_and_its_epsilon_inside_the_root(epsilon):
    # Small values, so that epsilon counts; a mean, so that it must go.
    x = normal(2, 3, 4, 8, scale=2e-3, shift=0.1)
    y, p = run(GroupNorm(4, epsilon), x)
    np.testing.assert_allclose(y, np_group_norm(x, p, 4, epsilon), atol=1e-4)
    other = np_group_norm(x, p, 4, epsilon * 3)
    assert np.abs(other - np.asarray(y)).max() > 0.01 * np.abs(y).max()


def plain_group_norm(x, scale, bias, groups, epsilon):
    """The formula, for autodiff."""
    y = x.astype(jnp.float32).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean = y.mean((1, 3), keepdims=True)
    variance = jnp.square(y - mean).mean((1, 3), keepdims=True)
    y = ((y - mean) / jnp.sqrt(variance + epsilon)).reshape(x.shape)
    return (y * scale.reshape(1, 1, 1, -1) + bias.reshape(1, 1, 1, -1)).astype(x.dtype)


def value_and_gradients(norm, x, cotangent):
    """Of <norm(x), cotangent> by x, scale and bias, four groups; gradients of that in x as well."""
    scale, bias = normal(x.shape[-1], seed=3, shift=1.0), normal(x.shape[-1], seed=4)

    def answers(x, scale, bias):
        y, pullback = jax.vjp(lambda *inputs: norm(*inputs, 4, 1e-5), x, scale, bias)
        return y, pullback(cotangent)

    def slope(x):
        return sum(jnp.square(g).sum() for g in answers(x, scale, bias)[1])

    return jax.jit(lambda x: (answers(x, scale, bias), jax.grad(slope)(x)))(x)


@pytest.mark.parametrize("shape", [(3, 4, 6, 8), (2, 1, 1, 16), (1, 3, 1, 4)])
def test_group_norm_and_its_gradients_are_those_of_the_formula(shape):
    """Channels of unlike means, so that a group's statistics are not those of its channels."""
    x = normal(*shape) + normal(shape[-1], seed=1, scale=2.0).reshape(1, 1, 1, -1)
    cotangent = normal(*shape, seed=2)
    ours = value_and_gradients(layers.group_norm, x, cotangent)
    exact = value_and_gradients(plain_group_norm, x, cotangent)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * max(1.0, np.abs(b).max()))

    jax.tree.map(close, ours, exact)


def test_group_norm_of_bfloat16_has_gradients_of_f32_sums():
    shape = (2, 8, 8, 8)
    x, cotangent = normal(*shape, shift=4.0).astype(jnp.bfloat16), normal(*shape, seed=2)
    cotangent = cotangent.astype(jnp.bfloat16)
    (y, (dx, dscale, dbias)), _ = value_and_gradients(layers.group_norm, x, cotangent)
    (_, exact), _ = value_and_gradients(
        plain_group_norm, x.astype(jnp.float32), cotangent.astype(jnp.float32)
    )
    assert y.dtype == dx.dtype == jnp.bfloat16 and dscale.dtype == dbias.dtype == jnp.float32
    np.testing.assert_allclose(dscale, exact[1], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dbias, exact[2], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(np.asarray(dx, np.float32), exact[0], rtol=2**-8, atol=2e-4)


def test_group_norm_is_the_same_sharded_rematerialised_mapped_and_scanned():
    mesh = make_mesh(MeshConfig(2, 4, 1))
    x, cotangent = normal(8, 4, 4, 8), normal(8, 4, 4, 8, seed=2)
    scale, bias = normal(8, seed=3), normal(8, seed=4)

    def pullback(norm):
        def answers(x, scale, bias, cotangent):
            return jax.vjp(norm, x, scale, bias)[1](cotangent)

        return answers

    def norm(x, scale, bias):
        return layers.group_norm(x, scale, bias, 4, 1e-5)

    def mapped(x, scale, bias):
        return jax.vmap(lambda one: norm(one[None], scale, bias)[0])(x)

    def scanned(x, scale, bias):
        return jax.lax.scan(lambda _, one: (None, norm(one[None], scale, bias)[0]), None, x)[1]

    inputs = (x, scale, bias, cotangent)
    want = jax.jit(pullback(norm))(*inputs)
    rows = batch_sharding(mesh)
    places = (rows, replicated(mesh), replicated(mesh), rows)
    found = [jax.jit(pullback(norm), in_shardings=places)(*inputs)]
    found += [jax.jit(pullback(f))(*inputs) for f in (jax.checkpoint(norm), mapped, scanned)]

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    for have in found:
        jax.tree.map(close, have, want)


def test_layer_norm_has_its_statistics_per_position():
    x = normal(2, 5, 8, scale=2e-3)
    y, p = run(LayerNorm(), x)
    np.testing.assert_allclose(y, np_layer_norm(x, p), atol=1e-5)
    assert np.abs(np_layer_norm(x, p, 1e-6) - np.asarray(y)).max() > 0.01


@pytest.mark.parametrize("module", [GroupNorm(1), LayerNorm()])
def test_norm_statistics_of_bfloat16_input_are_f32(module):
    """4096 values with a mean of 8: bf16 sums would lose the deviation altogether."""
    shape = (1, 8, 8, 64) if isinstance(module, GroupNorm) else (1, 1, 4096)
    x = normal(*shape, shift=8.0).astype(jnp.bfloat16)
    y = apply(module, initial_parameters(module, x), x)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean()) / exact.std()
    # One rounding, of the result: half a unit in the last of 8 bits.
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=2e-4)


def test_attention_is_softmax_of_products_over_the_root_of_the_head_size():
    q, k, v = (normal(2, t, 3, 4, seed=i) for i, t in enumerate((5, 7, 7)))
    np.testing.assert_allclose(
        jax.jit(attend)(q, k, v),
        np_attend(*(np.asarray(a, np.float64) for a in (q, k, v))),
        atol=1e-5,
    )


def test_attention_to_a_single_token_returns_its_value_everywhere():
    q, k, v = (normal(2, t, 3, 4, seed=i) for i, t in enumerate((5, 1, 1)))
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), np.broadcast_to(v, q.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("module", "shape", "fan_in"),
    [(Conv(64), (1, 4, 4, 16), 144), (Dense(256), (1, 64), 64), (Conv(64, 1), (1, 4, 4, 128), 128)],
)
def test_initial_values_are_uniform_within_the_root_of_the_fan_in(module, shape, fan_in):
    params = draw(declarations(module, jnp.zeros(shape)), jax.random.key(0))
    bound = 1 / math.sqrt(fan_in)
    for leaf in params.values():
        assert leaf.dtype == jnp.float32
        assert 0.9 * bound < np.abs(leaf).max() <= bound
        # Variance of the uniform; its estimate has the relative error sqrt(0.8 / n).
        np.testing.assert_allclose(
            np.square(leaf).mean(), bound**2 / 3, rtol=5 * math.sqrt(0.8 / leaf.size)
        )


@pytest.mark.parametrize("module", [Conv(4, zero_init=True), Dense(4, zero_init=True)])
def test_zero_init_starts_at_zero(module):
    params = draw(declarations(module, jnp.zeros((1, 2, 2, 3))), jax.random.key(0))
    assert set(params) == {"kernel", "bias"}
    assert not any(np.any(leaf) for leaf in params.values())


def test_norms_start_as_pure_normalisation():
    params = draw(declarations(GroupNorm(2), jnp.zeros((1, 2, 2, 4))), jax.random.key(0))
    np.testing.assert_array_equal(params["scale"], np.ones(4))
    np.testing.assert_array_equal(params["bias"], np.zeros(4))


class _Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Conv(8, name="b")(Conv(8, name="a")(x))


def two():
    return declarations(_Two(), jnp.zeros((1, 2, 2, 8)))


@pytest.mark.parametrize("size", [layers.DRAW_SIZE, 600])
def test_no_two_parameters_share_their_draws_in_one_chunk_or_several(monkeypatch, size):
    # 584 numbers per layer: with chunks of 600, each layer has a draw of its own.
    monkeypatch.setattr(layers, "DRAW_SIZE", size)
    params = jax.device_get(jax.jit(lambda key: draw_parameters(two(), key))(jax.random.key(0)))
    everything = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])
    assert len(np.unique(everything)) > 0.99 * everything.size
    correlation = np.corrcoef(np.ravel(params["a"]["kernel"]), np.ravel(params["b"]["kernel"]))
    assert abs(correlation[0, 1]) < 5 / math.sqrt(576)


def test_initial_values_depend_on_the_key_and_not_on_the_mesh():
    """They do depend on DRAW_SIZE and on the order of names: both belong to what a seed means."""
    declared = two()

    def make(key):
        return draw_parameters(declared, key)

    shapes = jax.eval_shape(make, jax.random.key(0))
    single = jax.jit(make)
    whole = single(jax.random.key(0))
    for config in (MeshConfig(8, 1, 1), MeshConfig(2, 2, 2)):
        mesh = make_mesh(config)
        shardings = param_shardings(parameter_axes(declared), shapes, mesh)
        split = jax.jit(make, out_shardings=shardings)(jax.random.key(0))
        jax.tree.map(np.testing.assert_array_equal, split, whole)
    other = single(jax.random.key(1))
    assert np.all(np.asarray(other["a"]["kernel"]) != np.asarray(whole["a"]["kernel"]))


def test_axes_name_every_dimension():
    declared = two()
    params = jax.eval_shape(draw_parameters, declared, jax.random.key(0))
    names = parameter_axes(declared)
    jax.tree.map(lambda leaf, n: np.testing.assert_equal(len(n), leaf.ndim), params, names)
    assert names["a"]["kernel"] == (None, None, "in_channels", "out_channels")


@pytest.mark.parametrize("module", [Conv(4), Dense(4)])
def test_bfloat16_is_the_type_of_products_and_f32_that_of_parameters(module):
    module = module.clone(dtype=jnp.bfloat16)
    x = normal(1, 4, 4, 3)
    y, params = run(module, x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.value.dtype for leaf in declarations(module, x).values()} == {jnp.dtype("float32")}
    exact = apply(module.clone(dtype=jnp.float32), params, x)
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.05)
    assert not np.array_equal(np.asarray(y, np.float32), exact)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")]
)
def test_auto_dtype_is_that_of_the_meshs_platform_wherever_it_is_compiled(kind, dtype):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=kind)]))
    with use_mesh(mesh):
        assert platform() == kind
        assert resolve_dtype("auto") == dtype
        assert resolve_dtype("float32") == "float32"
    assert resolve_dtype("auto") == "float32"  # the host's own, where no mesh is in use


def test_compute_dtype_names():
    assert resolve_dtype("bfloat16") == jnp.bfloat16
    assert resolve_dtype("float32") == jnp.float32
    # "auto" on the CPU, where these tests run.
    assert resolve_dtype("auto") == jnp.float32
    with pytest.raises(InputError, match=r"compute_dtype 'fp16' is unknown; choose .*'auto'"):
        resolve_dtype("fp16")


def test_widths_that_do_not_divide_into_groups_are_refused():
    check_groups([32, 64], 32, "unet")
    with pytest.raises(
        InputError, match=r"unet: width\(s\) \[24, 40\] must divide by norm_groups 16"
    ):
        check_groups([32, 40, 24, 40], 16, "unet")
