"""A denoiser of images larger than it was trained on: overlapping tiles, blended."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.process import Denoiser
from ldm_jax.errors import InputError


def tiled(denoiser: Denoiser, tile: int, overlap: int) -> Denoiser:
    """The denoiser applied to tiles [B, tile, tile, C] of z_t [B, H, W, C], one after another.

    Tiles overlap by at least `overlap` and the last one ends at the border, so that every size of
    at least `tile` is covered. A pixel's weight in a tile is its distance to the tile's border.
    Leaves of `cond` of z_t's height and width, [B, H, W, ...], are cut alike; others are passed on.
    Raises InputError for an overlap outside 0..tile-1 or an image smaller than a tile.
    """
    if not 0 <= overlap < tile:
        raise InputError(f"overlap {overlap} must be in 0..{tile - 1} for tiles of {tile}")

    def blended(z_t: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        height, width = z_t.shape[1:3]
        if min(height, width) < tile:
            raise InputError(
                f"tile {tile} is larger than the latent {height} x {width}; use tile "
                f"{min(height, width)}"
            )
        corners = [
            (y, x) for y in _starts(height, tile, overlap) for x in _starts(width, tile, overlap)
        ]
        shape = (1, tile, tile, 1)
        ramp = np.minimum(np.arange(tile) + 1, tile - np.arange(tile)).astype(np.float32)
        weight = jnp.asarray(np.minimum(ramp[:, None], ramp[None, :]).reshape(shape))

        def cut(x: jax.Array, corner: jax.Array) -> jax.Array:
            if x.ndim < 4 or x.shape[1:3] != (height, width):
                return x
            start = (0, corner[0], corner[1]) + (0,) * (x.ndim - 3)
            return jax.lax.dynamic_slice(x, start, (x.shape[0], tile, tile, *x.shape[3:]))

        def add(sums: tuple[jax.Array, jax.Array], corner: jax.Array) -> tuple[Any, None]:
            total, weights = sums
            tile_cond = jax.tree.map(lambda x: cut(x, corner), cond)
            prediction = denoiser(cut(z_t, corner), t, tile_cond).astype(total.dtype)
            return (
                _added(total, weight * prediction, corner),
                _added(weights, weight, corner),
            ), None

        corners = jnp.asarray(corners, jnp.int32)
        one = jax.tree.map(lambda x: cut(x, corners[0]), (z_t, cond))
        # A learned variance comes in channels beside z_t's.
        channels = jax.eval_shape(denoiser, one[0], t, one[1]).shape[-1]
        total = jnp.zeros((*z_t.shape[:3], channels), jnp.float32)
        sums = total, jnp.zeros((1, height, width, 1), jnp.float32)
        (total, weights), _ = jax.lax.scan(add, sums, corners)
        return total / weights

    return blended


def _added(sums: jax.Array, tile: jax.Array, corner: jax.Array) -> jax.Array:
    """sums [B, H, W, C] plus a tile [B, h, w, C] whose first pixel is `corner` (y, x)."""
    start = (0, corner[0], corner[1], 0)
    there = jax.lax.dynamic_slice(sums, start, tile.shape)
    return jax.lax.dynamic_update_slice(sums, tile + there, start)


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """First pixels of tiles that cover 0..size-1, the last one ending at the border."""
    last = size - tile
    return [*range(0, last, tile - overlap), last]
