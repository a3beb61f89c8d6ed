"""The latent perceptual loss: a decoder's maps of the predicted latent against those of the data.

Berrada et al. 2025. The decoder is frozen and comes as a callable; the prediction is the estimate
of x0, and only where little noise hides it. Where the paper and the reference code differ, both
are options.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import noise_levels
from ldm_jax.diffusion.noise_levels import NoiseLevels
from ldm_jax.diffusion.process import Process
from ldm_jax.errors import InputError, choose, within

Features = Callable[[jax.Array], list[jax.Array]]
"""Latents of the first stage [K,h,w,C] -> its decoder's maps [K,H_l,W_l,C_l], "mid" first, then
"up0" and so on, without a gap and at least up to the deepest tap."""

STD_FLOOR = 1e-6  # of the variance: a constant map has no scale to be divided by
NORM_FLOOR = 1e-6  # of a pixel's norm


@dataclass(frozen=True)
class PerceptualConfig:
    weight: float = 0.0  # of the loss beside the denoising loss; 0 = none, or target_ratio's
    target_ratio: float = 0.0  # weighted loss / denoising loss, measured once; 0 = weight is given
    calibration_steps: int = 20  # over which it is measured
    start_step: int = 0  # the first step with the loss
    every: int = 1  # only every k-th step has the loss, k times
    nsr_max: float = 3.0  # gate: sigma / (alpha sigma_data) at most; 0.577 is an SNR of 3 or more
    share: float = 0.0  # of a batch that is decoded at most; 0 = fitted to the gate, 1 = all
    taps: tuple[str, ...] = ()  # "mid", "up0", "up1" ...; empty = all of the decoder
    depth_weights: str = "inverse_resolution"  # mid's side / a tap's side | "uniform"
    tap_weights: tuple[float, ...] = ()  # one a tap, in the place of depth_weights
    normaliser: str = "pred_stats"  # a name in NORMALISERS
    mask: bool = True  # leaves outliers of the data's maps out
    mask_quantile: float = 0.02  # an inlier is above this quantile and below its mirror image,
    mask_stds: float = 2.0  # or at most so many standard deviations beyond
    mask_open: int = 5  # pixels, odd: outliers grow by it, after
    mask_close: int = 3  # pixels, odd: outliers have shrunk by it; 1 = not
    mask_from: int = 2  # the first tap with a mask, as its place in the decoder: mid 0, up0 1
    penalty: str = "l2"  # a name in PENALTIES
    reduction: str = "mean"  # over kept pixels and over taps | "sum", as the paper prints it
    compute_dtype: str = "auto"  # of the decoder: bfloat16 on accelerators, float32 on the CPU
    remat: bool = True  # compute the decoder's blocks again in the backward pass

    def __post_init__(self):
        within("lpl.weight", self.weight, "[0, inf)", "0 = none")
        within("lpl.target_ratio", self.target_ratio, "[0, inf)", "0 = weight is given")
        if self.weight and self.target_ratio:
            raise InputError(
                f"lpl.weight {self.weight} and lpl.target_ratio {self.target_ratio} both set the "
                "weight; leave one of them 0"
            )
        within("lpl.calibration_steps", self.calibration_steps, "[1, inf)")
        within("lpl.start_step", self.start_step, "[0, inf)", "0 = from the start")
        within("lpl.every", self.every, "[1, inf)", "1 = every step")
        within("lpl.nsr_max", self.nsr_max, "(0, inf)", "the paper's is 3")
        within("lpl.share", self.share, "[0, 1]", "0 = fitted to the gate")
        for i, tap in enumerate(self.taps):
            if not re.fullmatch(r"mid|up(0|[1-9]\d*)", tap) or tap in self.taps[:i]:
                raise InputError(
                    f"lpl.taps {self.taps} must be different names of decoder maps, as mid, up0 "
                    "or up1; leave it empty for all"
                )
        choose("lpl.depth_weights", self.depth_weights, DEPTH_WEIGHTS)
        for tap_weight in self.tap_weights:
            within("lpl.tap_weights", tap_weight, "[0, inf)")
        if self.tap_weights and not any(self.tap_weights):
            raise InputError(f"lpl.tap_weights {self.tap_weights} must be above 0 for some tap")
        if self.taps and self.tap_weights and len(self.taps) != len(self.tap_weights):
            raise InputError(
                f"lpl.tap_weights {self.tap_weights} must be as many as lpl.taps {self.taps}"
            )
        choose("lpl.normaliser", self.normaliser, NORMALISERS)
        within("lpl.mask_quantile", self.mask_quantile, "[0, 0.5)")
        within("lpl.mask_stds", self.mask_stds, "[0, inf)")
        for name in ("mask_open", "mask_close"):
            if getattr(self, name) < 1 or getattr(self, name) % 2 == 0:
                raise InputError(
                    f"lpl.{name} {getattr(self, name)} must be an odd number of pixels; 1 = none"
                )
        within("lpl.mask_from", self.mask_from, "[0, inf)")
        choose("lpl.penalty", self.penalty, PENALTIES)
        choose("lpl.reduction", self.reduction, ("mean", "sum"))
        choose("lpl.compute_dtype", self.compute_dtype, ("auto", "float32", "bfloat16"))

    @property
    def active(self) -> bool:
        """Whether there is such a loss at all."""
        return self.weight > 0 or self.target_ratio > 0


def tap_indices(config: PerceptualConfig, num_maps: int) -> tuple[int, ...]:
    """The places of the config's taps among a decoder's `num_maps` maps, mid being 0.

    In the config's order, which is that of tap_weights. Raises InputError for a tap that the
    decoder has not, and for weights that are not one a tap.
    """
    names = ["mid", *(f"up{i}" for i in range(num_maps - 1))]
    for tap in config.taps:
        if tap not in names:
            raise InputError(f"lpl.taps: {tap!r} is no map of this decoder; choose from {names}")
    if config.tap_weights and not config.taps and len(config.tap_weights) != num_maps:
        raise InputError(
            f"lpl.tap_weights {config.tap_weights} must be {num_maps}, one for each of {names}"
        )
    return tuple(names.index(tap) for tap in config.taps or names)


def noise_ratio(process: Process, t: jax.Array) -> jax.Array:
    """sigma / (alpha sigma_data) [B] at native times t [B]; infinite where alpha is 0."""
    alpha, sigma = process.coefficients(t)
    noise_only = alpha <= 0
    # The division has an alpha to divide by everywhere, so that no gradient of it is nan.
    signal = jnp.where(noise_only, 1.0, alpha) * process.config.sigma_data
    return jnp.where(noise_only, jnp.inf, sigma / signal)


def gated_share(process: Process, levels: NoiseLevels, nsr_max: float) -> float:
    """The probability that a training draw's noise ratio is at most nsr_max, to 1e-4; on the host.

    A share of 10000 even quantiles: no draw, and the same on every machine.
    """
    with jax.ensure_compile_time_eval():  # also from inside of a step that is being traced
        u = jnp.asarray((np.arange(10_000) + 0.5) / 10_000, jnp.float32)
        times = noise_levels.quantile_times(process, levels, u)
        return float(np.mean(np.asarray(noise_ratio(process, times)) <= nsr_max))


def capacity(config: PerceptualConfig, process: Process, levels: NoiseLevels, batch: int) -> int:
    """K, the rows of a batch that are decoded: at least 1, at most all.

    Of the batch size and the config alone, never of the mesh. Fitted, it is the mean number of
    gated rows and one standard deviation more.
    """
    if config.share:
        rows = config.share * batch
    else:
        p = gated_share(process, levels, config.nsr_max)
        rows = p * batch + (p * (1 - p) * batch) ** 0.5
    return min(batch, max(1, math.ceil(rows - 1e-9)))  # 0.1 * 30 is a little more than 3


def choose_rows(gated: jax.Array, order: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(index int32 [K], weight f32 [K]) of K = count rows, the first gated ones by `order`.

    gated bool [B]; order f32 [B] in [0, 1), uniform draws, so that no noise level is preferred:
    the weighted sum over the K rows has the sum over all gated rows as its mean. The weight is
    gated rows / used rows, and 0 for a row that only fills up.
    """
    assert 1 <= count <= len(gated), f"{count} rows of {len(gated)}"
    index = jnp.argsort(jnp.where(gated, order, 2.0))[:count].astype(jnp.int32)
    used = gated[index]
    each = jnp.sum(gated) / jnp.maximum(jnp.sum(used), 1)
    return index, jnp.where(used, each, 0.0).astype(jnp.float32)


