"""A denoiser that begins with another's weights: what is kept, begins anew and is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.objective import Objective
from ldm_jax.diffusion.perceptual import PerceptualConfig
from ldm_jax.errors import InputError
from ldm_jax.jobs import train_denoiser
from ldm_jax.models import denoiser
from ldm_jax.runs.build import build, facts_of_config, resolve_widths
from ldm_jax.runs.denoiser import read_denoiser
from ldm_jax.runs.initial import load_initial
from ldm_jax.runs.workdir import read_run
from ldm_jax.sharding import MeshConfig, make_mesh
from ldm_jax.train import ema, optim
from ldm_jax.train.denoiser import DenoiserLoss
from ldm_jax.train.step import updates_done
from tests import tiny

KEPT = {"init_optimizer": "keep", "init_averages": "keep"}
UNET = denoiser.init, denoiser.apply


@pytest.fixture(scope="module", autouse=True)
def toy():
    """A denoiser of two layers, named as the ends of the U-Net, which compiles at once."""

    def init(config, key):
        into, out = config.backbone.in_channels, config.backbone.out_channels
        keys = jax.random.split(key)
        return {
            "backbone": {
                "conv_in": {"kernel": jax.random.normal(keys[0], (into, 8))},
                "conv_out": {"kernel": jax.random.normal(keys[1], (8, out))},
            }
        }

    def apply(config, params, z_t, t, cond):
        ends = params["backbone"]
        assert z_t.shape[-1] == config.backbone.in_channels
        return jnp.tanh(z_t @ ends["conv_in"]["kernel"]) @ ends["conv_out"]["kernel"]

    def axes(config):
        ends = {"conv_in": {"kernel": (None, None)}, "conv_out": {"kernel": (None, None)}}
        return {"backbone": ends}

    with pytest.MonkeyPatch.context() as patch:
        for function in (init, apply, axes):
            patch.setattr(denoiser, function.__name__, function)
        yield


@pytest.fixture(scope="module")
def pretrained(toy, first_stage, tmp_path_factory):
    """(workdir, final state) of three steps."""
    workdir = tmp_path_factory.mktemp("initial") / "base"
    run = dataclasses.replace(tiny.DENOISER, autoencoder=str(first_stage), num_steps=3)
    return workdir, train_denoiser.run(run, workdir, jax.devices()[:1])


def started(pretrained, **fields):
    """The state before the first step of a run that begins with the pretrained one."""
    workdir, _ = pretrained
    run, data = read_denoiser(workdir)
    run = dataclasses.replace(run, init_from=str(workdir), **fields)
    facts = facts_of_config(run, tiny.AUTOENCODER.model)
    trainer = build(run, facts, make_mesh(MeshConfig(), jax.devices()[:1]))
    return trainer.init_from(*load_initial(run, data, trainer))


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_what_is_kept_is_that_of_the_other_run_and_all_else_begins_anew(pretrained):
    _, state = pretrained
    restarted, kept = started(pretrained), started(pretrained, **KEPT)
    for new in (restarted, kept):
        assert same(new.params, state.params) and int(new.step) == 0
    assert not same(state.averages, {"ema": state.params})
    assert same(restarted.averages["ema"], state.params)
    assert int(updates_done(restarted.opt_state)) == 0
    assert same(kept.averages, state.averages) and same(kept.opt_state, state.opt_state)
    averaged = started(pretrained, init_weights="ema")
    assert same(averaged.params, state.averages["ema"])


def test_a_kept_average_has_no_second_warm_up():
    run = dataclasses.replace(tiny.DENOISER, init_from="somewhere", init_averages="keep")
    model = tiny.AUTOENCODER.model
    trainer = build(run, facts_of_config(run, model), make_mesh(MeshConfig(), jax.devices()[:1]))
    params = denoiser.init(run.model, jax.random.key(0))
    average = jax.tree.map(lambda x: x + 1.0, params)
    state = trainer.init_from(params, {"ema": average})
    rows = {
        "moments": jnp.ones((16, 4, 4, 4)),
        "label": jnp.zeros(16, jnp.int32),
    }
    state, _ = trainer.step(state, {}, rows)
    moved = jax.tree.map(lambda a, b: a - b, state.averages["ema"], state.params)
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_allclose(leaf, 0.99, rtol=0.02)  # of 1, by the decay alone


def test_a_resumed_run_needs_the_other_no_more(pretrained, tmp_path):
    workdir, _ = pretrained
    run, _ = read_denoiser(workdir)
    gone = tmp_path / "gone"
    workdir.rename(gone)
    try:
        run = dataclasses.replace(run, num_steps=2, init_from=str(gone), **KEPT)
        train_denoiser.run(run, tmp_path / "new", jax.devices()[:1])
    finally:
        gone.rename(workdir)
    data = read_run(tmp_path / "new")["data"]
    assert len(data["init_from_hash"]) == 64
    longer = dataclasses.replace(run, num_steps=3)
    state = train_denoiser.run(longer, tmp_path / "new", jax.devices()[:1])
    assert int(updates_done(state.opt_state)) == 6
    assert read_run(tmp_path / "new")["data"] == data


@pytest.mark.parametrize("groups", [1, 2])
def test_new_channels_are_predicted_0_and_change_nothing(groups):
    init, apply = UNET
    narrow = tiny.DENOISER.model
    narrow = dataclasses.replace(
        narrow, backbone=dataclasses.replace(narrow.backbone, out_channels=2 * groups)
    )
    wide = dataclasses.replace(
        narrow,
        backbone=dataclasses.replace(narrow.backbone, in_channels=4, out_channels=4 * groups),
    )
    params = jax.tree.map(lambda x: x + 0.01, init(narrow, jax.random.key(0)))
    shapes = jax.eval_shape(lambda: init(wide, jax.random.key(0)))
    grown = denoiser.widened(wide, params, shapes, groups)
    z, t = jax.random.normal(jax.random.key(1), (2, 4, 4, 4)), jnp.array([0.0, 500.0])
    cond = {"label": jnp.array([1, 2])}
    before = apply(narrow, params, z[..., :2], t, cond)
    after = apply(wide, grown, z, t, cond)
    assert float(jnp.abs(before).max()) > 0.01
    for part in range(groups):
        got = after[..., 4 * part : 4 * part + 4]
        np.testing.assert_allclose(got[..., :2], before[..., 2 * part : 2 * part + 2], atol=1e-6)
        np.testing.assert_array_equal(got[..., 2:], 0)


def test_a_run_of_mean_and_spread_begins_with_the_predictions_of_one_channel_half(pretrained):
    workdir, state = pretrained
    run, data = read_denoiser(workdir)
    backbone = dataclasses.replace(run.model.backbone, in_channels=0, out_channels=0)
    wide = dataclasses.replace(
        run,
        init_from=str(workdir),
        codec="mean_logvar",
        model=dataclasses.replace(run.model, backbone=backbone),
    )
    facts = facts_of_config(wide, tiny.AUTOENCODER.model)
    wide = resolve_widths(wide, facts)
    trainer = build(wide, facts, make_mesh(MeshConfig(), jax.devices()[:1]))
    begun = trainer.init_from(*load_initial(wide, data, trainer))
    z, t = jax.random.normal(jax.random.key(1), (2, 4, 4, 4)), jnp.array([0.0, 500.0])
    cond = {"label": jnp.array([1, 2])}
    before = denoiser.apply(run.model, state.params, z[..., :2], t, cond)
    after = denoiser.apply(wide.model, begun.params, z, t, cond)
    assert after.shape[-1] == 4 and float(jnp.abs(before).max()) > 1e-4
    np.testing.assert_allclose(after[..., :2], before, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(after[..., 2:], 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_weights": "ema-0.5"}, "no weights 'ema-0.5'"),
        ({"ema": ema.EmaConfig(decay=0.99, more=(0.5,)), **KEPT}, "no weights 'ema-0.5'"),
        (
            {"optim": optim.OptimConfig(name="lion"), **KEPT},
            "its optimizer is adamw and this run's lion",
        ),
        ({"ema": ema.EmaConfig(decay=0.5), **KEPT}, "decay 0.99 and this run's 0.5"),
    ],
)
def test_what_the_other_run_has_not_is_refused(pretrained, fields, message):
    with pytest.raises(InputError, match=message):
        started(pretrained, **fields)


def test_another_model_or_first_stage_is_refused(pretrained):
    workdir, _ = pretrained
    run, data = read_denoiser(workdir)
    run = dataclasses.replace(run, init_from=str(workdir))
    wide = dataclasses.replace(run.model.backbone, width=16)
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, backbone=wide))
    with pytest.raises(
        InputError, match=r"another architecture: backbone\.width is 8 there and 16"
    ):
        load_initial(other, data, None)
    learned = dataclasses.replace(run, objective=Objective(learned_variance=True))
    with pytest.raises(InputError, match="learned_variance False, and so another output"):
        load_initial(learned, data, None)
    with pytest.raises(InputError, match="latents of another first stage"):
        load_initial(run, data | {"encoder_hash": "0" * 64}, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_optimizer": "keep"}, "init_from, and that is empty"),
        ({"init_weights": "ema"}, "init_from, and that is empty"),
        ({"init_from": "x", "init_weights": "ema", **KEPT}, "of the trained parameters"),
        ({"init_from": "x", "init_optimizer": "kept"}, "init_optimizer 'kept'"),
        (
            {"init_from": "x", "optim": optim.OptimConfig(schedule="cosine"), **KEPT},
            "cosine schedule would have ended",
        ),
        (
            {"init_from": "x", "ema": ema.EmaConfig(decay=0.9, power=(0.1,)), **KEPT},
            "shares of one training",
        ),
        (
            {
                "lpl": PerceptualConfig(target_ratio=0.25, calibration_steps=2),
                "objective": Objective(uncertainty=8),
            },
            "a ratio to a likelihood",
        ),
        ({"lpl": PerceptualConfig(taps=("mid",))}, "lpl.taps .* of a loss that has no weight"),
        (
            {"lpl": PerceptualConfig(target_ratio=0.25)},
            "weigh in at step 20 .start_step 0, calibration_steps 20., and num_steps is 6",
        ),
        (
            {"lpl": PerceptualConfig(target_ratio=0.25, calibration_steps=2, every=3)},
            "weigh in at step 6 ",
        ),
        ({"lpl": PerceptualConfig(weight=1.0, start_step=6)}, "weigh in at step 6 .start_step 6."),
        (
            {"loss": DenoiserLoss(second_half_weight=2.0)},
            "second_half_weight 2.0 is of codecs with",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(tiny.DENOISER, **fields)
