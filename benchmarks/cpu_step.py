"""The demo's training step on one core of the CPU: beside PyTorch's, its copies, its compilation.

    python -m benchmarks.cpu_step

Needs the extra `torch` and diffusers. Forward and backward of the U-Net take turns with diffusers'
of the same weights, eager, channels last. The plain variants that the step is held against stand
here: group norm by its formula, and a guard that selects between an old and a new state.
"""

import os

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import contextlib
import dataclasses
import re
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.record import keep
from benchmarks.timing import by_turns, ratios
from configs import autoencoder, denoiser
from ldm_jax.interop.unet_names import unet_names
from ldm_jax.models import layers, unet
from ldm_jax.models.conditions import Signals
from ldm_jax.runs.build import denoiser_training, facts_of_config, resolve_widths
from ldm_jax.runs.config_files import build
from ldm_jax.runs.settings import AutoencoderRun, DenoiserRun
from ldm_jax.sharding import make_mesh
from ldm_jax.train import step as step_lib
from ldm_jax.train.state import TrainState
from ldm_jax.train.step import Seen, Training, make_trainer
from tests.parity import reference

os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # XLA makes a thread for each core it has

FIRST_STAGE = build(AutoencoderRun, autoencoder.get_config("digits").to_dict())
RUN = build(DenoiserRun, denoiser.get_config("digits").to_dict())
RUN = resolve_widths(RUN, facts_of_config(RUN, FIRST_STAGE.model))
SIDE, REPEATS, COMPILATIONS = 8, 20, 1
LIMITS = {"to_diffusers": 1.30, "copies_of_update": 10}


def plain_group_norm(x, scale, bias, groups, epsilon):
    """As the formula says, its gradient by autodiff."""
    y = x.astype(jnp.float32).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean = y.mean((1, 3), keepdims=True)
    variance = jnp.square(y - mean).mean((1, 3), keepdims=True)
    y = ((y - mean) * jax.lax.rsqrt(variance + epsilon)).reshape(x.shape)
    return (y * scale.reshape(1, 1, 1, -1) + bias.reshape(1, 1, 1, -1)).astype(x.dtype)


def select_finite(
    state: TrainState, update: Callable[[TrainState], TrainState], *values: jax.Array
) -> tuple[TrainState, jax.Array]:
    """The guard that makes both states and chooses between them leaf by leaf."""
    new = update(state)
    finite = jnp.stack([jnp.isfinite(v) for v in values]).all()
    kept = jax.tree.map(lambda o, n: jnp.where(finite, n, o), state, new)
    return dataclasses.replace(kept, step=new.step), 1.0 - finite


@contextlib.contextmanager
def plain():
    """While open, what is traced has the plain variants."""
    ours = layers.group_norm, step_lib.keep_finite
    layers.group_norm, step_lib.keep_finite = plain_group_norm, select_finite
    try:
        yield
    finally:
        layers.group_norm, step_lib.keep_finite = ours


def both_ways() -> dict[str, Callable[[], Any]]:
    """Forward and backward of one batch in ours and in diffusers; they agree before they count."""
    config, width = RUN.model.backbone, RUN.model.widths.tokens
    z, cotangent = (reference.draw(i, RUN.batch_size, SIDE, SIDE, 4) for i in (1, 2))
    context, t = reference.draw(3, RUN.batch_size, 1, width), np.arange(RUN.batch_size) * 10
    theirs = reference.randomize(reference.conditional_unet(config, width))
    theirs = theirs.to(memory_format=torch.channels_last)
    shapes = jax.eval_shape(lambda: unet.init(config, jax.random.key(0), RUN.model.widths))
    names = unet_names(config, width)
    params = jax.tree.map(jnp.asarray, reference.parameters(theirs, names, shapes))

    def value(params):
        return (unet.apply(config, params, z, t, Signals(tokens=context)) * cotangent).sum()

    compiled = jax.jit(jax.value_and_grad(value)).lower(params).compile()
    of_torch = [reference.to_torch(a) for a in (z, cotangent)]
    z_torch, cotangent_torch = (a.to(memory_format=torch.channels_last) for a in of_torch)
    arguments = torch.from_numpy(t), torch.from_numpy(context)

    def run_theirs():
        theirs.zero_grad(set_to_none=True)
        loss = (theirs(z_torch, arguments[0], arguments[1]).sample * cotangent_torch).sum()
        loss.backward()
        return loss.item()

    def run_ours():
        return jax.block_until_ready(compiled(params))

    np.testing.assert_allclose(run_ours()[0], run_theirs(), rtol=1e-3, atol=1e-2)
    return {"ours": run_ours, "diffusers": run_theirs}


def make_compile(training: Training) -> Callable[[], Any]:
    """() -> the step of this training, traced and compiled anew."""

    def compiled():
        trainer = make_trainer(training, make_mesh())
        state, frozen, batch = trainer.abstract_state, trainer.abstract_frozen, trainer.batch_spec
        return trainer.step.lower(state, frozen, batch).compile()

    return compiled


def half_square(trained, extra, frozen, batch, step):
    """A loss whose gradient is the parameters: the step is then its update and nothing else."""
    return 0.5 * sum(jnp.square(p).sum() for p in jax.tree.leaves(trained)), Seen({}, {})


def copies(compiled: Any) -> int:
    return len(re.findall(r"= \S+ copy\(", compiled.as_text()))


def medians(pairs: list, names: Any, unit: float) -> dict[str, float]:
    """Processor time of each of the two, in 1 / `unit` seconds."""
    return {
        name: round(unit * statistics.median(pair[i][1] for pair in pairs), 1)
        for i, name in enumerate(names)
    }


def main():
    torch.set_num_threads(1)
    runs = both_ways()
    pairs = by_turns(runs["ours"], runs["diffusers"], REPEATS)
    clock, processors = ratios(pairs)
    demo = denoiser_training(RUN, facts_of_config(RUN, FIRST_STAGE.model))
    step, update = (
        make_compile(training) for training in (demo, dataclasses.replace(demo, loss=half_square))
    )

    def plain_step():
        with plain():
            step()

    compilations = by_turns(step, plain_step, COMPILATIONS)
    made = {"ours": update()}
    with plain():
        made["plain"] = update()
    results = {
        "to_diffusers": {
            "processors": processors,
            "clock": clock,
            "milliseconds": medians(pairs, runs, 1e3),
        },
        "copies_of_update": {name: copies(compiled) for name, compiled in made.items()},
        "compile_to_plain": {
            "processors": ratios(compilations)[1],
            "seconds": medians(compilations, made, 1.0),
        },
    }
    plan = {"batch": RUN.batch_size, "repeats": REPEATS, "compilations": COMPILATIONS}
    print(keep("cpu_step", results, plan | {"limits": LIMITS}))
    print(results)


if __name__ == "__main__":
    main()
