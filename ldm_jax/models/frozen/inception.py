"""The Inception v3 of FID, IS and KID: the graph of 2015-12-05 that TensorFlow published.

Unlike torchvision's Inception v3 its average pools leave the padding out of the average, the last
block pools by maximum, and it has 1008 outputs. Batch normalisation is folded into the kernels
(`interop/frozen_names.py`). Szegedy et al., CVPR 2016; names of layers are those of PyTorch's
ports.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.models.frozen.vit import leaf

SIDE = 299  # pixels; other sides from 75 work too, and give other features
TAPS = {
    "64": 64,
    "192": 192,
    "768": 768,
    "2048": 2048,
    "spatial2023": 2023,
    "logits_unbiased": 1008,
}
SPATIAL = ("Mixed_6d", "branch1x1", 7)  # block, layer and channels of sFID's features, 17x17x7


class Conv(NamedTuple):
    """Convolution, bias, ReLU; "SAME" pads by half the kernel, a stride of 2 never pads."""

    name: str
    height: int
    width: int
    features: int
    stride: int = 1
    padding: str = "SAME"


class Block(NamedTuple):
    """Branches side by side, joined along the channels.

    Each is a chain of layers, and a tuple at its end is layers side by side. The last branch starts
    from the pooled input.
    """

    pool: str  # "average" or "max", 3x3 at stride 1, or "reduce", the maximum at stride 2
    branches: tuple[tuple[Any, ...], ...]


def _grid35(pooled: int) -> Block:
    return Block(
        "average",
        (
            (Conv("branch1x1", 1, 1, 64),),
            (Conv("branch5x5_1", 1, 1, 48), Conv("branch5x5_2", 5, 5, 64)),
            (
                Conv("branch3x3dbl_1", 1, 1, 64),
                Conv("branch3x3dbl_2", 3, 3, 96),
                Conv("branch3x3dbl_3", 3, 3, 96),
            ),
            (Conv("branch_pool", 1, 1, pooled),),
        ),
    )


def _grid17(inner: int) -> Block:
    return Block(
        "average",
        (
            (Conv("branch1x1", 1, 1, 192),),
            (
                Conv("branch7x7_1", 1, 1, inner),
                Conv("branch7x7_2", 1, 7, inner),
                Conv("branch7x7_3", 7, 1, 192),
            ),
            (
                Conv("branch7x7dbl_1", 1, 1, inner),
                Conv("branch7x7dbl_2", 7, 1, inner),
                Conv("branch7x7dbl_3", 1, 7, inner),
                Conv("branch7x7dbl_4", 7, 1, inner),
                Conv("branch7x7dbl_5", 1, 7, 192),
            ),
            (Conv("branch_pool", 1, 1, 192),),
        ),
    )


def _grid8(pool: str) -> Block:
    def both(name):
        return Conv(f"{name}a", 1, 3, 384), Conv(f"{name}b", 3, 1, 384)

    return Block(
        pool,
        (
            (Conv("branch1x1", 1, 1, 320),),
            (Conv("branch3x3_1", 1, 1, 384), both("branch3x3_2")),
            (
                Conv("branch3x3dbl_1", 1, 1, 448),
                Conv("branch3x3dbl_2", 3, 3, 384),
                both("branch3x3dbl_3"),
            ),
            (Conv("branch_pool", 1, 1, 192),),
        ),
    )


STEM = (
    Conv("Conv2d_1a_3x3", 3, 3, 32, 2, "VALID"),
    Conv("Conv2d_2a_3x3", 3, 3, 32, 1, "VALID"),
    Conv("Conv2d_2b_3x3", 3, 3, 64),
    "64",  # the maximum of 3x3 at stride 2, whose average is the tap of this name
    Conv("Conv2d_3b_1x1", 1, 1, 80),
    Conv("Conv2d_4a_3x3", 3, 3, 192, 1, "VALID"),
    "192",
)
BLOCKS = {
    "Mixed_5b": _grid35(32),
    "Mixed_5c": _grid35(64),
    "Mixed_5d": _grid35(64),
    "Mixed_6a": Block(
        "reduce",
        (
            (Conv("branch3x3", 3, 3, 384, 2, "VALID"),),
            (
                Conv("branch3x3dbl_1", 1, 1, 64),
                Conv("branch3x3dbl_2", 3, 3, 96),
                Conv("branch3x3dbl_3", 3, 3, 96, 2, "VALID"),
            ),
            (),
        ),
    ),
    "Mixed_6b": _grid17(128),
    "Mixed_6c": _grid17(160),
    "Mixed_6d": _grid17(160),
    "Mixed_6e": _grid17(192),
    "Mixed_7a": Block(
        "reduce",
        (
            (Conv("branch3x3_1", 1, 1, 192), Conv("branch3x3_2", 3, 3, 320, 2, "VALID")),
            (
                Conv("branch7x7x3_1", 1, 1, 192),
                Conv("branch7x7x3_2", 1, 7, 192),
                Conv("branch7x7x3_3", 7, 1, 192),
                Conv("branch7x7x3_4", 3, 3, 192, 2, "VALID"),
            ),
            (),
        ),
    ),
    "Mixed_7b": _grid8("average"),
    "Mixed_7c": _grid8("max"),
}


def shapes() -> dict[str, Any]:
    """The tree of parameters as shapes: kernels HWIO and biases by block and layer, `logits`."""

    def entry(conv, c_in):
        kernel = leaf(conv.height, conv.width, c_in, conv.features)
        return {"kernel": kernel, "bias": leaf(conv.features)}

    tree: dict[str, Any] = {}
    c = 3
    for conv in STEM:
        if isinstance(conv, Conv):
            tree[conv.name] = entry(conv, c)
            c = conv.features
    for name, block in BLOCKS.items():
        tree[name], joined = {}, 0
        for branch in block.branches:
            inside = c
            for layer in branch:
                layers = (layer,) if isinstance(layer, Conv) else layer
                tree[name] |= {conv.name: entry(conv, inside) for conv in layers}
                inside = sum(conv.features for conv in layers)
            joined += inside
        c = joined
    return tree | {"logits": {"kernel": leaf(c, TAPS["logits_unbiased"])}}


def apply(params: Any, x: jax.Array) -> dict[str, jax.Array]:
    """Images f32 [B,299,299,3] in 0..255 -> {tap: f32 [B,D]} for each of TAPS.

    "64" to "2048" are averages over the image, "2048" that of FID; "logits_unbiased" is what the
    Inception Score takes the softmax of. "spatial2023" is flattened [H,W,C], as TensorFlow has it.
    """
    with jax.default_matmul_precision("highest"):  # else accelerators round to bf16 or TF32
        taps: dict[str, jax.Array] = {}
        h = (x - 128.0) / 128.0
        for step in STEM:
            if isinstance(step, Conv):
                h = _convolve(params[step.name], step, h)
            else:
                h = _reduce(h)
                taps[step] = h.mean((1, 2))
        for name, block in BLOCKS.items():
            h, spatial = _block(params[name], block, h)
            if name == SPATIAL[0]:
                taps["spatial2023"] = spatial[..., : SPATIAL[2]].reshape(len(x), -1)
            if name == "Mixed_6e":
                taps["768"] = h.mean((1, 2))
        taps["2048"] = h.mean((1, 2))
        taps["logits_unbiased"] = taps["2048"] @ params["logits"]["kernel"]
    return {tap: taps[tap] for tap in TAPS}


def _block(params, block, x):
    """The joined branches, and the first of them alone."""
    out = []
    for branch in block.branches:
        h = POOLS[block.pool](x) if branch is block.branches[-1] else x
        for layer in branch:
            layers = (layer,) if isinstance(layer, Conv) else layer
            parts = [_convolve(params[conv.name], conv, h) for conv in layers]
            h = jnp.concatenate(parts, -1) if len(parts) > 1 else parts[0]
        out.append(h)
    return jnp.concatenate(out, -1), out[0]


def _convolve(p, conv, x):
    y = jax.lax.conv_general_dilated(
        x,
        p["kernel"],
        (conv.stride, conv.stride),
        conv.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jax.nn.relu(y + p["bias"].reshape(1, 1, 1, -1))


def _window(x, start, function, stride, padding):
    return jax.lax.reduce_window(x, start, function, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _average(x):
    """Over the pixels of the window that are inside the image."""
    count = _window(jnp.ones((1, *x.shape[1:3], 1)), 0.0, jax.lax.add, 1, "SAME")
    return _window(x, 0.0, jax.lax.add, 1, "SAME") / count


def _max(x):
    return _window(x, -jnp.inf, jax.lax.max, 1, "SAME")


def _reduce(x):
    return _window(x, -jnp.inf, jax.lax.max, 2, "VALID")


POOLS = {"average": _average, "max": _max, "reduce": _reduce}
