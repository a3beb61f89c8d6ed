"""The one program that `ldm sample` runs, jitted over the mesh: from noise or images to images."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import samplers
from ldm_jax.diffusion.grid import Grid, make_grid
from ldm_jax.diffusion.parameterisation import (
    Predict,
    clipped,
    dynamically_clipped,
    predictor,
)
from ldm_jax.diffusion.process import Denoiser, Process, at_network, make_process
from ldm_jax.diffusion.tiling import tiled
from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, key_for, normal_like
from ldm_jax.models import autoencoder, conditions, denoiser
from ldm_jax.runs.denoiser import Model
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sampling.guidance import guidance_scales, guided
from ldm_jax.sampling.inputs import known_latents, latent_shape, latent_tiles
from ldm_jax.sampling.options import SampleOptions, sampler_options
from ldm_jax.sharding import batch_sharding, use_mesh

Program = Callable[[Any, dict[str, Any], dict[str, Any]], tuple[jax.Array, jax.Array | None]]


def steps_taken(settings: SampleOptions, process: Process) -> Grid:
    """The grid, from where `strength` begins on; InputError for one that cannot be sampled on."""
    total = settings.steps
    if total < 1 or (process.discrete and total > process.num_timesteps):
        most = process.num_timesteps or "any number"
        raise InputError(f"steps {total} must be in 1..{most}")
    grid = make_grid(process, total, settings.spacing)
    taken = round(settings.strength * total)
    if not taken:
        raise InputError(
            f"strength {settings.strength} of {total} steps is none of them; give at least "
            f"{1 / total:.3g}, or more steps"
        )
    if settings.progressive > taken:
        raise InputError(
            f"progressive {settings.progressive} is more than the {taken} steps that are taken; "
            f"{max(1, taken // 8)} shows them in about 8 pictures"
        )
    return grid if taken == total else grid.after(total - taken)


def check_steps(settings: SampleOptions, process: Process) -> None:
    """Raises InputError for steps that the sampler cannot take on this process."""
    grid, keys = steps_taken(settings, process), jax.eval_shape(jax.random.split, jax.random.key(0))
    sampler = lambda z, keys: samplers.SAMPLERS[settings.sampler](  # noqa: E731
        lambda z_t, t, cond: (z_t, z_t), grid, z, {}, keys, **sampler_options(settings)
    )
    jax.eval_shape(sampler, jax.ShapeDtypeStruct((2, 1, 1, 1), jnp.float32), keys)


def weights_of(model: Model) -> dict[str, Any]:
    """The parameters that a program is given first."""
    return {
        "denoiser": model.params,
        "first_stage": model.first_stage.params,
        "guide": model.guide.params if model.guide else {},
    }


def numbers_of(settings: SampleOptions, process: Process) -> dict[str, Any]:
    """The scalars that a program is given next; other ones do not compile anew."""
    return {
        "seed": np.uint32(settings.seed),
        "guidance": guidance_scales(settings, process),
        "bound": np.float32(settings.clip_x0),
        "quantile": np.float32(settings.threshold_x0),
    }


def compile_sampler(model: Model, settings: SampleOptions) -> Program:
    """(weights_of, numbers_of, rows) -> images uint8 [B,H,W,3], predicted x0 f32 [B,F,h,w,C].

    Rows are `index` and `label` int32 [B] and, where settings ask for them, `noise` f32 [B,h,w,C],
    `image` uint8 [B,H,W,3] and `mask` bool [B,H,W]. The x0 are None unless they are asked for.
    """
    run, first_stage = model.run, model.first_stage.config
    process = make_process(run.process)
    grid, shape = steps_taken(settings, process), latent_shape(settings, model)
    solver, options = samplers.SAMPLERS[settings.sampler], sampler_options(settings)
    entries = conditions.entries(run.model.conditions)
    noised = settings.strength < 1
    if settings.progressive:
        options |= {"every": settings.progressive}

    def draw(weights, numbers, rows):
        with use_mesh(model.mesh):
            index, more = rows["index"], {}
            keys = lambda purpose: example_keys(key_for(numbers["seed"], purpose), index)  # noqa: E731
            like = jax.ShapeDtypeStruct((len(index), *shape), jnp.float32)
            noise = rows["noise"] if "noise" in rows else normal_like(keys("initial_noise"), like)
            z0 = None
            if "image" in rows:
                x = autoencoder.to_unit(rows["image"])
                moments = autoencoder.encode(first_stage, weights["first_stage"], x)
                z0 = model.codec.encode_mode(moments)
            if "mask" in rows:
                more["known"] = samplers.Known(z0, known_latents(rows["mask"], first_stage.factor))
            cond = {name: rows[name] for name in entries}
            drawn = solver(
                prediction(model, settings, process, weights, numbers, cond),
                grid,
                grid.start(noise, z0 if noised else None),
                cond,
                keys("sampler_noise"),
                **options,
                **more,
            )
            z0, frames = drawn if settings.progressive else (drawn, None)
            images = to_images(model, weights["first_stage"], z0)
            if "mask" in rows:
                images = jnp.where(rows["mask"][..., None], images, rows["image"])
            return images, None if frames is None else jnp.moveaxis(frames, 0, 1)

    return jax.jit(draw, out_shardings=batch_sharding(model.mesh))


def prediction(
    model: Model,
    settings: SampleOptions,
    process: Process,
    weights: dict[str, Any],
    numbers: dict[str, Any],
    cond: conditions.Cond,
) -> Predict:
    """What the sampler speaks to: the network, in tiles, guided, and its x0 limited."""
    network = lambda run, params: at_network(  # noqa: E731
        process, in_tiles(settings, model, run, params)
    )
    guide = network(model.guide.run, weights["guide"]) if settings.autoguided else None
    denoise = guided(
        settings,
        model,
        process,
        network(model.run, weights["denoiser"]),
        guide,
        cond,
        numbers["guidance"],
    )
    predict = predictor(process, model.run.objective.parameterisation, denoise)
    if settings.threshold_x0:
        return dynamically_clipped(predict, process, numbers["quantile"], numbers["bound"])
    return clipped(predict, process, numbers["bound"]) if settings.clip_x0 else predict


def in_tiles(settings: SampleOptions, model: Model, run: DenoiserRun, params: Any) -> Denoiser:
    """The network of `run`, which is told nothing where it has no conditions."""
    entries = conditions.entries(run.model.conditions)

    def network(z_t: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        return denoiser.apply(run.model, params, z_t, t, {name: cond[name] for name in entries})

    return tiled(network, *latent_tiles(settings, model)) if settings.tile else network


def to_images(model: Model, first_stage_params: Any, z0: jax.Array) -> jax.Array:
    """Latents of the denoiser f32 [B,h,w,C] -> uint8 [B,H,W,3]."""
    z = model.codec.decode(z0)
    return autoencoder.to_uint8(autoencoder.decode(model.first_stage.config, first_stage_params, z))


def compile_decoder(model: Model) -> Callable[[Any, jax.Array, int], jax.Array]:
    """(first-stage params, predicted x0 f32 [B,F,h,w,C], which of F) -> uint8 [B,H,W,3]."""

    def decode(params, frames, which):
        with use_mesh(model.mesh):
            return to_images(model, params, frames[:, which])

    return jax.jit(decode, out_shardings=batch_sharding(model.mesh))
