"""`ldm demo`: real digits to a trained latent diffusion model, its figures and a report."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.data import images
from ldm_jax.eval import report
from ldm_jax.eval.images_out import grid
from ldm_jax.jobs import cache_latents, evaluate, sample, train_autoencoder, train_denoiser
from ldm_jax.runs import config_files, settings
from ldm_jax.runs.first_stage import load_first_stage
from ldm_jax.runs.reconstruction import reconstruct
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sharding import MeshConfig, make_mesh
from ldm_jax.train.log import read_metrics

GUIDANCE = 2.0
STEPS = 25
NUM_SAMPLES = 1000


def run(workdir: Path) -> Path:
    """Trains in WORKDIR/autoencoder and WORKDIR/denoiser; returns the path of `report.html`.

    Each phase is the job of its own verb, so that an interrupted demo goes on where it was.
    """
    workdir = Path(workdir)
    autoencoder_dir, denoiser_dir = workdir / "autoencoder", workdir / "denoiser"
    first = config_files.load_run(settings.AutoencoderRun, "configs/autoencoder.py:digits", [])
    second = config_files.load_run(
        settings.DenoiserRun,
        "configs/denoiser.py:digits",
        [f"--config.autoencoder={autoencoder_dir.absolute()}"],
    )
    draw = SampleOptions(num=NUM_SAMPLES, steps=STEPS, guidance=GUIDANCE, batch_size=200)
    commands = [
        f"ldm train-autoencoder --config=configs/autoencoder.py:digits --workdir={autoencoder_dir}",
        f"ldm cache-latents --workdir={autoencoder_dir}",
        "ldm train-denoiser --config=configs/denoiser.py:digits "
        f"--config.autoencoder={autoencoder_dir} --workdir={denoiser_dir}",
        f"ldm evaluate --workdir={autoencoder_dir}",
        f"ldm evaluate --workdir={denoiser_dir} --num={NUM_SAMPLES} --steps={STEPS} "
        f"--guidance={GUIDANCE} --batch-size=200",
        f"ldm sample --workdir={denoiser_dir} --num=100 --steps={STEPS} --guidance={GUIDANCE}",
    ]
    timings: dict[str, float] = {}

    def phase(name: str, job: Callable[[], Any]) -> Any:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        result = job()
        timings[name] = time.perf_counter() - start
        return result

    phase("train the autoencoder", lambda: train_autoencoder.run(first, autoencoder_dir))
    phase(
        "cache the latents",
        lambda: cache_latents.run(autoencoder_dir, cache_latents.CacheOptions()),
    )
    phase("train the denoiser", lambda: train_denoiser.run(second, denoiser_dir))
    rebuilt = phase(
        "evaluate reconstructions",
        lambda: evaluate.first_stage(autoencoder_dir),
    )
    figures = phase("sample and evaluate", lambda: evaluate.denoiser(denoiser_dir, draw))
    pictures = phase("draw the grids", lambda: _grids(autoencoder_dir, denoiser_dir))

    total = sum(timings.values())
    path = workdir / "report.html"
    report.write_report(
        path,
        title="ldm demo: handwritten digits",
        figures=_table(rebuilt, figures),
        commands=commands,
        timings=timings,
        images=pictures,
        curves=[
            ("Autoencoder: L1 per pixel", _curve(autoencoder_dir, "l1"), True),
            ("Denoiser: mean squared error of the noise", _curve(denoiser_dir, "loss"), True),
        ],
    )
    print()
    for name, value, comment in _table(rebuilt, figures):
        print(f"{name:52s} {value:>10s}   {comment}")
    for name, seconds in timings.items():
        print(f"{name:52s} {seconds:8.1f} s   {100 * seconds / total:4.1f} %")
    print(f"\nreport: {path.absolute()}")
    return path


def _table(rebuilt: dict[str, float], figures: dict[str, float]) -> list[tuple[str, str, str]]:
    halves, alone = figures["frechet_halves_of_real"], figures["frechet_autoencoder_alone"]
    limit = 3 * halves + alone

    def row(name, value, unit, rule):
        text = f"{value:.2f}{unit}" if unit else f"{value:.3f}"
        return name, text, rule

    return [
        row("Held-out reconstruction, PSNR", rebuilt["psnr_db"], " dB", "aim: at least 34 dB"),
        row("Held-out reconstruction, SSIM", rebuilt["ssim"], "", ""),
        row(
            "Classifier on held-out real digits",
            100 * figures["classifier_held_out_accuracy"],
            " %",
            "aim: at least 97 %",
        ),
        row(
            f"Samples classified as asked (of {int(figures['num_samples'])})",
            100 * figures["sample_accuracy"],
            " %",
            "aim: at least 95 %",
        ),
        row(
            "Fréchet distance, samples to real",
            figures["frechet_samples"],
            "",
            f"aim: below {limit:.3f}",
        ),
        row(
            "Fréchet distance, halves of the real digits", halves, "", "yardstick: 3 times this ..."
        ),
        row("Fréchet distance, reconstructions to real", alone, "", "... plus this"),
    ]


def _curve(workdir: Path, name: str) -> dict[str, tuple[list[float], list[float]]]:
    lines = [line for line in read_metrics(workdir) if name in line]  # not the evaluations'
    return {name: ([m["step"] for m in lines], [m[name] for m in lines])}


def _grids(autoencoder_dir: Path, denoiser_dir: Path) -> list[tuple[str, np.ndarray]]:
    mesh = make_mesh(MeshConfig())
    first_stage = load_first_stage(autoencoder_dir, mesh)
    source = images.open_images(first_stage.run.images, "held_out", augment=False)
    indices = np.arange(20, dtype=np.int64)
    originals = source.read(indices, indices)["image"]
    rebuilt = reconstruct(first_stage, originals, mesh)
    sample_settings = SampleOptions(num=100, steps=STEPS, guidance=GUIDANCE)
    path = sample.run(denoiser_dir, sample_settings)
    samples = np.load(path)["arr_0"]
    return [
        (
            "Held-out digits (top) and their reconstructions",
            grid(np.concatenate([originals, rebuilt]), 20),
        ),
        (
            f"Samples, one class a column; guidance {GUIDANCE}, {STEPS} DDIM steps",
            grid(samples, 10),
        ),
    ]
