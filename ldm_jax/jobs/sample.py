"""`ldm sample`: a trained denoiser and its first stage to images."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.eval.images_out import save_grid, save_npz
from ldm_jax.files import digest_json, write_json
from ldm_jax.runs.denoiser import load_model
from ldm_jax.sampling.draw import draw_samples
from ldm_jax.sampling.options import SampleOptions, check_values


def run(workdir: Path, options: SampleOptions, out: Path | None = None) -> Path:
    """Writes `OUT.npz` (layout of ADM's evaluator) and a grid `OUT.png`; returns the npz.

    Where asked for, `OUT-progress.png` too: a row for each of the first samples.
    """
    if out is not None:
        out = Path(out).with_suffix("") if Path(out).suffix in (".npz", ".png") else Path(out)
        if out.with_name(f"{out.name}.npz").exists() or out.is_dir():
            raise InputError(f"--out {out} exists; remove it or give another name")
    check_values(options)
    model = load_model(workdir, options.which)
    if out is None:
        out = Path(workdir) / "samples" / f"step{model.step}-{digest(options)}"
    _check_writable(out)
    drawn = draw_samples(model, options)
    path = out.with_name(f"{out.name}.npz")
    if jax.process_index() == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_npz(drawn.images, drawn.labels, path)
        columns = grid_columns(options, drawn.labels)
        save_grid(drawn.images[:400], out.with_name(f"{out.name}.png"), columns=columns)
        if drawn.progress.size:
            frames = drawn.progress.reshape(-1, *drawn.progress.shape[2:])
            progress = out.with_name(f"{out.name}-progress.png")
            save_grid(frames, progress, columns=drawn.progress.shape[1])
        record = dataclasses.asdict(options) | {"step": model.step, "weights": model.which}
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


def digest(options: SampleOptions) -> str:
    """A short name of what was asked for, so that other options never overwrite a result."""
    return f"seed{options.seed}-{digest_json(dataclasses.asdict(options))[:8]}"


def grid_columns(options: SampleOptions, labels: Sequence[int]) -> int:
    """One column a class when classes come in turn; else about square."""
    classes = len(options.classes) or int(max(labels)) + 1
    return classes if 1 < classes <= 40 else int(np.ceil(np.sqrt(min(len(labels), 400))))
