"""The first stage against the published architecture: its size, and its arithmetic in numpy."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.models import autoencoder
from ldm_jax.runs.config_files import load_run
from ldm_jax.runs.settings import AutoencoderRun
from tests.models.test_layers import (
    np_attend,
    np_conv,
    np_group_norm,
    np_swish,
    np_upsample,
    random_parameters,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# name: (multipliers, sides that attend at 256, latent channels, parameters)
PUBLISHED = {
    "kl-f4": ((1, 2, 4), (), 3, 55_312_063),
    "kl-f8": ((1, 2, 4, 4), (), 4, 83_653_863),
    "kl-f16": ((1, 1, 2, 2, 4), (16,), 16, 69_610_963),
    "kl-f32": ((1, 1, 2, 2, 4, 4), (16, 8), 64, 103_880_131),
}

# Every kind of layer: two levels with and without attention, blocks that change the width.
CONFIG = autoencoder.AutoencoderConfig(
    resolution=8,
    width=8,
    width_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    z_channels=3,
    latent_channels=2,
    norm_groups=4,
)


def variants(file):
    """The names in a file of configs/, without importing it as a package."""
    spec = importlib.util.spec_from_file_location(f"listed_{file}", CONFIGS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VARIANTS


def count(shapes):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def published_count(
    multipliers,
    attention,
    channels,
    moments=None,
    middle=True,
    width=128,
    blocks=2,
    side=256,
    colours=3,
):
    """(encoder, decoder): arithmetic over the levels of the published architecture."""

    def conv(i, o, k=3):
        return k * k * i * o + o

    def norm(c):
        return 2 * c

    def attend(c):
        return norm(c) + 4 * conv(c, c, 1)  # q, k, v, out

    def res(i, o):
        return norm(i) + conv(i, o) + norm(o) + conv(o, o) + (conv(i, o, 1) if i != o else 0)

    deepest = width * multipliers[-1]
    middle = 2 * res(deepest, deepest) + (attend(deepest) if middle else 0)
    moments = moments or 2 * channels

    encoder, c = conv(colours, width), width
    for level, multiplier in enumerate(multipliers):
        for _ in range(blocks):
            encoder += res(c, width * multiplier)
            c = width * multiplier
            encoder += attend(c) if side >> level in attention else 0
        encoder += conv(c, c) if level < len(multipliers) - 1 else 0
    encoder += middle + norm(c) + conv(c, moments) + conv(moments, moments, 1)

    decoder, c = conv(channels, channels, 1) + conv(channels, deepest) + middle, deepest
    for level in reversed(range(len(multipliers))):
        for _ in range(blocks + 1):
            decoder += res(c, width * multipliers[level])
            c = width * multipliers[level]
            decoder += attend(c) if side >> level in attention else 0
        decoder += conv(c, c) if level else 0
    return encoder, decoder + norm(c) + conv(c, colours)


# Millions, as released: encoder, decoder and total, of which a codebook is part.
RELEASED = {
    "kl-f4": (22.35, 32.96, 55.31),
    "kl-f8": (34.16, 49.49, 83.65),
    "kl-f16": (28.27, 41.34, 69.61),
    "kl-f32": (42.61, 61.24, 103.88),
    "vq-f4": (22.34, 32.96, 55.32),
    "vq-f4-noattn": (21.29, 31.91, 53.22),
    "vq-f8": (27.40, 40.25, 67.72),
    "vq-f8-n256": (27.40, 40.25, 67.65),
    "vq-f16": (28.16, 41.31, 69.59),
}


@pytest.mark.parametrize("name", variants("autoencoder.py"))
def test_every_preset_has_the_parameters_of_the_published_architecture(name):
    model = load_run(AutoencoderRun, f"{CONFIGS}/autoencoder.py:{name}", []).model
    shapes = jax.eval_shape(lambda: autoencoder.init(model, jax.random.key(0)))
    if model.latent == "identity":
        assert count(shapes) == 0 and model.factor == 1
        return
    encoder, decoder = published_count(
        model.width_multipliers,
        model.attention_resolutions,
        model.latent_channels,
        model.moment_channels,
        model.middle_attention,
        model.width,
        model.num_res_blocks,
        model.resolution,
    )
    assert (count(shapes["encoder"]), count(shapes["decoder"])) == (encoder, decoder)
    codebook = count(shapes.get("quantizer", {}))
    if model.latent == "vq":
        assert codebook == model.quantizer.codebook_size * model.latent_channels
    if name in RELEASED:
        # The 1x1 adapters are part of the total alone.
        adapters = [c * c + c for c in (model.moment_channels, model.latent_channels)]
        bare = encoder - adapters[0], decoder - adapters[1]
        figures = [n / 1e6 for n in (*bare, encoder + decoder + codebook)]
        np.testing.assert_allclose(figures, RELEASED[name], atol=0.0051)
        assert model.factor == int(name.split("-")[1].removeprefix("f"))
    if name in PUBLISHED:
        multipliers, attention, channels, total = PUBLISHED[name]
        assert sum(published_count(multipliers, attention, channels)) == total == count(shapes)
    assert model.latent_shape == (model.resolution // model.factor,) * 2 + (model.latent_channels,)


def np_res(x, p, groups):
    h = np_conv(np_swish(np_group_norm(x, p["norm1"], groups, 1e-6)), p["conv1"])
    h = np_conv(np_swish(np_group_norm(h, p["norm2"], groups, 1e-6)), p["conv2"])
    return h + (np_conv(x, p["shortcut"], padding=NONE) if "shortcut" in p else x)


NONE = ((0, 0), (0, 0))


def np_attention(x, p, groups):
    y = np_group_norm(x, p["norm"], groups, 1e-6)
    flat = (x.shape[0], -1, 1, x.shape[-1])
    q, k, v = (np_conv(y, p[name], padding=NONE).reshape(flat) for name in "qkv")
    return x + np_conv(np_attend(q, k, v).reshape(x.shape), p["out"], padding=NONE)


def np_middle(x, p, groups):
    x = np_attention(np_res(x, p["mid_block1"], groups), p["mid_attention"], groups)
    return np_res(x, p["mid_block2"], groups)


def np_encode(p, x, groups=4):
    """CONFIG's encoder, unrolled."""
    x = np_conv(x, p["conv_in"])
    x = np_res(x, p["level0_block0"], groups)
    x = np_conv(x, p["level0_downsample"], 2, ((0, 1), (0, 1)))
    x = np_attention(np_res(x, p["level1_block0"], groups), p["level1_attention0"], groups)
    x = np_swish(np_group_norm(np_middle(x, p, groups), p["norm_out"], groups, 1e-6))
    return np_conv(np_conv(x, p["conv_out"]), p["adapter"], padding=NONE)


