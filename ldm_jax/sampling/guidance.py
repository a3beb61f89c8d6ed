"""SampleOptions of guidance to the denoiser that follows them; every number of them is traced."""

import jax
import numpy as np

from ldm_jax.diffusion import guidance
from ldm_jax.diffusion.parameterisation import target, x0_and_eps
from ldm_jax.diffusion.process import Denoiser, Process
from ldm_jax.errors import InputError
from ldm_jax.models import conditions
from ldm_jax.runs.denoiser import Model
from ldm_jax.sampling.options import SampleOptions


def check_guidance(settings: SampleOptions, model: Model) -> None:
    """Raises InputError for guidance that this model can't be given; see also `check_values`."""
    count = model.codec.channels
    which = settings.guided_channels
    if not all(0 <= c < count for c in which) or len(set(which)) < len(which):
        raise InputError(
            f"guided-channels {','.join(map(str, which))} must be different ones of the latent's "
            f"0..{count - 1}; leave it out for all"
        )
    if settings.autoguided:
        if model.guide is None:
            raise InputError("the model was loaded without its guide; load it with these settings")
        return
    if settings.guidance == 1:
        return
    if not model.run.model.conditions:
        raise InputError(
            "this denoiser is unconditional; leave out --classes and --guidance, or give "
            "--guide-workdir to lead away from a worse denoiser"
        )
    if model.run.loss.condition_dropout == 0:
        raise InputError(
            f"guidance {settings.guidance}: this denoiser was trained with condition_dropout 0 and "
            "knows no null condition; leave --guidance out, or give --guide-workdir to lead away "
            "from a worse denoiser"
        )


def guidance_scales(settings: SampleOptions, process: Process) -> dict[str, np.ndarray]:
    """The numbers that `guided` is given, f32 []."""
    low, high = settings.guidance_interval
    projection = settings.guidance_projection
    numbers = {
        "scale": settings.guidance,
        # What noises above the process' end, as churn does, is at the end.
        "low": process.native_time(low) if low > 0 else -np.inf,
        "high": process.native_time(high) if high < 1 else np.inf,
        "rescale": settings.guidance_rescale,
        "eta": projection[0] if projection else 0.0,
        "norm": projection[1] if len(projection) > 1 else np.inf,
    }
    return {name: np.float32(number) for name, number in numbers.items()}


def guided(
    settings: SampleOptions,
    model: Model,
    process: Process,
    denoise: Denoiser,
    guide: Denoiser | None,
    cond: conditions.Cond,
    scales: dict[str, jax.Array],
) -> Denoiser:
    """The denoiser itself where guidance is 1; else led away from `guide` or its null condition.

    Projection acts on x0, rescaling then on the prediction, and other channels and times are those
    of the denoiser alone.
    """
    if settings.guidance == 1:
        return denoise
    if guide is not None:
        contrast = guidance.bad_and_good(guide, denoise)
    else:
        null = conditions.unconditioned(model.run.model.conditions, cond)
        contrast = guidance.null_and_cond(denoise, null)
    rule = guidance.extrapolate(scales["scale"])
    if settings.guidance_projection:
        rule = guidance.project(scales["scale"], scales["eta"], scales["norm"])
        rule = guidance.in_x0(rule, *conversions(process, model.run.objective.parameterisation))
    if settings.guidance_rescale:
        rule = guidance.rescale(rule, scales["rescale"])
    if settings.guided_channels:
        rule = guidance.channels(rule, settings.guided_channels)
    if settings.guidance_interval == SampleOptions.guidance_interval:
        return guidance.guide(contrast, rule)
    return guidance.interval(contrast, rule, scales["low"], scales["high"])


def conversions(process: Process, name: str) -> tuple[guidance.Convert, guidance.Convert]:
    """(prediction to x0, x0 to prediction), each of (z_t, it, t)."""

    def to_x0(z_t: jax.Array, prediction: jax.Array, t: jax.Array) -> jax.Array:
        return x0_and_eps(process, name, z_t, prediction, t)[0]

    def from_x0(z_t: jax.Array, x0: jax.Array, t: jax.Array) -> jax.Array:
        return target(process, name, *x0_and_eps(process, "x0", z_t, x0, t), t)

    return to_x0, from_x0
