"""`ldm sample`: a trained denoiser and its first stage to images."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ldm_jax.diffusion import guidance, samplers
from ldm_jax.diffusion.grid import make_grid
from ldm_jax.diffusion.parameterisation import predictor
from ldm_jax.diffusion.process import at_network, make_process
from ldm_jax.errors import InputError
from ldm_jax.eval.images_out import save_grid, save_npz
from ldm_jax.jobs.first_stage import load_first_stage
from ldm_jax.jobs.settings import DenoiserRun, build
from ldm_jax.keys import example_keys, key_for, normal_like
from ldm_jax.models import autoencoder, conditioners, denoiser, latents
from ldm_jax.sharding import (
    MeshConfig,
    abstract_params,
    batch_sharding,
    check_batch,
    host_array,
    make_mesh,
    use_mesh,
)
from ldm_jax.train.checkpoint import load_weights
from ldm_jax.train.run_dir import read_run, write_json


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to draw. Sample i depends on (seed, i) and these alone, not on batch size or mesh."""

    num: int = 16
    steps: int = 50
    sampler: str = "ddim"
    eta: float = -1.0  # noise of the sampler, for those that have it; -1 = its own default
    spacing: str = "auto"  # of the steps, as "trailing" or "karras:7"; "auto" = the process' own
    temperature: float = 1.0  # multiplies the noise of a stochastic sampler's steps
    guidance: float = 1.0  # 1 = conditional model only, >1 extrapolates
    classes: tuple[int, ...] = ()  # sample i is of class classes[i % len]; empty = all in turn
    seed: int = 0
    noise: str = ""  # .npy f32 [N,H,W,C] of initial noise; empty = drawn from the seed
    batch_size: int = 0  # images at a time over all devices; 0 = min(num, 100), rounded up to fit
    weights: str = "auto"  # "ema" | "params" | "ema-NAME" | "auto": the average when there is one
    step: int = -1  # checkpoint; -1 = the newest


@dataclasses.dataclass(frozen=True)
class Model:
    """A denoiser run, its first stage and what lies between them, on a mesh."""

    run: DenoiserRun
    params: Any
    step: int
    which: str
    first_stage: Any
    whitening: latents.Whitening
    latent_shape: tuple[int, int, int]
    mesh: Mesh


def load_model(workdir: Path, settings: Settings, mesh_config: MeshConfig = MeshConfig()) -> Model:
    """What `ldm sample` needs; raises InputError where first stage and denoiser do not fit."""
    record = read_run(workdir)
    if record["job"] != "train-denoiser":
        raise InputError(
            f"workdir {workdir} belongs to `ldm {record['job']}`; give one of `ldm train-denoiser`"
        )
    run, data = build(DenoiserRun, record["config"]), record["data"]
    mesh = make_mesh(mesh_config)
    first_stage = load_first_stage(run.autoencoder, mesh)
    if first_stage.encoder_hash != data["encoder_hash"]:
        raise InputError(
            f"autoencoder {run.autoencoder} has encoder_hash {first_stage.encoder_hash[:12]}, but "
            f"the denoiser saw latents of {data['encoder_hash'][:12]}; give back the weights "
            "it was trained with, or cache and train anew"
        )
    axes = denoiser.axes(run.model)
    like = abstract_params(lambda key: denoiser.init(run.model, key), axes, mesh)
    if settings.step < -1:
        raise InputError(
            f"step {settings.step} must be a checkpoint's; leave it out for the newest"
        )
    step = None if settings.step == -1 else settings.step
    which = settings.weights
    if which == "auto":
        which = "ema" if run.ema.decay else "params"
    weights = load_weights(workdir, like, which=which, step=step)
    whitening = latents.Whitening(*(tuple(data["whitening"][k]) for k in ("shift", "scale")))
    shape = tuple(data["latent_shape"])
    return Model(
        run, weights.params, weights.step, weights.which, first_stage, whitening, shape, mesh
    )


