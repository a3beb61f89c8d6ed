"""`ldm export`: a first stage becomes a model that diffusers reads."""

from pathlib import Path
from typing import Any

import jax

from ldm_jax.data.records.manifest import MANIFEST, load_manifest
from ldm_jax.errors import InputError
from ldm_jax.interop import diffusers
from ldm_jax.runs.first_stage import FirstStage, load_first_stage
from ldm_jax.runs.workdir import read_run
from ldm_jax.sharding import MeshConfig, host_array, make_mesh


def run(workdir: Path, out: Path) -> None:
    """Writes the newest weights of an autoencoder run (its average, if it keeps one) to `out`.

    An imported model gets back what its config.json said of scaling and sample size; another is
    scaled to unit deviation where its latents are cached, and not at all elsewhere. Raises
    InputError for a folder that holds something, and for a model that diffusers cannot express.
    """
    if jax.process_count() > 1:
        raise InputError("an export is the work of one process; start it without --distributed")
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    first_stage = load_first_stage(workdir, mesh)
    notes = read_run(workdir).get("imported", {}).get("diffusers") or _scaling(workdir, first_stage)
    params = jax.tree.map(host_array, first_stage.params)
    diffusers.write_folder(Path(out), first_stage.config, params, notes)
    print(out)


def _scaling(workdir: Path, first_stage: FirstStage) -> dict[str, Any]:
    """The factor that the "global" whitening of the workdir's own cache divides by."""
    cache = Path(workdir) / "latents" / "train"
    if not (cache / MANIFEST).exists():
        return {}
    manifest = load_manifest(cache)
    if manifest.encoder_hash != first_stage.encoder_hash:
        return {}
    return {"scaling_factor": 1 / manifest.global_std}
