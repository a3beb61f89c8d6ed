"""Where a sampler steps: native times from the noise end to the data, and their coefficients.

All on the host in f64. `make_grid` takes a spacing as NAME or NAME:NUMBER, as "karras:7".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ldm_jax.diffusion.noise_levels import shifted
from ldm_jax.diffusion.process import PathProcess, Process, SigmaProcess, TableProcess
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
    def starts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(t, alpha, sigma), each [S], where the steps begin."""
        return self.times[:-1], self.alpha[:-1], self.sigma[:-1]

    @property
    def log_ratio(self) -> np.ndarray:
        """lambda [S + 1] = ln(alpha / sigma), rising; infinite where either is 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    @property
    def scale(self) -> np.ndarray:
        """[S + 1]: in z_t / scale a discrete process adds noise to unscaled data, as edm does."""
        unscaled = not self.process.discrete or np.any(self.alpha == 0)
        return np.ones_like(self.alpha) if unscaled else self.alpha

    def start(self, noise: jax.Array, z0: jax.Array | None = None) -> jax.Array:
        """The state at times[0] from standard normal noise [B, ...], of data z0 where there is one.

        Without z0 it is the law that sampling starts from: N(0, 1), and for edm N(0, sigma^2).
        """
        if z0 is not None:
            return float(self.alpha[0]) * z0 + float(self.sigma[0]) * noise
        return float(self.sigma[0]) * noise if self.process.variance_exploding else noise

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
    """Raises InputError unless 1 <= num_steps <= num_timesteps; 0 timesteps have no limit."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer):
        raise InputError(f"num_steps {num_steps!r} must be a whole number; try 50")
    most = num_timesteps or np.inf
    if not 1 <= num_steps <= most:
        bounds = f"between 1 and the schedule's {num_timesteps} timesteps"
        raise InputError(
            f"num_steps {num_steps} must lie {bounds if num_timesteps else 'above 0'}; "
            f"nearest: {min(max(num_steps, 1), most)}"
        )


def leading(process: TableProcess, num_steps: int, _: float) -> Grid:
    """`uniform_grid`. Like LDM's it ends at alpha_bar_0, not on data, unless S is T."""
    return _timesteps(process, uniform_grid(process.num_timesteps, num_steps))


def quad(process: TableProcess, num_steps: int, _: float) -> Grid:
    """LDM's quadratic timesteps, up to 0.8 T, its repetitions moved apart; ends at alpha_bar_0."""
    root = np.linspace(0, (0.8 * process.num_timesteps) ** 0.5, num_steps)
    t = (root**2).astype(np.int32) + 1
    index = np.arange(num_steps)
    t = np.maximum.accumulate(t - index) + index
    if t[-1] >= process.num_timesteps:
        raise InputError(f"num_steps {num_steps} is too many for spacing 'quad'; use 'leading'")
    return _timesteps(process, t)


def trailing(process: TableProcess, num_steps: int, _: float) -> Grid:
    """T-1 and then every T / S-th timestep before it; ends on data (Lin et al. 2023, table 2)."""
    total = process.num_timesteps
    t = np.round(total * (1 + np.arange(num_steps)) / num_steps).astype(np.int32) - 1
    return _timesteps(process, t, to_data=True)


def linspace(process: TableProcess, num_steps: int, _: float) -> Grid:
    """Both ends 0 and T-1 and evenly between them, then data; one step takes T-1."""
    last = process.num_timesteps - 1
    t = np.round(np.linspace(last, 0, num_steps)).astype(np.int32)[::-1]
    return _timesteps(process, t, to_data=True)


def _timesteps(process: TableProcess, t: np.ndarray, to_data: bool = False) -> Grid:
    """The grid that visits increasing timesteps t [S] from the last, and ends on one or data."""
    alpha_bar = process.alpha_bar[t]
    # A grid that begins at 1 leaves alpha_bar_0 to end on; one that visits 0 has only data left.
    to_data = to_data or t[0] == 0
    alpha_bar = np.concatenate([[1.0 if to_data else process.alpha_bar[0]], alpha_bar])[::-1]
    times = np.concatenate([[process.data_time if to_data else 0], t])[::-1].astype(np.int32)
    return Grid(process, times, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))


