"""Where a sampler steps: native times from the noise end to the data, and their coefficients.

All on the host in f64. `make_grid` is given a spacing as NAME or NAME:NUMBER, as "karras:7".
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from ldm_jax.diffusion.noise_levels import shifted
from ldm_jax.diffusion.process import Process, host_coefficients, time_of_ratio
from ldm_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class Grid:
    """S steps, from times[i] to times[i + 1]; a denoiser is never called at the last time.

    -1 stands for the data itself as the end of a discrete process.
    """

    process: Process
    times: np.ndarray  # [S + 1] decreasing; integers where all are timesteps
    alpha: np.ndarray  # [S + 1] f64
    sigma: np.ndarray  # [S + 1] f64

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    @property
    def log_ratio(self) -> np.ndarray:
        """lambda [S + 1] = ln(alpha / sigma), rising; infinite where either is 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    @property
    def scale(self) -> np.ndarray:
        """[S + 1]: in z_t / scale a discrete process is one of unscaled data, as edm is."""
        unscaled = not self.process.discrete or np.any(self.alpha == 0)
        return np.ones_like(self.alpha) if unscaled else self.alpha

    def start(self, noise: jax.Array, z0: jax.Array | None = None) -> jax.Array:
        """The state at times[0] from standard normal noise [B, ...], of data z0 when it is given.

        Without z0 it is the law that sampling starts from: N(0, 1), and for edm N(0, sigma^2).
        """
        if z0 is not None:
            return float(self.alpha[0]) * z0 + float(self.sigma[0]) * noise
        edm = self.process.config.kind == "edm"
        return float(self.sigma[0]) * noise if edm else noise

    def after(self, step: int) -> "Grid":
        """The rest of the grid from step 0..S-1 on, for images noised half way (SDEdit)."""
        if not 0 <= step < self.num_steps:
            raise InputError(f"start step {step} must be in 0..{self.num_steps - 1}")
        return Grid(self.process, self.times[step:], self.alpha[step:], self.sigma[step:])


def uniform_grid(num_timesteps: int, num_steps: int) -> np.ndarray:
    """The timesteps [S] int32 that S = num_steps visit, increasing: floor(i T / S) + 1.

    For S that divides T this is LDM's grid (1, 21, ..., 981 for 50 of 1000), extended to give
    exactly S different timesteps for every S. S = T visits every timestep, 0..T-1. The spacing is
    a leading one: few steps start well below T-1. Raises InputError unless 1 <= S <= T.
    """
    _check_steps(num_timesteps, num_steps)
    if num_steps == num_timesteps:
        return np.arange(num_timesteps, dtype=np.int32)
    return (np.arange(num_steps) * num_timesteps // num_steps + 1).astype(np.int32)


def _check_steps(num_timesteps: int, num_steps: int) -> None:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer):
        raise InputError(f"num_steps {num_steps!r} must be a whole number; try 50")
    most = num_timesteps or np.inf
    if not 1 <= num_steps <= most:
        bounds = f"between 1 and the schedule's {num_timesteps} timesteps"
        raise InputError(
            f"num_steps {num_steps} must lie {bounds if num_timesteps else 'above 0'}; "
            f"nearest: {min(max(num_steps, 1), most)}"
        )


def leading(process: Process, num_steps: int, _: float) -> Grid:
    """`uniform_grid`. Like LDM's it ends at alpha_bar_0, not on data, unless S is T."""
    return _timesteps(process, uniform_grid(process.num_timesteps, num_steps))


def quad(process: Process, num_steps: int, _: float) -> Grid:
    """LDM's quadratic timesteps, up to 0.8 T, its repetitions moved apart; ends at alpha_bar_0."""
    root = np.linspace(0, (0.8 * process.num_timesteps) ** 0.5, num_steps)
    t = (root**2).astype(np.int32) + 1
    index = np.arange(num_steps)
    t = np.maximum.accumulate(t - index) + index
    if t[-1] >= process.num_timesteps:
        raise InputError(f"num_steps {num_steps} is too many for spacing 'quad'; use 'leading'")
    return _timesteps(process, t)


def trailing(process: Process, num_steps: int, _: float) -> Grid:
    """T-1 and then every T / S-th timestep before it; ends on data (Lin et al. 2023, table 2)."""
    total = process.num_timesteps
    t = np.round(total * (1 + np.arange(num_steps)) / num_steps).astype(np.int32) - 1
    return _timesteps(process, t, to_data=True)


def linspace(process: Process, num_steps: int, _: float) -> Grid:
    """Both ends 0 and T-1 and evenly between them, then data; one step takes T-1."""
    last = process.num_timesteps - 1
    t = np.round(np.linspace(last, 0, num_steps)).astype(np.int32)[::-1]
    return _timesteps(process, t, to_data=True)


def _timesteps(process: Process, t: np.ndarray, to_data: bool = False) -> Grid:
    """The grid that visits increasing timesteps t [S] from the last, and ends on one or data."""
    alpha_bar = process.alpha_bar[t]
    # A grid that begins at 1 leaves alpha_bar_0 to end on; one that visits 0 has only data left.
    to_data = to_data or t[0] == 0
    alpha_bar = np.concatenate([[1.0 if to_data else process.alpha_bar[0]], alpha_bar])[::-1]
    times = np.concatenate([[-1 if to_data else 0], t])[::-1].astype(np.int32)
    return Grid(process, times, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))