def inliers(config: PerceptualConfig, target: jax.Array, tap: int) -> jax.Array:
    """Which values of the data's maps [K,H,W,C] are no outliers, bool; `tap` counts from mid = 0.

    Each channel of each sample for itself: between two quantiles, with a margin of its (unbiased)
    standard deviation. Then outliers narrower than `mask_close` are dropped and what is left grows
    to a margin; up to up1, whose maps are small, by half as much. All True before `mask_from`.
    """
    if not config.mask or tap < config.mask_from:
        return jnp.ones(target.shape, bool)
    target = jax.lax.stop_gradient(target).astype(jnp.float32)
    low, high = _extremes(target, config.mask_quantile)
    margin = config.mask_stds * jnp.std(target, axis=(1, 2), keepdims=True, ddof=1)
    kept = (low - margin < target) & (target < high + margin)
    opening, closing = config.mask_open, config.mask_close
    if tap <= 2:
        # To an odd size: the larger for one, the smaller for the other.
        opening, closing = math.ceil(opening / 2) | 1, (math.ceil(closing / 2) - 1) | 1
    shrunk = _pooled(kept, closing, False, jax.lax.bitwise_or)
    return _pooled(shrunk, opening, True, jax.lax.bitwise_and)


def _extremes(maps: jax.Array, quantile: float) -> tuple[jax.Array, jax.Array]:
    """The quantile of [K,H,W,C] over space and its mirror image, both [K,1,1,C] and values of it.

    Torch's kthvalue at whole k, to the bit, by counting instead of sorting: the k-th smallest is
    the largest number that fewer than k values lie below, found bit by bit.
    """
    k, height, width, c = maps.shape
    size = height * width
    keys = _in_order(jax.lax.bitcast_convert_type(maps.reshape(k, size, c), jnp.int32))
    ranks = [max(int(size * share), 1) for share in (quantile, 1 - quantile)]
    wanted = jnp.array(ranks, jnp.int32).reshape(2, 1, 1)

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        larger = found + jax.lax.shift_left(jnp.int32(1), 31 - i)  # the first wraps around to 0
        below = jnp.stack([jnp.sum(keys < end[:, None], 1, dtype=jnp.int32) for end in larger])
        return jnp.where(below < wanted, larger, found)

    least = jnp.full((2, k, c), jnp.iinfo(jnp.int32).min, jnp.int32)
    found = jax.lax.bitcast_convert_type(
        _in_order(jax.lax.fori_loop(0, 32, step, least)), jnp.float32
    )
    low, high = found.reshape(2, k, 1, 1, c)
    return low, high


