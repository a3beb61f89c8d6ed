"""Numbers, paths and formats that no refactoring moves; `tests/golden/record.py` writes them."""

import json
import re
import tarfile
from pathlib import Path

import pytest

from ldm_jax import cli
from tests.golden import record

GOLDEN = Path(__file__).with_name("golden")
TOLERANCE = 1e-4  # machines, and numbers of devices, round differently


def comparable(tree):
    """The tree without what another rounding changes beyond the tolerance.

    That is: digests, also those in figures' names, norms of gradients that pass through an
    adversary, and the figures of a classifier that is trained for some hundred steps first.
    """
    if isinstance(tree, list):
        judged = "classifier_held_out_accuracy"
        return [comparable(x) for x in tree if not (isinstance(x, dict) and judged in x)]
    if not isinstance(tree, dict):
        return tree
    out = ("digest", "digests", "grad_norm")
    return {re.sub("-[0-9a-f]{8}$", "", k): comparable(v) for k, v in tree.items() if k not in out}


def test_the_recorded_numbers_and_paths_still_come_out(tmp_path):
    golden = json.loads((GOLDEN / "numbers.json").read_text())
    found = record.record(tmp_path, ("denoiser",), classifier=False)
    different = []
    for part, have in found.items():
        want = golden[part] if part == "cache" else {name: golden[part][name] for name in have}
        different += record.differences(comparable(have), comparable(want), part, TOLERANCE)
    assert different == []


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    """Runs of the first version: an autoencoder of 2 steps, its latents, a denoiser of 2 steps."""
    root = tmp_path_factory.mktemp("old")
    with tarfile.open(GOLDEN / "run.tar.gz") as archive:
        archive.extractall(root, filter="data")
    for name in ("autoencoder", "denoiser"):
        path = root / name / "run.json"
        path.write_text(path.read_text().replace("@ROOT@", str(root)))
    return root


def sampled(root, name):
    out = root / f"{name}.npz"
    flags = ["--num=8", "--batch-size=8", "--steps=3", "--guidance=2", f"--out={out}"]
    cli.main(["sample", f"--workdir={root / 'denoiser'}", *flags])
    return record.samples(out)["mean"]


def resumed(root, name):
    cli.main([f"train-{name}", f"--workdir={root / name}", "--config.num_steps=4"])
    return record.losses(root / name)[2:]


def test_runs_of_the_first_version_sample_and_resume(old_run):
    want = json.loads((GOLDEN / "run_continued.json").read_text())
    have = {"samples": {"before": sampled(old_run, "before")}}
    have["denoiser"] = resumed(old_run, "denoiser")
    have["samples"]["after"] = sampled(old_run, "after")
    have["autoencoder"] = resumed(old_run, "autoencoder")
    assert record.differences(have, want, tolerance=TOLERANCE) == []
