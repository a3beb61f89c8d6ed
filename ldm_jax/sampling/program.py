"""The one program that draws samples, jitted over the mesh: from noise or images to images.

Every number of its options is traced, so that another one does not compile it anew.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import guidance, samplers
from ldm_jax.diffusion.grid import Grid, make_grid
from ldm_jax.diffusion.parameterisation import (
    Predict,
    clipped,
    dynamically_clipped,
    predictor,
    target,
    x0_and_eps,
)
from ldm_jax.diffusion.process import Denoiser, Process, at_network, make_process
from ldm_jax.diffusion.tiling import tiled
from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, key_for, normal_like
from ldm_jax.models import autoencoder, conditions, denoiser
from ldm_jax.runs.denoiser import Model
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sampling.inputs import (
    cond_of,
    conditional,
    known_latents,
    latent_shape,
    latent_tiles,
    null_cond,
)
from ldm_jax.sampling.options import SampleOptions, sampler_options
from ldm_jax.sharding import batch_sharding, use_mesh

Program = Callable[[Any, dict[str, Any], dict[str, Any]], tuple[jax.Array, jax.Array | None]]


def steps_taken(options: SampleOptions, process: Process) -> Grid:
    """The grid, from where `strength` begins on; InputError for one that cannot be sampled on."""
    total = options.steps
    if total < 1 or (process.discrete and total > process.num_timesteps):
        most = process.num_timesteps or "any number"
        raise InputError(f"steps {total} must be in 1..{most}")
    grid = make_grid(process, total, options.spacing)
    taken = round(options.strength * total)
    if not taken:
        raise InputError(
            f"strength {options.strength} of {total} steps is none of them; give at least "
            f"{1 / total:.3g}, or more steps"
        )
    if options.progressive > taken:
        raise InputError(
            f"progressive {options.progressive} is more than the {taken} steps that are taken; "
            f"{max(1, taken // 8)} shows them in about 8 pictures"
        )
    return grid if taken == total else grid.after(total - taken)


def check_steps(options: SampleOptions, process: Process) -> None:
    """Raises InputError for steps that the sampler cannot take on this process."""
    grid, more = steps_taken(options, process), sampler_options(options)

    def predict(z_t, t, cond):
        return z_t, z_t

    def sample(z, keys):
        return samplers.SAMPLERS[options.sampler](predict, grid, z, {}, keys, **more)

    keys = jax.eval_shape(jax.random.split, jax.random.key(0))
    jax.eval_shape(sample, jax.ShapeDtypeStruct((2, 1, 1, 1), jnp.float32), keys)


def check_guidance(options: SampleOptions, model: Model) -> None:
    """Raises InputError for guidance that this model can't be given; see also `check_values`."""
    count = model.codec.channels
    which = options.guided_channels
    if not all(0 <= c < count for c in which) or len(set(which)) < len(which):
        raise InputError(
            f"guided-channels {','.join(map(str, which))} must be different ones of the latent's "
            f"0..{count - 1}; leave it out for all"
        )
    if options.autoguided:
        if model.guide is None:
            raise InputError("the model was loaded without its guide; load it with these options")
        return
    if options.guidance == 1:
        return
    if not conditional(model.run):
        raise InputError(
            "this denoiser is unconditional; leave out --classes and --guidance, or give "
            "--guide-workdir to lead away from a worse denoiser"
        )
    if model.run.loss.condition_dropout == 0:
        raise InputError(
            f"guidance {options.guidance}: this denoiser was trained with condition_dropout 0 and "
            "knows no null condition; leave --guidance out, or give --guide-workdir to lead away "
            "from a worse denoiser"
        )


def check_decode(options: SampleOptions, model: Model) -> None:
    """Raises InputError for a decoding that the model's latents can't be given."""
    if options.decode == "resampled" and not model.codec.halves[1]:
        raise InputError(
            f"decode 'resampled' draws by the spread that a latent's second half tells, and codec "
            f"{model.run.codec!r} has none; leave --decode out, or train with "
            "--config.codec=mean_logvar"
        )


