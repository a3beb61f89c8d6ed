"""The U-Net against the published architecture: its size, its arithmetic, its start at zero."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.models import unet
from ldm_jax.models.conditions import Signals, Widths
from ldm_jax.models.unet import _ResBlock, _SelfAttention, _SpatialTransformer, time_embedding
from tests.models.test_layers import apply as apply_module
from tests.models.test_layers import (
    initial_parameters,
    module_parameters,
    normal,
    np_attend,
    np_conv,
    np_dense,
    np_group_norm,
    np_layer_norm,
    np_swish,
    np_upsample,
    random_parameters,
    run,
)


def published_count(config, context_dim):
    """Arithmetic over the levels of the published architecture."""
    width, multipliers = config.width, config.width_multipliers

    def conv(i, o, k=3):
        return k * k * i * o + o

    def linear(i, o):
        return i * o + o

    def norm(c):
        return 2 * c

    def res(i, o):
        time = linear(4 * width, 2 * o if config.scale_shift_norm else o)
        shortcut = conv(i, o, 1) if i != o else 0
        return norm(i) + conv(i, o) + time + norm(o) + conv(o, o) + shortcut

    def attend(c):
        if not context_dim:
            return norm(c) + linear(c, 3 * c) + linear(c, c)
        own = 3 * c * c + linear(c, c)
        cross = c * c + 2 * context_dim * c + linear(c, c)
        block = 3 * norm(c) + own + cross + linear(c, 8 * c) + linear(4 * c, c)
        return norm(c) + 2 * linear(c, c) + config.transformer_depth * block

    def resample(c):
        return res(c, c) if config.resample_in_blocks else conv(c, c)

    total = linear(width, 4 * width) + linear(4 * width, 4 * width)
    total += conv(config.in_channels, width)
    c, skips, last = width, [width], len(multipliers) - 1
    for level, multiplier in enumerate(multipliers):
        for _ in range(config.num_res_blocks):
            total += res(c, width * multiplier)
            c = width * multiplier
            total += attend(c) if 2**level in config.attention_factors else 0
            skips.append(c)
        if level != last:
            total += resample(c)
            skips.append(c)
    total += 2 * res(c, c) + attend(c)
    for level in reversed(range(len(multipliers))):
        for _ in range(config.num_res_blocks + 1):
            total += res(c + skips.pop(), width * multipliers[level])
            c = width * multipliers[level]
            total += attend(c) if 2**level in config.attention_factors else 0
        total += resample(c) if level else 0
    assert not skips
    return total + norm(c) + conv(c, config.out_channels)


def count(shapes):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def shapes_of(config, widths=Widths()):
    return jax.eval_shape(lambda: unet.init(config, jax.random.key(0), widths))


# Released models that are no presets of ours (yet): the options that the presets leave alone.
SD_V1 = unet.UNetConfig(
    in_channels=4,
    out_channels=4,
    width=320,
    width_multipliers=(1, 2, 4, 4),
    attention_factors=(4, 2, 1),
    num_heads=8,
)
CHURCHES = unet.UNetConfig(
    in_channels=4,
    out_channels=4,
    width=192,
    width_multipliers=(1, 2, 2, 4, 4),
    attention_factors=(1, 2, 4, 8),
    num_heads=8,
    scale_shift_norm=True,
    resample_in_blocks=True,
)


@pytest.mark.parametrize(
    ("config", "context_dim", "parameters"),
    [(SD_V1, 768, 859_520_964), (SD_V1, 1280, 872_300_484), (CHURCHES, 0, 294_966_916)],
    ids=["SD v1", "text2img-large", "LSUN-churches LDM-8"],
)
def test_released_models_have_their_published_size(config, context_dim, parameters):
    assert published_count(config, context_dim) == parameters
    assert count(shapes_of(config, Widths(tokens=context_dim))) == parameters


# Small, with every kind of layer: `CROSS` attends to a context, `PLAIN` has churches' options.
CROSS = unet.UNetConfig(
    in_channels=2,
    out_channels=3,
    width=8,
    width_multipliers=(1, 2),
    num_res_blocks=1,
    attention_factors=(2,),
    num_heads=2,
    norm_groups=4,
)
PLAIN = dataclasses.replace(
    CROSS, num_heads=0, head_channels=4, scale_shift_norm=True, resample_in_blocks=True
)
CASES = {"cross": (CROSS, 6), "plain": (PLAIN, 0)}


def np_time_embedding(t, width):
    half = width // 2
    angles = [[time * 10000 ** (-i / half) for i in range(half)] for time in t]
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def np_pool(x):
    return sum(x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4


def np_res(x, e, p, c, resample=lambda y: y):
    h = resample(np_swish(np_group_norm(x, p["norm1"], c.norm_groups, 1e-5)))
    x = resample(x)
    h = np_conv(h, p["conv1"])
    time = np_dense(np_swish(e), p["time"])[:, None, None]
    if c.scale_shift_norm:
        width = h.shape[-1]
        h = np_group_norm(h, p["norm2"], c.norm_groups, 1e-5)
        h = h * (1 + time[..., :width]) + time[..., width:]
    else:
        h = np_group_norm(h + time, p["norm2"], c.norm_groups, 1e-5)
    h = np_conv(np_swish(h), p["conv2"])
    return h + (np_conv(x, p["shortcut"], padding=((0, 0), (0, 0))) if "shortcut" in p else x)


def np_self_attention(x, context, p, c):
    """Heads first, then q, k and v within each: QKVAttentionLegacy's layout."""
    b, width = x.shape[0], x.shape[-1]
    size = c.head_channels or width // c.num_heads
    qkv = np_dense(np_group_norm(x, p["norm"], c.norm_groups, 1e-5).reshape(b, -1, width), p["qkv"])
    heads = []
    for n in range(width // size):
        own = qkv[..., 3 * size * n : 3 * size * (n + 1)]
        q, k, v = (own[..., i * size : (i + 1) * size][:, :, None] for i in range(3))
        heads.append(np_attend(q, k, v)[:, :, 0])
    return x + np_dense(np.concatenate(heads, -1), p["out"]).reshape(x.shape)


GELU = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))


