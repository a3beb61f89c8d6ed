"""`ldm evaluate` of a first stage: rFID of held-out images, and which options belong to it."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.data.images import open_images
from ldm_jax.errors import InputError
from ldm_jax.eval import frechet
from ldm_jax.eval import judge as judge_lib
from ldm_jax.eval.frechet import Moments
from ldm_jax.eval.judge import JudgeOptions
from ldm_jax.interop import pretrained
from ldm_jax.jobs import evaluate
from ldm_jax.models import autoencoder
from ldm_jax.runs.reconstruction import spread
from ldm_jax.sampling.options import SampleOptions
from tests import tiny
from tests.judged import RANDOM, features, judges, one_device, plain  # noqa: F401

pytestmark = pytest.mark.usefixtures("judges")
NUM = 40


@pytest.fixture
def workdir(first_stage, tmp_path, monkeypatch):
    """A first stage that makes pictures darker: its latents are the pixels themselves."""
    monkeypatch.setattr(
        autoencoder, "encode", lambda config, params, x: jnp.concatenate([x, x], -1)
    )
    monkeypatch.setattr(autoencoder, "decode", lambda config, params, z: 0.75 * z - 0.25)
    monkeypatch.setattr(evaluate, "make_mesh", lambda config: one_device())
    monkeypatch.setattr(evaluate, "reconstruction_figures", lambda *a, **k: {"psnr_db": 1.0})
    shutil.copytree(first_stage, tmp_path / "w", ignore=shutil.ignore_patterns("latents"))
    return tmp_path / "w"


@pytest.fixture
def held_out():
    source = open_images(tiny.AUTOENCODER.images, "held_out", augment=False)
    rows = spread(len(source), NUM)
    return source.read(rows, rows)["image"]


def run(workdir, judge=RANDOM, **change):
    figures = evaluate.first_stage(workdir, judge, num=NUM, **change)
    return {name: value for name, value in figures.items() if "-" in name}


def test_figures_are_those_of_held_out_images_and_their_reconstructions(workdir, held_out):
    darker = np.floor(held_out * 0.75 + 0.5).astype(np.uint8)
    a, b = (features("random-conv", part)["quarters"] for part in (darker, held_out))
    figures = plain(run(workdir))
    want = frechet.distance(Moments.of(a), Moments.of(b))
    assert figures[f"rfrechet{NUM}"] == pytest.approx(want, rel=1e-3)
    assert set(figures) == {
        f"r{name}{NUM}" for name in ("frechet", "precision", "recall", "density", "coverage")
    }


def test_a_first_stage_that_loses_nothing_has_a_distance_of_none(workdir, monkeypatch):
    darker = plain(run(workdir))[f"rfrechet{NUM}"]
    monkeypatch.setattr(autoencoder, "decode", lambda config, params, z: z)
    figures = plain(run(workdir))
    assert figures[f"rfrechet{NUM}"] < 1e-9 < darker
    assert figures[f"rprecision{NUM}"] == figures[f"rrecall{NUM}"] == 1


def test_weights_are_part_of_the_name_and_the_step_is_not(workdir):
    average, raw, early = run(workdir), run(workdir, weights="params"), run(workdir, step=3)
    assert run(workdir, weights="ema") == average == early and not raw.keys() & average.keys()
    lines = [json.loads(x) for x in (workdir / "evaluation.jsonl").read_text().splitlines()]
    judged = [line for line in lines if "protocol" in line]
    assert [line["step"] for line in judged] == [3] * 4
    assert judged[0]["images"] == judged[3]["images"] != judged[1]["images"]
    # A line of PSNR and SSIM stands before each.
    assert [("protocol" in line) for line in lines] == [False, True] * 4
    assert lines[0]["figures"] == {"psnr_db": 1.0}


def test_held_out_images_are_compared_with_a_reference_that_is_named(workdir, held_out, tmp_path):
    np.savez(tmp_path / "originals.npz", arr_0=held_out)
    settings = dataclasses.replace(RANDOM, reference=str(tmp_path / "originals.npz"))
    own, other = run(workdir), run(workdir, settings)
    assert list(own.values()) == list(other.values()) and not own.keys() & other.keys()


def test_what_cannot_be_judged_is_refused_before_anything_is_measured(workdir, monkeypatch):
    def measured(*arguments, **options):
        raise AssertionError("measured")

    monkeypatch.setattr(evaluate, "reconstruction_figures", measured)
    few = dataclasses.replace(RANDOM, metrics=("kid",))
    needs = "'kid': it takes 1000 images or more, and what is judged is of 4"
    for judge, change, words in (
        (few, {}, needs),
        (RANDOM, {"num": 5}, "what is judged: 5 images for 6 features"),
        (RANDOM, {"num": -5}, "num -5 must be at least 1"),
        (None, {"dataset": "ffhq"}, "'ffhq' has no published reconstruction figures"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate.first_stage(workdir, judge, **{"num": NUM, **change})
    for options, change, words in (
        ({}, {"steps": 7}, "--steps 7 is about samples, and this workdir"),
        ({}, {"batch_size": 8}, "--batch-size 8 is about samples"),
        ({"labels": "random"}, {}, "--labels 'random' is about samples"),
        ({"keep": "samples"}, {}, "--keep 'samples' is about samples"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate.run(
                workdir, evaluate.EvaluateOptions(**options), SampleOptions(**change), RANDOM
            )
    monkeypatch.setattr(judge_lib, "read_weights", pretrained.read)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir))
    with pytest.raises(
        InputError, match=r"vgg16.safetensors is missing; `ldm weights vgg16` makes"
    ):
        vgg = JudgeOptions(preset="custom", extractor="vgg16")
        evaluate.first_stage(workdir, vgg, num=NUM)
    assert not (workdir / "evaluation.jsonl").exists() and not (workdir / "evaluation").exists()


def test_published_figures_stand_below_ours_and_are_marked(workdir, capsys):
    run(workdir, dataset="imagenet")
    lines = capsys.readouterr().out.splitlines()
    ours = [line for line in lines if not line.startswith("published: ")]
    assert lines[: len(ours)] == ours and ours[-1].startswith("rcoverage")
    (ours,) = [line for line in lines if line.startswith("published: kl-f8 c=4")]
    assert "rfid 0.9" in ours and "2112.10752" in ours


def test_a_first_stage_is_measured_by_the_options_that_it_has(first_stage, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "first_stage", lambda *a, **options: seen.append((a, options)))
    samples = SampleOptions(step=3, weights="params")
    evaluate.run(first_stage, evaluate.EvaluateOptions(), SampleOptions(), None)
    evaluate.run(first_stage, evaluate.EvaluateOptions(num=7, dataset="ffhq"), samples, RANDOM)
    assert seen == [
        ((first_stage, None), {"num": 10_000, "step": -1, "weights": "auto", "dataset": ""}),
        ((first_stage, RANDOM), {"num": 7, "step": 3, "weights": "params", "dataset": "ffhq"}),
    ]


def posterior(workdir, judge=None, **change):
    options = evaluate.EvaluateOptions(posterior=True, num=NUM)
    evaluate.run(workdir, options, SampleOptions(**change), judge)


def test_the_posterior_is_measured_noted_and_shown(workdir, capsys):
    posterior(workdir, seed=3)
    out, (line,) = capsys.readouterr().out, (workdir / "evaluation.jsonl").read_text().splitlines()
    line = json.loads(line)
    assert line["settings"]["posterior"] and line["settings"]["seed"] == 3
    figures = line["figures"]
    assert figures["num_images"] == NUM and figures["step"] == 3
    assert figures["psnr_db/k0"] > figures["psnr_db/k8"]
    for words in ("sqrt(E[sigma^2])", "D(mu + 8 sigma xi)", "can differ only", "posterior.html"):
        assert words in out
    page = (workdir / "posterior.html").read_text()
    assert "--posterior --num=40 --step=-1 --weights=auto --seed=3" in page


def test_the_posterior_takes_no_flags_of_other_evaluations(workdir, monkeypatch):
    def measured(*arguments, **options):
        raise AssertionError("measured")

    monkeypatch.setattr(evaluate, "measure_posterior", measured)
    for judge, change, words in (
        (RANDOM, {}, "figures of its own, .*--allow-few"),
        (None, {"steps": 7}, "--steps 7 is about samples"),
        (None, {"batch_size": 7}, "--batch-size 7 is about samples"),
    ):
        with pytest.raises(InputError, match=words):
            posterior(workdir, judge, **change)
    for change, words in (
        ({"dataset": "ffhq"}, "nobody published"),
        ({"num": -5}, "num -5 must be at least 1"),
    ):
        options = evaluate.EvaluateOptions(**{"posterior": True, "num": NUM, **change})
        with pytest.raises(InputError, match=words):
            evaluate.run(workdir, options, SampleOptions(), None)
    with pytest.raises(InputError, match="--seed 3 is about samples"):
        evaluate.run(workdir, evaluate.EvaluateOptions(), SampleOptions(seed=3), None)
    monkeypatch.setattr(evaluate, "read_run", lambda workdir: {"job": "train-denoiser"})
    with pytest.raises(InputError, match="holds a denoiser; give the workdir of its autoencoder"):
        posterior(workdir)
    assert not (workdir / "evaluation.jsonl").exists()
