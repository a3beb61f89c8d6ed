"""`ldm sample`: a trained denoiser and its first stage to images."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.diffusion.process import make_process
from ldm_jax.errors import InputError
from ldm_jax.eval.images_out import save_grid, save_npz
from ldm_jax.jobs.sample_guidance import check_guidance
from ldm_jax.jobs.sample_images import check_sizes, latent_shape, read_images
from ldm_jax.jobs.sample_model import Model, load_model
from ldm_jax.jobs.sample_program import (
    check_steps,
    compile_decoder,
    compile_sampler,
    numbers_of,
    weights_of,
)
from ldm_jax.jobs.sample_settings import Settings, check_values, sampler_options
from ldm_jax.sharding import batch_sharding, check_batch, host_array
from ldm_jax.train.run_dir import write_json

__all__ = [
    "Drawn",
    "Model",
    "Settings",
    "check",
    "compile_sampler",
    "draw",
    "load_model",
    "run",
    "sample",
    "sampler_options",
]

PROGRESS_ROWS = 16  # samples, the first ones, whose progress is shown


class Drawn(NamedTuple):
    images: np.ndarray  # uint8 [num,H,W,3]
    labels: np.ndarray  # int64 [num]; zeros for an unconditional model
    progress: np.ndarray  # uint8 [rows,F,H,W,3], the predicted x0 at every so many steps


def check(settings: Settings, model: Model) -> Settings:
    """Settings with their defaults filled in; raises InputError for what the model can't do."""
    check_values(settings)
    check_steps(settings, make_process(model.run.process))
    check_guidance(settings, model)
    check_sizes(settings, model)
    conditioner, classes = model.run.model.conditioner, settings.classes
    if conditioner.kind == "none":
        if classes:
            raise InputError("this denoiser is unconditional; leave out --classes and --guidance")
    else:
        classes = classes or tuple(range(conditioner.num_classes))
        bad = [c for c in classes if not 0 <= c < conditioner.num_classes]
        if bad:
            raise InputError(
                f"class {bad[0]} is unknown; this denoiser has classes "
                f"0..{conditioner.num_classes - 1}"
            )
    ways = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    batch = settings.batch_size or -(-min(settings.num, 100) // ways) * ways
    check_batch(batch, model.mesh)
    return dataclasses.replace(settings, classes=classes, batch_size=batch)


def initial_noise(settings: Settings, model: Model) -> dict[str, np.ndarray]:
    """The user's `noise` f32 [num,H,W,C], checked; none when it is drawn from the seed."""
    if not settings.noise:
        return {}
    try:
        noise = np.load(settings.noise, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"noise file {settings.noise} cannot be read: {error}") from error
    if not isinstance(noise, np.ndarray):
        raise InputError(f"noise file {settings.noise} holds several arrays; give one as .npy")
    want = (settings.num, *latent_shape(settings, model))
    if noise.shape != want or noise.dtype.kind != "f":
        raise InputError(
            f"noise file {settings.noise} has shape {noise.shape} and type {noise.dtype}; it must "
            f"hold floats of shape {want}"
        )
    if not np.isfinite(noise).all():
        raise InputError(f"noise file {settings.noise} holds values that are not finite")
    return {"noise": np.asarray(noise, np.float32)}


def sample(model: Model, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [num,H,W,3] and their classes int64 [num] (zeros for an unconditional model)."""
    drawn = draw(model, settings)
    return drawn.images, drawn.labels


def draw(model: Model, settings: Settings) -> Drawn:
    """The samples, a batch at a time over the mesh; every process must call it and gets all."""
    settings = check(settings, model)
    given = initial_noise(settings, model) | read_images(settings, model)
    program, decode = compile_sampler(model, settings), compile_decoder(model)
    weights = weights_of(model)
    numbers = numbers_of(settings, make_process(model.run.process))
    images, progress = [], []
    for rows in _batches(settings, model, given):
        out, frames = program(weights, numbers, rows)
        if frames is not None and len(images) * settings.batch_size < PROGRESS_ROWS:
            at = lambda k: host_array(decode(weights["first_stage"], frames, k))  # noqa: B023, E731
            progress.append(np.stack([at(k) for k in range(frames.shape[1])], axis=1))
        images.append(host_array(out))
    images = np.concatenate(images)[: settings.num]
    shown = np.concatenate(progress) if progress else np.zeros((0, 0, *images.shape[1:]), np.uint8)
    labels = np.asarray(settings.classes or (0,), np.int64)
    labels = labels[np.arange(settings.num) % len(labels)]
    return Drawn(images, labels, shown[: min(settings.num, PROGRESS_ROWS)])


def _batches(
    settings: Settings, model: Model, given: dict[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """The rows that a program is given; those of `given` are taken in turn."""
    sharding = batch_sharding(model.mesh)
    classes = np.asarray(settings.classes or (0,), np.int32)
    for start in range(0, settings.num, settings.batch_size):
        index = np.arange(start, start + settings.batch_size, dtype=np.int32)
        rows = {"index": index, "label": classes[index % len(classes)]}
        rows |= {name: value[index % len(value)] for name, value in given.items()}
        yield {name: jax.device_put(value, sharding) for name, value in rows.items()}


def run(workdir: Path, settings: Settings, out: Path | None = None) -> Path:
    """Writes `OUT.npz` (layout of ADM's evaluator) and a grid `OUT.png`; returns the npz.

    Where asked for, `OUT-progress.png` too: a row for each of the first samples.
    """
    if out is not None:
        out = Path(out).with_suffix("") if Path(out).suffix in (".npz", ".png") else Path(out)
        if out.with_name(f"{out.name}.npz").exists() or out.is_dir():
            raise InputError(f"--out {out} exists; remove it or give another name")
    check_values(settings)
    model = load_model(workdir, settings)
    if out is None:
        out = Path(workdir) / "samples" / f"step{model.step}-{digest(settings)}"
    _check_writable(out)
    drawn = draw(model, settings)
    path = out.with_name(f"{out.name}.npz")
    if jax.process_index() == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_npz(drawn.images, drawn.labels, path)
        columns = grid_columns(settings, drawn.labels)
        save_grid(drawn.images[:400], out.with_name(f"{out.name}.png"), columns=columns)
        if drawn.progress.size:
            frames = drawn.progress.reshape(-1, *drawn.progress.shape[2:])
            progress = out.with_name(f"{out.name}-progress.png")
            save_grid(frames, progress, columns=drawn.progress.shape[1])
        record = dataclasses.asdict(settings) | {"step": model.step, "weights": model.which}
        if model.guide:
            record |= {"guide_workdir": str(model.guide.workdir)}
            record |= {"guide_step": model.guide.step, "guide_weights": model.guide.which}
        write_json(out.with_name(f"{out.name}.json"), record)
    return path


def _check_writable(out: Path) -> None:
    """InputError, before the work, where `out` could not be written after it."""
    there = next(folder for folder in out.absolute().parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(f"--out {out}: nothing can be written in {there}; give another place")


def digest(settings: Settings) -> str:
    """A short name of what was asked for, so that other settings never overwrite a result."""
    text = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    return f"seed{settings.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def grid_columns(settings: Settings, labels: Sequence[int]) -> int:
    """One column a class when classes come in turn; else about square."""
    classes = len(settings.classes) or int(max(labels)) + 1
    return classes if 1 < classes <= 40 else int(np.ceil(np.sqrt(min(len(labels), 400))))
