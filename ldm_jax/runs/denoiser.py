"""What `ldm sample` draws from: a denoiser run, its first stage, and a run that guides it."""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ldm_jax.errors import InputError
from ldm_jax.models import conditions, denoiser
from ldm_jax.models.latents import Codec
from ldm_jax.runs.build import codec_of, facts_of_record
from ldm_jax.runs.config_files import build
from ldm_jax.runs.first_stage import FirstStage, load_first_stage
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.runs.workdir import read_run
from ldm_jax.sharding import MeshConfig, abstract_params, make_mesh
from ldm_jax.train.checkpoint import RunWeights, load_weights


@dataclasses.dataclass(frozen=True)
class WhichWeights:
    """Which checkpoint and average of a run is meant, and of the run that guides it."""

    step: int = -1  # -1 = the newest
    weights: str = "auto"  # "ema" | "params" | "ema-NAME" | "auto": the average when there is one
    guide_workdir: str = ""  # autoguidance away from this run; empty = the run itself
    guide_step: int = -1  # its checkpoint; -1 = its newest, of the run itself the one sampled
    guide_weights: str = "auto"  # its weights; with the two above left alone: no autoguidance

    @property
    def autoguided(self) -> bool:
        return (self.guide_workdir, self.guide_step, self.guide_weights) != ("", -1, "auto")


@dataclasses.dataclass(frozen=True)
class Guide:
    """A worse denoiser of the same latents: autoguidance leads away from what it says."""

    workdir: Path
    run: DenoiserRun
    params: Any
    step: int
    which: str


@dataclasses.dataclass(frozen=True)
class Model:
    """A denoiser run, its first stage and what lies between them, on a mesh."""

    run: DenoiserRun
    params: Any
    step: int
    which: str
    first_stage: FirstStage
    codec: Codec
    latent_shape: tuple[int, int, int]
    mesh: Mesh
    guide: Guide | None = None


def load_model(
    workdir: Path,
    which: WhichWeights = WhichWeights(),
    mesh_config: MeshConfig = MeshConfig(),
) -> Model:
    """What `ldm sample` needs; raises InputError where its parts do not fit each other."""
    for name in ("step", "guide_step"):
        if getattr(which, name) < -1:
            raise InputError(
                f"{name.replace('_', '-')} {getattr(which, name)} must be a checkpoint's; leave "
                "it out for the newest"
            )
    run, data = _read(workdir)
    guide_workdir = Path(which.guide_workdir or workdir)
    guide_run, its_data = _read(guide_workdir)
    _check_guide(guide_workdir, guide_run, its_data, run, data)
    mesh = make_mesh(mesh_config)
    first_stage = load_first_stage(run.autoencoder, mesh)
    if first_stage.encoder_hash != data["encoder_hash"]:
        raise InputError(
            f"autoencoder {run.autoencoder} has encoder_hash {first_stage.encoder_hash[:12]}, but "
            f"the denoiser saw latents of {data['encoder_hash'][:12]}; give back the weights "
            "it was trained with, or cache and train anew"
        )
    weights = _load(workdir, run, which.weights, which.step, mesh)
    guide = None
    if which.autoguided:
        guide = _load_guide(workdir, guide_workdir, guide_run, which, weights, mesh)
    facts = facts_of_record({"data": data}, first_stage.config.posterior)
    codec, shape = codec_of(run, facts), facts.latent_shape
    return Model(
        run, weights.params, weights.step, weights.which, first_stage, codec, shape, mesh, guide
    )


def _load_guide(
    workdir: Path,
    where: Path,
    run: DenoiserRun,
    which: WhichWeights,
    weights: RunWeights,
    mesh: Mesh,
) -> Guide:
    itself = where.resolve() == Path(workdir).resolve()
    step = weights.step if itself and which.guide_step == -1 else which.guide_step
    found = _load(where, run, which.guide_weights, step, mesh)
    if itself and (found.step, found.which) == (weights.step, weights.which):
        raise InputError(
            f"guide {where} at step {found.step} with weights {found.which!r} is the model itself; "
            "give another --guide-step, --guide-weights or --guide-workdir"
        )
    return Guide(where, run, found.params, found.step, found.which)


def _check_guide(
    where: Path,
    guide: DenoiserRun,
    its_data: dict[str, Any],
    run: DenoiserRun,
    data: dict[str, Any],
) -> None:
    """Both must mean the same by a latent, a time, a prediction and a class."""
    same = {"codec": (guide.codec, run.codec)}
    same |= {name: (its_data[name], data[name]) for name in ("latent_shape", "whitening")}
    same |= {"encoder_hash": (its_data["encoder_hash"][:12], data["encoder_hash"][:12])}
    same |= {"process": (guide.process, run.process)}
    same |= {"parameterisation": (guide.objective.parameterisation, run.objective.parameterisation)}
    if guide.model.conditions:
        theirs, ours = (conditions.entries(r.model.conditions) for r in (guide, run))
        same |= {"conditions": (theirs, ours), "classes": (_classes(guide), _classes(run))}
    for name, (theirs, ours) in same.items():
        if theirs != ours:
            raise InputError(
                f"guide {where} has {name} {theirs}, but the model has {ours}; give as "
                "--guide-workdir a run on the same latents, process and classes"
            )


def _classes(run: DenoiserRun) -> dict[str, int]:
    counts = {n: getattr(c, "num_classes", 0) for n, c in run.model.conditions.items()}
    return {name: count for name, count in counts.items() if count}


def _read(workdir: Path) -> tuple[DenoiserRun, dict[str, Any]]:
    record = read_run(workdir, "train-denoiser")
    return build(DenoiserRun, record["config"]), record["data"]


def _load(workdir: Path, run: DenoiserRun, which: str, step: int, mesh: Mesh) -> RunWeights:
    axes = denoiser.axes(run.model)
    like = abstract_params(lambda key: denoiser.init(run.model, key), axes, mesh)
    which, at = run.weights_named(which), None if step == -1 else step
    return load_weights(workdir, like, which=which, step=at)
