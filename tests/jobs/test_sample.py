"""Sample i is a function of (seed, i): neither batch size, number asked for nor mesh change it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from ldm_jax import cli
from ldm_jax.errors import InputError
from ldm_jax.eval.images_out import load_npz
from ldm_jax.jobs import sample, train_denoiser
from ldm_jax.models import autoencoder
from ldm_jax.runs.denoiser import load_model
from ldm_jax.sampling.draw import draw_images
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sharding import MeshConfig
from tests import tiny

ONE = SampleOptions(num=8, steps=4, guidance=2.0, eta=0.5)


@pytest.fixture(scope="module")
def workdir(first_stage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("denoiser")
    settings = dataclasses.replace(tiny.DENOISER, autoencoder=str(first_stage))
    train_denoiser.run(settings, folder, jax.devices()[:1])
    return folder


@pytest.fixture(scope="module")
def model(workdir):
    return load_model(workdir, ONE.which)


@pytest.fixture(scope="module")
def reference(model):
    return draw_images(model, ONE)


def latents_of(monkeypatch, model, settings):
    """What the sampler hands to the decoder, f32 [num,h,w,C], before rounding hides it."""
    monkeypatch.setattr(autoencoder, "to_uint8", lambda x: x)
    monkeypatch.setattr(autoencoder, "decode", lambda config, params, z: z)
    return draw_images(model, settings)[0]


def test_samples_do_not_depend_on_batch_size_or_number(model, monkeypatch):
    want = latents_of(monkeypatch, model, dataclasses.replace(ONE, batch_size=8))
    more = latents_of(monkeypatch, model, dataclasses.replace(ONE, num=12, batch_size=16))
    np.testing.assert_allclose(more[:8], want, atol=1e-5)
    assert np.abs(want[0] - want[1]).max() > 1e-2


def test_samples_do_not_depend_on_the_mesh(workdir, model, monkeypatch):
    want = latents_of(monkeypatch, model, dataclasses.replace(ONE, batch_size=8))
    for mesh in (MeshConfig(2, 4, 1), MeshConfig(2, 2, 2)):
        other = load_model(workdir, ONE.which, mesh)
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
    assert draw_images(model, settings)[1].tolist() == [3, 5, 3, 5, 3]


def test_noise_of_a_file_is_used(model, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).standard_normal((8, 4, 4, 2)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    plain = dataclasses.replace(ONE, eta=0.0)
    given = dataclasses.replace(plain, noise=str(tmp_path / "noise.npy"))
    first = latents_of(monkeypatch, model, given)
    again = latents_of(monkeypatch, model, dataclasses.replace(given, seed=7))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - latents_of(monkeypatch, model, plain)).max() > 1e-2


def test_a_file_that_is_no_noise_is_refused(model, tmp_path):
    noise = np.zeros((8, 4, 4, 2), np.float32)
    np.savez(tmp_path / "several.npz", noise)
    np.save(tmp_path / "nan.npy", noise * np.nan)
    np.save(tmp_path / "shape.npy", noise[1:])
    (tmp_path / "empty.npy").touch()
    faults = {"several.npz": "several arrays", "nan.npy": "not finite"}
    faults |= {"shape.npy": r"shape \(8, 4, 4, 2\)", "empty.npy": "cannot be read"}
    for name, words in faults.items():
        with pytest.raises(InputError, match=words):
            draw_images(model, dataclasses.replace(ONE, noise=str(tmp_path / name)))


def test_what_cannot_be_written_is_refused_before_the_work(workdir, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sample, "draw_samples", lambda *args: pytest.fail("it drew"))
    with pytest.raises(InputError, match=r"nothing can be written in .*file; give another place"):
        sample.run(workdir, ONE, tmp_path / "file" / "some.npz")


def test_the_average_is_what_samples_are_drawn_from(workdir, model):
    assert model.which == "ema"
    raw = load_model(workdir, dataclasses.replace(ONE, weights="params").which)
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


def test_a_run_guides_itself_by_its_other_weights(workdir, model):
    led = load_model(workdir, dataclasses.replace(ONE, step=3, guide_weights="params").which)
    assert (led.guide.step, led.guide.which, led.step, led.which) == (3, "params", 3, "ema")
    same = jax.tree.map(np.array_equal, led.params, led.guide.params)
    assert model.guide is None and not all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("change", "record", "words"),
    [
        ({"guide_step": 6}, {}, "at step 6 with weights 'ema' is the model itself"),
        ({"guide_step": -2}, {}, "guide-step -2 must be a checkpoint's"),
        ({"guide_workdir": "absent"}, {}, "absent is not there"),
        ({}, {"job": "train-autoencoder"}, "belongs to `ldm train-autoencoder`"),
        ({}, {"data": {"encoder_hash": "f" * 64}}, "has encoder_hash ffffffffffff, but"),
        ({}, {"data": {"latent_shape": [8, 8, 2]}}, "has latent_shape .8, 8, 2., but"),
        ({}, {"config": {"process": {"kind": "cosine"}}}, "has process .*'cosine'"),
        ({}, {"config": {"objective": {"parameterisation": "v"}}}, "has parameterisation v, but"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused(workdir, tmp_path, change, record, words):
    def merged(old, new):
        return old | {k: merged(old[k], v) if isinstance(v, dict) else v for k, v in new.items()}

    other = merged(json.loads((workdir / "run.json").read_text()), record)
    (tmp_path / "run.json").write_text(json.dumps(other))
    change = change or {"guide_workdir": str(tmp_path)}
    with pytest.raises(InputError, match=words):
        load_model(workdir, dataclasses.replace(ONE, **change).which)


def test_every_flag_at_once(workdir, reference, tmp_path, capsys):
    """On the command line, over a mesh of eight devices; what is black in the mask stays."""
    np.savez(tmp_path / "init.npz", reference[0][:, :, [*range(8), *range(8)]])
    mask = np.zeros((1, 8, 16), np.uint8)
    mask[0, :, 4:8] = 255
    np.savez(tmp_path / "mask.npz", mask)
    arguments = [
        *("--num=9", "--seed=2", "--steps=4", "--sampler=unipc", "--order=3", "--guidance=3"),
        *("--guidance-interval=0.1,0.9", "--guidance-rescale=0.5", "--guidance-projection=0,5"),
        *("--guided-channels=1", "--guide-step=3", "--clip-x0=3", "--threshold-x0=0.99"),
        *(f"--init-images={tmp_path / 'init.npz'}", "--strength=0.8", "--progressive=2"),
        *(f"--masks={tmp_path / 'mask.npz'}", "--size=8,16", "--tile=8", "--tile-overlap=4"),
    ]
    cli.main(["sample", f"--workdir={workdir}", *arguments, f"--out={tmp_path / 'out'}"])
    images, _ = load_npz(capsys.readouterr().out.strip())
    start = load_npz(tmp_path / "init.npz")[0][np.arange(9) % 8]
    keep = np.broadcast_to(mask[..., None] == 0, start.shape)
    np.testing.assert_array_equal(images[keep], start[keep])
    assert np.abs(images[~keep].astype(int) - start[~keep]).max() > 0
    progress = np.asarray(Image.open(tmp_path / "out-progress.png"))
    assert progress.shape == (9 * 8 + 8 * 2, 16, 3)  # of 3 steps that are taken, at the second
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["guide_step"], record["guide_weights"], record["step"]) == (3, "ema", 6)
    assert record["guidance_interval"] == [0.1, 0.9] and record["size"] == [8, 16]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": (3, 10)}, "class 10 is unknown; this denoiser has classes 0..9"),
        ({"sampler": "plms2"}, "sampler 'plms2' is unknown"),
        ({"steps": 0}, "steps 0 must be in 1..1000"),
        ({"num": 0}, "num 0 must be at least 1"),
        ({"batch_size": 12}, "must divide by 8"),
        ({"noise": "absent.npy"}, "absent.npy cannot be read"),
        ({"guidance": float("nan")}, "guidance nan must be at least 0"),
        ({"eta": -0.5}, "eta -0.5 must be in"),
        ({"sampler": "heun"}, "eta 0.5: sampler 'heun' has none"),
        ({"temperature": -1.0}, "temperature -1.0 must be at least 0"),
        ({"spacing": "uniform"}, "spacing 'uniform' is not one of"),
        ({"seed": -1}, "seed -1 must be in"),
        ({"guidance": -1.0}, "guidance -1.0 must be at least 0"),
    ],
)
def test_bad_settings_are_refused(model, change, words):
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        draw_images(model, dataclasses.replace(ONE, **change))
