"""Bad input: one line with value, rule and remedy, a non-zero exit, nothing lost."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ldm_jax import cli
from ldm_jax.train.loop import lock_workdir
from tests import tiny

AUTOENCODER = [
    "train-autoencoder",
    "--config=configs/autoencoder.py:digits",
    *tiny.overrides(tiny.AUTOENCODER),
]
DENOISER = ["train-denoiser", "--config=configs/denoiser.py:digits", "--config.batch_size=16"]


def refused(capsys, arguments):
    """Runs the command in this process; returns its one line of complaint."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    complaints = [line for line in lines if "error:" in line]
    assert len(complaints) == 1
    assert "Traceback" not in "".join(lines)
    return complaints[0]


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.optim.lrr=1", ["config.optim.lrr", "not a field", "--config.optim.lr"]),
        ("--config.batch_size=12", ["batch_size 12", "must divide by 8", "nearest: 16"]),
        ("--config.num_steps=many", ["config.num_steps", "many"]),
        ("--config.mesh.fsdp=3", ["'fsdp': 3", "8 devices", "-1"]),
        ("--config.images.source=floppy", ["floppy", "digits", "folder", "tfds"]),
        ("--config.model.norm_groups=3", ["norm_groups 3", "width"]),
        ("--config.log_every=0", ["log_every 0", "at least 1"]),
    ],
)
def test_a_bad_field_is_refused_before_anything_is_written(capsys, tmp_path, override, words):
    line = refused(capsys, [*AUTOENCODER, f"--workdir={tmp_path / 'w'}", override])
    for word in words:
        assert word in line
    assert not (tmp_path / "w").exists()


def test_a_best_figure_that_no_evaluation_has_is_refused(capsys, tmp_path):
    best = ["--config.eval_every=2", "--config.keep_best=foo", "--config.eval_images=3"]
    line = refused(capsys, [*AUTOENCODER, f"--workdir={tmp_path / 'w'}", *best])
    for word in ("keep_best 'foo'", "psnr_db", "sharpness", "--config.keep_best"):
        assert word in line
    assert not (tmp_path / "w").exists()


def test_a_missing_folder_is_refused(capsys, tmp_path):
    source = ["--config.images.source=folder", f"--config.images.path={tmp_path / 'absent'}"]
    line = refused(capsys, [*AUTOENCODER, *source, f"--workdir={tmp_path / 'w'}"])
    assert "absent" in line
    assert not (tmp_path / "w").exists()


def test_a_missing_config_or_variant_is_refused(capsys, tmp_path):
    workdir = f"--workdir={tmp_path / 'w'}"
    assert "absent.py" in refused(capsys, ["train-autoencoder", "--config=absent.py", workdir])
    line = refused(capsys, ["train-autoencoder", "--config=configs/autoencoder.py:kl-f9", workdir])
    assert "kl-f9" in line
    assert "kl-f8" in line
    assert "holds no run to go on with" in refused(capsys, ["train-autoencoder", workdir])


def test_a_corrupt_image_stops_the_run_and_loses_nothing(capsys, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(70):
        picture = rng.integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    (folder / "007.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    command = [
        *AUTOENCODER,
        "--config.images.source=folder",
        f"--config.images.path={folder}",
        "--config.images.held_out_fraction=0.0",
        "--config.num_steps=8",
        "--config.checkpoint_every=8",
        f"--workdir={tmp_path / 'w'}",
    ]
    line = refused(capsys, command)
    assert "007.png" in line
    steps = [int(p.name) for p in (tmp_path / "w" / "checkpoints").glob("[0-9]*")]
    metrics = (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()
    # Everything before the batch with the broken file is kept: 70 images, 16 a step.
    assert len(steps) == 1
    assert 1 <= steps[0] <= 4
    assert len(metrics) == steps[0]

    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / "007.png")
    cli.main(command)
    metrics = (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, 9))

    (folder / "069.png").unlink()
    assert "num_examples is 70 there and 69 now" in refused(capsys, command)


def test_another_config_on_resume_is_refused(capsys, tmp_path, first_stage):
    workdir = tmp_path / "w"
    shutil.copytree(first_stage, workdir)
    before = contents(workdir)
    config = json.loads((workdir / "run.json").read_text())["config"]
    line = refused(capsys, ["train-autoencoder", "--config.seed=5", f"--workdir={workdir}"])
    assert "seed is 0 there and 5 now" in line
    assert config["seed"] == 0
    line = refused(capsys, ["train-denoiser", f"--workdir={workdir}"])
    assert "train-autoencoder" in line
    assert contents(workdir) == before


def test_a_cache_of_another_autoencoder_is_refused(capsys, tmp_path, first_stage):
    other = tmp_path / "other"
    cli.main([*AUTOENCODER, "--config.num_steps=1", f"--workdir={other}"])
    arguments = [
        *DENOISER,
        f"--config.autoencoder={other}",
        f"--config.latents={first_stage / 'latents'}",
        f"--workdir={tmp_path / 'w'}",
    ]
    line = refused(capsys, arguments)
    assert "encoder_hash" in line
    assert not (tmp_path / "w").exists()
    # Nor does the cache take in latents of another encoder.
    before = contents(first_stage / "latents")
    cache = ["cache-latents", f"--workdir={other}", f"--out={first_stage / 'latents'}"]
    assert "encoder_hash" in refused(capsys, cache)
    assert contents(first_stage / "latents") == before


