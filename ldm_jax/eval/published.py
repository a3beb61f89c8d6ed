"""The figures that Latent Diffusion Models were published with, to print beside ours."""

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

from ldm_jax.errors import InputError


class Row(NamedTuple):
    """One line of a published table; nothing here was measured by this project."""

    task: str
    dataset: str
    model: str
    guidance: float | None  # 1 = none, None = not stated
    guided_by: str
    sampler: str  # "" = not stated
    steps: int  # 0 = not stated
    eta: float | None  # None = not stated
    num: int  # samples; 0 = not stated
    reference: str  # what the samples were compared with; "" = not stated
    params_millions: float  # 0 = not stated
    figures: Mapping[str, float]
    std: Mapping[str, float]  # as printed: over images, of IS over its splits
    source: str  # with the number of the table
    note: str


def lookup(dataset: str, task: str) -> list[Row]:
    """The rows of one data set and task, in the order of the tables; empty where there are none.

    Raises InputError for a task that no row has.
    """
    tasks = sorted({row.task for row in _rows()})
    if task not in tasks:
        raise InputError(f"published figures of task {task!r}: there are those of {tasks}")
    return [row for row in _rows() if (row.dataset, row.task) == (dataset, task)]


def datasets(task: str) -> list[str]:
    """The data sets that there are figures of a task for."""
    return sorted({row.dataset for row in _rows() if row.task == task})


def describe(row: Row) -> str:
    """One line for a table of results, marked as published."""
    parts = [f"{row.sampler} {row.steps}".strip() if row.steps else row.sampler]
    parts += [f"guidance {row.guidance:g}"] if row.guidance not in (1, None) else []
    parts += [f"{row.num} samples"] if row.num else []
    values = (
        f"{name} {value:g}{f' ± {row.std[name]:g}' if name in row.std else ''}"
        for name, value in row.figures.items()
    )
    sampling = f" ({', '.join(filter(None, parts))})" if any(parts) else ""
    return f"published: {row.model}{sampling}: {', '.join(values)} [{row.source}]"


@functools.cache
def _rows() -> tuple[Row, ...]:
    text = resources.files("ldm_jax.eval").joinpath("published.json").read_text(encoding="utf-8")
    content: list[dict[str, Any]] = json.loads(text)
    return tuple(Row(**row) for row in content)
