"""The published U-Net in numpy, f64: what the network's arithmetic is compared with."""

import math

import numpy as np

from tests.models.test_layers import (
    np_attend,
    np_conv,
    np_dense,
    np_group_norm,
    np_layer_norm,
    np_swish,
    np_upsample,
)


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
