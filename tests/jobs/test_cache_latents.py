import dataclasses

import numpy as np
import pytest

from ldm_jax.data.images import SOURCES, ImagesConfig, open_images
from ldm_jax.data.records.reader import open_cache
from ldm_jax.jobs import cache_latents
from ldm_jax.runs.first_stage import FirstStage
from tests import tiny
from tests.data import toy


@pytest.fixture
def toy_run(monkeypatch):
    """The run of a first stage on the toy source whose latents are the pixels themselves."""
    made = toy.source(*toy.FIELDS, toy.CLIP)
    monkeypatch.setitem(SOURCES, "toy", lambda config, split: made)
    model = dataclasses.replace(
        tiny.AUTOENCODER.model, latent="identity", width_multipliers=(1,), latent_channels=3
    )
    images = ImagesConfig("toy", resolution=toy.RESOLUTION)
    run = dataclasses.replace(tiny.AUTOENCODER, model=model, images=images)
    stage = FirstStage(run, {"encoder": {}, "decoder": {}}, 0, "ab" * 32)
    monkeypatch.setattr(cache_latents, "load_first_stage", lambda workdir, mesh: stage)
    return run


def test_further_fields_of_a_source_are_cached_and_mirror_with_their_image(toy_run, tmp_path):
    options = cache_latents.CacheOptions(batch_size=16, pack=4, shard_examples=12)
    manifest = cache_latents.run(tmp_path, options)["train"]
    assert manifest.fields == (*toy.FIELDS[1:], toy.CLIP)
    cache = open_cache(tmp_path / "latents" / "train", verify=True)
    indices = np.arange(toy.COUNT)
    want = open_images(toy_run.images, "train", augment=False).read(indices, indices)
    have = cache.read(indices, indices)
    np.testing.assert_allclose(have["moments"], want["image"] / np.float32(127.5) - 1, atol=1e-6)
    for name in ("label", "semantic", "tokens", "embedding", "clip"):
        np.testing.assert_array_equal(have[name], want[name])
        assert have[name].dtype == want[name].dtype

    positions = np.arange(200)
    batch = cache.read(positions % toy.COUNT, positions, flip=True, seed=5)
    pixels = np.round((batch["moments"] + 1) * 127.5).astype(int)
    np.testing.assert_array_equal(batch["semantic"], pixels[..., 2] + 1000)
    mirrored = pixels[:, 0, 0, 0] > pixels[:, 0, -1, 0]
    assert 60 < mirrored.sum() < 140
    np.testing.assert_array_equal(batch["clip"][:, 0] < 0, mirrored)
    np.testing.assert_array_equal(batch["tokens"], want["tokens"][positions % toy.COUNT])


def test_a_cache_without_mirrored_images_stores_no_copies(toy_run, tmp_path):
    options = cache_latents.CacheOptions(mirrored=False, batch_size=8, splits=("train",))
    manifest = cache_latents.run(tmp_path, options)["train"]
    assert {f.name: f.array_names for f in manifest.table}["clip"] == ("clip",)
    have = open_cache(tmp_path / "latents" / "train").read(np.arange(3), np.arange(3))
    assert have["clip"][:, 0].tolist() == [0, 1, 2]
