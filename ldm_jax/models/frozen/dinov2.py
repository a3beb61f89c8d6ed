"""DINOv2's vision transformer: the class token of an image, the feature of FD-DINOv2.

Oquab et al., TMLR 2024; Stein et al., NeurIPS 2023, section 4 recommends it for Fréchet distances.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models.frozen import vit

EPSILON = 1e-6
# ImageNet's mean and deviation, in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class DinoConfig:
    width: int
    layers: int
    heads: int
    patch: int = 14  # pixels
    grid: int = 37  # side of the trained position embedding, in patches: 518 pixels
    # Added to the target's side where the embedding is resized. The published code adds 0.1, so
    # all published FD-DINOv2 do; Hugging Face's adds 0, which moves the far patches by 0.2.
    position_offset: float = 0.1


VIT_L14 = DinoConfig(1024, 24, 16)
SIDE = 224  # pixels at which its features are compared


def shapes(config: DinoConfig) -> dict[str, Any]:
    """The tree of parameters as shapes; parameters of blocks are stacked over the layers."""
    width = config.width
    layer_scales = {f"scale{i}": vit.leaf(config.layers, width) for i in (1, 2)}
    return {
        "patch": {
            "kernel": vit.leaf(config.patch, config.patch, 3, width),
            "bias": vit.leaf(width),
        },
        "class": vit.leaf(width),
        "position": vit.leaf(1 + config.grid**2, width),
        "blocks": vit.block_shapes(width, 4 * width, config.layers) | layer_scales,
        "norm_out": vit.norm_shapes(width),
    }


def apply(config: DinoConfig, params: Any, x: jax.Array) -> jax.Array:
    """Images f32 [B,H,W,3] in 0..255, sides multiples of the patch -> class tokens f32 [B,D]."""
    _, height, width, _ = x.shape
    rows, columns = height // config.patch, width // config.patch
    assert (rows * config.patch, columns * config.patch) == (height, width), x.shape
    with jax.default_matmul_precision("highest"):  # else accelerators round to bf16 or TF32
        h = vit.patches(params["patch"]["kernel"], vit.normalised(x / 255.0, MEAN, STD))
        h = h + params["patch"]["bias"].reshape(1, 1, -1)
        first = jnp.broadcast_to(params["class"].reshape(1, 1, -1), (len(x), 1, config.width))
        h = jnp.concatenate([first, h], 1) + _position(config, params["position"], rows, columns)
        h = vit.blocks(
            params["blocks"],
            h,
            heads=config.heads,
            activation=functools.partial(jax.nn.gelu, approximate=False),
            epsilon=EPSILON,
        )
        return vit.norm(params["norm_out"], h[:, 0], EPSILON)


def _position(config, position, rows, columns):
    """The embedding [1,1+rows*columns,D] for a grid of another size, by bicubic interpolation."""
    grid = config.grid
    if (rows, columns) == (grid, grid):
        return position[None]
    down = _cubic_matrix(grid, rows, config.position_offset)
    across = _cubic_matrix(grid, columns, config.position_offset)
    maps = position[1:].reshape(grid, grid, -1)
    resized = jnp.einsum("yh,hwd,xw->yxd", down, maps, across).reshape(rows * columns, -1)
    return jnp.concatenate([position[:1], resized])[None]


def _cubic_matrix(length: int, size: int, offset: float) -> np.ndarray:
    """f32 [size,length], PyTorch's bicubic without antialiasing: Keys' kernel with a = -3/4.

    Pixels beyond the edge are those of the edge.
    """
    source = (np.arange(size) + 0.5) * length / (size + offset) - 0.5
    first = np.floor(source).astype(int)
    matrix = np.zeros((size, length))
    a = -0.75
    for step in (-1, 0, 1, 2):
        t = np.abs(source - first - step)
        near = ((a + 2) * t - (a + 3)) * t**2 + 1
        far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        weights = np.where(t <= 1, near, far)
        np.add.at(matrix, (np.arange(size), np.clip(first + step, 0, length - 1)), weights)
    return matrix.astype(np.float32)
