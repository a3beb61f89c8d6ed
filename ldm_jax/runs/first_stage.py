"""A trained first stage as later jobs need it: settings, weights and what identifies them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax.errors import InputError
from ldm_jax.files import digest_of
from ldm_jax.models import autoencoder
from ldm_jax.runs.config_files import build
from ldm_jax.runs.settings import AutoencoderRun
from ldm_jax.runs.workdir import read_run
from ldm_jax.sharding import abstract_params, host_array
from ldm_jax.train.checkpoint import load_weights


@dataclasses.dataclass(frozen=True)
class FirstStage:
    run: AutoencoderRun
    params: Any
    step: int
    encoder_hash: str  # sha256 of the encoder's weights: names what its latents mean

    @property
    def config(self) -> autoencoder.AutoencoderConfig:
        return self.run.model


def load_first_stage(
    workdir: str | Path, mesh: Mesh, *, step: int = -1, weights: str = "auto"
) -> FirstStage:
    """The weights of an autoencoder run, on the mesh.

    Those of the checkpoint `step`, -1 = the newest: "ema", "params", or "auto", the average when
    there is one.
    """
    record = read_run(Path(workdir))
    if record["job"] != "train-autoencoder":
        raise InputError(
            f"workdir {workdir} belongs to `ldm {record['job']}`; give one of "
            "`ldm train-autoencoder`"
        )
    run = build(AutoencoderRun, record["config"])
    if run.model.latent == "identity":
        params = {"encoder": {}, "decoder": {}}
        return FirstStage(run, params, 0, tree_hash(params["encoder"]))
    axes = autoencoder.axes(run.model)
    like = abstract_params(lambda key: autoencoder.init(run.model, key), axes, mesh)
    which = weights if weights != "auto" else "ema" if run.ema.decay else "params"
    found = load_weights(Path(workdir), like, which=which, step=None if step == -1 else step)
    return FirstStage(run, found.params, found.step, tree_hash(found.params["encoder"]))


def tree_hash(params: Any) -> str:
    """sha256 over names, shapes and values, in the order of the names."""

    def parts() -> Iterator[str | bytes]:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
            array = np.ascontiguousarray(host_array(leaf))
            yield f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n"
            yield array.tobytes()

    return digest_of(parts())
