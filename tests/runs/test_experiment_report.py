"""The page of an experiment, from what its runs have written."""

import json

import numpy as np
from PIL import Image

from ldm_jax.eval.comparison import contrast_table, contrasts, picture_name, table
from ldm_jax.eval.spectrum import Spectrum
from ldm_jax.runs import experiment_report
from ldm_jax.runs.plan import Arm
from tests import tiny
from tests.eval.test_report import Page

ARMS = {
    "base": Arm(tiny.DENOISER),
    "lpl": Arm(tiny.DENOISER, start="base"),
    "late": Arm(tiny.DENOISER),
}
PLAN = {"arms": {arm: {} for arm in ARMS}, "seeds": [0, 1]}
WAYS = [{"sampler": "ddim", "steps": 2}, {"sampler": "ddim", "steps": 4}]


def spectrum(seed):
    images = np.random.default_rng(seed).integers(0, 256, (4, 8, 8, 3), np.uint8)
    return Spectrum.of(images)


def finished(workdir, arm, seed):
    """Rows of a run whose metrics and pictures are in the workdir."""
    folder = workdir / f"{arm}-seed{seed}"
    folder.mkdir()
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval/loss": 1.5}]
    if arm == "lpl":
        lines = [line | {"loss_diffusion": 0.5, "loss_lpl": 3.0} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = []
    for way in WAYS:
        found = spectrum(seed + way["steps"])
        figures = {"frechet_samples": seed + way["steps"], "frequency": found.frequency.tolist()}
        rows.append({"arm": arm, "seed": seed, **way, **figures, "spectrum": found.power.tolist()})
        grey = 100 if arm == "base" else 200
        Image.new("RGB", (20, 8), (grey,) * 3).save(folder / picture_name(way))
    return rows


def write(workdir, rows, monkeypatch):
    written = {}

    def keep(path, **given):
        written.update(given)
        real(path, **given)

    real = experiment_report.write_report
    monkeypatch.setattr(experiment_report, "write_report", keep)
    experiment_report.write(
        workdir,
        PLAN,
        ARMS,
        rows,
        command="ldm experiment --config=x",
        tables=[table(rows), contrast_table(contrasts(rows, {"d": {"lpl": 1, "base": -1}}))],
        times={"autoencoder": 9.0, "base-seed0": 1.0, "base-seed1": 2.0, "lpl-seed0": 4.0},
        reals=spectrum(99),
    )
    return written


def test_the_page_of_an_experiment_that_is_half_done(tmp_path, monkeypatch):
    rows = [
        r
        for arm, seed in (("base", 0), ("base", 1), ("lpl", 0))
        for r in finished(tmp_path, arm, seed)
    ]
    page = write(tmp_path, rows, monkeypatch)
    text = (tmp_path / "report.html").read_text()
    Page(text)
    assert "3 of 6 runs are finished" in page["summary"]
    assert 'src="http' not in text and "<script" not in text
    curves = {curve.title: curve.series for curve in page["curves"]}
    # Of a sum of losses the denoising one, so that arms are compared by the same.
    assert curves["Training loss"] == {"base": ((1, 2), (2.0, 1.0)), "lpl": ((1, 2), (0.5, 0.5))}
    assert curves["Latent perceptual loss, without its weight"] == {"lpl": ((1, 2), (3.0, 3.0))}
    assert curves["Held-out loss"] == {"base": ((2,), (1.5,)), "lpl": ((2,), (1.5,))}
    spectra = curves["Power spectrum of samples"]
    assert list(spectra) == ["real images", "base", "lpl"]
    # The first way's alone, over seeds.
    expected = (spectrum(2).power + spectrum(3).power) / 2
    np.testing.assert_allclose(spectra["base"][1], expected)
    assert page["timings"] == {"autoencoder": 9.0, "base": 3.0, "lpl": 4.0}
    ((caption, grid),) = page["images"]
    assert caption.endswith("from the top: base (ddim 2), lpl (ddim 2)")
    assert (
        grid.shape == (18, 20, 3) and {*grid[:8].ravel()} == {100} and {*grid[10:].ravel()} == {200}
    )
    assert page["commands"][0] == "ldm experiment --config=x"


def test_a_page_without_pictures_metrics_or_reals(tmp_path):
    rows = [{"arm": "base", "seed": 0, "psnr_db": 20.0}]
    experiment_report.write(
        tmp_path, PLAN, ARMS, rows, command="c", tables=[table(rows)], times={}, reals=None
    )
    text = (tmp_path / "report.html").read_text()
    Page(text)
    assert "20.000" in text and "1 of 6 runs" in text
