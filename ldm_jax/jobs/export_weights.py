"""`ldm export`: a first stage becomes a model that diffusers reads."""

from pathlib import Path

import jax

from ldm_jax.errors import InputError
from ldm_jax.interop import diffusers
from ldm_jax.jobs.first_stage import load_first_stage
from ldm_jax.sharding import MeshConfig, host_array, make_mesh
from ldm_jax.train.run_dir import read_run


def run(workdir: Path, out: Path) -> None:
    """Writes the newest weights of an autoencoder run (its average, if it keeps one) to `out`.

    An imported model gets back what its config.json said of scaling and sample size. Raises
    InputError for a folder that holds something, and for a model that diffusers cannot express.
    """
    if jax.process_count() > 1:
        raise InputError("an export is the work of one process; start it without --distributed")
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    first_stage = load_first_stage(workdir, mesh)
    notes = read_run(workdir).get("imported", {}).get("diffusers", {})
    params = jax.tree.map(host_array, first_stage.params)
    diffusers.write_folder(Path(out), first_stage.config, params, notes)
