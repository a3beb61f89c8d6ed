"""The evaluation of a first stage in training: what it measures, and on which weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.data.images import open_images
from ldm_jax.errors import InputError
from ldm_jax.eval.reconstruction import psnr
from ldm_jax.jobs import train_autoencoder
from ldm_jax.models import autoencoder
from ldm_jax.runs import reconstruction
from ldm_jax.runs.first_stage import load_first_stage
from ldm_jax.runs.reconstruction import (
    compile_reconstruction,
    evaluation_hook,
    reconstruct,
    reconstruction_figures,
)
from ldm_jax.sharding import MeshConfig, make_mesh
from ldm_jax.train.state import TrainState
from tests import tiny

CONFIG = dataclasses.replace(tiny.AUTOENCODER, eval_every=1, eval_images=37, keep_best="psnr")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(2, 4, 1))


@pytest.fixture(scope="module")
def trained(first_stage, mesh):
    return load_first_stage(first_stage, mesh)


@pytest.fixture(scope="module")
def held_out():
    source = open_images(CONFIG.images, "held_out", augment=False)
    spread = np.linspace(0, len(source) - 1, 37).round().astype(int)
    return source.read(spread, spread)["image"]


def evaluated(hook, params, ema=None, step=1):
    """The figures and pictures of weights, and of their average where there is one."""
    averages = {} if ema is None else {"ema": ema}
    report = hook.run(TrainState(np.int32(step), params, {}, averages), step)
    assert tuple(report.figures) == hook.figures
    return report.figures, report.pictures


def test_figures_are_those_of_held_out_images_spread_over_the_split(trained, mesh, held_out):
    figures, pictures = evaluated(evaluation_hook(CONFIG, mesh), trained.params)
    rebuilt = reconstruct(trained, held_out, mesh)
    assert figures["num_images"] == 37
    assert figures["psnr_db"] == pytest.approx(psnr(held_out, rebuilt).mean(), abs=1e-3)
    assert set(pictures) == {"fixed", "worst"}
    for picture in pictures.values():
        assert picture.shape == (2 * 8 + 2, 8 * 8 + 7 * 2, 3) and picture.dtype == np.uint8
    worst = np.argmin(psnr(held_out, rebuilt))
    np.testing.assert_array_equal(pictures["worst"][:8, :8], held_out[worst])
    np.testing.assert_allclose(pictures["worst"][-8:, :8].astype(int), rebuilt[worst], atol=1)
    np.testing.assert_array_equal(pictures["fixed"][:8, :8], held_out[0])
    np.testing.assert_array_equal(pictures["fixed"][:8, -8:], held_out[-1])


def test_averaged_weights_are_evaluated_where_there_are_any(trained, mesh):
    hook = evaluation_hook(CONFIG, mesh)
    zeros = jax.tree.map(np.zeros_like, trained.params)
    average, _ = evaluated(hook, zeros, trained.params)
    raw, _ = evaluated(hook, trained.params)
    nothing, _ = evaluated(hook, zeros)
    assert average == raw != nothing


def test_one_program_serves_every_evaluation(trained, mesh, monkeypatch):
    traces = []
    encode = autoencoder.encode
    monkeypatch.setattr(autoencoder, "encode", lambda *a: traces.append(1) or encode(*a))
    hook = evaluation_hook(CONFIG, mesh)
    for step in (1, 2):
        evaluated(hook, trained.params, step=step)
    assert len(traces) == 1


def test_reconstructions_do_not_depend_on_the_batch_or_the_mesh(trained, mesh, held_out):
    want = reconstruct(trained, held_out, mesh).astype(int)
    assert want.shape == held_out.shape and want.std() > 1
    np.testing.assert_allclose(reconstruct(trained, held_out, mesh, batch_size=5), want, atol=1)
    one = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    params = jax.device_get(trained.params)
    alone = compile_reconstruction(trained.config, one, 20)(params, held_out)
    np.testing.assert_allclose(alone, want, atol=1)


def test_what_is_decoded_is_the_mode_and_what_comes_out_is_rounded(mesh, held_out, monkeypatch):
    def encode(config, params, x):  # mean: red and green; log-variance: 7
        return jnp.concatenate([x[..., :2], jnp.full_like(x[..., :2], 7)], -1)

    def decode(config, params, z):  # blue far out of range, the rest a third of a value off
        return jnp.concatenate([z + 1 / 3 / 127.5, jnp.full_like(z[..., :1], 3)], -1)

    monkeypatch.setattr(autoencoder, "encode", encode)
    monkeypatch.setattr(autoencoder, "decode", decode)
    rebuilt = compile_reconstruction(CONFIG.model, mesh, 8)({}, held_out)
    np.testing.assert_array_equal(rebuilt[..., :2], held_out[..., :2])
    assert (rebuilt[..., 2] == 255).all()


@pytest.mark.parametrize("latent", ["vq", "identity"])
def test_every_kind_of_latent_is_evaluated(latent, mesh):
    changes = {"latent": latent}
    if latent == "identity":
        changes |= {"width_multipliers": (1,), "latent_channels": 3}
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **changes))
    params = autoencoder.init(config.model, jax.random.key(0))
    figures, _ = evaluated(evaluation_hook(config, mesh), params)
    assert figures["num_images"] == 37
    assert (figures["psnr_db"] == 100) == (latent == "identity")


def test_lpips_is_measured_where_it_is_given(trained, mesh):
    def lpips(x, y):
        return np.arange(len(x)) * 1.0

    figures, _ = evaluated(evaluation_hook(CONFIG, mesh, lpips), trained.params)
    # In batches of the run's 16: 16, 16 and 5 images.
    assert figures["lpips"] == pytest.approx((2 * 120 + 10) / 37)


def test_a_split_without_images_and_a_share_of_none_are_refused(mesh):
    images = dataclasses.replace(CONFIG.images, held_out_fraction=0.0)
    with pytest.raises(InputError, match=r"held_out split of digits .* is empty"):
        evaluation_hook(dataclasses.replace(CONFIG, images=images), mesh)
    with pytest.raises(InputError, match="eval_images 0 must be at least 1"):
        dataclasses.replace(CONFIG, eval_images=0)


def test_without_an_interval_there_is_no_evaluation_and_no_data_is_opened(tmp_path, monkeypatch):
    opened, hooks = [], []

    def recorded(config, split, **options):
        opened.append(split)
        return open_images(config, split, **options)

    for module in (train_autoencoder, reconstruction):
        monkeypatch.setattr(module, "open_images", recorded)
    monkeypatch.setattr(train_autoencoder, "fit", lambda *a, **more: hooks.append(more["hooks"]))
    for every in (0, 1):
        run = dataclasses.replace(CONFIG, eval_every=every, keep_best="")
        train_autoencoder.run(run, tmp_path / str(every), jax.devices()[:1])
    assert opened == ["train", "train", "held_out"]
    assert [[hook.every for hook in each] for each in hooks] == [[], [1]]


def test_evaluate_gives_the_same_figures_of_a_finished_run(first_stage, trained, mesh):
    figures = reconstruction_figures(first_stage, limit=37)
    while_training, _ = evaluated(evaluation_hook(CONFIG, mesh), {}, trained.params, step=3)
    assert figures.pop("step") == 3
    assert figures == pytest.approx(while_training, abs=1e-3)
