"""`ldm ema`: an average of any width as a run directory of its own."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from ldm_jax import cli
from ldm_jax.errors import InputError
from ldm_jax.jobs import ema, train_denoiser
from ldm_jax.models import denoiser
from ldm_jax.runs.denoiser import load_model
from ldm_jax.runs.workdir import check_trainable
from ldm_jax.sampling.draw import draw_images
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sharding import MeshConfig, abstract_params, host_array, make_mesh
from ldm_jax.train.checkpoint import Snapshots, load_weights
from ldm_jax.train.ema import coefficients
from tests import tiny


@pytest.fixture(scope="module")
def workdir(first_stage, tmp_path_factory):
    """Six steps, with snapshots of two widths after the third and the sixth."""
    folder = tmp_path_factory.mktemp("denoiser")
    settings = dataclasses.replace(tiny.DENOISER, ema=tiny.AVERAGES, autoencoder=str(first_stage))
    train_denoiser.run(settings, folder, jax.devices()[:1])
    return folder


@pytest.fixture(scope="module")
def like():
    config = tiny.DENOISER.model
    mesh = make_mesh(MeshConfig(1, 8, 1))
    return abstract_params(lambda key: denoiser.init(config, key), denoiser.axes(config), mesh)


def host(tree):
    return jax.tree.map(host_array, tree)


def close(got, want, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


def test_a_tracked_width_is_the_one_of_the_checkpoint(workdir, like, tmp_path):
    out = ema.run(workdir, 0.1, out=tmp_path / "out")
    got = load_weights(out, like, which="params")
    assert got.step == 6
    want = load_weights(workdir, like, which="ema-power-0.1")
    close(host(got.params), host(want.params))
    # The average is not the weights: equality above says something.
    raw = host(load_weights(workdir, like, which="params").params)
    pairs = zip(jax.tree.leaves(raw), jax.tree.leaves(host(want.params)), strict=True)
    assert max(np.abs(a - b).max() for a, b in pairs) > 2e-5


def test_a_third_width_is_the_sum_in_f64_on_one_device_and_on_eight(workdir, like, tmp_path):
    snapshots = Snapshots(workdir, read_only=True)
    kept = snapshots.kept()
    assert kept == [(3, 0.05), (3, 0.1), (6, 0.05), (6, 0.1)]
    weights, _ = coefficients(kept, 6, 0.15)
    total = jax.tree.map(lambda x: np.zeros(x.shape), like)
    for (step, width), weight in zip(kept, weights, strict=True):
        tree = host(snapshots.load(step, width, like))
        total = jax.tree.map(lambda a, b, w=weight: a + w * np.float64(b), total, tree)
    snapshots.close()
    eight = ema.run(workdir, 0.15, out=tmp_path / "eight")
    one = ema.run(workdir, 0.15, out=tmp_path / "one", mesh_config=MeshConfig(8, 1, 1))
    eight, one = (host(load_weights(w, like, which="params").params) for w in (eight, one))
    close(eight, total)
    jax.tree.map(np.testing.assert_array_equal, eight, one)
    record = json.loads((tmp_path / "eight" / "run.json").read_text())
    assert record["imported"]["snapshots"] == 4 and record["imported"]["ema_width"] == 0.15


def test_what_it_writes_is_a_run_to_sample_from_and_not_to_train(workdir, capsys):
    cli.main(["ema", f"--workdir={workdir}", "--width=0.1", "--step=3"])
    printed = capsys.readouterr()
    out = workdir / "ema" / "width-0.1-step3"
    assert printed.out.strip() == str(out) and "off by 0.000 %" in printed.err
    settings = SampleOptions(num=8, steps=2)
    model = load_model(out, settings.which)
    assert (model.which, model.step) == ("params", 3)
    assert draw_images(model, settings)[0].shape == (8, 8, 8, 3)
    with pytest.raises(InputError, match="cannot be trained further; train in a new"):
        check_trainable(out)
    with pytest.raises(InputError, match="is not empty"):
        ema.run(workdir, 0.1, 3)


def test_every_average_is_weights_to_sample_from(workdir, like):
    for which in ("ema-0.9", "ema-power-0.1"):
        model = load_model(workdir, SampleOptions(weights=which).which)
        want = load_weights(workdir, like, which=which)
        assert model.which == want.which == which
        jax.tree.map(np.testing.assert_array_equal, host(model.params), host(want.params))
    with pytest.raises(InputError, match=r"no weights 'ema-0\.8' at step 6; it has \['ema', 'ema-"):
        load_model(workdir, SampleOptions(weights="ema-0.8").which)


@pytest.mark.parametrize(
    ("width", "step", "words"),
    [(0.5, -1, "ema width 0.5"), (0.1, 2, "step 2 must be in 3..6"), (0.1, 7, "must be in 3..6")],
)
def test_what_cannot_be_made_is_refused(workdir, tmp_path, width, step, words):
    with pytest.raises(InputError, match=words):
        ema.run(workdir, width, step, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_snapshots_is_refused(first_stage, tmp_path):
    with pytest.raises(InputError, match="holds no snapshots of averages; train with"):
        ema.run(first_stage, 0.1, out=tmp_path / "out")