def _in_order(bits: jax.Array) -> jax.Array:
    """Bits of f32, as int32, -> int32 in the order of the numbers; and back."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _pooled(
    mask: jax.Array, side: int, neutral: bool, reduce: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Each pixel of [K,H,W,C] reduced with its side x side neighbourhood; beyond is `neutral`."""
    for window in ((1, side, 1, 1), (1, 1, side, 1)):
        mask = jax.lax.reduce_window(mask, neutral, reduce, window, (1, 1, 1, 1), "SAME")
    return mask


def l1(error: jax.Array) -> jax.Array:
    """|error|; its slope at 0 is 0, where that of jnp.abs is 1."""
    return jnp.where(error == 0, 0.0, jnp.abs(error))


def huber(error: jax.Array) -> jax.Array:
    """error^2 / 2 up to 1, and |error| - 1/2 beyond."""
    size = jnp.abs(error)
    return jnp.where(size < 1, 0.5 * jnp.square(error), size - 0.5)


PENALTIES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "l1": l1,
    "l2": jnp.square,
    "huber": huber,
}


def _std(maps: jax.Array) -> jax.Array:
    """[K,1,1,C] of maps [K,H,W,C], over space."""
    return jnp.sqrt(jnp.var(maps, axis=(1, 2), keepdims=True) + STD_FLOOR)


def _pred_stats(predicted: jax.Array, target: jax.Array, kept: jax.Array) -> jax.Array:
    """Both by the prediction's mean and deviation; the gradient passes through the deviation."""
    return (predicted - target) / _std(predicted)


def _pred_stats_sg(predicted: jax.Array, target: jax.Array, kept: jax.Array) -> jax.Array:
    """The same with the deviation held: growing it is then no way to a smaller loss."""
    return (predicted - target) / jax.lax.stop_gradient(_std(predicted))


def _target_stats(predicted: jax.Array, target: jax.Array, kept: jax.Array) -> jax.Array:
    return (predicted - target) / _std(target)


def _separate(predicted: jax.Array, target: jax.Array, kept: jax.Array) -> jax.Array:
    """Each by its own; the prediction too without outliers, or z would differ from itself."""
    pair = jnp.where(kept, predicted, 0.0), target
    ours, theirs = ((x - jnp.mean(x, axis=(1, 2), keepdims=True)) / _std(x) for x in pair)
    return ours - theirs


def _target_l2(predicted: jax.Array, target: jax.Array, kept: jax.Array) -> jax.Array:
    """Both by the norm of the target's channels at each pixel."""
    norm = jnp.sqrt(jnp.sum(jnp.square(target), axis=-1, keepdims=True))
    return (predicted - target) / (norm + NORM_FLOOR)


def _none(predicted: jax.Array, target: jax.Array, kept: jax.Array) -> jax.Array:
    return predicted - target


NORMALISERS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "pred_stats": _pred_stats,
    "pred_stats_sg": _pred_stats_sg,
    "target_stats": _target_stats,
    "separate": _separate,
    "target_l2": _target_l2,
    "none": _none,
}
"""(predicted, target with 0 for outliers, inliers, all [K,H,W,C]) -> difference once normalised.

A mean that both are freed of is in no difference. Without it, equal maps differ by exactly 0.
"""

