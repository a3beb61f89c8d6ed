"""The samples of a denoiser, a batch at a time over the mesh."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.diffusion.process import make_process
from ldm_jax.errors import InputError
from ldm_jax.models import conditions
from ldm_jax.runs.denoiser import Model
from ldm_jax.sampling.guidance import check_guidance
from ldm_jax.sampling.inputs import check_sizes, latent_shape, read_images
from ldm_jax.sampling.options import SampleOptions, check_values
from ldm_jax.sampling.program import (
    check_steps,
    compile_decoder,
    compile_sampler,
    numbers_of,
    weights_of,
)
from ldm_jax.sharding import batch_sharding, check_batch, host_array

PROGRESS_ROWS = 16  # samples, the first ones, whose progress is shown


class Drawn(NamedTuple):
    images: np.ndarray  # uint8 [num,H,W,3]
    labels: np.ndarray  # int64 [num]; zeros for an unconditional model
    progress: np.ndarray  # uint8 [rows,F,H,W,3], the predicted x0 at every so many steps


def check_options(settings: SampleOptions, model: Model) -> SampleOptions:
    """The options with their defaults filled in; raises InputError for what the model can't do."""
    check_values(settings)
    check_steps(settings, make_process(model.run.process))
    check_guidance(settings, model)
    check_sizes(settings, model)
    count, classes = conditions.num_classes(model.run.model.conditions), settings.classes
    if not count:
        if classes:
            raise InputError("this denoiser is unconditional; leave out --classes and --guidance")
    else:
        classes = classes or tuple(range(count))
        bad = [c for c in classes if not 0 <= c < count]
        if bad:
            raise InputError(f"class {bad[0]} is unknown; this denoiser has classes 0..{count - 1}")
    ways = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    batch = settings.batch_size or -(-min(settings.num, 100) // ways) * ways
    check_batch(batch, model.mesh)
    return dataclasses.replace(settings, classes=classes, batch_size=batch)


def initial_noise(settings: SampleOptions, model: Model) -> dict[str, np.ndarray]:
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


def draw_images(model: Model, settings: SampleOptions) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [num,H,W,3] and their classes int64 [num] (zeros for an unconditional model)."""
    drawn = draw_samples(model, settings)
    return drawn.images, drawn.labels


def draw_samples(model: Model, settings: SampleOptions) -> Drawn:
    """The samples, a batch at a time over the mesh; every process must call it and gets all."""
    settings = check_options(settings, model)
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
    settings: SampleOptions, model: Model, given: dict[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """The rows that a program is given; those of `given` are taken in turn."""
    sharding = batch_sharding(model.mesh)
    classes = np.asarray(settings.classes or (0,), np.int32)
    for start in range(0, settings.num, settings.batch_size):
        index = np.arange(start, start + settings.batch_size, dtype=np.int32)
        rows = {"index": index, "label": classes[index % len(classes)]}
        rows |= {name: value[index % len(value)] for name, value in given.items()}
        yield {name: jax.device_put(value, sharding) for name, value in rows.items()}
