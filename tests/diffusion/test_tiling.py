"""Laws of tiles: they cover every size, and what needs no neighbours is unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.tiling import _starts, tiled
from ldm_jax.errors import InputError
from ldm_jax.keys import key_for

T = jnp.array([3, 700])


def pointwise(z_t, t, cond):
    shift = cond["label"].reshape(-1, 1, 1, 1) + cond["map"] if cond else 0
    return jnp.tanh(z_t) * t.reshape(-1, 1, 1, 1) / 1000 + shift


def test_tiles_cover_every_size_and_overlap_enough():
    for tile, overlap in ((4, 0), (4, 1), (8, 4), (8, 7)):
        for size in range(tile, 40):
            starts = _starts(size, tile, overlap)
            assert starts[0] == 0 and starts[-1] == size - tile
            assert len(set(starts)) == len(starts)
            assert np.all(np.diff(starts) <= tile - overlap)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (7, 13), (9, 4)])
def test_denoiser_without_neighbours_is_unchanged(height, width):
    z_t = jax.random.normal(key_for(0, "z_t"), (2, height, width, 3))
    cond = {"label": jnp.array([0.5, -1.0]), "map": z_t[..., :1] ** 2}
    got = tiled(pointwise, 4, 2)(z_t, T, cond)
    np.testing.assert_allclose(got, pointwise(z_t, T, cond), rtol=0, atol=1e-6)


def test_one_tile_is_the_denoiser_itself():
    """Also for one that mixes pixels."""
    z_t = jax.random.normal(key_for(0, "z_t"), (2, 6, 6, 3))

    def mixing(z_t, t, cond):
        return jnp.cumsum(z_t, axis=1)

    np.testing.assert_allclose(tiled(mixing, 6, 3)(z_t, T, None), mixing(z_t, T, None), atol=1e-5)


def test_overlap_passes_smoothly_from_tile_to_tile():
    def position(z_t, t, cond):
        return jnp.ones_like(z_t) * z_t[:, :1, :1]

    z_t = jnp.tile(jnp.linspace(0, 1, 24).reshape(1, 24, 1, 1), (1, 1, 24, 1))
    blended = tiled(position, 8, 4)(z_t, T[:1], None)[0, :, 12, 0]
    steps = np.diff(blended)
    assert np.all(steps >= -1e-6) and steps.max() < 0.6 * (blended[-1] - blended[0])


def test_pixel_is_the_mean_of_its_tiles_weighted_by_the_distance_to_their_borders():
    def first_pixel(z_t, t, cond):
        return jnp.ones_like(z_t) * z_t[:, :1, :1]

    z_t = jax.random.normal(key_for(0, "z_t"), (1, 8, 8, 1))
    total, weights = np.zeros((8, 8)), np.zeros((8, 8))
    for y, x in ((0, 0), (0, 2), (2, 0), (2, 2)):
        for row in range(6):
            for column in range(6):
                weight = min(row + 1, 6 - row, column + 1, 6 - column)
                total[y + row, x + column] += weight * z_t[0, y, x, 0]
                weights[y + row, x + column] += weight
    got = tiled(first_pixel, 6, 4)(z_t, T[:1], None)[0, ..., 0]
    np.testing.assert_allclose(got, total / weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("tile", "overlap", "words"), [(4, 4, "overlap 4"), (8, 2, "tile 8 is")])
def test_tiles_that_do_not_fit_are_refused(tile, overlap, words):
    with pytest.raises(InputError, match=words):
        tiled(pointwise, tile, overlap)(jnp.zeros((2, 6, 9, 1)), T, None)
