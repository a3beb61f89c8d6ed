"""A model for sampling that compiles at once: a formula of pixels, and latents of 2 x 2 means."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.objective import Objective
from ldm_jax.diffusion.process import ProcessConfig
from ldm_jax.models import autoencoder, denoiser, latents
from ldm_jax.models.layers import upsample_nearest
from ldm_jax.runs.denoiser import Model
from ldm_jax.runs.first_stage import FirstStage
from ldm_jax.sharding import MeshConfig, make_mesh
from tests import tiny

C = 3
TABLE = jnp.asarray(np.random.default_rng(0).normal(0, 0.3, (11, C)), jnp.float32)
GOOD, BAD = {"gain": jnp.float32(0.6)}, {"gain": jnp.float32(0.3)}


def network(config, params, z_t, t, cond):
    """x0, in which neither pixels nor channels mix; class 10 is the null condition."""
    shift = TABLE[cond["label"]][:, None, None] if cond else 0.1
    return params["gain"] * jnp.tanh(z_t) + shift


def encode(config, params, x):
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def run_of(process="ldm_linear"):
    return dataclasses.replace(
        tiny.DENOISER,
        process=ProcessConfig(process),
        objective=Objective(parameterisation="x0"),
    )


def model_of(process="ldm_linear", guide=None):
    """16 x 16 pixels, 8 x 8 latents, on one device."""
    first = dataclasses.replace(
        tiny.AUTOENCODER,
        images=dataclasses.replace(tiny.AUTOENCODER.images, resolution=16),
        model=dataclasses.replace(
            tiny.AUTOENCODER.model, latent="vq", latent_channels=C, resolution=16
        ),
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    whitening = latents.Whitening((0.1, 0.0, -0.1), (0.5, 0.4, 0.6))
    codec = latents.make_codec("sample", "point", whitening)
    stage, shape = FirstStage(first, {}, 3, "hash"), (8, 8, C)
    return Model(run_of(process), GOOD, 6, "ema", stage, codec, shape, mesh, guide)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(denoiser, "apply", network)
    monkeypatch.setattr(autoencoder, "encode", encode)
    monkeypatch.setattr(autoencoder, "decode", lambda config, params, z: upsample_nearest(z))


@pytest.fixture
def as_latents(monkeypatch):
    """Samples are then the denoiser's latents [num,h,w,C] themselves."""
    monkeypatch.setattr(autoencoder, "to_uint8", lambda x: x)
    monkeypatch.setattr(autoencoder, "decode", lambda config, params, z: z)
    monkeypatch.setattr(latents.Whitening, "unwhiten", lambda self, z: z)
