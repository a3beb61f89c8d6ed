"""Sample i is a function of (seed, i): neither batch size, number asked for nor mesh change it."""

import dataclasses

import jax
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval.images_out import load_npz
from ldm_jax.jobs import sample, train_denoiser
from ldm_jax.models import autoencoder
from ldm_jax.sharding import MeshConfig
from tests import tiny

ONE = sample.Settings(num=8, steps=4, guidance=2.0, eta=0.5)


@pytest.fixture(scope="module")
def workdir(first_stage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("denoiser")
    settings = dataclasses.replace(tiny.DENOISER, autoencoder=str(first_stage))
    train_denoiser.run(settings, folder, jax.devices()[:1])
    return folder


@pytest.fixture(scope="module")
def model(workdir):
    return sample.load_model(workdir, ONE)


@pytest.fixture(scope="module")
def reference(model):
    return sample.sample(model, ONE)


def latents_of(monkeypatch, model, settings):
    """What the sampler hands to the decoder, f32 [num,h,w,C], before rounding hides it."""
    monkeypatch.setattr(autoencoder, "to_uint8", lambda x: x)
    monkeypatch.setattr(autoencoder, "decode", lambda config, params, z: z)
    return sample.sample(model, settings)[0]


def test_samples_do_not_depend_on_batch_size_or_number(model, monkeypatch):
    want = latents_of(monkeypatch, model, dataclasses.replace(ONE, batch_size=8))
    more = latents_of(monkeypatch, model, dataclasses.replace(ONE, num=12, batch_size=16))
    np.testing.assert_allclose(more[:8], want, atol=1e-5)
    assert np.abs(want[0] - want[1]).max() > 1e-2


def test_samples_do_not_depend_on_the_mesh(workdir, model, monkeypatch):
    want = latents_of(monkeypatch, model, dataclasses.replace(ONE, batch_size=8))
    for mesh in (MeshConfig(2, 4, 1), MeshConfig(2, 2, 2)):
        other = sample.load_model(workdir, ONE, mesh)
        got = latents_of(monkeypatch, other, dataclasses.replace(ONE, batch_size=8))
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_seed_class_and_guidance_change_samples(model, reference, monkeypatch):
    want = latents_of(monkeypatch, model, ONE)
    for change in ({"seed": 1}, {"classes": (3,)}, {"guidance": 1.5}):
        got = latents_of(monkeypatch, model, dataclasses.replace(ONE, **change))
        assert np.abs(got - want).max() > 1e-4, change


def test_classes_go_in_turn(model, reference):
    assert reference[1].tolist() == list(range(8))
    settings = dataclasses.replace(ONE, classes=(3, 5), num=5)
    assert sample.sample(model, settings)[1].tolist() == [3, 5, 3, 5, 3]


def test_noise_of_a_file_is_used(model, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).standard_normal((8, 4, 4, 2)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    plain = dataclasses.replace(ONE, eta=0.0)
    given = dataclasses.replace(plain, noise=str(tmp_path / "noise.npy"))
    first = latents_of(monkeypatch, model, given)
    again = latents_of(monkeypatch, model, dataclasses.replace(given, seed=7))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - latents_of(monkeypatch, model, plain)).max() > 1e-2


def test_the_average_is_what_samples_are_drawn_from(workdir, model):
    assert model.which == "ema"
    raw = sample.load_model(workdir, dataclasses.replace(ONE, weights="params"))
    different = jax.tree.map(lambda a, b: not np.array_equal(a, b), model.params, raw.params)
    assert any(jax.tree.leaves(different))


def test_files_have_the_layout_of_adm(workdir, reference):
    path = sample.run(workdir, ONE, workdir / "out" / "some.npz")
    images, labels = load_npz(path)
    assert images.dtype == np.uint8
    assert images.shape == (8, 8, 8, 3)
    np.testing.assert_array_equal(images, reference[0])
    np.testing.assert_array_equal(labels, np.arange(8))
    assert path.with_suffix(".png").stat().st_size > 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": (3, 10)}, "class 10 is unknown; this denoiser has classes 0..9"),
        ({"sampler": "plms2"}, "sampler 'plms2' is unknown"),
        ({"steps": 0}, "steps 0 must be in 1..1000"),
        ({"num": 0}, "num 0 must be at least 1"),
        ({"batch_size": 12}, "must divide by 8"),
        ({"noise": "absent.npy"}, "absent.npy cannot be read"),
        ({"guidance": float("nan")}, "guidance nan must be finite"),
        ({"eta": -0.5}, "eta -0.5 must be in"),
        ({"sampler": "heun"}, "eta 0.5: sampler 'heun' has none"),
        ({"temperature": -1.0}, "temperature -1.0 must be finite"),
        ({"spacing": "uniform"}, "spacing 'uniform' is not one of"),
        ({"seed": -1}, "seed -1 must be in"),
        ({"guidance": -1.0}, "guidance -1.0 must be finite and not negative"),
    ],
)
def test_bad_settings_are_refused(model, change, words):
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        sample.sample(model, dataclasses.replace(ONE, **change))
