"""Samples judged while a denoiser trains: the figures of `ldm evaluate`, and the same training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval import judge as image_judge
from ldm_jax.interop import pretrained
from ldm_jax.jobs import evaluate, train_denoiser
from ldm_jax.models import autoencoder, denoiser
from ldm_jax.models.layers import upsample_nearest
from ldm_jax.runs import denoiser as sample_model
from ldm_jax.runs.settings import Samples
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.train.checkpoint import Checkpoints
from ldm_jax.train.log import read_metrics
from ldm_jax.train.loop import score_of
from tests import tiny
from tests.judged import RANDOM, judges, one_device  # noqa: F401

pytestmark = pytest.mark.usefixtures("judges")
SAMPLES = Samples(
    num=24, steps=2, guidance=1.5, labels="random", seed=2, batch_size=8, judge=RANDOM
)
CONFIG = dataclasses.replace(
    tiny.DENOISER,
    num_steps=4,
    eval_every=2,
    checkpoint_every=2,
    eval_examples=16,
    keep_best="frechet",
    samples=SAMPLES,
    ema=dataclasses.replace(tiny.DENOISER.ema, decay=0.9),
)
AS_TRAINED = SampleOptions(num=24, steps=2, guidance=1.5, seed=2)


@pytest.fixture(scope="module", autouse=True)
def formulas():
    """A denoiser and a decoder that compile at once."""

    def init(config, key):
        table = jax.random.normal(key, (config.conditions["class"].num_classes + 1, 2))
        return {"gain": jnp.float32(0.5), "table": table}

    def apply(config, params, z_t, t, cond):
        return params["gain"] * z_t + params["table"][cond["label"]][:, None, None]

    def decode(config, params, z):
        return upsample_nearest(z.mean(-1, keepdims=True).repeat(3, -1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser, "init", init)
        patch.setattr(denoiser, "apply", apply)
        patch.setattr(denoiser, "axes", lambda config: {"gain": (), "table": (None, None)})
        patch.setattr(autoencoder, "decode", decode)
        yield


def train(config, first_stage, workdir):
    config = dataclasses.replace(config, autoencoder=str(first_stage))
    return train_denoiser.run(config, workdir, jax.devices()[:1])


@pytest.fixture(scope="module")
def trained(judges, formulas, first_stage, tmp_path_factory):  # noqa: F811
    """(workdir, state, names of what was traced meanwhile) of a training that judges samples."""
    workdir = tmp_path_factory.mktemp("judged") / "run"
    decode, traces = autoencoder.decode, []
    del judges[:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "decode", lambda *a: traces.append("decoder") or decode(*a))
        state = train(CONFIG, first_stage, workdir)
    return workdir, state, traces + judges


@pytest.fixture
def alone(monkeypatch):
    """`ldm evaluate` runs on the device that was trained on: the same bits."""
    monkeypatch.setattr(sample_model, "make_mesh", lambda config: one_device())


def judged(workdir):
    """{step: figures of samples}."""
    lines = [line for line in read_metrics(workdir) if "eval/loss" in line]
    return {
        line["step"]: {
            name.removeprefix("eval/"): value for name, value in line.items() if "-" in name
        }
        for line in lines
    }


@pytest.mark.usefixtures("alone")
def test_figures_are_those_of_ldm_evaluate(trained, capsys):
    workdir = trained[0]
    during = judged(workdir)
    assert list(during) == [2, 4] and during[2].keys() == during[4].keys()
    assert during[2] != during[4]
    for step in (2, 4):
        settings = dataclasses.replace(AS_TRAINED, step=step)
        assert evaluate.denoiser(workdir, settings, RANDOM, labels="random") == pytest.approx(
            during[step], rel=1e-6
        )
        assert len(capsys.readouterr().out.splitlines()) == 5
    raw = evaluate.denoiser(
        workdir, dataclasses.replace(AS_TRAINED, weights="params"), RANDOM, labels="random"
    )
    assert not raw.keys() & during[4].keys()
    assert not set(raw.values()) <= set(during[4].values())  # the averages are judged in training
    lines = [json.loads(x) for x in (workdir / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 2, 4, 4]
    assert lines[0]["images"] == lines[2]["images"] != lines[1]["images"]


@pytest.mark.parametrize(
    ("judge", "change", "words"),
    [
        (None, {"labels": "random"}, "--labels and --keep belong to frozen networks"),
        (None, {"keep": "there"}, "--labels and --keep belong to frozen networks"),
        (None, {"dataset": "ffhq"}, "'ffhq' has no published class-conditional figures"),
        (RANDOM, {"labels": "sorted"}, "labels 'sorted' is unknown"),
    ],
)
def test_what_does_not_fit_a_run_is_refused(trained, judge, change, words):
    before = (trained[0] / "evaluation.jsonl").read_bytes()
    with pytest.raises(InputError, match=words):
        evaluate.denoiser(trained[0], AS_TRAINED, judge, **change)
    assert (trained[0] / "evaluation.jsonl").read_bytes() == before


def test_judging_changes_no_bit_of_the_training(trained, first_stage, tmp_path):
    config = dataclasses.replace(CONFIG, eval_every=0, samples=Samples(), keep_best="")
    state = train(config, first_stage, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, state, trained[1])


def test_sampler_decoder_and_networks_are_compiled_once(trained):
    assert sorted(trained[2]) == ["decoder", "random-conv"]


def test_the_best_checkpoint_is_that_of_the_figure_which_is_named(trained):
    figures = judged(trained[0])
    scores = [score_of(figures[step], "frechet") for step in (2, 4)]
    assert max(scores) == -min(next(iter(figures[step].values())) for step in (2, 4))
    assert next(iter(figures[2])).startswith("frechet24-custom-")
    checkpoints = Checkpoints(trained[0], keep_best=True, read_only=True)
    assert checkpoints.best() == max(scores)
    checkpoints.close()


def test_a_best_figure_that_no_evaluation_has_is_refused(first_stage, tmp_path):
    config = dataclasses.replace(CONFIG, keep_best="fid", autoencoder=str(first_stage))
    with pytest.raises(InputError, match=r"keep_best 'fid' begins .*'frechet24-custom-'.*'loss'"):
        train_denoiser.run(config, tmp_path / "run", jax.devices()[:2])
    assert not (tmp_path / "run").exists()


ADM = {"preset": "adm", "extractor": ""}


@pytest.mark.parametrize(
    ("change", "judge", "words"),
    [
        ({"num": 3000}, ADM, r"inception.safetensors is missing; `ldm weights inception` makes it"),
        ({}, {"extractor": ""}, "extractor '' with preset 'custom'"),
        ({}, {"extractor": "resnet"}, "extractor 'resnet' is unknown; choose"),
        ({}, {"reference": "absent.npz"}, "absent.npz does not exist"),
        ({}, {"metrics": ("kid",)}, "'kid': it takes 1000 images or more, and what is judged is"),
        ({"num": 6}, {}, "what is judged: 6 images for 6 features"),
        ({"num": -1}, {}, "num -1 must be at least 1"),
        ({"labels": "sorted"}, {}, "labels 'sorted' is unknown"),
        ({"sampler": "dice"}, {}, "sampler 'dice' is unknown"),
        ({"batch_size": 3}, {}, "batch_size 3 must divide by 2"),
        (None, {}, "samples.num 24 are judged at every evaluation, and eval_every is 0"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_written(
    first_stage, tmp_path, monkeypatch, change, judge, words
):
    if judge == ADM:
        monkeypatch.setattr(image_judge, "read_weights", pretrained.read)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loop = {"eval_every": 0, "keep_best": ""} if change is None else {}
    with pytest.raises(InputError, match=words):
        judge = dataclasses.replace(RANDOM, **judge)
        samples = dataclasses.replace(SAMPLES, judge=judge, **(change or {}))
        config = dataclasses.replace(CONFIG, samples=samples, autoencoder=str(first_stage), **loop)
        train_denoiser.run(config, tmp_path / "run", jax.devices()[:2])
    assert not (tmp_path / "run").exists()