def check(settings: Settings, model: Model) -> Settings:
    """Settings with their defaults filled in; raises InputError for what the model can't do."""
    conditioner = model.run.model.conditioner
    if settings.sampler not in samplers.SAMPLERS:
        raise InputError(
            f"sampler {settings.sampler!r} is unknown; choose one of {sorted(samplers.SAMPLERS)}"
        )
    process = make_process(model.run.process)
    if settings.steps < 1 or (process.discrete and settings.steps > process.num_timesteps):
        most = process.num_timesteps or "any number"
        raise InputError(f"steps {settings.steps} must be in 1..{most}")
    make_grid(process, settings.steps, settings.spacing)
    sampler_options(settings)
    if not (math.isfinite(settings.guidance) and settings.guidance >= 0):
        raise InputError(
            f"guidance {settings.guidance} must be finite and not negative; 1 is the plain model"
        )
    if settings.guidance != 1 and model.run.loss.label_dropout == 0:
        raise InputError(
            f"guidance {settings.guidance}: this denoiser was trained with label_dropout 0 and "
            "knows no null condition; leave --guidance out"
        )
    if not 0 <= settings.seed < 2**32:
        raise InputError(f"seed {settings.seed} must be in 0..2**32 - 1")
    if settings.num < 1:
        raise InputError(f"num {settings.num} must be at least 1")
    classes = settings.classes
    if conditioner.kind == "none":
        if classes or settings.guidance != 1:
            raise InputError("this denoiser is unconditional; leave out --classes and --guidance")
    else:
        classes = classes or tuple(range(conditioner.num_classes))
        bad = [c for c in classes if not 0 <= c < conditioner.num_classes]
        if bad:
            raise InputError(
                f"class {bad[0]} is unknown; this denoiser has classes "
                f"0..{conditioner.num_classes - 1}"
            )
    ways = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    batch = settings.batch_size or -(-min(settings.num, 100) // ways) * ways
    check_batch(batch, model.mesh)
    return dataclasses.replace(settings, classes=classes, batch_size=batch)


def sampler_options(settings: Settings) -> dict[str, float]:
    """The options that the sampler is given; raises InputError for one that it does not have."""
    if settings.eta != -1 and not 0 <= settings.eta <= 1:
        raise InputError(
            f"eta {settings.eta} must be in [0, 1]; leave it out for the sampler's own"
        )
    if not (math.isfinite(settings.temperature) and settings.temperature >= 0):
        raise InputError(
            f"temperature {settings.temperature} must be finite and not negative; 1 is plain"
        )
    asked = {"eta": (settings.eta, -1), "temperature": (settings.temperature, 1)}
    asked = {name: value for name, (value, neutral) in asked.items() if value != neutral}
    for name, value in asked.items():
        if name not in samplers.options(settings.sampler):
            having = [s for s in samplers.SAMPLERS if name in samplers.options(s)]
            raise InputError(
                f"{name} {value}: sampler {settings.sampler!r} has none; leave it out, or use one "
                f"of {having}"
            )
    return asked


def initial_noise(settings: Settings, model: Model) -> np.ndarray | None:
    """The user's noise f32 [num,H,W,C], checked; None when it is drawn from the seed."""
    if not settings.noise:
        return None
    try:
        noise = np.load(settings.noise, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"noise file {settings.noise} cannot be read: {error}") from error
    want = (settings.num, *model.latent_shape)
    if noise.shape != want or noise.dtype.kind != "f" or not np.isfinite(noise).all():
        raise InputError(
            f"noise file {settings.noise} has shape {noise.shape} and type {noise.dtype}; it must "
            f"hold finite floats of shape {want}"
        )
    return np.asarray(noise, np.float32)


def sample(model: Model, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [num,H,W,3] and their classes int64 [num] (zeros for an unconditional model)."""
    settings = check(settings, model)
    noise = initial_noise(settings, model)
    draw = compile_sampler(model, settings)
    spread = lambda a: jax.device_put(a, batch_sharding(model.mesh))  # noqa: E731
    images, batch = [], settings.batch_size
    classes = settings.classes or (0,)
    for start in range(0, settings.num, batch):
        indices = np.arange(start, start + batch)
        labels = np.asarray(classes, np.int32)[indices % len(classes)]
        z_T = None
        if noise is not None:
            z_T = spread(noise[np.minimum(indices, settings.num - 1)])
        out = draw(
            model.params,
            model.first_stage.params,
            jnp.uint32(settings.seed),
            spread(indices.astype(np.int32)),
            spread(labels),
            jnp.float32(settings.guidance),
            z_T,
        )
        images.append(host_array(out))
    labels = np.asarray(classes, np.int64)[np.arange(settings.num) % len(classes)]
    return np.concatenate(images)[: settings.num], labels


def compile_sampler(model: Model, settings: Settings):
    """(params, first-stage params, seed, indices [B], labels [B], scale, z_T or None) -> images.

    Seed, classes and guidance scale are traced: other values of them do not compile anew.
    """
    run, first_stage = model.run, model.first_stage.config
    process = make_process(run.process)
    grid = make_grid(process, settings.steps, settings.spacing)
    solver, options = samplers.SAMPLERS[settings.sampler], sampler_options(settings)
    guided = settings.guidance != 1
    conditional = run.model.conditioner.kind != "none"

    def draw(params, first_stage_params, seed, indices, labels, scale, z_T):
        with use_mesh(model.mesh):
            keys = lambda purpose: example_keys(key_for(seed, purpose), indices)  # noqa: E731
            shape = jax.ShapeDtypeStruct((indices.shape[0], *model.latent_shape), jnp.float32)
            z_T = normal_like(keys("initial_noise"), shape) if z_T is None else z_T
            network = lambda z_t, t, c: denoiser.apply(run.model, params, z_t, t, c)  # noqa: E731
            denoise = at_network(process, network)
            if guided:
                null = conditioners.null(run.model.conditioner, indices.shape[0])
                denoise = guidance.classifier_free(denoise, scale, null)
            z0 = solver(
                predictor(process, run.objective.parameterisation, denoise),
                grid,
                grid.start(z_T),
                {"label": labels} if conditional else {},
                keys("sampler_noise"),
                **options,
            )
            x = autoencoder.decode(first_stage, first_stage_params, model.whitening.unwhiten(z0))
            return autoencoder.to_uint8(x)

    return jax.jit(draw, out_shardings=batch_sharding(model.mesh))


def run(workdir: Path, settings: Settings, out: Path | None = None) -> Path:
    """Writes `OUT.npz` (layout of ADM's evaluator) and a grid `OUT.png`; returns the npz."""
    if out is not None:
        out = Path(out).with_suffix("") if Path(out).suffix in (".npz", ".png") else Path(out)
        if out.with_name(f"{out.name}.npz").exists() or out.is_dir():
            raise InputError(f"--out {out} exists; remove it or give another name")
        out.parent.mkdir(parents=True, exist_ok=True)
    model = load_model(workdir, settings)
    if out is None:
        out = Path(workdir) / "samples" / f"step{model.step}-{digest(settings)}"
        out.parent.mkdir(parents=True, exist_ok=True)
    images, labels = sample(model, settings)
    path = out.with_name(f"{out.name}.npz")
    if jax.process_index() == 0:
        save_npz(images, labels, path)
        columns = grid_columns(settings, labels)
        save_grid(images[:400], out.with_name(f"{out.name}.png"), columns=columns)
        record = dataclasses.asdict(settings) | {"step": model.step, "weights": model.which}
        write_json(out.with_name(f"{out.name}.json"), record)
    return path


def digest(settings: Settings) -> str:
    """A short name of what was asked for, so that other settings never overwrite a result."""
    text = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    return f"seed{settings.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def grid_columns(settings: Settings, labels: Sequence[int]) -> int:
    """One column a class when classes come in turn; else about square."""
    classes = len(settings.classes) or int(max(labels)) + 1
    return classes if 1 < classes <= 40 else int(np.ceil(np.sqrt(min(len(labels), 400))))