def test_a_missing_cache_is_refused(capsys, tmp_path, first_stage):
    missing = f"--config.latents={tmp_path / 'none'}"
    arguments = [
        *DENOISER,
        f"--config.autoencoder={first_stage}",
        missing,
        f"--workdir={tmp_path / 'w'}",
    ]
    assert "cache-latents" in refused(capsys, arguments)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.model.backbone.in_channels=3", ["in_channels is 3", "2 channels"]),
        (
            "--config.model.conditions.class.num_classes=9",
            ["conditions.class.num_classes is 9", "10 classes"],
        ),
        ("--config.model.conditioner.num_classes=9", ["num_classes is 9", "10 classes"]),
        ("--config.model.conditions.class.kind=text", ["'text'", "'class'"]),
        ("--config.model.backbone.kind=transformer", ["'transformer'", "'unet'"]),
        ("--config.whitening=pca", ["'pca'", "channel"]),
    ],
)
def test_a_denoiser_that_does_not_fit_its_latents_is_refused(
    capsys, tmp_path, first_stage, override, words
):
    assert tiny.DENOISER.model.backbone.in_channels == 2
    fits = ["--config.model.backbone.in_channels=2", "--config.model.backbone.out_channels=2"]
    arguments = [*DENOISER, *fits, override, f"--config.autoencoder={first_stage}"]
    line = refused(capsys, [*arguments, f"--workdir={tmp_path / 'w'}"])
    for word in words:
        assert word in line
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--classes=cat", ["'cat'", "0,3,7"]),
        ("--guidance-interval=0.2-0.8", ["'0.2-0.8'", "0.2,0.8"]),
        ("--guidance-projection=none", ["'none'", "0,15"]),
        ("--guided-channels=rgb", ["'rgb'", "0,1,2"]),
        ("--churn=much", ["'much'", "40,0.05,50"]),
        ("--size=8x16", ["'8x16'", "512,768"]),
        ("--strength=0.5", ["--init-images"]),
        ("--guidance-rescale=0.7", ["--guidance"]),
    ],
)
def test_bad_flags_of_sampling_are_refused_before_the_model_is_read(capsys, tmp_path, flag, words):
    line = refused(capsys, ["sample", f"--workdir={tmp_path}", flag])
    for word in words:
        assert word in line


@pytest.fixture
def copy(first_stage, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(first_stage, workdir, ignore=shutil.ignore_patterns("latents"))
    return workdir


def test_vanished_checkpoints_are_refused_and_the_log_is_kept(capsys, copy):
    shutil.rmtree(copy / "checkpoints")
    before = (copy / "metrics.jsonl").read_bytes()
    line = refused(capsys, ["train-autoencoder", f"--workdir={copy}"])
    assert "had checkpoints and holds none now" in line
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_a_missing_average_is_refused_not_replaced(capsys, copy):
    shutil.rmtree(copy / "checkpoints" / "3" / "ema")
    assert "lacks ['ema']" in refused(capsys, ["cache-latents", f"--workdir={copy}"])
    assert not (copy / "latents" / "train").exists()


def test_a_second_training_in_a_workdir_is_refused(capsys, copy):
    lock = lock_workdir(copy)
    line = refused(capsys, ["train-autoencoder", "--config.num_steps=4", f"--workdir={copy}"])
    assert "in use by another training" in line
    lock.close()


def test_a_refused_resume_leaves_the_record_as_it_was(capsys, copy):
    before = (copy / "run.json").read_bytes()
    with lock_workdir(copy):
        line = refused(capsys, ["train-autoencoder", "--config.num_steps=9", f"--workdir={copy}"])
        assert "in use by another training" in line
    line = refused(capsys, ["train-autoencoder", "--config.num_steps=2", f"--workdir={copy}"])
    assert "num_steps 2 is less than the 3" in line
    assert (copy / "run.json").read_bytes() == before  # a plain resume goes on as before


def test_a_damaged_run_json_is_refused(capsys, copy):
    for text in ("{", "[]", "{}"):
        (copy / "run.json").write_text(text)
        assert "run.json is damaged" in refused(capsys, ["evaluate", f"--workdir={copy}"])


def test_a_diverged_loss_stops_the_run_before_it_is_saved(capsys, tmp_path):
    diverging = ["--config.optim.lr=1e30", "--config.max_bad_steps=0"]
    arguments = [*AUTOENCODER, *diverging, f"--workdir={tmp_path / 'w'}"]
    assert "training has diverged" in refused(capsys, arguments)
    assert not list((tmp_path / "w" / "checkpoints").glob("[0-9]*"))


def test_a_workdir_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, [*AUTOENCODER, f"--workdir={tmp_path / 'file' / 'w'}"])
