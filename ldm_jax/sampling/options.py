"""What `ldm sample` can be asked for, and what is wrong with an answer whatever the model."""

import dataclasses
import math

from ldm_jax.diffusion import samplers
from ldm_jax.errors import InputError
from ldm_jax.runs.denoiser import WhichWeights


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """What to draw. Sample i depends on (seed, i) and these alone, not on batch size or mesh."""

    num: int = 16
    steps: int = 50
    sampler: str = "ddim"
    eta: float = -1.0  # noise of the sampler, for those that have it; -1 = its own default
    churn: tuple[float, ...] = ()  # of sampler edm: S_churn[, S_tmin, S_tmax[, S_noise]]
    order: int = 0  # of sampler unipc, 1..3; 0 = its own default
    spacing: str = "auto"  # of the steps, as "trailing" or "karras:7"; "auto" = the process' own
    temperature: float = 1.0  # multiplies the noise of a stochastic sampler's steps
    guidance: float = 1.0  # 1 = conditional model only, >1 extrapolates
    guidance_interval: tuple[float, ...] = (0.0, 1.0)  # guided times; 0 = data, 1 = noise end
    guidance_rescale: float = 0.0  # 0..1: towards the conditional prediction's deviation
    guidance_projection: tuple[float, ...] = ()  # APG in x0: eta[, norm threshold]; empty = none
    guided_channels: tuple[int, ...] = ()  # of the latent; empty = all
    guide_workdir: str = ""  # autoguidance away from this run; empty = the run itself
    guide_step: int = -1  # its checkpoint; -1 = its newest, of the run itself the one sampled
    guide_weights: str = "auto"  # its weights; with the two above left alone: no autoguidance
    clip_x0: float = 0.0  # predicted latents are kept within -clip_x0..clip_x0; 0 = anywhere
    threshold_x0: float = 0.0  # quantile of |x0| that is first shrunk to clip_x0; 0 = none
    init_images: str = ""  # folder or .npz; sample i begins at image i % count; empty = noise
    strength: float = 1.0  # share of the steps that is taken from the noised image; 1 = all
    masks: str = ""  # folder or .npz; white is repainted, black keeps the image; empty = all white
    size: tuple[int, ...] = ()  # pixels, a side or height and width; empty = as trained
    tile: int = 0  # pixels a side of tiles that the latent is denoised in; 0 = whole
    tile_overlap: int = -1  # pixels; -1 = half a tile
    progressive: int = 0  # every so many steps the predicted x0 is shown; 0 = never
    classes: tuple[int, ...] = ()  # sample i is of class classes[i % len]; empty = all in turn
    seed: int = 0
    noise: str = ""  # .npy f32 [N,H,W,C] of initial noise; empty = drawn from the seed
    batch_size: int = 0  # images at a time over all devices; 0 = min(num, 100), rounded up to fit
    weights: str = "auto"  # "ema" | "params" | "ema-NAME" | "auto": the average when there is one
    step: int = -1  # checkpoint; -1 = the newest

    @property
    def which(self) -> WhichWeights:
        names = [f.name for f in dataclasses.fields(WhichWeights)]
        return WhichWeights(**{name: getattr(self, name) for name in names})

    @property
    def autoguided(self) -> bool:
        return self.which.autoguided


def check_values(settings: SampleOptions) -> None:
    """Raises InputError for what no model can do."""
    if settings.sampler not in samplers.SAMPLERS:
        raise InputError(
            f"sampler {settings.sampler!r} is unknown; choose one of {sorted(samplers.SAMPLERS)}"
        )
    sampler_options(settings)
    if not 0 <= settings.seed < 2**32:
        raise InputError(f"seed {settings.seed} must be in 0..2**32 - 1")
    if settings.num < 1:
        raise InputError(f"num {settings.num} must be at least 1")
    _check_guidance(settings)
    _check_limits(settings)
    _check_images(settings)
    if settings.progressive < 0:
        raise InputError(
            f"progressive {settings.progressive} must be a number of steps; 0 = show none"
        )


