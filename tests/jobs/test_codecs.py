"""Denoisers of one latent cache by several codecs: what each trains on, records and samples."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import cli
from ldm_jax.data.records import parts
from ldm_jax.data.records.reader import open_cache
from ldm_jax.errors import InputError
from ldm_jax.eval.images_out import load_npz
from ldm_jax.jobs import train_denoiser
from ldm_jax.models import autoencoder, denoiser
from ldm_jax.models.latents import CODECS, SPREADS
from ldm_jax.models.layers import upsample_nearest
from ldm_jax.runs import held_out
from ldm_jax.runs.build import codec_of, facts_of_manifest, facts_of_record
from ldm_jax.runs.config_files import build
from ldm_jax.runs.denoiser import WhichWeights, load_model
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sharding import make_mesh
from ldm_jax.train.log import read_metrics
from ldm_jax.train.state import TrainState
from tests import tiny

KINDS = ("sample", "sample_frozen", "mean", "mean_logvar")


@pytest.fixture(scope="module", autouse=True)
def formulas():
    """A denoiser and a decoder that compile at once."""

    def init(config, key):
        backbone = config.backbone
        assert backbone.in_channels == backbone.out_channels > 0
        table = jax.random.normal(key, (11, backbone.out_channels))
        return {"gain": jnp.float32(0.5), "table": table}

    def apply(config, params, z_t, t, cond):
        assert z_t.shape[-1] == config.backbone.in_channels
        return params["gain"] * z_t + params["table"][cond["label"]][:, None, None]

    def decode(config, params, z):
        return upsample_nearest(z.mean(-1, keepdims=True).repeat(3, -1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser, "init", init)
        patch.setattr(denoiser, "apply", apply)
        patch.setattr(denoiser, "axes", lambda config: {"gain": (), "table": (None, None)})
        patch.setattr(autoencoder, "decode", decode)
        yield


def config_of(codec, first_stage):
    backbone = dataclasses.replace(tiny.DENOISER.model.backbone, in_channels=0, out_channels=0)
    return dataclasses.replace(
        tiny.DENOISER,
        codec=codec,
        autoencoder=str(first_stage),
        model=dataclasses.replace(tiny.DENOISER.model, backbone=backbone),
        num_steps=2,
        checkpoint_every=1,
        eval_every=2 if codec == "mean_logvar" else 0,
        eval_examples=16,
    )


@pytest.fixture(scope="module")
def runs(first_stage, formulas, tmp_path_factory):
    """{codec: workdir}, and the manifest's bytes before and after."""
    root, path = tmp_path_factory.mktemp("codecs"), first_stage / "latents/train/manifest.json"
    before = path.read_bytes()
    for kind in KINDS:
        train_denoiser.run(config_of(kind, first_stage), root / kind, jax.devices()[:1])
    return {kind: root / kind for kind in KINDS}, (before, path.read_bytes())


def record(workdir):
    return json.loads((workdir / "run.json").read_text())


def test_one_cache_serves_every_codec_and_stays_as_it_is(runs):
    workdirs, (before, after) = runs
    assert before == after
    records = {kind: record(workdir) for kind, workdir in workdirs.items()}
    assert len({r["data"]["manifest_hash"] for r in records.values()}) == 1
    white = {kind: r["data"]["whitening"] for kind, r in records.items()}
    manifest = json.loads(before)
    of_draws = {"shift": manifest["mean"], "scale": manifest["std"]}
    assert white["sample"] == white["sample_frozen"] == of_draws
    assert white["mean"].keys() == of_draws.keys() and white["mean"] != of_draws
    both = white["mean_logvar"]
    assert {n: both[n][:2] for n in of_draws} == white["mean"]
    assert {n: len(values) for n, values in both.items()} == {
        **dict.fromkeys(("shift", "scale"), 4),
        **dict.fromkeys(("low", "high"), 2),
    }
    for kind, channels in (("sample", 2), ("sample_frozen", 2), ("mean", 2), ("mean_logvar", 4)):
        backbone = records[kind]["config"]["model"]["backbone"]
        assert (backbone["in_channels"], backbone["out_channels"]) == (channels, channels)


