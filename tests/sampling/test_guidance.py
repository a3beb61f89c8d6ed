"""Guidance, limits and options of samplers reach the samples; their numbers are traced."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.objective import Objective
from ldm_jax.diffusion.parameterisation import target, x0_and_eps
from ldm_jax.diffusion.process import make_process
from ldm_jax.errors import InputError
from ldm_jax.models import denoiser
from ldm_jax.runs.denoiser import Guide
from ldm_jax.sampling.draw import check_options, draw_samples
from ldm_jax.sampling.options import SampleOptions, sampler_options
from ldm_jax.sampling.program import compile_sampler, numbers_of, weights_of
from tests.sampling.quick import BAD, as_latents, model_of, network, quick, run_of  # noqa: F401

pytestmark = pytest.mark.usefixtures("as_latents")

FEW = SampleOptions(num=3, steps=4, guidance=3.0, batch_size=3)
ONE = dataclasses.replace(FEW, steps=1, spacing="trailing")  # z0 is the prediction at T - 1


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def guided_model():
    return model_of(guide=Guide(Path("worse"), run_of(), BAD, 3, "ema"))


def drawn(model, settings, **changes):
    return draw_samples(model, dataclasses.replace(settings, **changes)).images


CHANGES = {
    "guidance": 2.0,
    "guidance_interval": (0.1, 0.5),
    "guidance_rescale": 0.1,
    "guidance_projection": (0.9, 1.0),
    "clip_x0": 1.1,
    "threshold_x0": 0.3,
    "seed": 5,
}


@pytest.fixture(scope="module")
def everything():
    return dataclasses.replace(
        FEW,
        sampler="ddpm",
        guidance_interval=(0.2, 0.9),
        guidance_rescale=0.7,
        guidance_projection=(0.2, 20.0),
        guided_channels=(0, 1),
        clip_x0=0.9,
        threshold_x0=0.9,
    )


def test_another_number_does_not_compile_anew(model, everything):
    program, process = compile_sampler(model, everything), make_process(model.run.process)
    rows = {"index": jnp.arange(3), "label": jnp.arange(3)}

    def at(**changes):
        settings = dataclasses.replace(everything, **changes)
        numbers = numbers_of(settings, process)
        return np.asarray(program(weights_of(model), numbers, rows)[0])

    plain = at()
    for name, value in CHANGES.items():
        assert np.abs(at(**{name: value}) - plain).max() > 1e-3, name
    program(weights_of(model), numbers_of(everything, process), rows | {"label": jnp.arange(3) + 4})
    assert program._cache_size() == 1


def test_another_scale_of_autoguidance_does_not_compile_anew(guided_model):
    settings = dataclasses.replace(FEW, guide_step=3)
    program, process = (
        compile_sampler(guided_model, settings),
        make_process(run_of().process),
    )
    rows = {"index": jnp.arange(3), "label": jnp.arange(3)}

    def at(options):
        return program(weights_of(guided_model), numbers_of(options, process), rows)[0]

    assert np.abs(at(settings) - at(dataclasses.replace(settings, guidance=2.0))).max() > 1e-3
    assert program._cache_size() == 1


def test_scale_one_is_the_conditional_model(model):
    """And so is an interval that holds no step; one that holds all is plain guidance."""
    plain, full = drawn(model, FEW, guidance=1.0), drawn(model, FEW)
    none, every = ({"guidance_interval": i} for i in ((0.0, 0.0005), (0.0005, 0.9995)))
    np.testing.assert_allclose(drawn(model, FEW, **none), plain, atol=1e-6)
    np.testing.assert_allclose(drawn(model, FEW, **every), full, atol=1e-6)
    assert np.abs(full - plain).max() > 0.1


def test_interval_is_of_times_whose_0_is_data(model):
    each = dataclasses.replace(FEW, spacing="trailing", progressive=1)

    def frames(**change):
        return draw_samples(model, dataclasses.replace(each, **change)).progress

    plain, full = frames(guidance=1.0), frames()
    late, early = frames(guidance_interval=(0.0, 0.6)), frames(guidance_interval=(0.6, 1.0))
    np.testing.assert_allclose(late[:, :2], plain[:, :2], atol=1e-6)
    np.testing.assert_allclose(early[:, :2], full[:, :2], atol=1e-6)
    assert np.abs(late[:, 2] - plain[:, 2]).max() > 0.1
    assert np.abs(early[:, 2] - full[:, 2]).max() > 0.1


def test_interval_up_to_1_holds_what_churn_noises_above_the_end():
    edm = model_of("edm")
    two = dataclasses.replace(FEW, sampler="edm", churn=(40.0, 0.0, 100.0), steps=2, progressive=1)

    def first(**change):
        return draw_samples(edm, dataclasses.replace(two, **change)).progress[:, 0]

    want = first()
    np.testing.assert_allclose(first(guidance_interval=(0.5, 1.0)), want, atol=1e-5)
    assert np.abs(first(guidance_interval=(0.5, 0.999)) - want).max() > 0.1


def test_other_channels_are_those_of_the_conditional_model(model):
    some, plain = drawn(model, FEW, guided_channels=(0, 2)), drawn(model, FEW, guidance=1.0)
    # Two programs, in which products may round differently; the rule itself leaves it bit for bit.
    np.testing.assert_allclose(some[..., 1], plain[..., 1], atol=1e-6)
    np.testing.assert_allclose(some[..., [0, 2]], drawn(model, FEW)[..., [0, 2]], atol=1e-6)


def test_rescaled_samples_have_the_conditional_deviation(model):
    def deviation(**changes):
        return drawn(model, ONE, **changes).std(axis=(1, 2, 3))

    plain = deviation(guidance=1.0)
    np.testing.assert_allclose(deviation(guidance_rescale=1.0), plain, rtol=1e-5)
    assert np.abs(deviation() - plain).max() > 0.02


def test_projected_change_is_short_and_not_along_the_prediction(model):
    plain, full = drawn(model, ONE, guidance=1.0), drawn(model, ONE)
    change = drawn(model, ONE, guidance_projection=(0.0,)) - plain
    assert np.abs((change * plain).sum(axis=(1, 2, 3))).max() < 1e-3
    assert np.abs(((full - plain) * plain).sum(axis=(1, 2, 3))).min() > 0.1
    short = drawn(model, ONE, guidance_projection=(1.0, 0.25)) - plain
    size = np.sqrt((short**2).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(size, 0.25 * (ONE.guidance - 1), rtol=1e-5)
    np.testing.assert_allclose(drawn(model, ONE, guidance_projection=(1.0,)), full, atol=1e-5)


def test_projection_does_not_depend_on_what_is_predicted(model, monkeypatch):
    settings = dataclasses.replace(ONE, spacing="leading", guidance_projection=(0.0, 1.0))
    want, process = drawn(model, settings), make_process(model.run.process)

    def velocity(config, params, z_t, t, cond):
        x0 = network(config, params, z_t, t, cond)
        return target(process, "v", *x0_and_eps(process, "x0", z_t, x0, t), t)

    monkeypatch.setattr(denoiser, "apply", velocity)
    run = dataclasses.replace(model.run, objective=Objective(parameterisation="v"))
    got = drawn(dataclasses.replace(model, run=run), settings)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_autoguidance_leads_away_from_the_guide(guided_model):
    led = dataclasses.replace(ONE, guide_workdir="worse")
    good = drawn(guided_model, ONE, guidance=1.0)
    worse = dataclasses.replace(guided_model, params=BAD)
    bad = drawn(worse, ONE, guidance=1.0)
    assert np.abs(good - bad).max() > 0.1
    np.testing.assert_allclose(drawn(guided_model, led), bad + 3 * (good - bad), atol=1e-5)
    # A guide that stands by is not used.
    np.testing.assert_array_equal(drawn(guided_model, ONE), drawn(model_of(), ONE))


def test_predicted_latents_are_clipped_or_shrunk(model):
    free = drawn(model, ONE)
    np.testing.assert_allclose(drawn(model, ONE, clip_x0=0.5), np.clip(free, -0.5, 0.5), atol=1e-6)
    quantile = np.quantile(np.abs(free).reshape(3, -1), 0.9, axis=1).reshape(3, 1, 1, 1)
    want = np.clip(free / np.maximum(quantile / 0.5, 1), -0.5, 0.5)
    got = drawn(model, ONE, clip_x0=0.5, threshold_x0=0.9)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert quantile.min() > 0.5


def test_options_reach_their_samplers(model):
    def of(**change):
        return sampler_options(dataclasses.replace(FEW, **change))

    edm = of(sampler="edm", churn=(1.0, 0.1, 20.0, 1.01), temperature=0.5)
    numbers = {"churn": 1.0, "churn_from": 0.1, "churn_to": 20.0, "inflation": 1.01}
    assert edm == numbers | {"temperature": 0.5}
    assert of(sampler="edm", churn=(30.0,)) == {"churn": 30.0}
    assert of(sampler="unipc", order=3) == {"order": 3} and of() == {}
    second = drawn(model, FEW, sampler="unipc")
    assert np.abs(drawn(model, FEW, sampler="unipc", order=1) - second).max() > 1e-4


def test_samples_do_not_depend_on_their_batch(model, everything):
    whole = drawn(model, everything)
    parts = drawn(model, everything, batch_size=1)
    np.testing.assert_allclose(parts, whole, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidance_interval": (0.8, 0.2)}, "guidance-interval 0.8,0.2 must be LOW,HIGH"),
        ({"guidance_interval": (0.8,)}, "guidance-interval 0.8 must be LOW,HIGH"),
        ({"guidance_interval": (0.0, 500.0)}, "guidance-interval 0.0,500.0 must be"),
        ({"guidance_rescale": 1.5}, r"guidance-rescale 1.5 must be in \[0, 1\]"),
        ({"guidance_rescale": float("nan")}, r"guidance-rescale nan must be in \[0, 1\]"),
        ({"guidance_projection": (2.0,)}, "guidance-projection 2.0 must be ETA"),
        ({"guidance_projection": (0.0, 0.0)}, "guidance-projection 0.0,0.0 must be ETA"),
        ({"guidance_projection": (0.0, 1.0, 2.0)}, "guidance-projection 0.0,1.0,2.0 must be"),
        ({"guided_channels": (0, 3)}, "guided-channels 0,3 must be different ones .* 0..2"),
        ({"guided_channels": (1, 1)}, "guided-channels 1,1 must be different"),
        ({"guidance": 1.0, "guidance_rescale": 0.5}, "guidance-rescale changes guidance"),
        ({"guidance": 1.0, "guide_step": 3}, "guide-workdir.* changes guidance.* give --guidance"),
        ({"clip_x0": -1.0}, "clip-x0 -1.0 must be at least 0"),
        ({"clip_x0": float("inf")}, "clip-x0 inf must be at least 0 and finite"),
        (
            {"clip_x0": 1.0, "threshold_x0": 99.5},
            r"threshold-x0 99.5 must be in \[0, 1\]; a quantile",
        ),
        ({"threshold_x0": 0.9}, "threshold-x0 0.9 .* give --clip-x0 too"),
        ({"order": 2}, "order 2: sampler 'ddim' has none; .*'unipc'"),
        ({"sampler": "unipc", "order": 4}, r"order 4 must be in \[0, 3\]"),
        ({"churn": (40.0,)}, "churn 40.0: sampler 'ddim' has none; .*'edm'"),
        ({"sampler": "edm", "churn": (40.0, 1.0)}, "churn 40.0,1.0 must be numbers"),
        ({"sampler": "edm", "churn": (-1.0,)}, "churn -1.0 must be numbers"),
        ({"sampler": "edm", "churn": (9.0, 5.0, 1.0)}, "churn 9.0,5.0,1.0 is of no sigma"),
        ({"temperature": 0.5}, "'ddim' draws none; give --eta=1 too"),
        ({"sampler": "edm"}, "'edm' is for process kind 'edm', not 'ldm_linear'; use 'heun'"),
    ],
)
def test_bad_settings_are_refused(model, changes, words):
    with pytest.raises(InputError, match=words):
        check_options(dataclasses.replace(FEW, **changes), model)


def test_guidance_that_the_model_does_not_know_is_refused(model, guided_model):
    run = model.run
    bare = dataclasses.replace(run, model=dataclasses.replace(run.model, conditions={}))
    with pytest.raises(InputError, match=r"unconditional; .*--guide-workdir"):
        check_options(FEW, dataclasses.replace(model, run=bare))
    led = dataclasses.replace(FEW, guide_workdir="worse")
    assert check_options(led, dataclasses.replace(guided_model, run=bare)).classes == ()
    with pytest.raises(InputError, match="without its guide"):
        check_options(led, model)
    never = dataclasses.replace(run, loss=dataclasses.replace(run.loss, condition_dropout=0.0))
    with pytest.raises(InputError, match=r"condition_dropout 0 .*--guide-workdir"):
        check_options(FEW, dataclasses.replace(model, run=never))
