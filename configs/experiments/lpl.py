"""The latent perceptual loss (Berrada et al., 2025) after pre-training: does it help, and at what?

    ldm experiment --config=configs/experiments/lpl.py:VARIANT --workdir=runs/lpl

Of each objective a base is trained, and three runs go on from it, with its optimizer and averages:
`control` without the loss, `lpl` with it for as many steps, and `control-time` without it for as
long as those took. Three seeds; what is written is lpl - control, seed by seed.

| variant     | images, first stage                    | denoiser                  | one CPU core  |
|-------------|----------------------------------------|---------------------------|---------------|
| digits      | configs/autoencoder.py:digits          | classes, guidance 1 and 2 | 70 minutes    |
| photographs | 48 pixels, autoencoder.py:photographs  | unconditional             | 50 minutes    |
| smoke       | photographs, a few steps, to see it run | one objective            | 5 minutes     |

Measured: docs/results.md.
"""

import ml_collections

# Pre-training, and what goes on from it.
TRAIN_STEPS = {"digits": (400, 130), "photographs": (300, 60), "smoke": (6, 4)}
SEEDS = (0, 1, 2)
SAMPLES = 400
STEPS = (8, 16)  # of dpmpp_2m
EMA, SHORT_EMA = 0.995, 0.98
LPL = {"target_ratio": 0.25, "nsr_max": 3.0, "remat": False}

VARIANTS = ("digits", "photographs", "smoke")

# objective  process     parameterisation noise levels
TABLE = """
eps          ldm_linear  eps              uniform
v            ldm_linear  v                uniform
flow         flow        velocity         logit_normal
"""
OBJECTIVES = {
    name: {
        "process": {"kind": process},
        "objective": {"parameterisation": kind, "noise_levels": {"draw": draw}},
    }
    for name, process, kind, draw in map(str.split, TABLE.strip().splitlines())
}


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
    images = {"digits": "digits", "photographs": "photographs", "smoke": "photographs"}[variant]
    smoke = variant == "smoke"
    objectives = {"digits": ("eps", "v", "flow"), "photographs": ("eps", "flow"), "smoke": ("v",)}
    names = objectives[variant]
    arms, contrasts = {}, {}
    for name in names:
        arms |= _family(name, variant)
        for other in ("control", "control-time"):
            contrasts[f"{name}: lpl - {other}"] = {f"{name}-lpl": 1, f"{name}-{other}": -1}
    if not smoke:
        share = 1 / len(names)
        for other in ("control", "control-time"):
            signs = {f"{n}-lpl": share for n in names} | {f"{n}-{other}": -share for n in names}
            contrasts[f"all: lpl - {other}"] = signs
    return ml_collections.ConfigDict(
        {
            "first_stage": f"configs/autoencoder.py:{images}",
            "denoiser": f"configs/denoiser.py:{images}",
            "arms": arms,
            "samples": _ways((1.0, 2.0) if images == "digits" else (1.0,), smoke),
            "contrasts": contrasts,
            "seeds": SEEDS[:1] if smoke else SEEDS,
        }
    )


def _family(name, variant):
    base_steps, more_steps = TRAIN_STEPS[variant]
    smoke = variant == "smoke"
    shared = OBJECTIVES[name] | {
        "batch_size": 32,
        "log_every": 2 if smoke else 20,
        "checkpoint_every": base_steps,
        "eval_every": 2 if smoke else base_steps // 2,
        "eval_examples": 256,
        "model": {"backbone": {"width": 32}},
        # Constant after its warm-up, so that what goes on does so at the same learning rate.
        "optim": {"schedule": "constant"},
        "ema": {"decay": EMA, "more": (SHORT_EMA,)},
    }
    if smoke:
        shared |= {"first_stage": {"num_steps": 20}}
    few = {} if variant == "digits" else {"calibration_steps": more_steps // 4}
    start = {"init_from": f"{name}-base", "init_optimizer": "keep", "init_averages": "keep"}
    more = shared | start | {"num_steps": more_steps}
    return {
        f"{name}-base": shared | {"num_steps": base_steps},
        f"{name}-control": more,
        f"{name}-lpl": more | {"lpl": LPL | few},
        f"{name}-control-time": shared | start | {"as_long_as": (f"{name}-lpl", f"{name}-control")},
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
