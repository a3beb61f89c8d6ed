"""Denoisers of cached latents.

    ldm train-denoiser --config=configs/denoiser.py:VARIANT --config.autoencoder=DIR --workdir=DIR

| variant       | architecture, batch, learning rate, steps | expected score                       |
|---------------|-------------------------------------------|--------------------------------------|
| digits        | ours, small; 4 minutes on two CPU cores   | `ldm demo` prints its figures        |
| photographs   | ours, small, unconditional                | not yet measured                     |
| imagenet-ldm4 | LDM, Table 15; 271 V100-days as published | not yet measured (published 10.56 FID)
| celebahq-ldm4 | LDM, Table 12; 14.4 V100-days as published| not yet measured (published FID 5.11)
| ffhq-ldm4     | LDM, Table 12; 26 V100-days as published  | not yet measured (published FID 4.98)

The published models trained on latents of `vq-f4`, unscaled: add `--config.whitening=none`. Those
of `kl-f4` have the same 3 channels at the same size. `imagenet-ldm4-512` is imagenet-ldm4 on the
latents of 512-pixel images; of `-v` and `-flow` it predicts v, and a straight path's velocity.

Decoupled latents (docs/decoupled.md): `-mean` and `-mean_logvar` after celebahq-ldm4, ffhq-ldm4 or
imagenet-ldm4 are the arms beside the plain preset, which draws samples. Same batch, steps and cost
(`mean_logvar` has 3 more channels at both ends: 0.01 % of the parameters), on latents of `kl-f4`.
Not yet measured; no figure of the paper (Choi et al., 2025) is known to us.

Latent perceptual loss (docs/lpl.md): `-lpl` after any of imagenet-ldm4, imagenet-ldm4-v,
imagenet-ldm4-flow and the same of imagenet-ldm4-512 goes on from a finished run of the name before
it, with its optimizer and averages, for a quarter of its steps:

    ldm train-denoiser --config=configs/denoiser.py:imagenet-ldm4-v-lpl --config.autoencoder=DIR \
        --config.init_from=RUN --workdir=DIR

| variant (batch 1200, 44,500 steps, lr 1e-4) | examples decoded | planned cost of a step |
|---------------------------------------------|------------------|------------------------|
| imagenet-ldm4-lpl, -v-lpl                   | 53 %             | 3.3 times one without  |
| imagenet-ldm4-flow-lpl                      | 87 %             | 4.8 times              |
| the same at 512 pixels                      | 53 %, 87 %       | 3.4, 4.9 times         |
| any, --config.lpl.nsr_max=0.577             | 15 %, 30 %       | 1.6, 2.3 times         |
| any, --config.lpl.taps=('mid','up0')        | as above         | half of what is on top |

Planned from operations: decoding one example and back (kl-f4's maps, levels computed twice) is 4.4
denoiser steps of one example; a plain quarter is 68 V100-days. Not yet measured. Published of the
loss: 6 to 20 % lower FID over three data sets at 256 and 512 pixels, of other models than these.
"""

import ml_collections

# name: (width, multipliers, heads, width of a head, classes, batch, lr, steps)
PUBLISHED = {
    "imagenet-ldm4": (192, (1, 2, 3, 5), 1, 0, 1000, 1200, 1.0e-4, 178_000),
    "celebahq-ldm4": (224, (1, 2, 3, 4), 0, 32, 0, 48, 9.6e-5, 410_000),
    "ffhq-ldm4": (224, (1, 2, 3, 4), 0, 32, 0, 42, 8.4e-5, 635_000),
}
CODECS = ("mean", "mean_logvar")
_VELOCITY = {"parameterisation": "velocity", "noise_levels": {"draw": "logit_normal"}}
OBJECTIVES = {
    "": {},
    "-v": {"objective": {"parameterisation": "v"}},
    "-flow": {"process": {"kind": "flow"}, "objective": _VELOCITY},
}
LPL = {
    "lpl": {"target_ratio": 0.25, "calibration_steps": 50},
    "init_optimizer": "keep",
    "init_averages": "keep",
    "num_steps": 178_000 // 4,
}

