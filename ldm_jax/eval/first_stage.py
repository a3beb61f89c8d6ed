"""What a first stage's reconstructions are measured by, over any number of images."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.eval import reconstruction

Pictures = np.ndarray  # uint8 [B,H,W,3]
Lpips = Callable[[Pictures, Pictures], np.ndarray]  # (originals, reconstructions) -> [B]


def measure(
    reconstruct: Callable[[Pictures], Pictures],
    batches: Iterable[Pictures],
    *,
    lpips: Lpips | None = None,
) -> dict[str, float]:
    """Figures of the reconstructions of `batches`, uint8 [B,H,W,3] each, one batch at a time.

    `psnr_db`, its standard deviation `psnr_db_std` and `ssim` (of images of at least 11 pixels a
    side) are means over the images; `sharpness` is the mean gradient magnitude of all
    reconstructions over that of all originals, 1 = as sharp, nan for flat originals. With `lpips`
    its mean. `num_images` is what they are of. Raises InputError without any image.
    """
    parts = []
    for pictures in batches:
        parts.append(per_image(pictures, reconstruct(pictures), lpips))
    return summary(parts)


def per_image(
    pictures: Pictures, rebuilt: Pictures, lpips: Lpips | None = None
) -> dict[str, np.ndarray]:
    """What `summary` makes figures of, f64 [B] each, of one batch and its reconstructions."""
    rows = {
        "psnr_db": reconstruction.psnr(pictures, rebuilt),
        "slope": reconstruction.gradient_magnitude(pictures),
        "rebuilt_slope": reconstruction.gradient_magnitude(rebuilt),
    }
    if min(pictures.shape[1:3]) >= reconstruction.WINDOW:
        # One at a time they stay in the processor's cache: a third of the time at 256 pixels.
        pairs = zip(pictures[:, None], rebuilt[:, None], strict=True)
        rows["ssim"] = np.concatenate([reconstruction.ssim(a, b) for a, b in pairs])
    if lpips:
        rows["lpips"] = np.asarray(lpips(pictures, rebuilt), np.float64)
    return rows


def summary(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """The figures of `measure` from what `per_image` gave, batch by batch."""
    if not parts:
        raise InputError("there are no images to measure reconstructions on; give at least one")
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    slope, rebuilt_slope = columns.pop("slope").mean(), columns.pop("rebuilt_slope").mean()
    figures = {name: float(values.mean()) for name, values in columns.items()}
    figures["psnr_db_std"] = float(columns["psnr_db"].std())
    figures["sharpness"] = float(rebuilt_slope / slope) if slope else float("nan")
    return figures | {"num_images": float(len(columns["psnr_db"]))}
