"""`ldm reconstruct`: a folder of images through a first stage, to look at and to measure."""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import numpy as np

from ldm_jax.data import pixels
from ldm_jax.data.folder import image_files, read_image
from ldm_jax.errors import InputError, divides, within
from ldm_jax.eval.images_out import png_bytes, save_grid
from ldm_jax.eval.reconstruction import WINDOW, psnr, ssim
from ldm_jax.files import write_bytes, write_json
from ldm_jax.options import option
from ldm_jax.runs.first_stage import load_first_stage
from ldm_jax.runs.reconstruction import compile_reconstruction
from ldm_jax.sharding import MeshConfig, make_mesh

GRID, RECORD = "grid.png", "reconstruction.json"
SHOWN = 32  # pairs in the grid, four to a row


@dataclasses.dataclass(frozen=True)
class ReconstructOptions:
    size: int = option(0, "pixels a side (default: the model's resolution)", metavar="PIXELS")
    batch_size: int = option(
        0, "images at a time over all devices (default: 8 for each)", metavar="N"
    )


def run(
    workdir: Path, images: str, out: Path, options: ReconstructOptions = ReconstructOptions()
) -> dict:
    """Writes OUT/NAME.png for each image, OUT/grid.png and OUT/reconstruction.json, given back.

    Images are resized and centre-cropped as the run's held-out ones are, whatever their folders.
    OUT appears when it is whole. Raises InputError for an OUT that holds anything or lies inside
    the folder of the images, and for a size that the model's downsampling does not divide.
    """
    within("--batch-size", options.batch_size, "[0, inf)", "0 is 8 for each device")
    out = Path(out).resolve()
    _check_place(images, out)
    targets = _targets(images)
    mesh = make_mesh(MeshConfig())
    first_stage = load_first_stage(workdir, mesh)
    size = options.size or first_stage.config.resolution
    divides("--size", size, first_stage.config.factor, "the model's downsampling factor")
    batch_size = min(options.batch_size or 8 * mesh.devices.size, len(targets))
    forward = compile_reconstruction(first_stage.config, mesh, batch_size)
    kernel = first_stage.run.images.kernel
    is_main = jax.process_index() == 0
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    rows: dict[str, dict[str, float]] = {}
    pairs: list[np.ndarray] = []
    names = list(targets)
    try:
        for start in range(0, len(names), batch_size):
            chunk = names[start : start + batch_size]
            originals = np.stack(
                [np.asarray(pixels.square(read_image(images, n), size, kernel)) for n in chunk]
            )
            rebuilt = forward(first_stage.params, originals)
            if not is_main:
                continue
            for name, original, picture in zip(chunk, originals, rebuilt, strict=True):
                write_bytes(part / targets[name], png_bytes(picture))
                rows[name] = _figures(original[None], picture[None])
                if len(pairs) < 2 * SHOWN:
                    pairs += [original, picture]
        record = {
            "first_stage": str(workdir),
            "step": first_stage.step,
            "encoder_hash": first_stage.encoder_hash,
            "size": size,
            "kernel": kernel,
            "images": rows,
        }
        if is_main:
            keys = next(iter(rows.values()))
            record["mean"] = {k: float(np.mean([r[k] for r in rows.values()])) for k in keys}
            save_grid(np.stack(pairs), part / GRID, columns=8)
            write_json(part / RECORD, record)
            os.replace(part, out)
            for name, value in record["mean"].items():
                print(f"{name:32s} {value:.4f}")
            print(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return record


def _figures(original: np.ndarray, rebuilt: np.ndarray) -> dict[str, float]:
    figures = {"psnr_db": float(psnr(original, rebuilt)[0])}
    if min(original.shape[1:3]) >= WINDOW:
        figures["ssim"] = float(ssim(original, rebuilt)[0])
    return figures


def _check_place(images: str, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"--out {out} exists and is no empty folder; give a new one, so that nothing in it is "
            "overwritten"
        )
    if "://" not in images and out.is_relative_to(Path(images).resolve()):
        raise InputError(
            f"--out {out} lies inside --images {images}: the results would become images of the "
            "next run; give a folder elsewhere"
        )


def _targets(images: str) -> dict[str, str]:
    """Name -> name of its PNG, both relative, sorted by name."""
    targets: dict[str, str] = {}
    taken = {GRID: "the grid"}
    for name in image_files(images):
        target = f"{name.rpartition('.')[0]}.png"
        if target in taken:
            raise InputError(
                f"--images {images}: {name} and {taken[target]} would both become {target}; rename "
                "or move one of them"
            )
        taken[target] = name
        targets[name] = target
    return targets