def np_spatial_transformer(x, context, p, c):
    b, h, w, width = x.shape

    def split(a):
        return a.reshape(b, -1, c.num_heads, width // c.num_heads)

    def attention(x, context, p):
        q, k, v = np_dense(x, p["q"]), np_dense(context, p["k"]), np_dense(context, p["v"])
        return np_dense(np_attend(split(q), split(k), split(v)).reshape(b, -1, width), p["out"])

    y = np_group_norm(x, p["norm"], c.norm_groups, 1e-6).reshape(b, h * w, width)
    y = np_dense(y, p["in"])
    for i in range(c.transformer_depth):
        norms = [p[f"block{i}_norm{k}"] for k in (1, 2, 3)]
        z = np_layer_norm(y, norms[0])
        y = y + attention(z, z, p[f"block{i}_self"])
        y = y + attention(np_layer_norm(y, norms[1]), context, p[f"block{i}_cross"])
        hidden = np_dense(np_layer_norm(y, norms[2]), p[f"block{i}_feed_forward"]["in"])
        hidden = hidden[..., : 4 * width] * GELU(hidden[..., 4 * width :])
        y = y + np_dense(hidden, p[f"block{i}_feed_forward"]["out"])
    return x + np_dense(y, p["out"]).reshape(x.shape)


def np_unet(p, z_t, t, context, c):
    """A U-Net of two levels and one block per level, unrolled; the second level attends."""
    attention = np_self_attention if context is None else np_spatial_transformer
    e = np_dense(np_time_embedding(t, c.width), p["time_in"])
    e = np_dense(np_swish(e), p["time_out"])
    stem = np_conv(z_t, p["conv_in"])
    block0 = np_res(stem, e, p["down0_block0"], c)
    if c.resample_in_blocks:
        down = np_res(block0, e, p["down0_downsample"], c, np_pool)
    else:
        down = np_conv(block0, p["down0_downsample"], 2, ((1, 1), (1, 1)))
    block1 = attention(np_res(down, e, p["down1_block0"], c), context, p["down1_attention0"], c)
    x = attention(np_res(block1, e, p["mid_block1"], c), context, p["mid_attention"], c)
    x = np_res(x, e, p["mid_block2"], c)
    for j, skip in enumerate((block1, down)):
        x = np_res(np.concatenate([x, skip], -1), e, p[f"up1_block{j}"], c)
        x = attention(x, context, p[f"up1_attention{j}"], c)
    if c.resample_in_blocks:
        x = np_res(x, e, p["up1_upsample"], c, np_upsample)
    else:
        x = np_conv(np_upsample(x), p["up1_upsample"])
    for j, skip in enumerate((block0, stem)):
        x = np_res(np.concatenate([x, skip], -1), e, p[f"up0_block{j}"], c)
    return np_conv(np_swish(np_group_norm(x, p["norm_out"], c.norm_groups, 1e-5)), p["conv_out"])


apply = jax.jit(unet.apply, static_argnums=0)


@pytest.fixture(scope="module", params=CASES)
def model(request):
    """(config, parameters, the signals that it hears)."""
    config, context_dim = CASES[request.param]
    tokens = normal(2, 5, context_dim, seed=3) if context_dim else None
    params = random_parameters(shapes_of(config, Widths(tokens=context_dim)))
    return config, params, Signals(tokens=tokens)


Z_T, T = normal(2, 4, 6, 2), np.array([3, 977])


def widths_of(signals):
    return Widths(*(0 if s is None else s.shape[-1] for s in signals))


def test_network_is_the_published_arithmetic(model):
    config, params, signals = model
    y = apply(config, params, Z_T, T, signals)
    assert y.shape == (2, 4, 6, 3) and y.dtype == jnp.float32
    wide = [None if a is None else np.asarray(a, np.float64) for a in (Z_T, signals.tokens)]
    np.testing.assert_allclose(y, np_unet(params, wide[0], T, wide[1], config), atol=5e-4)


def test_network_is_exactly_zero_when_its_last_convolution_is(model):
    """With the next test: a fresh network predicts exactly 0."""
    config, params, signals = model
    params = params | {"conv_out": jax.tree.map(np.zeros_like, params["conv_out"])}
    assert not np.any(apply(config, params, Z_T, T, signals))


def test_exactly_the_published_layers_start_at_zero(model):
    config, _, signals = model
    declared = unet._declared(config, widths_of(signals))
    leaves = jax.tree_util.tree_leaves_with_path(declared, is_leaf=lambda x: hasattr(x, "names"))
    for path, leaf in leaves:
        names = [key.key for key in path]
        last_of_attention = "attention" in names[0] and names[1] == "out"
        zero = names[0] == "conv_out" or names[1] == "conv2" or last_of_attention
        assert (leaf.scale == 0) == (zero or "norm" in names[-2]), names


X, E, CONTEXT = normal(2, 4, 4, 8), normal(2, 32, seed=1), normal(2, 5, 6, seed=2)
BLOCKS = {
    "residual": (_ResBlock(8, CROSS), (X, E)),
    "residual, scale and shift": (_ResBlock(8, PLAIN), (X, E)),
    "self-attention": (_SelfAttention(PLAIN), (X, None)),
    "transformer": (_SpatialTransformer(CROSS), (X, CONTEXT)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_starts_as_the_identity(name):
    module, inputs = BLOCKS[name]
    params = initial_parameters(module, *inputs)
    np.testing.assert_array_equal(apply_module(module, params, *inputs), X)


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_bfloat16_blocks_stay_close_to_f32(name):
    module, inputs = BLOCKS[name]
    rounded = module.clone(config=dataclasses.replace(module.config, compute_dtype="bfloat16"))
    y, params = run(rounded, *inputs)
    error = np.abs(np.asarray(y - apply_module(module, params, *inputs), np.float32)).max()
    assert 1e-4 < error < 0.2


def test_bfloat16_network_returns_f32():
    config = dataclasses.replace(CROSS, compute_dtype="bfloat16")
    shapes, signals = shapes_of(config, Widths(tokens=6)), Signals(tokens=CONTEXT)
    y = jax.eval_shape(lambda p: unet.apply(config, p, Z_T, T, signals), shapes)
    assert y.dtype == jnp.float32


def test_block_of_another_width_starts_as_its_shortcut():
    module = _ResBlock(12, CROSS)
    params = initial_parameters(module, X, E)
    want = np_conv(X, params["shortcut"], padding=((0, 0), (0, 0)))
    np.testing.assert_allclose(apply_module(module, params, X, E), want, atol=1e-5)


def test_transformer_of_depth_two_runs_its_blocks_in_order():
    config = dataclasses.replace(CROSS, transformer_depth=2)
    params = module_parameters(_SpatialTransformer(config), X, CONTEXT)
    wide = (np.asarray(a, np.float64) for a in (X, CONTEXT))
    np.testing.assert_allclose(
        apply_module(_SpatialTransformer(config), params, X, CONTEXT),
        np_spatial_transformer(*wide, params, config),
        atol=1e-4,
    )


def test_attention_is_split_into_the_heads_of_the_config():
    """Weights have the same shapes for every number of heads; only the numbers tell."""
    params = module_parameters(_SelfAttention(PLAIN), X, None)
    outputs = []
    for size in (2, 4):
        config = dataclasses.replace(PLAIN, head_channels=size)
        outputs.append(apply_module(_SelfAttention(config), params, X, None))
        want = np_self_attention(np.asarray(X, np.float64), None, params, config)
        np.testing.assert_allclose(outputs[-1], want, atol=1e-4)
    assert not np.allclose(outputs[0], outputs[1], atol=1e-2)
    heads = (PLAIN.heads(8), dataclasses.replace(PLAIN, num_heads=1, head_channels=0).heads(8))
    assert heads == (2, 1)


def test_cross_attention_to_one_token_does_not_depend_on_the_position():
    module = unet._CrossAttention(CROSS)
    x, token = normal(2, 7, 8), normal(2, 1, 6, seed=1)
    params = module_parameters(module, x, token)
    y = np.asarray(apply_module(module, params, x, token))
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :1], y.shape), atol=1e-6)
    value = np_dense(np_dense(np.asarray(token, np.float64), params["v"]), params["out"])
    np.testing.assert_allclose(y[:, :1], value, atol=1e-5)
    assert not np.allclose(y[0], y[1])


