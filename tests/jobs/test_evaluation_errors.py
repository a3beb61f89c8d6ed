"""Bad input to `ldm evaluate`: one line with value, rule and remedy, and nothing is measured."""

import io
import zipfile

import numpy as np
import pytest

from ldm_jax import cli
from ldm_jax.eval import evaluation
from ldm_jax.jobs import evaluate
from tests.jobs.test_errors import contents, refused
from tests.judged import digits

RANDOM = "--extractor=random-conv"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of files that the flags name, and no weights anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def measured(*arguments):
        raise AssertionError("measured")

    monkeypatch.setattr(evaluation, "accumulate", measured)
    np.savez("set.npz", arr_0=digits(40))
    np.savez("gaussian.npz", mu=np.zeros(16), sigma=np.eye(16))
    np.savez("floats.npz", arr_0=digits(2) / 255)
    np.savez("other.npz", pictures=digits(2))
    header, real = io.BytesIO(), io.BytesIO()
    header_fields = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 512, 512, 3)}
    np.lib.format.write_array_header_1_0(header, header_fields)
    np.save(real, digits(2))
    with zipfile.ZipFile("lie.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + real.getvalue())
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--preset=fid", ["preset 'fid' is unknown", "torch_fidelity"]),
        ("--extractor=resnet", ["extractor 'resnet' is unknown", "random-conv"]),
        ("--preset=adm --extractor=inception", ["'inception' with preset 'adm'", "'custom'"]),
        (f"{RANDOM} --extractor-file=x", ["'random-conv' takes no weights", "'x'"]),
        (f"{RANDOM} --metrics=fid,fidd", ["metric 'fidd' is unknown", "precision_recall"]),
        (
            f"{RANDOM} --reference=set.npz --metrics=sfid",
            ["'sfid': this preset has no features for it"],
        ),
        (f"{RANDOM} --dataset=cifar", ["dataset 'cifar' has no published", "celebahq"]),
        (RANDOM, ["nothing to compare with", "--reference"]),
        (f"{RANDOM} --reference=absent.npz", ["absent.npz does not exist"]),
        (f"{RANDOM} --reference=set.npz", ["40 images for 256 features", "at least 257"]),
        (f"{RANDOM} --reference=set.npz --metrics=kid", ["1000 images or more", "40"]),
        (f"{RANDOM} --kid-subset-size=1", ["kid_subset_size 1 must be at least 2"]),
        ("--preset=adm --kid-subset-size=50", ["kid_subset_size 50 with preset 'adm'"]),
        (f"{RANDOM} --reference=gaussian.npz", ["no metric", "'fid'", "statistics of 'quarters'"]),
        (f"{RANDOM} --reference=gaussian.npz --metrics=kid", ["images, not statistics alone"]),
        (f"{RANDOM} --reference=lie.npz", ["lie.npz", "does not hold"]),
        (f"{RANDOM} --reference=other.npz", ["other.npz holds ['pictures']", "arr_0"]),
        ("--reference=set.npz", ["inception.safetensors is missing", "`ldm weights inception`"]),
        ("--preset=adm --reference=gaussian.npz --metrics=sfid", ["statistics of 'spatial2023'"]),
        ("--preset=edm2 --reference=set.npz", ["`ldm weights dinov2-vitl14 --unverified`"]),
        (f"{RANDOM} --steps=7", ["--steps 7 is about samples"]),
        (f"{RANDOM} --num=7", ["--num 7 is about samples", "whole"]),
        (f"{RANDOM} --labels=random", ["--labels 'random' is about samples"]),
        (f"{RANDOM} --keep=there", ["--keep 'there' is about samples"]),
        (f"{RANDOM} --posterior", ["--posterior is of a first stage, not of --images"]),
        (f"{RANDOM} --workdir=w", ["--workdir=DIR of a run, or --images"]),
    ],
)
def test_bad_flags_of_a_set_of_images_are_refused(capsys, here, flags, words):
    before = contents(here)
    line = refused(capsys, ["evaluate", "--images=set.npz", "--out=out", *flags.split()])
    for word in words:
        assert word in line
    assert contents(here) == before and not (here / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", ["--workdir=DIR of a run, or --images"]),
        ("--images=set.npz", ["--images needs --out"]),
        ("--images=set.npz --stats-only", ["--images needs --out"]),
        ("--workdir=w --stats-only", ["--out and --stats-only belong to --images"]),
        ("--workdir=w --out=x", ["--out and --stats-only belong to --images"]),
        ("--workdir=w", ["w is not there"]),
        ("--images=set.npz --stats-only --out=set.npz", ["--out=set.npz must be a new file"]),
        ("--images=set.npz --stats-only --out=x", ["--out=x must be a new file", ".npz"]),
        ("--images=set.npz --stats-only --out=x.npz", ["40 images for 256 features"]),
        ("--images=set.npz --stats-only --out=x.npz --metrics=fid", ["compares with nothing"]),
        ("--images=set.npz --stats-only --out=x.npz --reference=y", ["compares with nothing"]),
        ("--images=set.npz --stats-only --out=x.npz --seed=3", ["--seed 3 is about samples"]),
        ("--images=lie.npz --out=x", ["lie.npz", "does not hold"]),
        ("--images=floats.npz --out=x", ["float64", "uint8 [N,H,W,3]"]),
        ("--images=empty --out=x", ["empty", "no images"]),
        ("--images=absent --out=x", ["absent does not exist"]),
    ],
)
def test_bad_commands_are_refused(capsys, here, flags, words):
    before = contents(here)
    line = refused(capsys, ["evaluate", RANDOM, *flags.split()])
    for word in words:
        assert word in line
    assert contents(here) == before and not (here / "x").exists()


def test_frozen_networks_judge_wherever_one_of_their_flags_is_given(monkeypatch):
    seen = []

    def run(workdir, options, samples, judge):
        seen.append(judge)

    monkeypatch.setattr(evaluate, "run", run)
    for flag in ("--preset=adm", RANDOM, "--metrics=fid", "--reference=x", "--allow-few"):
        cli.main(["evaluate", "--workdir=w", flag])
    cli.main(["evaluate", "--workdir=w", "--extractor-file=x"])
    assert None not in seen and [judge.preset for judge in seen].count("custom") == 1
    cli.main(["evaluate", "--workdir=w", "--steps=3"])
    assert seen[-1] is None
