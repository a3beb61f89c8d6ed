"""How close decoded images are to their originals, and how sharp: f64 per image, on the host."""

import numpy as np

from ldm_jax.errors import InputError

CAP = 100.0  # dB, of identical images too, so that a mean over images stays finite
WINDOW, SIGMA = 11, 1.5  # pixels
K1, K2, PEAK = 0.01, 0.03, 255.0


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, f64 [B], of uint8 images [B,H,W,3]; at most 100.

    The mean of these per-image figures is larger than the PSNR of the pooled error; report it as
    "mean per image". Raises InputError unless both arrays are uint8 and of one shape.
    """
    a, b = _pair(a, b)
    mse = np.square(a - b).mean((1, 2, 3))
    return 10 * np.log10(PEAK**2 / np.maximum(mse, PEAK**2 / 10 ** (CAP / 10)))


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity, f64 [B], of uint8 images [B,H,W,3].

    Gaussian window, population covariance, on each of R, G and B, then the mean over them and over
    the pixels whose whole window lies in the image. Raises InputError as `psnr` does and for images
    smaller than the window. Wang et al., IEEE Trans. Image Processing 13 (2004), eq. 13-16.
    """
    a, b = _pair(a, b)
    if min(a.shape[1:3]) < WINDOW:
        raise InputError(f"images of {a.shape[1:3]} pixels: SSIM needs at least {WINDOW} a side")
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a * mean_a
    variance_b = _blur(b * b) - mean_b * mean_b
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    )
    return similarity.mean((1, 2, 3))


def gradient_magnitude(images: np.ndarray) -> np.ndarray:
    """Mean length of the gradient in grey values per pixel, f64 [B], of uint8 images [B,H,W,3].

    Forward differences of each of R, G and B at the pixels that have both neighbours, then the mean
    over pixels and channels. Divided by that of the originals it measures blur: 1 is as sharp, less
    is blurred; noise counts as sharp. Raises InputError for other arrays and below 2 pixels a side.
    """
    x = np.asarray(images)
    if x.dtype != np.uint8 or x.ndim != 4 or min(x.shape[1:3]) < 2:
        raise InputError(
            f"images {x.dtype} {x.shape}: a gradient needs uint8 [B,H,W,3] of at least 2 pixels a "
            "side; round to uint8 first"
        )
    x = x.astype(np.float64)
    down = x[:, 1:, :-1] - x[:, :-1, :-1]
    right = x[:, :-1, 1:] - x[:, :-1, :-1]
    return np.hypot(down, right).mean((1, 2, 3))


def _blur(x):
    """Gaussian mean over each whole window, [B,H,W,3] -> [B,H-10,W-10,3]."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (1, 2):
        size = x.shape[axis] - WINDOW + 1
        shifted = (x.take(range(i, i + size), axis) for i in range(WINDOW))
        x = sum(w * part for w, part in zip(weights, shifted, strict=True))
    return x


def _pair(a, b):
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.ndim != 4 or a.shape != b.shape:
        raise InputError(
            f"images {a.dtype} {a.shape} and {b.dtype} {b.shape}: both must be uint8 [B,H,W,3] of "
            "one shape; round to uint8 first"
        )
    return a.astype(np.float64), b.astype(np.float64)
