"""The latent perceptual loss on posterior samples and on their mean: do the two go together?

    ldm experiment --config=configs/experiments/lpl_decoupled.py:VARIANT --workdir=runs/both

{sample, mean} x {control, lpl}: of each codec a base is trained, and two runs go on from it for as
many steps, with its optimizer and averages. Three seeds; `interaction` is what the loss does to
`mean` beyond what it does to `sample`.

| variant     | images, first stage                    | denoiser                  | one CPU core  |
|-------------|----------------------------------------|---------------------------|---------------|
| digits      | configs/autoencoder.py:digits          | classes, guidance 1 and 2 | 30 minutes    |
| photographs | 48 pixels, autoencoder.py:photographs  | unconditional             | not measured  |
| smoke       | photographs, a few steps, to see it run | unconditional            | 5 minutes     |

Measured: docs/results.md.
"""

import ml_collections

BASE_STEPS, MORE_STEPS = 400, 130  # pre-training, and what goes on from it
SEEDS = (0, 1, 2)
SAMPLES = 400
STEPS = (8, 16)  # of dpmpp_2m
EMA, SHORT_EMA = 0.995, 0.98
LPL = {"target_ratio": 0.25, "nsr_max": 3.0, "remat": False}
CODECS = ("sample", "mean")

VARIANTS = ("digits", "photographs", "smoke")
CONTRASTS = {
    "sample: lpl - control": {"sample-lpl": 1, "sample-control": -1},
    "mean: lpl - control": {"mean-lpl": 1, "mean-control": -1},
    "control: mean - sample": {"mean-control": 1, "sample-control": -1},
    "lpl: mean - sample": {"mean-lpl": 1, "sample-lpl": -1},
    "interaction": {"mean-lpl": 1, "mean-control": -1, "sample-lpl": -1, "sample-control": 1},
}


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
    images = {"digits": "digits", "photographs": "photographs", "smoke": "photographs"}[variant]
    smoke, arms = variant == "smoke", {}
    for codec in CODECS:
        arms |= _family(codec, smoke)
    return ml_collections.ConfigDict(
        {
            "first_stage": f"configs/autoencoder.py:{images}",
            "denoiser": f"configs/denoiser.py:{images}",
            "arms": arms,
            "samples": _ways((1.0, 2.0) if images == "digits" else (1.0,), smoke),
            "contrasts": CONTRASTS,
            "seeds": SEEDS[:1] if smoke else SEEDS,
        }
    )


def _family(codec, smoke):
    base_steps, more_steps = (6, 4) if smoke else (BASE_STEPS, MORE_STEPS)
    shared = {
        "codec": codec,
        "batch_size": 32,
        "log_every": 2 if smoke else 20,
        "checkpoint_every": base_steps,
        "eval_every": 2 if smoke else 200,
        "eval_examples": 256,
        "model": {"backbone": {"width": 32}},
        # Constant after its warm-up, so that what goes on does so at the same learning rate.
        "optim": {"schedule": "constant"},
        "ema": {"decay": EMA, "more": (SHORT_EMA,)},
    }
    if smoke:
        shared |= {"first_stage": {"num_steps": 20}}
    more = shared | {
        "num_steps": more_steps,
        "init_from": f"{codec}-base",
        "init_optimizer": "keep",
        "init_averages": "keep",
    }
    return {
        f"{codec}-base": shared | {"num_steps": base_steps},
        f"{codec}-control": more,
        f"{codec}-lpl": more | {"lpl": LPL | ({"calibration_steps": 2} if smoke else {})},
    }


def _ways(guidance, smoke):
    """With each guidance; by the last one also in more steps and by the shorter average."""
    if smoke:
        return [_way(2, guidance[-1], "ema", 32)]
    few, many = STEPS
    ways = [_way(few, scale, "ema", SAMPLES) for scale in guidance]
    last = guidance[-1]
    ways.append(_way(many, last, "ema", SAMPLES))
    return [*ways, _way(few, last, f"ema-{SHORT_EMA:g}", SAMPLES)]


def _way(steps, guidance, weights, num):
    return {
        "sampler": "dpmpp_2m",
        "steps": steps,
        "guidance": guidance,
        "weights": weights,
        "num": num,
        "batch_size": min(num, 200),
    }
