"""`ldm ema`: the average of any width, from the snapshots that a training kept."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.files import write_json
from ldm_jax.models import autoencoder, denoiser
from ldm_jax.runs.config_files import build, to_json
from ldm_jax.runs.settings import AutoencoderRun, DenoiserRun
from ldm_jax.runs.workdir import read_run
from ldm_jax.sharding import MeshConfig, abstract_params, make_mesh
from ldm_jax.train.checkpoint import Snapshots, save_params
from ldm_jax.train.ema import coefficients, gamma_of

KINDS: dict[str, Any] = {
    "train-autoencoder": (AutoencoderRun, autoencoder),
    "train-denoiser": (DenoiserRun, denoiser),
}
NO_AVERAGE = {"decay": 0.0, "more": [], "power": [], "snapshot_every": 0}


def run(
    workdir: Path,
    width: float,
    step: int = -1,
    out: Path | None = None,
    mesh_config: MeshConfig = MeshConfig(data=1, fsdp=-1),
) -> Path:
    """Writes a run directory that holds the average of `width` (sigma_rel) as of `step` (-1: last).

    `ldm sample`, `ldm evaluate` and all that read weights take it as their workdir; by default it
    is `ema/width-WIDTH-stepSTEP` in `workdir`.
    """
    gamma_of(width)
    record = read_run(workdir)
    if not (Path(workdir) / "ema" / "snapshots").is_dir():
        raise InputError(
            f"workdir {workdir} holds no snapshots of averages; train with "
            "--config.ema.power='(0.05, 0.1)' and --config.ema.snapshot_every=STEPS"
        )
    snapshots = Snapshots(workdir, read_only=True)
    try:
        kept = snapshots.kept()
        if not kept:
            raise InputError(f"workdir {workdir} holds no whole snapshot yet; train on")
        step = kept[-1][0] if step == -1 else step
        if not kept[0][0] <= step <= kept[-1][0]:
            raise InputError(
                f"step {step} must be in {kept[0][0]}..{kept[-1][0]}, the steps that workdir "
                f"{workdir} has snapshots of; leave it out for the last"
            )
        used = [(s, w) for s, w in kept if s <= step]
        weights, error = coefficients(used, step, width)
        if out is None:
            out = Path(workdir) / "ema" / f"width-{width:g}-step{step}"
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out {out} is not empty; remove it or give another name")
        cls, model = KINDS[record["job"]]
        config = build(cls, record["config"]).model
        mesh = make_mesh(mesh_config)
        like = abstract_params(lambda key: model.init(config, key), model.axes(config), mesh)
        params = combine(snapshots, used, weights, like)
    finally:
        snapshots.close()
    origin = {
        "source": str(Path(workdir).absolute()),
        "ema_width": width,
        "step": step,
        "snapshots": len(used),
        "profile_error": error,
        "sum_of_sizes": float(np.abs(weights).sum()),
    }
    save_params(out, params, step, {"imported": origin})
    if jax.process_index() == 0:
        # Last, so that a workdir which has it is whole.
        changed = record["config"] | {"ema": record["config"]["ema"] | NO_AVERAGE}
        config = to_json(build(cls, changed))
        write_json(out / "run.json", record | {"config": config, "imported": origin})
        print(
            f"{len(used)} averages make the one of width {width:g} at step {step}; its profile is "
            f"off by {100 * error:.3f} %",
            file=sys.stderr,
        )
        print(out)
    return out


def combine(
    snapshots: Snapshots, used: Sequence[tuple[int, float]], weights: np.ndarray, like: Any
) -> Any:
    """The weighted sum of snapshots (step, width), f32 and placed as `like`, one at a time."""
    assert math.isclose(weights.sum(), 1.0), f"weights sum to {weights.sum()}, not 1"
    shardings = jax.tree.map(lambda x: x.sharding, like)

    def zeros():
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)

    def plus(total, tree, weight):
        return jax.tree.map(lambda a, b: a + weight * b, total, tree)

    total = jax.jit(zeros, out_shardings=shardings)()
    add = jax.jit(plus, donate_argnums=0)
    for (step, width), weight in zip(used, weights, strict=True):
        total = add(total, snapshots.load(step, width, like), jnp.float32(weight))
    return total