def karras(process: TableProcess | SigmaProcess, num_steps: int, rho: float) -> Grid:
    """(sigma / alpha)^(1 / rho) evenly from one end to the other, then data (EDM eq. 5)."""
    low, high = (end ** (1 / rho) for end in _ratio_range(process, "karras"))
    return _by_ratio(process, np.linspace(high, low, num_steps) ** rho)


def exponential(process: TableProcess | SigmaProcess, num_steps: int, _: float) -> Grid:
    """ln(sigma / alpha) evenly from one end to the other, then data."""
    low, high = (np.log(end) for end in _ratio_range(process, "exponential"))
    return _by_ratio(process, np.exp(np.linspace(high, low, num_steps)))


def _ratio_range(process: TableProcess | SigmaProcess, spacing: str) -> tuple[float, float]:
    if process.ends_on_noise:
        raise InputError(
            f"spacing {spacing!r} needs a finite sigma / alpha at the noise end, which this "
            f"{process.config.kind!r} process lacks; use 'trailing'"
        )
    return process.ratio_range()


def _by_ratio(process: TableProcess | SigmaProcess, ratio: np.ndarray) -> Grid:
    """The grid that visits falling ratios sigma / alpha [S], and ends on data."""
    times = np.append(process.time_of_ratio(ratio), process.data_time)
    if not process.discrete:
        return Grid(process, times, *process.host_coefficients(times))
    alpha = np.append((1 + ratio**2) ** -0.5, 1)
    return Grid(process, times, alpha, np.append(ratio, 0) * alpha)


def uniform(process: PathProcess | SigmaProcess, num_steps: int, _: float) -> Grid:
    """Even in t, from the noise end (1, edm: sigma_max) to data."""
    return _continuous(process, np.linspace(process.noise_time, 0, num_steps + 1))


def shifted_uniform(process: PathProcess, num_steps: int, shift: float) -> Grid:
    """Even in u, t = a u / (1 + (a - 1) u): for larger latents a > 1, more steps near noise."""
    return _continuous(process, np.asarray(shifted(np.linspace(1, 0, num_steps + 1), shift)))


def last_step(process: PathProcess, num_steps: int, size: float) -> Grid:
    """Even in t from 1 to `size`, and from there one step to data: SiT's grid for its SDE."""
    if size >= 1:
        raise InputError(
            f"spacing 'last_step:{size:g}': the step must be shorter than 1; SiT: 0.04"
        )
    t = np.linspace(1, size, num_steps) if num_steps > 1 else np.ones(1)
    return _continuous(process, np.append(t, 0))


def _continuous(process: PathProcess | SigmaProcess, times: np.ndarray) -> Grid:
    return Grid(process, times, *process.host_coefficients(times))


Spacing = Callable[[Any, int, float], Grid]
"""(process, S, number) -> the grid; the number is that of NAME:NUMBER, which most have not."""

SPACINGS: dict[type[Process], dict[str, Spacing]] = {
    TableProcess: {
        "leading": leading,
        "trailing": trailing,
        "quad": quad,
        "linspace": linspace,
        "karras": karras,
        "exponential": exponential,
    },
    PathProcess: {"uniform": uniform, "shifted": shifted_uniform, "last_step": last_step},
    SigmaProcess: {"karras": karras, "exponential": exponential, "uniform": uniform},
}
"""The first is the one that "auto" stands for: LDM's, even steps, EDM's."""

NUMBERS = {"karras": 7.0, "shifted": 3.0, "last_step": 0.04}  # what NAME alone stands for


def make_grid(process: Process, num_steps: int, spacing: str = "auto") -> Grid:
    """The grid of S = num_steps steps; raises InputError for what the process has no grid of."""
    known = SPACINGS[type(process)]
    name, colon, text = spacing.partition(":")
    name = next(iter(known)) if spacing == "auto" else name
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
    _check_steps(process.num_timesteps, num_steps)
    return known[name](process, num_steps, number)
