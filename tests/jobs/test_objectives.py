"""Learned variances and uncertainty from a config to samples, and through a resume."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.objective import Objective
from ldm_jax.errors import InputError
from ldm_jax.jobs import train_denoiser
from ldm_jax.runs.denoiser import load_model
from ldm_jax.sampling.draw import draw_images
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.train.checkpoint import Checkpoints
from tests import tiny

ONE = SampleOptions(num=8, steps=4, guidance=2.0, sampler="ddpm")


def settings(first_stage):
    model = tiny.DENOISER.model
    return dataclasses.replace(
        tiny.DENOISER,
        autoencoder=str(first_stage),
        model=dataclasses.replace(
            model, backbone=dataclasses.replace(model.backbone, out_channels=4)
        ),
        objective=Objective(learned_variance=True, uncertainty=8),
    )


@pytest.fixture(scope="module")
def trained(first_stage, tmp_path_factory):
    """A workdir and the state it ended with."""
    folder = tmp_path_factory.mktemp("learned")
    state = train_denoiser.run(settings(first_stage), folder, jax.devices()[:1])
    return folder, state


def test_what_is_learned_beside_the_denoiser_resumes_bit_for_bit(first_stage, trained, tmp_path):
    folder, want = trained
    assert want.params.keys() == want.averages["ema"].keys() == {"backbone", "conditioner"}
    assert np.any(want.extra["uncertainty"]["weight"])
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "6")
    checkpoints = Checkpoints(again, read_only=True)
    assert checkpoints.latest() == 3
    checkpoints.close()
    got = train_denoiser.run(settings(first_stage), again, jax.devices()[:1])
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


def test_ddpm_draws_with_the_variance(trained):
    model = load_model(trained[0], ONE.which)
    bias = model.params["backbone"]["conv_out"]["bias"]
    wider = bias + jnp.array([0.0, 0.0, 1.0, 1.0])
    backbone = {**model.params["backbone"]}
    backbone["conv_out"] = {**backbone["conv_out"], "bias": wider}
    other = dataclasses.replace(model, params={**model.params, "backbone": backbone})
    assert not np.array_equal(*(draw_images(m, ONE)[0] for m in (model, other)))


def test_sizes_that_do_not_fit_learned_variances_are_refused(first_stage, tmp_path):
    narrow = dataclasses.replace(settings(first_stage), model=tiny.DENOISER.model)
    with pytest.raises(InputError, match=r"out_channels is 2, .* twice .*; set it to 4"):
        train_denoiser.run(narrow, tmp_path / "narrow")
    wrong = Objective("v", learned_variance=True)
    with pytest.raises(InputError, match="learned_variance is of parameterisation 'eps'"):
        train_denoiser.run(
            dataclasses.replace(settings(first_stage), objective=wrong), tmp_path / "wrong"
        )
    assert not list(tmp_path.iterdir())
