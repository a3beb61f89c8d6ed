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
    np_conv,
    np_dense,
    random_parameters,
    run,
)
from tests.models.unet_arithmetic import (
    np_self_attention,
    np_spatial_transformer,
    np_time_embedding,
    np_unet,
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
        ({"num_heads": -1, "head_channels": 4}, "num_heads -1 and head_channels 4: exactly one"),
        ({"width_multipliers": ()}, r"width_multipliers \(\) are of no level"),
        ({"width_multipliers": (1, 0)}, r"width\(s\) \[0\] must"),
        ({"attention_factors": (3, 2, 0)}, r"attention_factors \[3, 0\] are no level's"),
        ({"width": 1, "norm_groups": 1}, "unet width 1 must be at least 2"),
        ({"num_res_blocks": 0}, "unet num_res_blocks 0 must be at least 1"),
        ({"transformer_depth": -1}, "unet transformer_depth -1 must be at least 1"),
        ({"compute_dtype": "fp16"}, "unet compute_dtype 'fp16' is unknown; choose one of"),
        ({"in_channels": -1}, "unet in_channels -1 must be at least 0"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CROSS, **change)


def test_latent_side_that_does_not_divide_by_the_levels_is_refused():
    with pytest.raises(InputError, match=r"latent side \(4, 5\) must divide by 2"):
        unet.apply(CROSS, {}, jnp.zeros((1, 4, 5, 2)), jnp.zeros((1,)))
