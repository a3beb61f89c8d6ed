"""How images reach the size that an extractor takes: named, because every figure depends on it.

All take uint8 or f32 [B,H,W,3] in 0..255 and a side S, and give f32 [B,S,S,3] in 0..255, unrounded.
At 256 pixels the two bilinear grids below lie 1.15 of 255 apart on average on photographs, which
is enough to spoil a comparison with published reference statistics.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def tf1_bilinear(x: jax.Array, size: int) -> jax.Array:
    """Grid anchored at the corner, source = target * in / out; no antialiasing.

    TensorFlow 1's ResizeBilinear, part of the graph that ADM's evaluator runs; torch-fidelity's.
    """
    return _bilinear(x, size, lambda target, scale: target * scale)


def torch_bilinear(x: jax.Array, size: int) -> jax.Array:
    """Grid of half pixels, no antialiasing: pytorch-fid's."""
    half = np.float32(0.5)

    def source(target, scale):
        return np.maximum((target + half) * scale - half, 0)

    return _bilinear(x, size, source)


def pil_bicubic(x: jax.Array, size: int) -> jax.Array:
    """PIL's antialiased bicubic on each channel in floating point, then clipped: clean-fid's."""
    return jnp.clip(torch_bicubic_aa(x, size), 0, 255)


def torch_bicubic_aa(x: jax.Array, size: int) -> jax.Array:
    """Antialiased bicubic in floating point, neither rounded nor clipped: EDM2's for DINOv2."""
    _, height, width, _ = x.shape
    x = x.astype(jnp.float32)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    x = product("bhwc,xw->bhxc", x, _cubic_matrix(width, size))
    return product("bhxc,yh->byxc", x, _cubic_matrix(height, size))


RESIZES = {
    "tf1_bilinear": tf1_bilinear,
    "torch_bilinear": torch_bilinear,
    "pil_bicubic": pil_bicubic,
    "torch_bicubic_aa": torch_bicubic_aa,
}


def _bilinear(x, size, source):
    """Between neighbours along the width, then along the height: the order of TensorFlow's sums."""
    _, height, width, _ = x.shape
    x = x.astype(jnp.float32)
    left, right, across = _neighbours(width, size, source)
    x = _between(x[:, :, left], x[:, :, right], across.reshape(1, 1, -1, 1))
    top, bottom, down = _neighbours(height, size, source)
    return _between(x[:, top], x[:, bottom], down.reshape(1, -1, 1, 1))


def _neighbours(length, size, source):
    """Two indices and the weight of the second, [size] each; f32 like the references' grids."""
    at = source(np.arange(size, dtype=np.float32), np.float32(length / size))
    first = np.minimum(at.astype(np.int32), length - 1)
    return first, np.minimum(first + 1, length - 1), at - first.astype(np.float32)


def _between(a, b, weight):
    # A bound that no product reaches: it keeps compilers from joining product and sum, which would
    # round once instead of twice. So the CPU gives the references' bits, compiled or not.
    return a + jnp.maximum((b - a) * weight, -1e9)


@functools.lru_cache(maxsize=64)
def _cubic_matrix(length: int, size: int) -> np.ndarray:
    """f32 [size,length]: each output as a sum of inputs; rows sum to 1.

    Keys' kernel with a = -1/2, widened by the factor of reduction (Keys, IEEE TASSP 29, 1981, eq. 4
    gives a and the kernel).
    """
    scale = length / size
    widened = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    distance = np.abs((np.arange(length)[None] + 0.5 - centres[:, None]) / widened)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
