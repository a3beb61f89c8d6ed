"""The samples of a denoiser, a batch at a time over the mesh."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.diffusion.process import make_process
from ldm_jax.runs.denoiser import Model
from ldm_jax.sampling.inputs import (
    check_sizes,
    checked_classes,
    initial_noise,
    label_table,
    read_images,
    sample_rows,
)
from ldm_jax.sampling.options import SampleOptions, check_values
from ldm_jax.sampling.program import (
    check_decode,
    check_guidance,
    check_steps,
    compile_decoder,
    compile_sampler,
    numbers_of,
    weights_of,
)
from ldm_jax.sharding import batch_sharding, check_batch, fitting_batch, host_array

Fields = Mapping[str, np.ndarray]
NO_FIELDS: Fields = MappingProxyType({})
PROGRESS_ROWS = 16  # samples, the first ones, whose progress is shown


class Drawn(NamedTuple):
    images: np.ndarray  # uint8 [num,H,W,3]
    labels: np.ndarray  # int64 [num]; zeros for an unconditional model
    progress: np.ndarray  # uint8 [rows,F,H,W,3], the predicted x0 at every so many steps


Draw = Callable[[Model], Drawn]


def check_options(options: SampleOptions, model: Model) -> SampleOptions:
    """The options with their defaults filled in; raises InputError for what the model can't do."""
    check_values(options)
    check_steps(options, make_process(model.run.process))
    check_guidance(options, model)
    check_decode(options, model)
    check_sizes(options, model)
    classes = checked_classes(options, model.run)
    batch = options.batch_size or fitting_batch(min(options.num, 100), model.mesh)
    check_batch(batch, model.mesh)
    return dataclasses.replace(options, classes=classes, batch_size=batch)


def draw_images(
    model: Model, options: SampleOptions, fields: Fields = NO_FIELDS
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [num,H,W,3] and their classes int64 [num] (zeros for an unconditional model)."""
    drawn = draw_samples(model, options, fields)
    return drawn.images, drawn.labels


def draw_samples(model: Model, options: SampleOptions, fields: Fields = NO_FIELDS) -> Drawn:
    """The samples, a batch at a time over the mesh; every process must call it and gets all.

    `fields` are what its conditions read beside the class, by name, [N, ...]: sample i takes row
    i % N.
    """
    return compile_draw(model, options, fields)(model)


def compile_draw(model: Model, options: SampleOptions, fields: Fields = NO_FIELDS) -> Draw:
    """draw(model) -> the samples of this model with any weights; see `draw_samples`."""
    options = check_options(options, model)
    starts = initial_noise(options, model) | read_images(options, model)
    program, decode = compile_sampler(model, options), compile_decoder(model, options)
    numbers = numbers_of(options, make_process(model.run.process))

    def draw(model: Model) -> Drawn:
        weights, images, progress = weights_of(model), [], []
        for rows in _batches(options, model, starts, fields):
            out, frames = program(weights, numbers, rows)
            if frames is not None and len(images) * options.batch_size < PROGRESS_ROWS:
                shown = [
                    host_array(decode(weights, numbers, rows, frames, k))
                    for k in range(frames.shape[1])
                ]
                progress.append(np.stack(shown, axis=1))
            images.append(host_array(out))
        images = np.concatenate(images)[: options.num]
        nothing = np.zeros((0, 0, *images.shape[1:]), np.uint8)
        shown = np.concatenate(progress) if progress else nothing
        labels = label_table(options)(np.arange(options.num))
        return Drawn(images, labels, shown[: min(options.num, PROGRESS_ROWS)])

    return draw


def _batches(
    options: SampleOptions, model: Model, starts: dict[str, np.ndarray], fields: Fields
) -> Iterator[dict[str, Any]]:
    """The rows that a program is given; those of `starts` are taken in turn."""
    sharding, labels = batch_sharding(model.mesh), label_table(options)
    for start in range(0, options.num, options.batch_size):
        index = np.arange(start, start + options.batch_size)
        rows = sample_rows(model.run, index, labels(index), fields)
        rows |= {name: value[index % len(value)] for name, value in starts.items()}
        yield {name: jax.device_put(value, sharding) for name, value in rows.items()}
