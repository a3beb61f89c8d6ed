"""`ldm demo`: real digits to a trained latent diffusion model, its figures and a report."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ldm_jax.data import images
from ldm_jax.eval import report
from ldm_jax.eval.images_out import grid
from ldm_jax.jobs import cache_latents, evaluate, sample, train_autoencoder, train_denoiser
from ldm_jax.runs.config_files import load_run
from ldm_jax.runs.first_stage import load_first_stage
from ldm_jax.runs.reconstruction import reconstruct
from ldm_jax.runs.settings import AutoencoderRun, DenoiserRun
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sharding import MeshConfig, make_mesh
from ldm_jax.train.log import read_metrics

FIRST_STAGE, DENOISER = "configs/autoencoder.py:digits", "configs/denoiser.py:digits"
DRAWN = SampleOptions(num=1000, sampler="dpmpp_2m", steps=20, guidance=1.75, batch_size=200)
FLAGS = f"--sampler={DRAWN.sampler} --steps={DRAWN.steps} --guidance={DRAWN.guidance}"


def run(workdir: Path) -> Path:
    """Trains in WORKDIR/autoencoder and WORKDIR/denoiser; returns the path of `report.html`.

    Each phase is the job of its own verb, so that an interrupted demo goes on where it was.
    """
    first, second = Path(workdir) / "autoencoder", Path(workdir) / "denoiser"
    timings: dict[str, float] = {}
    with _phase("train the autoencoder", timings):
        train_autoencoder.run(load_run(AutoencoderRun, FIRST_STAGE, []), first)
    with _phase("cache the latents", timings):
        cache_latents.run(first, cache_latents.CacheOptions())
    with _phase("train the denoiser", timings):
        on_top = [f"--config.autoencoder={first.absolute()}"]
        train_denoiser.run(load_run(DenoiserRun, DENOISER, on_top), second)
    with _phase("evaluate reconstructions", timings):
        rebuilt = evaluate.first_stage(first)
    with _phase("sample and evaluate", timings):
        figures = evaluate.denoiser(second, DRAWN)
    with _phase("draw the grids", timings):
        pictures = _grids(first, second)
    table = _table(rebuilt, figures)
    path = Path(workdir) / "report.html"
    report.write_report(
        path,
        title="ldm demo: handwritten digits",
        figures=table,
        commands=_commands(first, second),
        timings=timings,
        images=pictures,
        curves=[
            ("Autoencoder: L1 per pixel", _curve(first, "l1"), True),
            ("Denoiser: mean squared error of the velocity", _curve(second, "loss"), True),
        ],
    )
    print()
    for name, value, comment in table:
        print(f"{name:52s} {value:>10s}   {comment}")
    total = sum(timings.values())
    for name, seconds in timings.items():
        print(f"{name:52s} {seconds:8.1f} s   {100 * seconds / total:4.1f} %")
    print(f"\nreport: {path.absolute()}")
    return path


@contextlib.contextmanager
def _phase(name: str, timings: dict[str, float]) -> Iterator[None]:
    print(f"== {name}", flush=True)
    start = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - start


def _commands(first: Path, second: Path) -> list[str]:
    """What a newcomer types to have the same."""
    return [
        f"ldm train-autoencoder --config={FIRST_STAGE} --workdir={first}",
        f"ldm cache-latents --workdir={first}",
        f"ldm train-denoiser --config={DENOISER} --config.autoencoder={first} --workdir={second}",
        f"ldm evaluate --workdir={first}",
        f"ldm evaluate --workdir={second} --num={DRAWN.num} {FLAGS} "
        f"--batch-size={DRAWN.batch_size}",
        f"ldm sample --workdir={second} --num=100 {FLAGS}",
    ]


def _table(rebuilt: dict[str, float], figures: dict[str, float]) -> list[tuple[str, str, str]]:
    """Rows (figure, value, rule)."""
    halves, alone = figures["frechet_halves_of_real"], figures["frechet_autoencoder_alone"]
    limit = min(3 * halves + alone, 0.95)
    accuracy_name = f"Samples classified as asked (of {int(figures['num_samples'])})"
    classifier, accuracy = figures["classifier_held_out_accuracy"], figures["sample_accuracy"]
    distance = figures["frechet_samples"]
    return [
        ("Held-out reconstruction, PSNR", f"{rebuilt['psnr_db']:.2f} dB", "aim: at least 34 dB"),
        ("Held-out reconstruction, SSIM", f"{rebuilt['ssim']:.3f}", ""),
        ("Classifier on held-out real digits", f"{100 * classifier:.2f} %", "aim: at least 97 %"),
        (accuracy_name, f"{100 * accuracy:.2f} %", "aim: at least 99 %"),
        ("Fréchet distance, samples to real", f"{distance:.3f}", f"aim: below {limit:.3f}"),
        ("Fréchet distance, halves of the real digits", f"{halves:.3f}", "yardstick"),
        ("Fréchet distance, reconstructions to real", f"{alone:.3f}", "the first stage's share"),
    ]


def _curve(workdir: Path, name: str) -> dict[str, tuple[list[float], list[float]]]:
    lines = [line for line in read_metrics(workdir) if name in line]  # not the evaluations'
    return {name: ([m["step"] for m in lines], [m[name] for m in lines])}


def _grids(first: Path, second: Path) -> list[tuple[str, np.ndarray]]:
    mesh = make_mesh(MeshConfig())
    first_stage = load_first_stage(first, mesh)
    source = images.open_images(first_stage.run.images, "held_out", augment=False)
    indices = np.arange(20, dtype=np.int64)
    originals = source.read(indices, indices)["image"]
    both = np.concatenate([originals, reconstruct(first_stage, originals, mesh)])
    path = sample.run(second, dataclasses.replace(DRAWN, num=100, batch_size=0))
    sampling = f"guidance {DRAWN.guidance}, {DRAWN.steps} steps of {DRAWN.sampler}"
    return [
        ("Held-out digits (top) and their reconstructions", grid(both, 20)),
        (f"Samples, one class a column; {sampling}", grid(np.load(path)["arr_0"], 10)),
    ]
