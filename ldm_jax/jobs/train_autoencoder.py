"""`ldm train-autoencoder`: images to a first stage."""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from clu import parameter_overview

from ldm_jax.data import images, order, stream
from ldm_jax.jobs.settings import AutoencoderRun, loop_config
from ldm_jax.keys import key_for
from ldm_jax.models import autoencoder
from ldm_jax.sharding import check_batch, make_mesh, process_slice
from ldm_jax.train import loop, optim, steps
from ldm_jax.train.run_dir import open_run
from ldm_jax.train.state import TrainState, init_state


def run(config: AutoencoderRun, workdir: Path, devices: Sequence[jax.Device] | None = None) -> TrainState:
    """Trains, or goes on, in `workdir`, on `devices` (None: all); refusals come before any writing."""
    loop_settings = loop_config(config)
    mesh = make_mesh(config.mesh, devices)
    check_batch(config.batch_size, mesh)
    source = images.open_images(config.images, "train", augment=True, seed=config.seed)
    data = {"listing": source.listing(), "num_examples": len(source)}
    open_run(workdir, "train-autoencoder", config, mesh, data)

    optimizer = optim.make_optimizer(config.optim, config.num_steps)
    state, shardings = init_state(
        lambda: autoencoder.init(config.model, key_for(config.seed, "init")),
        autoencoder.axes(config.model),
        optimizer,
        mesh,
        with_ema=config.ema.decay > 0,
    )
    if jax.process_index() == 0:
        print(parameter_overview.get_parameter_overview(state.params, include_stats=False), file=sys.stderr)
    step = steps.make_step(
        steps.autoencoder_loss(config.model, config.loss, config.seed),
        optimizer,
        optim.learning_rate(config.optim, config.num_steps),
        config.ema,
        mesh,
        shardings,
    )
    index, count = process_slice(config.batch_size, mesh)
    read = lambda indices, positions: {"image": source.read(indices, positions)["image"]}  # noqa: E731
    return loop.train(
        loop_settings,
        workdir=workdir,
        name="train-autoencoder",
        state=state,
        step=step,
        batches=lambda start: stream.batches(
            read,
            order.Order(len(source), config.seed),
            config.batch_size,
            start_step=start,
            shard_index=index,
            shard_count=count,
            num_threads=config.data_threads,
        ),
        batch_size=config.batch_size,
        mesh=mesh,
    )
