"""Guidance: from a denoiser, or two, to a denoiser that follows its condition more closely.

A contrast gives two predictions, weak and strong; a rule makes one of them; `guide` and `interval`
join both into a denoiser. Every scale is a scalar or one number a row [B], and may be traced.

Differences of predictions are what extrapolation, `channels` and `interval` act on, so they mean
the same for eps, x0, v and velocity. `rescale` and `project` look at sizes and directions: they
act on the prediction as it is, or on x0 inside of `in_x0`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.process import Denoiser
from ldm_jax.errors import InputError

Scale = float | jax.Array
Rule = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(weak, strong, z_t, all [B, ...] f32, t [B]) -> prediction; strong itself, bit for bit, where
its scale is 1."""

Convert = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(z_t [B, ...], prediction or x0 [B, ...], t [B]) -> x0 or prediction [B, ...]."""


class Contrast(NamedTuple):
    """`both` gives (weak, strong) for a denoiser's input, `strong` the second one alone."""

    both: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array]]
    strong: Denoiser


def null_and_cond(denoiser: Denoiser, null_cond: Any) -> Contrast:
    """The unconditional prediction against the conditional one, from one call on [2B, ...].

    `null_cond` has cond's tree; each leaf broadcasts to cond's leaf [B, ...], so one row serves
    every batch. The null half comes first.
    """

    def both(z_t: jax.Array, t: jax.Array, cond: Any) -> tuple[jax.Array, jax.Array]:
        conds = jax.tree.map(_null_then_cond, null_cond, cond)
        pair = denoiser(jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t]), conds)
        null, conditional = jnp.split(pair, 2)
        return null, conditional

    return Contrast(both, denoiser)


def bad_and_good(bad: Denoiser, good: Denoiser) -> Contrast:
    """A worse denoiser's prediction against a better one's, for the same condition."""
    return Contrast(lambda z_t, t, cond: (bad(z_t, t, cond), good(z_t, t, cond)), good)


