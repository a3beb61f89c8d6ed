"""Samples of a denoiser as images to judge: drawn when they are measured, written only if asked."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.diffusion.process import make_process
from ldm_jax.errors import InputError, choose, within
from ldm_jax.eval.image_sets import ImageStream, open_split
from ldm_jax.eval.images_out import png_bytes
from ldm_jax.eval.judge import JudgeOptions
from ldm_jax.eval.statistics import local_rows, pad_rows
from ldm_jax.keys import example_keys, key_for
from ldm_jax.runs.denoiser import Model
from ldm_jax.runs.first_stage import FirstStage, tree_hash
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sampling.draw import check_options
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sampling.program import compile_sampler, numbers_of, weights_of
from ldm_jax.sharding import process_slice, put_batch

# What of the settings does not belong to the protocol: how many at a time, and which weights.
APART = ("num", "batch_size", "step", "weights")
LABELS = ("balanced", "random")  # how classes are chosen
CHUNK = 4096  # labels drawn at a time: one compilation, whatever the number of samples

Draw = Callable[[Model, Path | None], ImageStream]


def compile_samples(model: Model, settings: SampleOptions, labels: str) -> Draw:
    """draw(model, keep) -> `settings.num` samples of this model with any weights, as images.

    Sample i depends on its index and the settings alone. `labels` is "balanced" or "random", over
    `settings.classes` or all. Every process must call `draw`. With `keep`, a folder, each is
    written there too, as INDEX.png. Raises InputError for what the model cannot do.
    """
    settings = check_options(settings, model)
    for name in ("noise", "init_images"):
        if getattr(settings, name):
            raise InputError(f"{name} {getattr(settings, name)!r} is of `ldm sample`; leave it out")
    size = settings.batch_size
    rows = size // process_slice(size, model.mesh)[1]
    label_of, program = label_table(settings, labels), compile_sampler(model, settings)
    numbers = numbers_of(settings, make_process(model.run.process))

    def draw(model: Model, keep: Path | None) -> ImageStream:
        weights = weights_of(model)

        def read(indices: np.ndarray) -> np.ndarray:
            index = pad_rows(np.asarray(indices, np.int32), rows)
            given = {"index": index, "label": label_of(index).astype(np.int32)}
            drawn, _ = program(weights, numbers, put_batch(given, model.mesh, size))
            pictures = local_rows(drawn)[: len(indices)]
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                for i, picture in zip(indices, pictures, strict=True):
                    (keep / f"{i:06d}.png").write_bytes(png_bytes(picture))
            return pictures

        made_by = f"{model.which} of step {model.step}, weights {tree_hash(weights)[:16]}"
        return ImageStream(settings.num, lambda rows: read, "samples", made_by, rows, keep)

    return draw


def label_table(settings: SampleOptions, kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """indices [n] -> classes int64 [n], of those that checked settings name; zeros where none."""
    classes = np.asarray(settings.classes or (0,), np.int64)
    choose("labels", kind, LABELS)
    return lambda index: classes[class_labels(kind, settings.seed, index, len(classes))]


def class_labels(kind: str, seed: int, indices: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [n] in [0, num_classes): the classes of the samples `indices` [n].

    "balanced": the classes in turn, so that any run of them has each equally often, give or take
    one. "random": uniform and independent. The two differ by about 0.1 FID on ImageNet.
    """
    choose("labels", kind, LABELS)
    within("num_classes", num_classes, "[1, inf)")
    indices = np.asarray(indices, np.int64)
    if kind == "balanced":
        return indices % num_classes
    labels = [np.zeros(0, np.int64)]
    for start in range(0, len(indices), CHUNK):
        part = indices[start : start + CHUNK]
        padded = np.pad(part, (0, CHUNK - len(part)))
        drawn = _draw_labels(seed, padded.astype(np.uint32), num_classes)
        labels.append(np.asarray(drawn, np.int64)[: len(part)])
    return np.concatenate(labels)


@jax.jit
def _draw_labels(seed, indices, num_classes):
    keys = example_keys(key_for(seed, "evaluation_labels"), indices)
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_classes))(keys)


def labels_kind(run: DenoiserRun, labels: str) -> str:
    """What the protocol says of the labels."""
    return labels if run.model.conditions else "none"


def sampling(settings: SampleOptions, model: Model) -> dict[str, Any]:
    """What of the sampling the protocol names: everything that changes a sample but the weights."""
    default = SampleOptions()
    how = {
        name: value
        for name, value in dataclasses.asdict(settings).items()
        if name not in APART and value != getattr(default, name)
    }
    basic = {name: getattr(settings, name) for name in ("sampler", "steps", "guidance", "seed")}
    if model.guide:  # which the settings may leave to what is newest
        how |= {"guide_step": model.guide.step, "guide_weights": model.guide.which}
    return {**how, **basic, "weights": model.which}


def reference_of(judge: JudgeOptions, first_stage: FirstStage) -> ImageStream | None:
    """What samples are held against where no reference is named: what the first stage has seen.

    As it saw them but for crops and flips. None, with nothing opened, where one is named.
    """
    return None if judge.reference else open_split(first_stage.run.images, "train")
