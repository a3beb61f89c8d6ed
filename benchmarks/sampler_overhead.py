"""What a sampling loop costs beside the denoiser's calls in it, and its memory by step count.

    python -m benchmarks.sampler_overhead

Both are compiled and take turns, so that other work on the machine meets them alike; the ratio of
processor time, all threads together, is what such work disturbs least. The bare calls are chained,
each on the last one's output, as in a sampler.
"""

import statistics

import jax
import jax.numpy as jnp

from benchmarks.record import keep
from benchmarks.timing import by_turns, ratios
from ldm_jax.diffusion.grid import make_grid
from ldm_jax.diffusion.parameterisation import predictor
from ldm_jax.diffusion.process import ProcessConfig, at_network, make_process
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.keys import example_keys, key_for
from ldm_jax.models import conditions, denoiser, unet

NAMES = ("ddim", "dpmpp_2m", "heun", "unipc", "ddpm")
STEPS, REPEATS, LIMIT = 8, 60, 1.05
SHAPE = (4, 16, 16, 4)
MODEL = denoiser.DenoiserConfig(
    unet.UNetConfig(
        in_channels=4,
        out_channels=4,
        width=64,
        width_multipliers=(1, 2),
        num_res_blocks=1,
        attention_factors=(2,),
        num_heads=4,
    ),
    {"class": conditions.ClassCondition(num_classes=10, context_dim=64)},
)
PROCESS = make_process(ProcessConfig())


def network(params):
    cond = {"label": jnp.arange(SHAPE[0])}

    def net(z, t, c):
        return denoiser.apply(MODEL, params, z, t, cond)

    return at_network(PROCESS, net)


def sampling(name, num_steps):
    """jitted (params, z_T, keys) -> z0; Heun's last of its steps has one call, the others two."""
    grid = make_grid(PROCESS, num_steps, "trailing")

    def run(params, z_T, keys):
        predict = predictor(PROCESS, "eps", network(params))
        return SAMPLERS[name](predict, grid, z_T, None, keys)

    return jax.jit(run)


def main():
    params = denoiser.init(MODEL, key_for(0, "init"))
    z, t = jax.random.normal(key_for(0, "z_T"), SHAPE), jnp.full(SHAPE[:1], 500)
    keys = example_keys(key_for(0, "sampler"), jnp.arange(SHAPE[0]))
    bare = jax.jit(lambda params, z: network(params)(z, t, None)).lower(params, z).compile()
    gflop = bare.cost_analysis()["flops"] / 1e9
    assert gflop >= 1, f"{gflop} GFLOP a call"

    def calls(count):
        state = z
        for _ in range(count):
            state = bare(params, state)
        return state

    results = {}
    for name in NAMES:
        run = sampling(name, STEPS).lower(params, z, keys).compile()
        count = 2 * STEPS - 1 if name == "heun" else STEPS

        def loop(run=run):
            return run(params, z, keys).block_until_ready()

        def alone(count=count):
            return calls(count).block_until_ready()

        pairs = by_turns(loop, alone, REPEATS)
        (clock, processors), bare_clock = ratios(pairs), [alone[0] for _, alone in pairs]
        results[name] = {
            "calls": count,
            "clock": clock,
            "processors": processors,
            "milliseconds_a_bare_call": round(1e3 * statistics.median(bare_clock) / count, 2),
            "temporary_bytes_of_steps": {
                str(steps): memory(name, steps, params, z, keys) for steps in (5, 50)
            },
        }
        results[name]["below_limit"] = {
            kind: results[name][kind]["median_of_ratios"] < LIMIT
            for kind in ("clock", "processors")
        }
        print(name, results[name], flush=True)
    plan = {"gflop_a_call": round(gflop, 2), "batch": SHAPE, "steps": STEPS, "repeats": REPEATS}
    print(keep("sampler_overhead", results, plan | {"limit": LIMIT}))


def memory(name, num_steps, params, z, keys):
    analysis = sampling(name, num_steps).lower(params, z, keys).compile().memory_analysis()
    return analysis.temp_size_in_bytes


if __name__ == "__main__":
    main()
