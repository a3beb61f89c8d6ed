"""What a run is built of: the widths that follow from its codec, and what lies in run.json."""

import dataclasses

import pytest

from ldm_jax.diffusion.objective import Objective
from ldm_jax.diffusion.perceptual import PerceptualConfig
from ldm_jax.errors import InputError
from ldm_jax.models.latents import DRAWS, SPREADS, Whitening
from ldm_jax.runs.build import (
    denoising_of,
    facts_of_config,
    facts_of_record,
    perceptual_of,
    resolve_widths,
)
from tests import tiny

VQ = dataclasses.replace(tiny.AUTOENCODER.model, latent="vq")


def run_of(codec, learned=False, **widths):
    backbone = dataclasses.replace(
        tiny.DENOISER.model.backbone, **({"in_channels": 0, "out_channels": 0} | widths)
    )
    return dataclasses.replace(
        tiny.DENOISER,
        codec=codec,
        model=dataclasses.replace(tiny.DENOISER.model, backbone=backbone),
        objective=Objective(learned_variance=learned),
    )


def widths(run):  # of a DenoiserRun or a Denoising
    return run.model.backbone.in_channels, run.model.backbone.out_channels


@pytest.mark.parametrize(
    ("codec", "channels"), [*((k, 2) for k in DRAWS), *((k, 4) for k in SPREADS)]
)
def test_channels_of_0_are_those_of_the_codec_and_the_objective(codec, channels):
    for learned in (False, True):
        run = run_of(codec, learned)
        facts = facts_of_config(run, tiny.AUTOENCODER.model)
        want = (channels, channels * (1 + learned))
        assert widths(resolve_widths(run, facts)) == widths(denoising_of(run, facts)) == want


def test_channels_that_are_given_stay_and_are_refused_where_they_do_not_fit():
    facts = facts_of_config(run_of("mean_logvar"), tiny.AUTOENCODER.model)
    right = run_of("mean_logvar", in_channels=4)
    assert widths(resolve_widths(right, facts)) == (4, 4)
    wrong = run_of("mean_logvar", out_channels=2)
    assert widths(resolve_widths(wrong, facts)) == (4, 2)
    with pytest.raises(InputError, match=r"out_channels is 2, .* codec 'mean_logvar' have 4 chan"):
        denoising_of(wrong, facts)


def test_a_first_stage_of_points_has_no_spread_to_train_on():
    assert denoising_of(run_of("mean"), facts_of_config(run_of("mean"), VQ)).codec.channels == 2
    with pytest.raises(InputError, match=r"codec 'mean_std' .* points .*use --config\.codec=mean"):
        facts_of_config(run_of("mean_std"), VQ)


def test_a_gate_that_nothing_passes_is_refused():
    run = dataclasses.replace(tiny.DENOISER, lpl=PerceptualConfig(weight=1.0, nsr_max=1e-9))
    facts = facts_of_config(run, tiny.AUTOENCODER.model)
    with pytest.raises(InputError, match=r"lpl\.nsr_max 1e-09: no noise level that is trained on"):
        perceptual_of(run, facts, denoising_of(run, facts))


def test_the_record_of_an_earlier_version_is_read():
    data = {"latent_shape": [4, 4, 2], "whitening": {"shift": [1.0, 2.0], "scale": [3.0, 4.0]}}
    facts = facts_of_record({"data": data}, "gaussian")
    assert facts.latent_shape == (4, 4, 2)
    assert facts.whitening == Whitening((1.0, 2.0), (3.0, 4.0))