OURS = {"digits": lambda: _digits(), "photographs": lambda: _photographs()}

# name: (its published row, what differs)
ROWS = {name: (name, {}) for name in PUBLISHED}
ROWS |= {f"{n}-{codec}": (n, {"codec": codec}) for n in PUBLISHED for codec in CODECS}
for _size in ("imagenet-ldm4", "imagenet-ldm4-512"):
    for _objective, _fields in OBJECTIVES.items():
        ROWS[f"{_size}{_objective}"] = ("imagenet-ldm4", _fields)
        ROWS[f"{_size}{_objective}-lpl"] = ("imagenet-ldm4", _fields | LPL)

VARIANTS = (*OURS, *ROWS)


def get_config(variant: str = "imagenet-ldm4") -> ml_collections.ConfigDict:
    if variant in OURS:
        return OURS[variant]()
    name, fields = ROWS[variant]
    config = _published(PUBLISHED[name])
    config.update(fields)
    return config


def _published(row):
    width, multipliers, num_heads, head_channels, num_classes, batch_size, lr, num_steps = row
    c = ml_collections.ConfigDict()
    c.batch_size = batch_size
    c.num_steps = num_steps
    c.log_every = 100
    c.checkpoint_every = 5_000
    c.whitening = "global"  # 1/std; VQ latents, as published, would come close to unit variance
    c.model = ml_collections.ConfigDict(
        {
            "backbone": {
                "width": width,
                "width_multipliers": multipliers,
                "num_res_blocks": 2,
                "attention_factors": (8, 4, 2),
                "num_heads": num_heads,
                "head_channels": head_channels,
            },
            "conditions": _classes(num_classes, 512) if num_classes else {},
        }
    )
    c.process = ml_collections.ConfigDict({"beta_start": 0.0015, "beta_end": 0.0195})
    # The share of dropped labels was not published; 0.1 is what the field uses.
    c.loss = ml_collections.ConfigDict({"condition_dropout": 0.1 if num_classes else 0.0})
    c.optim = ml_collections.ConfigDict({"lr": lr, "weight_decay": 0.01})
    c.ema = ml_collections.ConfigDict({"decay": 0.9999})
    return c


def _digits():
    c = ml_collections.ConfigDict()
    c.batch_size = 64
    c.num_steps = 900
    c.log_every = 25
    c.checkpoint_every = 300
    c.whitening = "channel"
    c.model = ml_collections.ConfigDict(
        {
            "backbone": {
                "width": 48,
                "width_multipliers": (1, 2),
                "num_res_blocks": 1,
                "attention_factors": (2,),
                "num_heads": 4,
                "norm_groups": 16,
            },
            "conditions": _classes(10, 64),
        }
    )
    c.process = ml_collections.ConfigDict({"kind": "flow"})
    c.objective = ml_collections.ConfigDict(
        {"parameterisation": "velocity", "noise_levels": {"draw": "logit_normal"}}
    )
    c.loss = ml_collections.ConfigDict({"condition_dropout": 0.1})
    c.optim = ml_collections.ConfigDict(
        {
            "lr": 1e-3,
            "warmup_steps": 50,
            "schedule": "cosine",
            "clip_norm": 1.0,
            "weight_decay": 0.01,
        }
    )
    c.ema = ml_collections.ConfigDict({"decay": 0.995})
    return c


def _photographs():
    c = _digits()
    c.batch_size = 32
    c.model.backbone.width = 32
    c.model.conditions = ml_collections.ConfigDict()
    c.loss.condition_dropout = 0.0
    return c


def _classes(count, context_dim):
    return {"class": {"kind": "class", "num_classes": count, "context_dim": context_dim}}
