"""EDM2's learned uncertainty u(t): a linear map of Fourier features, trained beside the denoiser.

Dividing the loss by e^u and adding u makes u(t) the logarithm of the loss at t, so that every noise
level comes to weigh the same (Karras et al., CVPR 2024, eq. 21). No sampler needs it: it is in
`TrainState.extra`, not in the parameters, and has no average.
"""

from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SPAN = np.log(80 / 0.002) / 4
"""What unit time is stretched to: to EDM2's features ln(sigma) / 4 is the time."""


def init(width: int) -> Any:
    """Weights f32 [width], zeros: training starts with the plain loss (EDM2's start at random)."""
    return {"weight": jnp.zeros(width, jnp.float32)}


def axes() -> Any:
    """The tree of `init` with a tuple of logical axis names for each parameter."""
    return {"weight": (None,)}


def apply(params: Any, times: jax.Array) -> jax.Array:
    """u f32 [B] at times [B] in [0, 1] (`process.unit_time`)."""
    frequencies, phases = _features(params["weight"].shape[0])
    angles = SPAN * times.astype(jnp.float32)[:, None] * frequencies[None] + phases[None]
    return jnp.sum(2**0.5 * jnp.cos(angles) * params["weight"][None], axis=-1)


def _features(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and phases f32 [width]: quantiles of the laws that EDM2 draws them from."""
    share = (np.arange(width) + 0.5) / width
    frequencies = 2 * np.pi * np.array([NormalDist().inv_cdf(s) for s in share])
    # Steps of the golden ratio: neighbouring frequencies have unlike phases.
    phases = 2 * np.pi * ((np.arange(width) * (5**0.5 - 1) / 2) % 1)
    return frequencies.astype(np.float32), phases.astype(np.float32)