def weights_of(model: Model) -> dict[str, Any]:
    """The parameters that a program is given first."""
    return {
        "denoiser": model.params,
        "first_stage": model.first_stage.params,
        "guide": model.guide.params if model.guide else {},
    }


def numbers_of(options: SampleOptions, process: Process) -> dict[str, Any]:
    """The scalars that a program is given next; other ones do not compile anew."""
    return {
        "seed": np.uint32(options.seed),
        "guidance": guidance_numbers(options, process),
        "bound": np.float32(options.clip_x0),
        "quantile": np.float32(options.threshold_x0),
    }


def guidance_numbers(options: SampleOptions, process: Process) -> dict[str, np.ndarray]:
    """The scalars of `guided`, f32 []."""
    low, high = options.guidance_interval
    projection = options.guidance_projection
    numbers = {
        "scale": options.guidance,
        # What noises above the process' end, as churn does, is at the end.
        "low": process.native_time(low) if low > 0 else -np.inf,
        "high": process.native_time(high) if high < 1 else np.inf,
        "rescale": options.guidance_rescale,
        "eta": projection[0] if projection else 0.0,
        "norm": projection[1] if len(projection) > 1 else np.inf,
    }
    return {name: np.float32(number) for name, number in numbers.items()}


def compile_sampler(model: Model, options: SampleOptions) -> Program:
    """(weights_of, numbers_of, rows) -> images uint8 [B,H,W,3], predicted x0 f32 [B,F,h,w,C].

    Rows are those of `sample_rows` and, where the options ask for them, `noise` f32 [B,h,w,C],
    `image` uint8 [B,H,W,3] and `mask` bool [B,H,W]. The x0 are None without `progressive`.
    """
    run, first_stage = model.run, model.first_stage.config
    process = make_process(run.process)
    grid, shape = steps_taken(options, process), latent_shape(options, model)
    solver, fixed = samplers.SAMPLERS[options.sampler], sampler_options(options)
    noised = options.strength < 1
    if options.progressive:
        fixed |= {"every": options.progressive}

    def draw(weights, numbers, rows):
        with use_mesh(model.mesh):
            index, more = rows["index"], {}

            def keys(purpose):
                return example_keys(key_for(numbers["seed"], purpose), index)

            like = jax.ShapeDtypeStruct((len(index), *shape), jnp.float32)
            noise = rows["noise"] if "noise" in rows else normal_like(keys("initial_noise"), like)
            z0 = None
            if "image" in rows:
                x = autoencoder.to_unit(rows["image"])
                moments = autoencoder.encode(first_stage, weights["first_stage"], x)
                z0 = model.codec.encode_mode(moments)
            if "mask" in rows:
                more["known"] = samplers.Known(z0, known_latents(rows["mask"], first_stage.factor))
            cond = cond_of(run, rows)
            drawn = solver(
                prediction(model, options, weights, numbers, cond),
                grid,
                grid.start(noise, z0 if noised else None),
                cond,
                keys("sampler_noise"),
                **fixed,
                **more,
            )
            z0, frames = drawn if options.progressive else (drawn, None)
            drawn_by = decoding_keys(options, numbers, index)
            images = to_images(model, weights["first_stage"], z0, drawn_by)
            if "mask" in rows:
                images = jnp.where(rows["mask"][..., None], images, rows["image"])
            return images, None if frames is None else jnp.moveaxis(frames, 0, 1)

    return jax.jit(draw, out_shardings=batch_sharding(model.mesh))