def np_decode(p, z, groups=4):
    """CONFIG's decoder, unrolled."""
    x = np_middle(np_conv(np_conv(z, p["adapter"], padding=NONE), p["conv_in"]), p, groups)
    for j in range(2):
        x = np_res(x, p[f"level1_block{j}"], groups)
        x = np_attention(x, p[f"level1_attention{j}"], groups)
    x = np_conv(np_upsample(x), p["level1_upsample"])
    for j in range(2):
        x = np_res(x, p[f"level0_block{j}"], groups)
    return np_conv(np_swish(np_group_norm(x, p["norm_out"], groups, 1e-6)), p["conv_out"])


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(lambda: autoencoder.init(CONFIG, jax.random.key(0)))
    return random_parameters(shapes)


encode = jax.jit(autoencoder.encode, static_argnums=0)
decode = jax.jit(autoencoder.decode, static_argnums=0)


def images():
    return np.random.default_rng(1).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)


def latents():
    return np.random.default_rng(2).normal(size=(2, 4, 4, 2)).astype(np.float32)


def test_encoder_is_the_published_arithmetic(params):
    moments = encode(CONFIG, params, images())
    assert moments.shape == (2, 4, 4, 4) and moments.dtype == jnp.float32
    np.testing.assert_allclose(moments, np_encode(params["encoder"], images()), atol=2e-4)


def test_decoder_is_the_published_arithmetic_without_tanh_or_clamp(params):
    x = decode(CONFIG, params, latents())
    assert x.shape == (2, 8, 8, 3) and x.dtype == jnp.float32
    np.testing.assert_allclose(x, np_decode(params["decoder"], latents()), atol=2e-4)
    assert np.abs(x).max() > 1
    # Nothing in it is drawn: the same latent, the same image.
    np.testing.assert_array_equal(decode(CONFIG, params, latents()), x)


def test_axes_name_every_dimension(params):
    axes = autoencoder.axes(CONFIG)
    jax.tree.map(lambda leaf, names: np.testing.assert_equal(len(names), leaf.ndim), params, axes)


def test_bfloat16_compute_returns_f32_close_to_f32_compute(params):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    exact, rounded = (encode(c, params, images()) for c in (CONFIG, config))
    assert rounded.dtype == jnp.float32
    decoded = jax.eval_shape(lambda: autoencoder.decode(config, params, latents()))
    assert decoded.dtype == jnp.float32
    error = np.abs(rounded - exact).max() / np.std(exact)
    assert 1e-4 < error < 0.1


def test_no_convolution_starts_at_zero():
    """Unlike the U-Net's: the published first stage has no zero-initialised layer."""
    declared = autoencoder._declared(CONFIG)
    leaves = jax.tree_util.tree_leaves_with_path(declared, is_leaf=lambda x: hasattr(x, "names"))
    assert len(leaves) == len(jax.tree.leaves(declared))
    for path, leaf in leaves:
        assert (leaf.scale > 0) != ("norm" in path[-2].key), path


def test_pixels_survive_the_way_to_unit_range_and_back():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    unit = autoencoder.to_unit(jnp.asarray(every))
    assert unit.dtype == jnp.float32 and float(unit.min()) == -1 and float(unit.max()) == 1
    np.testing.assert_array_equal(autoencoder.to_uint8(unit), every)


def test_pixels_are_rounded_to_the_nearest_and_clipped():
    x = jnp.array([-5.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 0.999, 1.0, 5.0])
    np.testing.assert_array_equal(autoencoder.to_uint8(x), [0, 0, 0, 1, 255, 255, 255])


def test_width_that_does_not_divide_into_groups_is_refused():
    with pytest.raises(
        InputError, match=r"autoencoder: width\(s\) \[48\] must divide by norm_groups"
    ):
        autoencoder.AutoencoderConfig(width=48, width_multipliers=(1, 2))


def test_resolution_that_does_not_divide_by_the_factor_is_refused():
    with pytest.raises(
        InputError, match=r"resolution 100 must divide by its downsampling factor 8"
    ):
        autoencoder.AutoencoderConfig(resolution=100)


def test_unknown_compute_dtype_is_refused(params):
    with pytest.raises(InputError, match=r"compute_dtype 'float16' is unknown"):
        encode(dataclasses.replace(CONFIG, compute_dtype="float16"), params, images())
