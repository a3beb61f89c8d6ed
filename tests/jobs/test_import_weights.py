"""Weights in and out: what is imported is exported bit for bit, and later jobs take it as a run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ldm_jax import cli
from ldm_jax.interop import diffusers
from ldm_jax.interop.autoencoder_names import compvis_names, diffusers_names, shapes
from ldm_jax.interop.names import to_ours, to_theirs
from ldm_jax.jobs import train_autoencoder
from ldm_jax.models import quantizer
from ldm_jax.runs.first_stage import load_first_stage
from ldm_jax.sharding import MeshConfig, host_array, make_mesh
from ldm_jax.train.checkpoint import load_weights
from tests import tiny
from tests.interop.test_names import drawn
from tests.jobs.test_errors import contents, refused

KL = tiny.AUTOENCODER.model
VQ = dataclasses.replace(
    KL, latent="vq", z_channels=3, quantizer=quantizer.QuantizerConfig(codebook_size=16)
)
NOTES = {"scaling_factor": 0.5, "sample_size": 8, "force_upcast": True}
DIGITS = ["--config.images.source=digits", "--config.images.held_out_fraction=0.9"]


def folder_of_diffusers(folder, config):
    """A folder with drawn weights and notes of its own; the names are the ones of diffusers."""
    diffusers.write_folder(folder, config, drawn(config), NOTES)
    return folder


def imported(source, workdir, *more):
    cli.main(["import", f"--from={source}", f"--workdir={workdir}", *more])
    return workdir


@pytest.fixture(scope="module")
def kl_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("kl")
    return imported(folder_of_diffusers(root / "in", KL), root / "w", *DIGITS)


@pytest.mark.parametrize("config", [KL, VQ], ids=["kl", "vq"])
def test_import_then_export_gives_the_folder_back(tmp_path, config):
    source = folder_of_diffusers(tmp_path / "in", config)
    workdir = imported(source, tmp_path / "w")
    cli.main(["export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}"])
    before, after = (load_file(f / diffusers.WEIGHTS) for f in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "out")
    )
    assert before == after
    assert after["scaling_factor"] == 0.5


def test_an_import_is_a_run_for_later_jobs(kl_run):
    record = json.loads((kl_run / "run.json").read_text())
    assert record["job"] == "train-autoencoder"
    assert record["imported"]["format"] == "AutoencoderKL"
    assert len(record["imported"]["sha256"]) == 64
    first_stage = load_first_stage(kl_run, make_mesh(MeshConfig()))
    assert dataclasses.replace(first_stage.config, compute_dtype="auto") == KL
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(host_array(a), b), first_stage.params, drawn(KL)
    )
    cli.main(["cache-latents", f"--workdir={kl_run}", "--splits=train", "--batch-size=64"])
    assert (kl_run / "latents" / "train" / "manifest.json").exists()


def test_an_import_is_not_trained_further(capsys, kl_run):
    for more in ([], ["--config=configs/autoencoder.py:digits"]):
        line = refused(capsys, ["train-autoencoder", *more, f"--workdir={kl_run}"])
        assert f"--config.init_from={kl_run}" in line
    with pytest.raises(Exception, match="lacks"):
        load_weights(kl_run, shapes(KL), which="ema")


def test_training_in_a_new_workdir_starts_from_an_import(tmp_path, kl_run):
    run = dataclasses.replace(
        tiny.AUTOENCODER,
        num_steps=1,
        init_from=str(kl_run),
        optim=dataclasses.replace(tiny.AUTOENCODER.optim, lr=0.0),
    )
    train_autoencoder.run(run, tmp_path / "w")
    first_stage = load_first_stage(tmp_path / "w", make_mesh(MeshConfig()))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(host_array(a), b), first_stage.params, drawn(KL)
    )


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_compvis_file_is_imported_with_the_architecture_of_a_config(tmp_path, capsys, prefix):
    tensors = to_theirs(compvis_names(VQ), drawn(VQ))
    file = tmp_path / "model.safetensors"
    save_file({f"{prefix}{n}": np.ascontiguousarray(a) for n, a in tensors.items()}, file)
    workdir = tmp_path / "w"
    command = ["import", f"--from={file}", f"--workdir={workdir}"]
    assert "--config=FILE:VARIANT" in refused(capsys, command)
    variant = "--config=configs/autoencoder.py:digits"
    line = refused(capsys, [*command, variant])
    assert "missing" in line and "unknown" in line and "of another shape" in line
    assert not workdir.exists()
    run = dataclasses.replace(tiny.AUTOENCODER, model=VQ)
    cli.main([*command, variant, *tiny.overrides(run)])
    first_stage = load_first_stage(workdir, make_mesh(MeshConfig()))
    assert first_stage.run.ema.decay == 0
    np.testing.assert_array_equal(
        first_stage.params["quantizer"]["codebook"], tensors["quantize.embedding.weight"]
    )


def test_a_config_keeps_its_images_and_gets_the_folders_architecture(tmp_path):
    source = folder_of_diffusers(tmp_path / "in", KL)
    workdir = imported(source, tmp_path / "w", "--config=configs/autoencoder.py:digits")
    config = json.loads((workdir / "run.json").read_text())["config"]
    assert config["images"]["source"] == "digits"
    assert config["images"]["resolution"] == config["model"]["resolution"] == 32
    assert config["model"]["width"] == KL.width


def test_a_workdir_or_folder_that_holds_something_is_left_alone(capsys, tmp_path, kl_run):
    source = folder_of_diffusers(tmp_path / "in", KL)
    before = contents(kl_run)
    assert "not empty" in refused(capsys, ["import", f"--from={source}", f"--workdir={kl_run}"])
    assert contents(kl_run) == before
    before = contents(source)
    assert "not empty" in refused(capsys, ["export", f"--workdir={kl_run}", f"--out={source}"])
    assert contents(source) == before


def test_what_does_not_fit_is_refused_before_anything_is_written(capsys, tmp_path):
    source = folder_of_diffusers(tmp_path / "in", KL)
    workdir = tmp_path / "w"
    command = ["import", f"--from={source}", f"--workdir={workdir}"]
    assert "of another shape" in refused(capsys, [*command, "--config.model.width=16"])
    (source / diffusers.WEIGHTS).write_bytes(b"12345678")
    assert "damaged" in refused(capsys, command)
    assert "absent does not exist" in refused(
        capsys, ["import", f"--from={tmp_path}/absent", command[2]]
    )
    assert not workdir.exists()


def test_a_trained_run_exports_its_average_and_the_scale_of_its_cache(tmp_path, first_stage):
    assert tiny.AUTOENCODER.ema.decay
    manifest = json.loads((first_stage / "latents" / "train" / "manifest.json").read_text())
    cli.main(["export", f"--workdir={first_stage}", f"--out={tmp_path / 'out'}"])
    model = load_first_stage(first_stage, make_mesh(MeshConfig()))
    tensors = load_file(tmp_path / "out" / diffusers.WEIGHTS)
    ours = to_ours(diffusers_names(model.config), tensors, shapes(model.config))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(host_array(a), b), model.params, ours)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["scaling_factor"] == 1 / manifest["global_std"]