def test_time_embedding_is_cosines_then_sines_of_frequencies_over_half():
    t = np.array([0, 1, 17, 999])
    np.testing.assert_allclose(
        time_embedding(jnp.asarray(t), 10), np_time_embedding(t, 10), atol=1e-4
    )
    zero = time_embedding(jnp.array([0]), 10)[0]
    np.testing.assert_array_equal(zero, [1] * 5 + [0] * 5)


def test_context_changes_the_output_and_so_does_time(model):
    config, params, signals = model
    y = apply(config, params, Z_T, T, signals)
    assert not np.allclose(apply(config, params, Z_T, T[::-1].copy(), signals), y, atol=1e-2)
    if signals.tokens is not None:
        turned = Signals(tokens=signals.tokens[::-1])
        assert not np.allclose(apply(config, params, Z_T, T, turned), y, atol=1e-2)


def test_axes_have_the_structure_and_ranks_of_the_parameters(model):
    config, params, signals = model
    axes = unet.axes(config, widths_of(signals))
    jax.tree.map(lambda leaf, n: np.testing.assert_equal(len(n), leaf.ndim), params, axes)


def test_maps_reach_the_network_beside_z_t_and_a_vector_beside_the_time():
    """With zeros where they come in, the output is that without them; else it is another."""
    params = random_parameters(shapes_of(PLAIN))
    y = apply(PLAIN, params, Z_T, T, Signals())
    maps = normal(2, 4, 6, 3, seed=5)
    kernel = params["conv_in"]["kernel"]
    assert shapes_of(PLAIN, Widths(maps=3))["conv_in"]["kernel"].shape == (3, 3, 2 + 3, 8)

    def seen(of_maps):
        first = {**params["conv_in"], "kernel": np.concatenate([kernel, of_maps], 2)}
        return apply(PLAIN, {**params, "conv_in": first}, Z_T, T, Signals(maps=maps))

    np.testing.assert_allclose(seen(np.zeros((3, 3, 3, 8), np.float32)), y, atol=1e-4)
    assert np.abs(seen(normal(3, 3, 3, 8)) - y).max() > 1e-2
    assert jax.tree.map(lambda s: s.shape, shapes_of(PLAIN, Widths(vector=32))) == jax.tree.map(
        lambda s: s.shape, shapes_of(PLAIN)
    )
    # A vector is added where the time is: the bias of its last layer says the same to every row.
    vector = normal(1, 32, seed=6)
    told = apply(PLAIN, params, Z_T, T, Signals(vector=np.tile(vector, (2, 1))))
    last = {**params["time_out"], "bias": params["time_out"]["bias"] + vector[0]}
    want = apply(PLAIN, {**params, "time_out": last}, Z_T, T, Signals())
    np.testing.assert_allclose(told, want, atol=1e-4)
    assert np.abs(told - y).max() > 1e-2


def test_vectors_of_another_width_than_the_time_are_refused():
    with pytest.raises(InputError, match=r"vectors of width 31 .* 4 x 8; .* vectors of 32"):
        shapes_of(CROSS, Widths(vector=31))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 12, "norm_groups": 8}, r"unet: width\(s\) \[12\] must divide by norm_groups 8"),
        ({"head_channels": 4}, "num_heads 2 and head_channels 4: exactly one must be positive"),
        ({"num_heads": 0}, "num_heads 0 and head_channels 0: exactly one must be positive"),
        ({"num_heads": 3}, r"attending width\(s\) \[16\] must divide by num_heads 3"),
        (
            {"num_heads": 0, "head_channels": 16, "attention_factors": (1,)},
            r"attending width\(s\) \[8\] must divide by head_channels 16",
        ),
    ],
)
def test_configurations_that_make_no_sense_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CROSS, **change)


def test_latent_side_that_does_not_divide_by_the_levels_is_refused():
    with pytest.raises(InputError, match=r"latent side \(4, 5\) must divide by 2"):
        unet.apply(CROSS, {}, jnp.zeros((1, 4, 5, 2)), jnp.zeros((1,)))
