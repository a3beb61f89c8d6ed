"""What a denoiser is trained to predict, and how it is sampled: digits.

    ldm experiment --config=configs/experiments/objectives.py --workdir=runs/objectives

The demo's first stage and denoiser; five objectives, the same network, steps and learning rate;
1,000 guided samples (scale 2) for each sampler and number of steps, judged by a classifier trained
on the real digits. Heun calls the network twice a step.

Measured: docs/denoisers.md; benchmarks/results/objectives_digits.json.
"""

import ml_collections


def _timesteps(**objective):
    return {
        "process": {"kind": "ldm_linear"},
        "objective": {"noise_levels": {"draw": "uniform"}, **objective},
    }


ARMS = {
    "eps": _timesteps(parameterisation="eps"),
    "x0": _timesteps(parameterisation="x0", weight="min_snr"),
    "v": _timesteps(parameterisation="v"),
    "flow": {
        "process": {"kind": "flow"},
        "objective": {"parameterisation": "velocity", "noise_levels": {"draw": "logit_normal"}},
    },
    # EDM's mean of ln(sigma) is -1.2 for data of deviation 0.5; whitened latents have 1.
    "edm": {
        "process": {"kind": "edm"},
        "objective": {
            "parameterisation": "preconditioned",
            "weight": "edm",
            "noise_levels": {"draw": "log_normal", "mean": -0.5, "std": 1.2},
        },
    },
}
WAYS = (
    ("ddim", 10), ("ddim", 25), ("ddpm", 50), ("euler_ancestral", 25), ("heun", 10),
    ("dpmpp_2m", 10), ("dpmpp_2m", 20), ("dpmpp_2m_sde", 20), ("unipc", 10),
)  # fmt: skip
OTHERS = {"flow": [("sde_flow", 50)], "edm": [("edm", 10)]}


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "first_stage": "configs/autoencoder.py:digits",
            "denoiser": "configs/denoiser.py:digits",
            "arms": ARMS,
            "samples": {arm: [_way(*way) for way in (*WAYS, *OTHERS.get(arm, ()))] for arm in ARMS},
            "seeds": (0,),
        }
    )


def _way(sampler, steps):
    return {
        "sampler": sampler,
        "steps": steps,
        "spacing": "last_step" if sampler == "sde_flow" else "auto",
        "guidance": 2.0,
        "num": 1000,
        "batch_size": 200,
    }
