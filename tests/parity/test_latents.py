"""The Gaussian latent against diffusers' DiagonalGaussianDistribution."""

import jax
import numpy as np
import pytest
from diffusers.models.autoencoders import vae

from ldm_jax.keys import normal_like
from ldm_jax.models import latents
from tests.parity import reference

pytestmark = pytest.mark.parity


def keys():
    return jax.random.split(jax.random.key(0), 3)


def moments():
    """Log-variances from -40 to 30, past both ends of the clamp."""
    x = reference.draw(0, 3, 5, 7, 8)
    x[..., 4:] *= 2
    x[0, :2, :, 4:], x[1, 0, :, 4:] = -40, 30
    return x


def test_posterior_kl_and_mode_are_the_reference():
    x = moments()
    theirs = vae.DiagonalGaussianDistribution(reference.to_torch(x))
    assert reference.error(latents.kl_to_standard_normal(x), theirs.kl().numpy()) < 1e-6
    # The clamp's e^20 would drown any other error, so one example does without it.
    assert reference.error(latents.kl_to_standard_normal(x)[2], theirs.kl().numpy()[2]) < 1e-6
    np.testing.assert_array_equal(latents.split_moments(x)[0], reference.from_torch(theirs.mode()))


def test_posterior_draw_is_the_reference(monkeypatch):
    x = moments()
    mean = latents.split_moments(x)[0]
    noise = reference.to_torch(normal_like(keys(), mean))
    monkeypatch.setattr(vae, "randn_tensor", lambda *args, **kwargs: noise)
    theirs = reference.from_torch(vae.DiagonalGaussianDistribution(reference.to_torch(x)).sample())
    ours = latents.sample(x, keys())
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert reference.error(theirs[2], mean[2]) > 0.1
