"""`ldm import`: a first stage of another library becomes a run directory."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from ldm_jax.errors import InputError
from ldm_jax.files import sha256, write_json
from ldm_jax.interop import compvis, diffusers
from ldm_jax.interop.autoencoder_names import compvis_names, diffusers_names, shapes
from ldm_jax.interop.names import to_ours
from ldm_jax.runs import config_files
from ldm_jax.runs.config_files import to_json
from ldm_jax.runs.settings import AutoencoderRun
from ldm_jax.runs.workdir import describe
from ldm_jax.sharding import MeshConfig, make_mesh
from ldm_jax.train import ema
from ldm_jax.train.checkpoint import save_params


def run(source: Path, workdir: Path, config: str, overrides: list[str]) -> None:
    """Makes `workdir` a run of `train-autoencoder` whose checkpoint is the weights in `source`.

    A folder of diffusers brings its architecture, and `config` (FILE:VARIANT, or "") the rest; a
    file in CompVis' names needs a `config` for both. Raises InputError before anything is written.
    """
    source, workdir = Path(source), Path(workdir)
    if jax.process_count() > 1:
        raise InputError("an import is the work of one process; start it without --distributed")
    if not source.exists():
        raise InputError(f"{source} does not exist; check --from")
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise InputError(f"workdir {workdir} is not empty; import into a new one")
    values = config_files.load_config_file(config) if config else {}
    if source.is_dir():
        fields = diffusers.read_config(source)
        run_config = _run_config(_with_architecture(values, fields), overrides)
        names, tensors = diffusers_names(run_config.model), diffusers.read_tensors(source)
        file = source / diffusers.WEIGHTS
        origin = {"format": fields["_class_name"], "diffusers": diffusers.kept(fields)}
    else:
        if not config:
            raise InputError(
                f"{source} does not say its architecture; give --config=FILE:VARIANT, such as "
                "configs/autoencoder.py:kl-f8"
            )
        run_config = _run_config(values, overrides)
        names, tensors = compvis_names(run_config.model), compvis.read_file(source)
        file, origin = source, {"format": "CompVis"}
    params = to_ours(names, tensors, shapes(run_config.model))
    imported = {"source": str(file), "sha256": sha256(file), **origin}
    record = describe("train-autoencoder", to_json(run_config), make_mesh(MeshConfig()), {})
    save_params(workdir, jax.tree.map(jax.numpy.asarray, params), 0, {"imported": imported})
    # Last, so that a workdir which has it is whole.
    write_json(workdir / "run.json", record | {"imported": imported})
    print(workdir)


def _run_config(values: dict[str, Any], overrides: list[str]) -> AutoencoderRun:
    run_config = config_files.apply_overrides(AutoencoderRun, values, overrides)
    assert isinstance(run_config, AutoencoderRun)
    return dataclasses.replace(run_config, ema=ema.EmaConfig(decay=0.0))


def _with_architecture(values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    images = {"source": "folder", **values.get("images", {})}
    model = diffusers.architecture(fields, images.get("resolution", 0))
    model_values = values.get("model", {})
    if "quantizer" in model:
        model["quantizer"] = {**model_values.get("quantizer", {}), **model["quantizer"]}
    images["resolution"] = model["resolution"]
    # Nothing is trained here, so no model is too small for a loss.
    loss = {"perceptual_weight": 0.0, **values.get("loss", {})}
    return {**values, "images": images, "model": {**model_values, **model}, "loss": loss}