def prediction(
    model: Model,
    options: SampleOptions,
    weights: dict[str, Any],
    numbers: dict[str, Any],
    cond: conditions.Cond,
) -> Predict:
    """What the sampler calls: the network, in tiles, guided, and its x0 limited."""
    process = make_process(model.run.process)
    denoise = at_network(process, in_tiles(options, model, model.run, weights["denoiser"]))
    if options.guidance != 1:
        if options.autoguided:
            worse = in_tiles(options, model, model.guide.run, weights["guide"])
            contrast = guidance.bad_and_good(at_network(process, worse), denoise)
        else:
            contrast = guidance.null_and_cond(denoise, null_cond(model.run, cond))
        denoise = guided(contrast, model, options, numbers["guidance"])
    predict = predictor(process, model.run.objective.parameterisation, denoise)
    if options.threshold_x0:
        return dynamically_clipped(predict, process, numbers["quantile"], numbers["bound"])
    return clipped(predict, process, numbers["bound"]) if options.clip_x0 else predict


def in_tiles(options: SampleOptions, model: Model, run: DenoiserRun, params: Any) -> Denoiser:
    """The network of `run`, which ignores conditions that it was trained without."""

    def network(z_t: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        return denoiser.apply(run.model, params, z_t, t, cond_of(run, cond))

    return tiled(network, *latent_tiles(options, model)) if options.tile else network


def guided(
    contrast: guidance.Contrast, model: Model, options: SampleOptions, scales: dict[str, jax.Array]
) -> Denoiser:
    """The denoiser of a contrast, led by the rules that the options name.

    Projection acts on x0, rescaling then on the prediction, and other channels and times are those
    of the denoiser alone.
    """
    rule = guidance.extrapolate(scales["scale"])
    if options.guidance_projection:
        rule = guidance.project(scales["scale"], scales["eta"], scales["norm"])
        rule = guidance.in_x0(rule, *conversions(model.run))
    if options.guidance_rescale:
        rule = guidance.rescale(rule, scales["rescale"])
    if options.guided_channels:
        rule = guidance.channels(rule, options.guided_channels)
    if options.guidance_interval == SampleOptions.guidance_interval:
        return guidance.guide(contrast, rule)
    return guidance.interval(contrast, rule, scales["low"], scales["high"])


def conversions(run: DenoiserRun) -> tuple[guidance.Convert, guidance.Convert]:
    """(prediction to x0, x0 to prediction), each of (z_t, it, t)."""
    process, name = make_process(run.process), run.objective.parameterisation

    def to_x0(z_t: jax.Array, prediction: jax.Array, t: jax.Array) -> jax.Array:
        return x0_and_eps(process, name, z_t, prediction, t)[0]

    def from_x0(z_t: jax.Array, x0: jax.Array, t: jax.Array) -> jax.Array:
        return target(process, name, *x0_and_eps(process, "x0", z_t, x0, t), t)

    return to_x0, from_x0


def decoding_keys(
    options: SampleOptions, numbers: dict[str, Any], index: jax.Array
) -> jax.Array | None:
    """Of the samples `index` [B], for a decoding that draws; the same for all of a sample's x0."""
    if options.decode == "mean":
        return None
    return example_keys(key_for(numbers["seed"], "posterior"), index)


def to_images(
    model: Model, first_stage_params: Any, z0: jax.Array, keys: jax.Array | None = None
) -> jax.Array:
    """Latents of the denoiser f32 [B,h,w,C] -> uint8 [B,H,W,3]; with keys [B] resampled."""
    z = model.codec.decode(z0, keys)
    return autoencoder.to_uint8(autoencoder.decode(model.first_stage.config, first_stage_params, z))


Decoder = Callable[[Any, dict[str, Any], dict[str, Any], jax.Array, int], jax.Array]


def compile_decoder(model: Model, options: SampleOptions) -> Decoder:
    """(weights_of, numbers_of, rows, x0 f32 [B,F,h,w,C], which of F) -> images uint8 [B,H,W,3]."""

    def decode(weights, numbers, rows, frames, which):
        with use_mesh(model.mesh):
            keys = decoding_keys(options, numbers, rows["index"])
            return to_images(model, weights["first_stage"], frames[:, which], keys)

    return jax.jit(decode, out_shardings=batch_sharding(model.mesh))
