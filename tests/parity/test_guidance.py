"""Guided predictions against diffusers' guiders.

Where they differ: adaptive projection there adds scale D to the unconditional prediction by
default; ours is the paper's, strong + (scale - 1) D, their `use_original_formulation` at scale
w = scale - 1. Their interval is a share of the steps, ours is in times. Autoguidance there takes
layers out of the one model; what it does with both predictions is compared. Their rescaling uses
the unbiased spread, whose quotient is the same. Their momentum is a state of the guider.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
)

from ldm_jax.diffusion import guidance
from tests.parity import reference

pytestmark = pytest.mark.parity

WEAK, STRONG, Z_T = (reference.draw(i, 3, 4, 4, 2) for i in range(3))
T = jnp.array([100, 500, 900])
BOTH = guidance.Contrast(lambda z_t, t, cond: (WEAK, STRONG), lambda z_t, t, cond: STRONG)


def ours(rule):
    return np.asarray(guidance.guide(BOTH, rule)(jnp.asarray(Z_T), T, None))


def theirs(guider):
    return guider.forward(torch.from_numpy(STRONG), torch.from_numpy(WEAK)).pred.numpy()


def same(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, 7.5])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_classifier_free_guidance_and_its_rescaling(scale, phi):
    guider = ClassifierFreeGuidance(guidance_scale=scale, guidance_rescale=phi)
    same(ours(guidance.rescale(guidance.extrapolate(scale), phi)), theirs(guider))


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_autoguidance(scale):
    guider = AutoGuidance(guidance_scale=scale, auto_guidance_layers=[0], dropout=1.0)
    same(ours(guidance.extrapolate(scale)), theirs(guider))


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
@pytest.mark.parametrize("eta, threshold", [(0.0, 0.0), (1.0, 2.0), (0.3, 15.0), (-0.5, 3.0)])
def test_adaptive_projected_guidance(scale, eta, threshold):
    guider = AdaptiveProjectedGuidance(
        guidance_scale=scale - 1,
        eta=eta,
        adaptive_projected_guidance_rescale=threshold,
        use_original_formulation=True,
    )
    same(ours(guidance.project(scale, eta, threshold or jnp.inf)), theirs(guider))


@pytest.mark.parametrize("start, stop", [(0.0, 1.0), (0.2, 0.8), (0.5, 0.6)])
def test_the_interval_over_a_trajectory(start, stop):
    steps = np.arange(10)
    times = 950 - 100 * steps
    guider = ClassifierFreeGuidance(guidance_scale=3.0, start=start, stop=stop)
    inside = times[round(10 * start) : round(10 * stop)]
    rule = guidance.extrapolate(3.0)
    guided = guidance.interval(BOTH, rule, int(inside[-1]), int(inside[0]))
    seen = set()
    for step, t in zip(steps, times, strict=True):
        guider.set_state(step, 10, torch.tensor(t))
        got = guided(jnp.asarray(Z_T), jnp.full((3,), t), None)
        same(got, theirs(guider))
        seen.add(bool(np.array_equal(got, STRONG)))
    assert seen == ({False} if (start, stop) == (0, 1) else {False, True})


def test_guiding_some_channels_is_not_guiding_all():
    """The comparison sees a wrong rule."""
    guider = ClassifierFreeGuidance(guidance_scale=3.0)
    got = ours(guidance.channels(guidance.extrapolate(3.0), [0]))
    same(got[..., 0], theirs(guider)[..., 0])
    assert np.abs(got - theirs(guider)).max() > 1
