"""`ldm train-autoencoder`: images to a first stage."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from ldm_jax.data.images import open_images
from ldm_jax.data.order import Order
from ldm_jax.jobs.settings import AutoencoderRun
from ldm_jax.jobs.training import check_traces, fit
from ldm_jax.models import autoencoder
from ldm_jax.sharding import check_batch, make_mesh
from ldm_jax.train.run_dir import open_run
from ldm_jax.train.state import TrainState
from ldm_jax.train.steps import autoencoder_loss


def run(
    config: AutoencoderRun, workdir: Path, devices: Sequence[jax.Device] | None = None
) -> TrainState:
    """Trains, or goes on, in `workdir`, on `devices` (None: all); refusals precede any writing."""
    mesh = make_mesh(config.mesh, devices)
    check_batch(config.batch_size, mesh)
    source = open_images(config.images, "train", augment=True, seed=config.seed)
    data = {"listing": source.listing(), "num_examples": len(source)}
    loss = autoencoder_loss(config.model, config.loss, config.seed)
    side = config.model.resolution
    shape = jax.ShapeDtypeStruct((config.batch_size, side, side, 3), "uint8")
    check_traces(loss, lambda key: autoencoder.init(config.model, key), {"image": shape})
    open_run(workdir, "train-autoencoder", config, mesh, data)

    def read(indices: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": source.read(indices, positions)["image"]}

    return fit(
        "train-autoencoder",
        config,
        workdir,
        mesh,
        init=lambda key: autoencoder.init(config.model, key),
        axes=autoencoder.axes(config.model),
        loss=loss,
        read=read,
        order=Order(len(source), config.seed),
    )