DEPTH_WEIGHTS: dict[str, Callable[[int, int], float]] = {
    "inverse_resolution": lambda mid, side: mid / side,
    "uniform": lambda mid, side: 1.0,
}
"""(side of mid's maps, side of a tap's maps) -> the tap's weight."""


class Distance(NamedTuple):
    loss: jax.Array  # [K] f32
    kept: jax.Array  # [K] f32, the share of inliers in the taps with a mask; 1 without any


def distance(
    config: PerceptualConfig,
    predicted: list[jax.Array],
    target: list[jax.Array],
    taps: tuple[int, ...],
) -> Distance:
    """How far two lists of a decoder's maps [K,H_l,W_l,C_l] are apart at its taps, in f32.

    The lists begin with mid; `taps` are places in them (`tap_indices`). No gradient by `target`.
    A depth weight compares a tap's height with that of mid, whether mid is a tap or not.
    """
    loss, kept_shares = jnp.zeros(len(predicted[0]), jnp.float32), []
    for place, tap in enumerate(taps):
        ours = predicted[tap].astype(jnp.float32)
        theirs = jax.lax.stop_gradient(target[tap]).astype(jnp.float32)
        assert ours.shape == theirs.shape, f"maps {ours.shape} and {theirs.shape}"
        kept = inliers(config, theirs, tap)
        if config.mask and tap >= config.mask_from:
            kept_shares.append(jnp.mean(kept, axis=(1, 2, 3), dtype=jnp.float32))
        normalised = NORMALISERS[config.normaliser]
        error = normalised(ours, jnp.where(kept, theirs, 0.0), kept)
        errors = jnp.where(kept, PENALTIES[config.penalty](error), 0.0)
        by_channel = jnp.sum(errors, axis=(1, 2))
        if config.reduction == "mean":
            counts = jnp.sum(kept, axis=(1, 2), dtype=jnp.float32)
            by_channel = by_channel / jnp.maximum(counts, 1) / len(taps)
        sides = predicted[0].shape[1], ours.shape[1]
        by_depth = DEPTH_WEIGHTS[config.depth_weights](*sides)
        weight = config.tap_weights[place] if config.tap_weights else by_depth
        loss = loss + weight * jnp.mean(by_channel, axis=1)
    kept_share = sum(kept_shares) / len(kept_shares) if kept_shares else jnp.ones_like(loss)
    return Distance(loss, jnp.asarray(kept_share))


class PerceptualLoss(NamedTuple):
    value: jax.Array  # [] f32, the batch's mean; rows behind the gate count as 0
    kept: jax.Array  # [] f32, `Distance.kept` over the rows used; 1 without any
    gated: jax.Array  # [] f32, the share of rows that pass the gate


def perceptual_loss(
    config: PerceptualConfig,
    features: Features,
    predicted_z: jax.Array,
    target_z: jax.Array,
    ratio: jax.Array,
    order: jax.Array,
    count: int,
    *,
    multiple: int = 1,
    place: Callable[[jax.Array], jax.Array] = lambda z: z,
) -> PerceptualLoss:
    """The loss of latents predicted_z [B,h,w,C], as the decoder takes them, against target_z.

    Rows of a noise ratio [B] up to nsr_max count, and `count` of them (`capacity`) are decoded:
    the first by order [B], uniform draws in [0, 1). Their number is filled up to a multiple of
    `multiple`, with rows of no weight, and `place` may lay each of the two [K,h,w,C] on a mesh. A
    row without weight gets no gradient, and its prediction need not be finite.
    """
    assert predicted_z.shape == target_z.shape, f"{predicted_z.shape} and {target_z.shape}"
    gated = ratio <= config.nsr_max
    index, weight = choose_rows(gated, order, count)
    index, weight = (jnp.pad(x, (0, -count % multiple)) for x in (index, weight))
    used = weight > 0
    target = jax.lax.stop_gradient(target_z)[index]
    # An unused row is compared with itself: 0 at a gradient of 0, whatever was predicted.
    shown = used.reshape(-1, *(1 for _ in target_z.shape[1:]))
    predicted = jnp.where(shown, predicted_z[index], target)
    seen = [jax.lax.stop_gradient(maps) for maps in features(place(target))]
    maps = features(place(predicted))
    found = distance(config, maps, seen, tap_indices(config, len(maps)))
    kept = jnp.sum(used * found.kept) / jnp.maximum(jnp.sum(used), 1)
    return PerceptualLoss(
        jnp.sum(weight * found.loss) / len(ratio),
        jnp.where(jnp.any(used), kept, 1.0),
        jnp.mean(gated, dtype=jnp.float32),
    )