def guide(contrast: Contrast, rule: Rule) -> Denoiser:
    """The denoiser that follows `rule` at every time; predictions are combined in f32."""

    def guided(z_t: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        weak, strong = _f32(*contrast.both(z_t, t, cond))
        return _beside(rule, weak, strong, z_t, t)

    return guided


def interval(contrast: Contrast, rule: Rule, low: Scale, high: Scale) -> Denoiser:
    """Follows `rule` for times in [low, high], both in the process' own unit; else is `strong`.

    Where no row is inside, the strong denoiser runs alone, at half of the cost. Limited-interval
    guidance (Kynkäänniemi et al. 2024, eq. 4) with w = scale - 1 and noise levels named by times.
    """

    def guided(z_t: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        inside = (low <= t) & (t <= high)

        def either() -> jax.Array:
            weak, strong = _f32(*contrast.both(z_t, t, cond))
            return jnp.where(_rows(inside, strong), _beside(rule, weak, strong, z_t, t), strong)

        def alone() -> jax.Array:
            return _f32(contrast.strong(z_t, t, cond))[0]

        return jax.lax.cond(jnp.any(inside), either, alone)

    return guided


def extrapolate(scale: Scale) -> Rule:
    """weak + scale (strong - weak): 1 is strong, bit for bit.

    Of `null_and_cond` it is classifier-free guidance (Ho and Salimans 2022, eq. 6), whose w is
    scale - 1: 0 is the unconditional model, 1 the conditional one, more extrapolates. Of
    `bad_and_good` it is autoguidance (Karras et al. 2024, eq. 3).
    """

    def rule(weak: jax.Array, strong: jax.Array, z_t: jax.Array, t: jax.Array) -> jax.Array:
        by = _rows(scale, strong)
        # a + (b - a) is not b in floating point.
        return jnp.where(by == 1, strong, weak + by * (strong - weak))

    return rule


def project(scale: Scale, eta: Scale = 0.0, norm_threshold: Scale = jnp.inf) -> Rule:
    """strong + (scale - 1) D, where D = strong - weak, shortened and turned away from strong.

    D is cut to a norm of at most `norm_threshold` (> 0, over a whole row; inf = never), and its
    part along strong is multiplied by `eta`; eta 1 and no threshold are plain extrapolation.
    Adaptive projected guidance (Sadat et al. 2024, algorithm 1), which is meant for x0 (`in_x0`),
    without its momentum: that averages D over the steps, a state that a denoiser does not have.
    """

    def rule(weak: jax.Array, strong: jax.Array, z_t: jax.Array, t: jax.Array) -> jax.Array:
        by, delta = _rows(scale, strong), strong - weak
        size = jnp.sqrt(_row_sum(jnp.square(delta)))
        delta *= jnp.minimum(1.0, _rows(norm_threshold, strong) / size)
        square = _row_sum(jnp.square(strong))
        along = jnp.where(square > 0, _row_sum(delta * strong) / square, 0.0) * strong
        turned = delta + (_rows(eta, strong) - 1) * along
        return jnp.where(by == 1, strong, strong + (by - 1) * turned)

    return rule


def rescale(rule: Rule, phi: Scale) -> Rule:
    """Moves each row's standard deviation towards strong's: phi 0 not at all, 1 onto it.

    Lin et al. 2023 (common noise schedules are flawed), eqs. 15 and 16.
    """

    def rescaled(weak: jax.Array, strong: jax.Array, z_t: jax.Array, t: jax.Array) -> jax.Array:
        guided = rule(weak, strong, z_t, t)
        axes = tuple(range(1, strong.ndim))
        want = jnp.std(strong, axis=axes, keepdims=True)
        have = jnp.std(guided, axis=axes, keepdims=True)
        ratio = jnp.where(have > 0, want / have, 1.0)
        unguided = jnp.all(guided == strong, axis=axes, keepdims=True)
        return jnp.where(unguided, strong, guided * (1 + _rows(phi, strong) * (ratio - 1)))

    return rescaled


def channels(rule: Rule, which: Sequence[int]) -> Rule:
    """Guides the latent channels `which` alone; the others are strong's, bit for bit.

    DiT guides the first 3 of 4 by default: range(3). Scales do not compare across choices.
    """

    def some(weak: jax.Array, strong: jax.Array, z_t: jax.Array, t: jax.Array) -> jax.Array:
        count = strong.shape[-1]
        bad = [c for c in which if not 0 <= c < count]
        if bad or not which:
            raise InputError(
                f"guided channels {list(which)} must be among the latent's 0..{count - 1}; name "
                f"at least one, or range({count}) for all"
            )
        mask = jnp.zeros((1,) * (strong.ndim - 1) + (count,), bool).at[..., list(which)].set(True)
        return jnp.where(mask, rule(weak, strong, z_t, t), strong)

    return some


def in_x0(rule: Rule, to_x0: Convert, from_x0: Convert) -> Rule:
    """The rule applied to the predictions' x0, and its result turned back into a prediction."""

    def converted(weak: jax.Array, strong: jax.Array, z_t: jax.Array, t: jax.Array) -> jax.Array:
        x0 = to_x0(z_t, strong, t)
        guided = rule(to_x0(z_t, weak, t), x0, z_t, t)
        return jnp.where(guided == x0, strong, from_x0(z_t, guided, t))

    return converted


def _beside(rule: Rule, weak: jax.Array, strong: jax.Array, z_t: jax.Array, t: jax.Array):
    """The rule on z_t's channels; a learned variance beside them stays strong's."""
    count = z_t.shape[-1]
    guided = rule(weak[..., :count], strong[..., :count], z_t, t)
    beside = strong[..., count:]
    return jnp.concatenate([guided, beside], axis=-1) if beside.shape[-1] else guided


def _f32(*predictions: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(p.astype(jnp.float32) for p in predictions)


def _row_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=tuple(range(1, x.ndim)), keepdims=True)


def _rows(value: Scale, like: jax.Array) -> jax.Array:
    """A scalar, or [B] shaped [B, 1, ...], for an array [B, ...]."""
    value = jnp.asarray(value)
    assert value.ndim == 0 or value.shape == like.shape[:1], f"scale {value.shape}: [] or [B]"
    return value.reshape(value.shape + (1,) * (like.ndim - 1)) if value.ndim else value


def _null_then_cond(null: Any, cond: jax.Array) -> jax.Array:
    null = jnp.broadcast_to(jnp.asarray(null, cond.dtype), cond.shape)
    return jnp.concatenate([null, cond])  # 2 x [B, ...] -> [2B, ...]
