"""A VQ first stage through every job: trained, cached, fine-tuned, under a denoiser, sampled."""

import dataclasses

import jax
import numpy as np
import pytest

from ldm_jax.data import images
from ldm_jax.data.records.reader import open_cache
from ldm_jax.errors import InputError
from ldm_jax.jobs import cache_latents, train_autoencoder, train_denoiser
from ldm_jax.models import quantizer
from ldm_jax.runs.denoiser import load_model
from ldm_jax.runs.first_stage import load_first_stage
from ldm_jax.sampling.draw import draw_images
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sharding import MeshConfig, host_array, make_mesh
from ldm_jax.train import adversarial, optim
from tests import tiny

VQ = dataclasses.replace(
    tiny.AUTOENCODER,
    num_steps=3,
    model=dataclasses.replace(
        tiny.AUTOENCODER.model,
        latent="vq",
        middle_attention=False,
        quantizer=quantizer.QuantizerConfig(codebook_size=16, average_decay=0.8, restart_below=1.0),
    ),
    adversarial=adversarial.AdversarialConfig(),
)


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vq") / "autoencoder"
    train_autoencoder.run(VQ, workdir)
    cache_latents.run(workdir, cache_latents.CacheOptions(batch_size=64, pack=8, shard_examples=64))
    return workdir


@pytest.fixture(scope="module")
def fine_tuned(vq):
    workdir = vq.with_name("fine-tuned")
    run = dataclasses.replace(
        VQ, train="decoder", init_from=str(vq), optim=optim.OptimConfig(lr=1e-3, weight_decay=0.1)
    )
    train_autoencoder.run(run, workdir)
    return workdir


def test_cache_holds_latents_before_quantization(vq):
    cache = open_cache(vq / "latents" / "train")
    assert cache.manifest.posterior == "point"
    rows = np.arange(8)
    z = cache.read(rows, rows)["moments"]
    assert z.shape == (8, 4, 4, 2)
    everything = np.arange(len(cache))
    stored = cache.read(everything, everything)["moments"].reshape(-1, 2)
    np.testing.assert_allclose(cache.manifest.std, stored.std(0), rtol=1e-4)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    codebook = host_array(load_first_stage(vq, mesh).params["quantizer"]["codebook"])
    distance = np.abs(z.reshape(-1, 1, 2) - codebook[None]).sum(-1).min(1)
    assert distance.max() > 1e-4  # they are not codes yet


def test_fine_tuning_the_decoder_keeps_cached_latents_valid(vq, fine_tuned):
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    before, after = (load_first_stage(w, mesh) for w in (vq, fine_tuned))
    assert after.encoder_hash == before.encoder_hash
    for name, moves in (("encoder", False), ("quantizer", False), ("decoder", True)):
        pairs = zip(
            jax.tree.leaves(before.params[name]), jax.tree.leaves(after.params[name]), strict=True
        )
        assert all(np.array_equal(a, b) != moves for a, b in pairs), name


def test_denoiser_trains_on_them_and_samples_through_the_fine_tuned_decoder(vq, fine_tuned):
    workdir = vq.with_name("denoiser")
    run = dataclasses.replace(
        tiny.DENOISER,
        num_steps=2,
        whitening="none",
        autoencoder=str(fine_tuned),
        latents=str(vq / "latents"),
    )
    train_denoiser.run(run, workdir)
    settings = SampleOptions(num=8, steps=2)
    drawn, _ = draw_images(load_model(workdir, settings.which), settings)
    assert drawn.shape == (8, 8, 8, 3) and len(np.unique(drawn)) > 2


def test_other_architectures_are_not_begun_with(vq, tmp_path):
    wide = dataclasses.replace(VQ, model=dataclasses.replace(VQ.model, width=16), init_from=str(vq))
    with pytest.raises(InputError, match="another architecture"):
        train_autoencoder.run(wide, tmp_path / "w")
    with pytest.raises(InputError, match="init_from"):
        train_autoencoder.run(dataclasses.replace(VQ, train="decoder"), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_identity_stage_caches_the_pixels_themselves(tmp_path):
    model = dataclasses.replace(
        tiny.AUTOENCODER.model, latent="identity", width_multipliers=(1,), latent_channels=3
    )
    run = dataclasses.replace(
        tiny.AUTOENCODER, model=model, adversarial=adversarial.AdversarialConfig()
    )
    assert train_autoencoder.run(run, tmp_path) is None
    cache_latents.run(
        tmp_path, cache_latents.CacheOptions(batch_size=64, pack=8, shard_examples=64)
    )
    cache = open_cache(tmp_path / "latents" / "held_out")
    source = images.open_images(run.images, "held_out", augment=False)
    rows = np.arange(16)
    pixels = source.read(rows, rows)["image"] / 127.5 - 1
    np.testing.assert_allclose(cache.read(rows, rows)["moments"], pixels, atol=1e-6)
