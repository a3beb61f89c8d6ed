"""A training step with the latent perceptual loss beside one without: seconds and memory.

    python -m benchmarks.lpl_cost

A U-Net on 16 x 16 latents of a four-level decoder, of random weights, on this machine's devices.
Each step takes turns with the plain one. Predicted from multiplications alone: per decoded example
the decoder forward twice and back by its input once, against three forward passes of the denoiser;
with `remat` the prediction's forward pass once more.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import keep
from benchmarks.timing import by_turns, ratios
from ldm_jax.diffusion.perceptual import PerceptualConfig
from ldm_jax.models import autoencoder, denoiser, unet
from ldm_jax.models.autoencoder import AutoencoderConfig
from ldm_jax.runs.build import build, facts_of_config, resolve_widths
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sharding import make_mesh
from ldm_jax.train import perceptual
from ldm_jax.train.ema import EmaConfig

BATCH, REPEATS = 16, 3
FIRST_STAGE = AutoencoderConfig(
    resolution=128, width=32, width_multipliers=(1, 2, 4, 4), num_res_blocks=1, norm_groups=8
)
RUN = DenoiserRun(
    batch_size=BATCH,
    ema=EmaConfig(decay=0.0),
    model=denoiser.DenoiserConfig(
        backbone=unet.UNetConfig(
            width=96, width_multipliers=(1, 2, 4), attention_factors=(), num_heads=4
        )
    ),
)
LAST = {"up1": 3, "up2": 4, "up3": 5}  # the deepest tap -> maps that are made
SHARES = (0.2, 0.67)
LIMIT = 0.25  # of measured over predicted, to either side


def made(lpl: PerceptualConfig) -> tuple[Any, int]:
    """(a step of a state of its own, bytes of the program's temporary arrays)."""
    run = dataclasses.replace(RUN, lpl=lpl)
    facts = facts_of_config(run, FIRST_STAGE)
    trainer = build(run, facts, make_mesh())
    lowered = trainer.step.lower(
        trainer.abstract_state, trainer.abstract_frozen, trainer.batch_spec
    )
    compiled = lowered.compile()
    frozen = {}
    if lpl.active:
        params = jax.jit(lambda key: autoencoder.init(FIRST_STAGE, key))(jax.random.key(0))
        frozen = {perceptual.FROZEN: perceptual.decoder_of(params)}
    frozen = jax.device_put(frozen, jax.tree.map(lambda s: s.sharding, trainer.abstract_frozen))
    moments = np.random.default_rng(0).normal(size=(BATCH, *facts.moments_shape))
    batch = jax.device_put(
        {"moments": moments.astype(np.float32)},
        jax.tree.map(lambda s: s.sharding, trainer.batch_spec),
    )
    held = [trainer.init()]

    def step() -> None:
        held[0], metrics = compiled(held[0], frozen, batch)
        jax.block_until_ready(metrics)

    return step, compiled.memory_analysis().temp_size_in_bytes


def multiplications(count: int) -> tuple[float, float]:
    """(of the denoiser, of the decoder's first `count` maps): forward, one example."""

    def flops(function: Any, *shapes: Any) -> float:
        return jax.jit(function).lower(*shapes).cost_analysis()["flops"]

    run = resolve_widths(RUN, facts_of_config(RUN, FIRST_STAGE))
    z = jax.ShapeDtypeStruct((1, *FIRST_STAGE.latent_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    ours = jax.eval_shape(lambda: denoiser.init(run.model, jax.random.key(0)))
    theirs = jax.eval_shape(lambda: autoencoder.init(FIRST_STAGE, jax.random.key(0)))
    return (
        flops(lambda p, z, t: denoiser.apply(run.model, p, z, t, {}), ours, z, t),
        flops(lambda p, z: autoencoder.decoder_maps(FIRST_STAGE, p, z, count)[-1], theirs, z),
    )


def taps(last: str) -> tuple[str, ...]:
    return autoencoder.decoder_taps(FIRST_STAGE)[: LAST[last]]


def main():
    plain, plain_bytes = made(PerceptualConfig())
    rows, seconds = [], {}
    for last in LAST:
        one, decoder = multiplications(LAST[last])
        # The whole batch is decoded where a gate only masks, whatever passes it.
        wanted = [(share, False) for share in (*SHARES, 1.0)]
        if last == "up1":
            wanted.append((SHARES[1], True))
        for share, remat in wanted:
            # All pass, so that the share alone says how many are decoded.
            config = PerceptualConfig(
                weight=1.0, nsr_max=1e9, share=share, taps=taps(last), remat=remat
            )
            step, size = made(config)
            decoded = int(np.ceil(share * BATCH - 1e-9))
            clock, processors = ratios(by_turns(step, plain, REPEATS))
            predicted = 1 + decoded / BATCH * (4 if remat else 3) * decoder / (3 * one)
            measured = processors["median_of_ratios"]
            seconds[last, share, remat] = measured - 1
            rows.append(
                {
                    "last_tap": last,
                    "decoded": decoded,
                    "remat": remat,
                    "predicted": round(predicted, 3),
                    "processors": processors,
                    "clock": clock,
                    "measured_to_predicted": round(measured / predicted, 3),
                    "temporary_bytes_to_plain": round(size / plain_bytes, 3),
                }
            )
            print(rows[-1], flush=True)
    masked = [
        {
            "last_tap": last,
            "decoded": int(np.ceil(share * BATCH)),
            "predicted": round(BATCH / np.ceil(share * BATCH), 2),
            "measured": round(seconds[last, 1.0, False] / seconds[last, share, False], 2),
        }
        for last in LAST
        for share in SHARES
    ]
    plan = {"batch": BATCH, "repeats": REPEATS, "limit": LIMIT}
    results = {"steps": rows, "whole_batch_masked_to_top_k": masked}
    print(keep("lpl_cost", results, plan), masked)


if __name__ == "__main__":
    main()
