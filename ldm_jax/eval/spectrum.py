"""How much power images hold at each spatial frequency: f64, on the host."""

import dataclasses

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.eval.images_out import check_images

CUT = 0.25  # cycles/pixel: a quarter of the sampling frequency, half of Nyquist's
BLOCK = 64  # images that are transformed at a time
ROUNDING = 1 / 12  # variance of rounding to grey values


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The radial power spectrum of a set of uint8 images, the mean over R, G and B; no window.

    A mode's power is |F|^2 / (HW)^2, so that all of an image add up to its mean square; its own
    mean, the mode at 0, is left out. A ring of frequencies is 1 / min(H, W) wide.
    """

    frequency: np.ndarray  # [F] in cycles/pixel, the middle of each ring; up to sqrt(1/2)
    power: np.ndarray  # [F] in squared grey values, the mean over the modes of a ring and images
    modes: np.ndarray  # [F] int64, how many a ring has; their powers add up to the variance
    num: int  # images

    @classmethod
    def of(cls, images: np.ndarray) -> "Spectrum":
        """Of uint8 [N,H,W,3]; raises InputError for other arrays, and for none or single pixels."""
        images = check_images(images)
        n, h, w, _ = images.shape
        if n < 1 or min(h, w) < 2:
            raise InputError(
                f"a spectrum of {n} images of {h} x {w} pixels: give 1 of 2 x 2 or more"
            )
        power = np.zeros((h, w // 2 + 1))
        for start in range(0, n, BLOCK):
            # Channels ahead of the pixels: each transform then runs over neighbouring values.
            block = np.moveaxis(images[start : start + BLOCK], -1, 1).astype(np.float64)
            power += np.square(np.abs(np.fft.rfft2(block))).mean(1).sum(0)
        power /= n * (h * w) ** 2.0
        # Of a real image, the columns between 0 and Nyquist stand for their mirror images too.
        twice = np.where((np.arange(w // 2 + 1) % w * 2 % w > 0), 2, 1)
        count = np.broadcast_to(twice[None], power.shape).copy()
        count[0, 0] = 0
        radius = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :])
        ring = np.maximum(np.rint(radius * min(h, w)).astype(int), 1)
        modes = np.bincount(ring.ravel(), count.ravel())[1:]
        total = np.bincount(ring.ravel(), (count * power).ravel())[1:]
        frequency = np.arange(1, len(modes) + 1) / min(h, w)
        return cls(frequency, total / modes, modes.astype(np.int64), n)

    def merge(self, other: "Spectrum") -> "Spectrum":
        """That of both sets together; raises InputError for images of another size."""
        self._check(other)
        num = self.num + other.num
        power = (self.num * self.power + other.num * other.power) / num
        return dataclasses.replace(self, power=power, num=num)

    def distance(self, reals: "Spectrum") -> float:
        """Mean |ln(power / that of the reals)| over the rings, 0 = the same spectrum.

        What lies below the noise of rounding to grey values counts as that. Raises InputError for
        images of another size.
        """
        self._check(reals)
        least = ROUNDING / (self.modes.sum() + 1)
        ours, theirs = (np.maximum(s.power, least) for s in (self, reals))
        return float(np.abs(np.log(ours / theirs)).mean())

    def _check(self, other):
        if not np.array_equal(self.modes, other.modes):
            raise InputError(
                f"spectra of {self.modes.sum() + 1} and {other.modes.sum() + 1} pixels an image: "
                "the rule is images of one size; resize them first"
            )


def high_frequency_power(spectrum: Spectrum, cut: float = CUT) -> float:
    """The variance, in squared grey values, that lies in rings above `cut` cycles/pixel.

    Divided by that of the originals: below 1 is blur, above it noise.
    """
    high = spectrum.frequency > cut
    return float((spectrum.modes * spectrum.power)[high].sum())