def sampler_options(settings: SampleOptions) -> dict[str, float]:
    """The options that the sampler is given; raises InputError for one that it does not have."""
    if settings.eta != -1 and not 0 <= settings.eta <= 1:
        raise InputError(
            f"eta {settings.eta} must be in [0, 1]; leave it out for the sampler's own"
        )
    if not (math.isfinite(settings.temperature) and settings.temperature >= 0):
        raise InputError(
            f"temperature {settings.temperature} must be finite and not negative; 1 is plain"
        )
    churn = settings.churn
    if len(churn) not in (0, 1, 3, 4) or not all(c >= 0 for c in churn):
        raise InputError(
            f"churn {_listed(churn)} must be numbers from 0 on, S_churn or S_churn,S_tmin,S_tmax "
            "or these and S_noise; EDM's for ImageNet is 40,0.05,50,1.003"
        )
    if len(churn) > 2 and churn[1] > churn[2]:
        raise InputError(
            f"churn {_listed(churn)} is of no sigma: S_tmin must not exceed S_tmax, as in "
            "40,0.05,50,1.003"
        )
    if settings.temperature != 1 and settings.sampler == "ddim" and settings.eta in (-1, 0):
        raise InputError(
            f"temperature {settings.temperature} multiplies the noise of the steps, and sampler "
            "'ddim' draws none; give --eta=1 too, or leave it out"
        )
    if not 0 <= settings.order <= 3:
        raise InputError(f"order {settings.order} must be in 1..3; leave it out for 2")
    asked = {"eta": (settings.eta, -1), "temperature": (settings.temperature, 1)}
    asked |= {"order": (settings.order, 0)}
    options = {name: value for name, (value, neutral) in asked.items() if value != neutral}
    names = ("churn", "churn_from", "churn_to", "inflation")
    options |= dict(zip(names, churn, strict=False))
    for name, value in options.items():
        if name not in samplers.options(settings.sampler):
            having = [s for s in samplers.SAMPLERS if name in samplers.options(s)]
            raise InputError(
                f"{name} {value}: sampler {settings.sampler!r} has none; leave it out, or use one "
                f"of {having}"
            )
    return options


def _check_guidance(settings: SampleOptions) -> None:
    if not (math.isfinite(settings.guidance) and settings.guidance >= 0):
        raise InputError(
            f"guidance {settings.guidance} must be finite and not negative; 1 is the plain model"
        )
    changes = {
        "guidance-interval": settings.guidance_interval != SampleOptions.guidance_interval,
        "guidance-rescale": settings.guidance_rescale != 0,
        "guidance-projection": settings.guidance_projection != (),
        "guided-channels": settings.guided_channels != (),
        "guide-workdir, guide-step or guide-weights": settings.autoguided,
    }
    changed = [name for name, given in changes.items() if given]
    if changed and settings.guidance == 1:
        raise InputError(
            f"{changed[0]} changes guidance, and guidance 1 is none; give --guidance too, or leave "
            "it out"
        )
    times = settings.guidance_interval
    if len(times) != 2 or not 0 <= times[0] < times[1] <= 1:
        raise InputError(
            f"guidance-interval {_listed(times)} must be LOW,HIGH with 0 <= LOW < HIGH <= 1, where "
            "0 is data and 1 the noise end; 0.2,0.8 guides the middle"
        )
    if not 0 <= settings.guidance_rescale <= 1:
        raise InputError(
            f"guidance-rescale {settings.guidance_rescale} must be in 0..1; 0 = none, 0.7 is usual"
        )
    projection = settings.guidance_projection
    if projection and not (
        len(projection) <= 2 and 0 <= projection[0] <= 1 and all(n > 0 for n in projection[1:])
    ):
        raise InputError(
            f"guidance-projection {_listed(projection)} must be ETA or ETA,NORM with ETA in 0..1 "
            "and NORM above 0; 0 leaves out all along the prediction, as 0,15"
        )


def _check_limits(settings: SampleOptions) -> None:
    if not 0 <= settings.clip_x0 < math.inf:
        raise InputError(
            f"clip-x0 {settings.clip_x0} must be positive and finite; 1 for pixels, about 4 for "
            "latents, whose deviation is 1"
        )
    if not 0 <= settings.threshold_x0 <= 1:
        raise InputError(
            f"threshold-x0 {settings.threshold_x0} must be a quantile in 0..1, as 0.995"
        )
    if settings.threshold_x0 and not settings.clip_x0:
        raise InputError(
            f"threshold-x0 {settings.threshold_x0} shrinks that quantile to --clip-x0; give "
            "--clip-x0 too, 1 for pixels"
        )


def _check_images(settings: SampleOptions) -> None:
    strength = settings.strength
    if not 0 < strength <= 1:
        raise InputError(
            f"strength {strength} must be above 0 and at most 1; 1 takes every step, from noise"
        )
    if not settings.init_images:
        for name, given in (("masks", settings.masks), ("strength", strength != 1)):
            if given:
                raise InputError(
                    f"{name} {getattr(settings, name)} is about images to start from; give "
                    f"--init-images too, or leave --{name} out"
                )
    elif strength == 1 and not settings.masks:
        raise InputError(
            f"init-images {settings.init_images} would have no influence at strength 1 and without "
            "masks; give --strength=0.6 or --masks"
        )


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(str(value) for value in values)
