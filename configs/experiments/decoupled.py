"""What a denoiser is trained on: posterior samples, their mean, or mean and spread (Choi et al.).

    ldm experiment --config=configs/experiments/decoupled.py:VARIANT --workdir=runs/decoupled

One first stage and one cache of moments; the same network, steps and noise. `mean_logvar` has twice
the channels; it is decoded from its mean and, from the same latents, resampled by its spread.
Three seeds; what is written is the difference to `sample`, seed by seed.

| variant     | images, first stage                    | denoiser                  | one CPU core  |
|-------------|----------------------------------------|---------------------------|---------------|
| digits      | configs/autoencoder.py:digits          | classes, guidance 1 and 2 | 30 minutes    |
| photographs | 48 pixels, autoencoder.py:photographs  | unconditional             | 40 minutes    |
| smoke       | photographs, a few steps, to see it run | unconditional            | 5 minutes     |

Measured: docs/results.md.
"""

import ml_collections

TRAIN_STEPS = 500
SEEDS = (0, 1, 2)
SAMPLES = 400
STEPS = (8, 16)  # of dpmpp_2m
EMA, SHORT_EMA = 0.995, 0.98

# variant: (images, codecs, guidance)
VARIANTS = {
    "digits": ("digits", ("sample", "mean", "mean_logvar", "sample_frozen"), (1.0, 2.0)),
    "photographs": ("photographs", ("sample", "mean", "mean_logvar"), (1.0,)),
    "smoke": ("photographs", ("sample", "mean", "mean_logvar", "sample_frozen"), (1.0,)),
}
CONTRASTS = (
    ("mean", "sample"), ("mean_logvar", "sample"), ("mean_logvar", "mean"),
    ("sample_frozen", "sample"),
)  # fmt: skip


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
    images, codecs, guidance = VARIANTS[variant]
    smoke = variant == "smoke"
    return ml_collections.ConfigDict(
        {
            "first_stage": f"configs/autoencoder.py:{images}",
            "denoiser": f"configs/denoiser.py:{images}",
            "arms": {codec: _arm(codec, smoke) for codec in codecs},
            "samples": {codec: _ways(codec, guidance, smoke) for codec in codecs},
            "contrasts": {
                f"{one} - {other}": {one: 1, other: -1} for one, other in CONTRASTS if one in codecs
            },
            "seeds": SEEDS[:1] if smoke else SEEDS,
        }
    )


def _arm(codec, smoke):
    steps = 6 if smoke else TRAIN_STEPS
    arm = {
        "codec": codec,
        "batch_size": 32,
        "num_steps": steps,
        "log_every": 2 if smoke else 20,
        "checkpoint_every": steps,
        "eval_every": 2 if smoke else 200,
        "eval_examples": 256,
        "model": {"backbone": {"width": 32}},
        "ema": {"decay": EMA, "more": (SHORT_EMA,)},
    }
    return arm | ({"first_stage": {"num_steps": 20}} if smoke else {})


def _ways(codec, guidance, smoke):
    """With each guidance; by the last one also in more steps and by the shorter average.

    What tells its spread is also resampled, from the same latents.
    """
    if smoke:
        more = [{"decode": "resampled"}] if codec == "mean_logvar" else []
        return [_way(2, guidance[-1], "ema", 32) | fields for fields in ({}, *more)]
    (few, many), num = STEPS, SAMPLES
    ways = [_way(few, scale, "ema", num) for scale in guidance]
    last = guidance[-1]
    ways += [_way(many, last, "ema", num), _way(few, last, f"ema-{SHORT_EMA:g}", num)]
    if codec == "mean_logvar":
        ways.append(_way(few, last, "ema", num) | {"decode": "resampled"})
    return ways


def _way(steps, guidance, weights, num):
    return {
        "sampler": "dpmpp_2m",
        "steps": steps,
        "guidance": guidance,
        "weights": weights,
        "num": num,
        "batch_size": min(num, 200),
    }