def karras(process: Process, num_steps: int, rho: float) -> Grid:
    """(sigma / alpha)^(1 / rho) evenly from one end to the other, then data (EDM eq. 5)."""
    high, low = (end ** (1 / rho) for end in _ratios(process, "karras"))
    return _by_ratio(process, np.linspace(high, low, num_steps) ** rho)


def exponential(process: Process, num_steps: int, _: float) -> Grid:
    """ln(sigma / alpha) evenly from one end to the other, then data."""
    high, low = (np.log(end) for end in _ratios(process, "exponential"))
    return _by_ratio(process, np.exp(np.linspace(high, low, num_steps)))


def _ratios(process: Process, spacing: str) -> tuple[float, float]:
    """sigma / alpha at the noise end and at the data end."""
    if process.ends_on_noise:
        raise InputError(
            f"spacing {spacing!r} needs a finite sigma / alpha at the noise end, which this "
            f"{process.config.kind!r} process lacks; use "
            f"{'trailing' if process.discrete else 'uniform'!r}"
        )
    if process.discrete:
        ratio = process.sigma / process.alpha
        return ratio[-1], ratio[0]
    return process.config.sigma_max, process.config.sigma_min


def _by_ratio(process: Process, ratio: np.ndarray) -> Grid:
    times = np.append(time_of_ratio(process, ratio), -1 if process.discrete else 0)
    if not process.discrete:
        return Grid(process, times, *host_coefficients(process, times))
    alpha = np.append((1 + ratio**2) ** -0.5, 1)
    return Grid(process, times, alpha, np.append(ratio, 0) * alpha)


def uniform(process: Process, num_steps: int, _: float) -> Grid:
    """Even in t, from 1 (edm: sigma_max) to data."""
    high = process.config.sigma_max if process.config.kind == "edm" else 1.0
    return _continuous(process, np.linspace(high, 0, num_steps + 1))


def shifted_uniform(process: Process, num_steps: int, shift: float) -> Grid:
    """Even in u, t = a u / (1 + (a - 1) u): for larger latents a > 1, more steps near noise."""
    _check_unit_time(process, "shifted")
    return _continuous(process, np.asarray(shifted(np.linspace(1, 0, num_steps + 1), shift)))


def last_step(process: Process, num_steps: int, size: float) -> Grid:
    """Even in t from 1 to `size`, and from there one step to data: SiT's grid for its SDE."""
    _check_unit_time(process, "last_step")
    t = np.linspace(1, size, num_steps) if num_steps > 1 else np.ones(1)
    return _continuous(process, np.append(t, 0))


def _check_unit_time(process: Process, spacing: str) -> None:
    if process.config.kind == "edm":
        raise InputError(f"spacing {spacing!r} is for t in [0, 1], not for 'edm'; use 'karras'")


def _continuous(process: Process, times: np.ndarray) -> Grid:
    return Grid(process, times, *host_coefficients(process, times))


Spacing = Callable[[Process, int, float], Grid]
DISCRETE: dict[str, Spacing] = {
    "leading": leading,
    "trailing": trailing,
    "quad": quad,
    "linspace": linspace,
    "karras": karras,
    "exponential": exponential,
}
CONTINUOUS: dict[str, Spacing] = {
    "uniform": uniform,
    "shifted": shifted_uniform,
    "last_step": last_step,
    "karras": karras,
    "exponential": exponential,
}
NUMBERS = {"karras": 7.0, "shifted": 3.0, "last_step": 0.04}  # what NAME alone stands for


def default_spacing(process: Process) -> str:
    """LDM's for timesteps, EDM's for sigmas, even steps for t in [0, 1]."""
    if process.discrete:
        return "leading"
    return "karras" if process.config.kind == "edm" else "uniform"


def make_grid(process: Process, num_steps: int, spacing: str = "auto") -> Grid:
    """The grid of S = num_steps steps; raises InputError for what the process has no grid of."""
    name, colon, text = spacing.partition(":")
    name = default_spacing(process) if spacing == "auto" else name
    known = DISCRETE if process.discrete else CONTINUOUS
    if name not in known:
        raise InputError(
            f"spacing {spacing!r} is not one of a {process.config.kind!r} process; choose one of "
            f"{list(known)}"
        )
    try:
        number = float(text) if colon else NUMBERS.get(name, 1.0)
    except ValueError:
        number = np.nan
    if (colon and name not in NUMBERS) or not 0 < number < np.inf:
        raise InputError(
            f"spacing {spacing!r} must be a name, or one of {sorted(NUMBERS)} with a positive "
            "number as karras:7"
        )
    if name == "last_step" and number >= 1:
        raise InputError(f"spacing {spacing!r}: the last step must be shorter than 1; SiT: 0.04")
    _check_steps(process.num_timesteps, num_steps)
    return known[name](process, num_steps, number)