def test_every_codec_encodes_the_cache_to_mean_0_and_deviation_1(runs, first_stage):
    cache = open_cache(first_stage / "latents/train")
    measured, rows = parts.load(cache), np.arange(len(cache))
    assert measured is not None
    moments = cache.read(rows, rows)["moments"]
    for kind in CODECS:
        config = config_of(kind, first_stage)
        facts = facts_of_manifest(config, cache.manifest, measured)
        codec = codec_of(config, facts)
        keys = jax.random.split(jax.random.key(0), len(rows))
        z = np.asarray(codec.encode(moments, keys), np.float64)
        drawn = codec.draws != "none"
        atol = 5 / z[..., 0].size ** 0.5 if drawn else 1e-4
        np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=atol)
        first = cache.manifest.std if drawn else measured["mean"].std
        second = measured[SPREADS[kind].part].std if kind in SPREADS else ()
        floored = np.asarray(facts.whitening.scale) > [*first, *second]
        assert not floored[:2].any()
        np.testing.assert_allclose(z.std((0, 1, 2))[~floored], 1, atol=atol)


def test_held_out_losses_of_frozen_and_fresh_samples_are_of_the_same_draws(runs, first_stage):
    workdirs, _ = runs
    cache, found = open_cache(first_stage / "latents/held_out"), []
    state = TrainState(jnp.int32(0), load_model(workdirs["sample"]).params, {})
    for kind in ("sample", "sample_frozen"):
        data = record(workdirs[kind])
        facts = facts_of_record(data, "gaussian")
        hook = held_out.hook(build(DenoiserRun, data["config"]), facts, make_mesh(), cache)
        found.append(hook.run(state, 0).figures["loss"])
    assert found[0] == found[1]
    assert "eval/loss" in read_metrics(workdirs["mean_logvar"])[-1]


def test_a_run_goes_on_with_its_numbers_and_refuses_another_codec(runs, first_stage):
    workdir = runs[0]["mean_logvar"]
    same = dataclasses.replace(config_of("mean_logvar", first_stage), num_steps=3)
    state = train_denoiser.run(same, workdir, jax.devices()[:1])
    assert int(state.step) == 3
    other = dataclasses.replace(same, codec="mean_std")
    with pytest.raises(InputError, match="codec is 'mean_logvar' there and 'mean_std' now"):
        train_denoiser.run(other, workdir, jax.devices()[:1])


def test_a_guide_of_another_codec_is_refused(runs):
    which = WhichWeights(guide_workdir=str(runs[0]["mean"]))
    with pytest.raises(InputError, match="has codec mean, but the model has sample_frozen"):
        load_model(runs[0]["sample_frozen"], which)


def test_ldm_sample_resamples_repaints_and_is_led(runs, tmp_path, capsys):
    np.savez(tmp_path / "init.npz", np.full((1, 8, 16, 3), 99, np.uint8))
    mask = np.zeros((1, 8, 16), np.uint8)
    mask[:, :, 8:] = 255
    np.savez(tmp_path / "mask.npz", mask)
    arguments = [
        *(
            "--num=8",
            "--steps=2",
            "--guidance=3",
            "--guided-channels=0,3",
            "--guide-weights=params",
        ),
        *(f"--init-images={tmp_path / 'init.npz'}", f"--masks={tmp_path / 'mask.npz'}"),
        *("--strength=0.8", "--progressive=1", "--size=8,16", "--tile=8"),
    ]
    images = []
    for decode in ("mean", "resampled"):
        out = f"--out={tmp_path / decode}"
        workdir = f"--workdir={runs[0]['mean_logvar']}"
        cli.main(["sample", workdir, *arguments, f"--decode={decode}", out])
        images.append(load_npz(capsys.readouterr().out.strip())[0])
    for drawn in images:
        np.testing.assert_array_equal(drawn[:, :, :8], 99)
    assert np.abs(images[0].astype(int) - images[1]).max() > 0
    assert json.loads((tmp_path / "resampled.json").read_text())["decode"] == "resampled"


def test_parts_are_measured_once_and_by_the_first_process(runs, first_stage, monkeypatch):
    config, cache = config_of("mean", first_stage), open_cache(first_stage / "latents/train")
    want = parts.load(cache)
    monkeypatch.setattr(parts, "measure", lambda cache: pytest.fail("measured again"))
    assert train_denoiser._parts(config, cache) == want
    assert train_denoiser._parts(dataclasses.replace(config, codec="sample"), cache) == {}
    # Another process waits for the first, and measures where it could not write.
    waited = []
    monkeypatch.setattr(train_denoiser, "wait_for_all", waited.append)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(parts, "measure", lambda cache: waited.append("measured") or {})
    assert train_denoiser._parts(config, cache) == want
    monkeypatch.setattr(parts, "load", lambda cache: None)
    assert train_denoiser._parts(config, cache) == {}
    assert waited == ["latent-parts", "latent-parts", "measured"]
