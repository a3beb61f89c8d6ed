"""The runs that `tests/golden/record.py` records, in the field names of the first version.

They are still understood, as those of every configuration and run.json written then are.
"""

import ml_collections


def autoencoder():
    return {
        "batch_size": 16,
        "num_steps": 10,
        "log_every": 1,
        "checkpoint_every": 10,
        "images": {"source": "digits", "resolution": 16, "held_out_fraction": 0.5},
        "model": {
            "resolution": 16,
            "width": 8,
            "width_multipliers": (1, 2),
            "num_res_blocks": 1,
            "z_channels": 2,
            "latent_channels": 2,
            "norm_groups": 4,
        },
        "loss": {"perceptual_weight": 0.0},
        "adversarial": {
            "weight": 0.5,
            "start": 4,
            "discriminator": {"width": 8, "num_layers": 1},
        },
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "ema": {"decay": 0.9},
    }


def denoiser():
    return {
        "batch_size": 16,
        "num_steps": 10,
        "log_every": 1,
        "checkpoint_every": 10,
        "eval_every": 10,
        "eval_examples": 32,
        "loss_bins": 2,
        "flip": True,
        "whitening": "channel",
        "model": {
            "backbone": {
                "in_channels": 2,
                "out_channels": 2,
                "width": 8,
                "width_multipliers": (1, 2),
                "num_res_blocks": 1,
                "attention_factors": (),
                "num_heads": 2,
                "norm_groups": 4,
            },
            "conditioner": {"kind": "class", "num_classes": 10, "context_dim": 8},
        },
        "loss": {"label_dropout": 0.2},
        "optim": {"lr": 1e-3, "warmup_steps": 2, "clip_norm": 1.0, "weight_decay": 0.01},
        "ema": {"decay": 0.9, "more": (0.5,), "power": (0.1,), "snapshot_every": 5},
    }


def flow():
    return denoiser() | {
        "num_steps": 3,
        "eval_every": 0,
        "process": {"kind": "flow"},
        "objective": {"parameterisation": "velocity", "noise_levels": {"draw": "logit_normal"}},
    }


def edm():
    return denoiser() | {
        "num_steps": 3,
        "accumulate": 2,
        "eval_every": 0,
        "process": {"kind": "edm"},
        "objective": {
            "parameterisation": "preconditioned",
            "weight": "edm",
            "noise_levels": {"draw": "log_normal", "mean": -0.5, "std": 1.2},
        },
    }


VARIANTS = {"autoencoder": autoencoder, "denoiser": denoiser, "flow": flow, "edm": edm}


def get_config(variant):
    return ml_collections.ConfigDict(VARIANTS[variant]())
