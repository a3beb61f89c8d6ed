"""What the adversarial loss does to a small first stage on real photographs.

    ldm experiment --config=configs/experiments/first_stage.py --workdir=runs/first_stage

Small KL-f4 and VQ-f4 autoencoders, L1 alone against L1 + patch adversary, three seeds each; the
seven photographs bundled with scikit-learn and scikit-image, a third of each held out. No
perceptual loss: its weights are not bundled. `smoke` is the same in a few steps, to see it run.

Measured: docs/first_stages.md; benchmarks/results/first_stage_photographs.json.
"""

import ml_collections

VARIANTS = ("photographs", "smoke")


def get_config(variant: str = "photographs") -> ml_collections.ConfigDict:
    smoke = {"photographs": False, "smoke": True}[variant]
    steps = 12 if smoke else 500
    arms = {}
    for latent in ("kl", "vq"):
        for name, weight in (("l1", 0.0), ("l1-gan", 0.5)):
            arms[f"{latent}-f4-{name}"] = _arm(latent, weight, steps)
    seeds = (0,) if smoke else (0, 1, 2)
    return ml_collections.ConfigDict({"arms": arms, "seeds": seeds})


def _arm(latent, weight, steps):
    model = {
        "latent": latent,
        "resolution": 48,
        "width": 16,
        "width_multipliers": (1, 2, 4),
        "num_res_blocks": 1,
        "z_channels": 3,
        "latent_channels": 3,
        "norm_groups": 8,
    }
    if latent == "vq":
        model["quantizer"] = {
            "codebook_size": 512,
            "average_decay": 0.99,
            "restart_below": 0.1,
        }
    return {
        "batch_size": 8,
        "num_steps": steps,
        "log_every": 20,
        "checkpoint_every": steps,
        "images": {"source": "photographs", "resolution": 48, "crop": "random", "flip": True},
        "model": model,
        "loss": {
            "reduction": "sum" if latent == "kl" else "mean",
            "perceptual_weight": 0.0,
        },
        "adversarial": {
            "weight": weight,
            "start": steps // 2,
            "discriminator": {"width": 32, "num_layers": 2},
        },
        "optim": {"lr": 1e-3, "b1": 0.5, "b2": 0.9, "warmup_steps": 50},
    }
