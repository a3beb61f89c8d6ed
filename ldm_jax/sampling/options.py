"""What `ldm sample` can draw: fields, their flags, and what no model can do."""

import dataclasses

from ldm_jax.diffusion import samplers
from ldm_jax.errors import InputError, choose
from ldm_jax.options import Group, check_intervals, option
from ldm_jax.runs.denoiser import WhichWeights

SAMPLES = Group("which samples")
SAMPLER = Group("sampler")
GUIDANCE = Group(
    "guidance",
    "Leads from the null condition's prediction to the condition's; with a --guide-..., from a "
    "worse denoiser's of the same latents to this one's (autoguidance).",
)
IMAGES = Group(
    "images to start from",
    "Sample i begins at image i, in turn: noised and denoised again (--strength), or repainted "
    "where its mask is white, with its other pixels kept.",
)
SIZE = Group("size", "In pixels, by the same weights at other sizes.")
DECODES = ("mean", "resampled")
# Options that say something about guidance and nothing without it.
GUIDANCE_CHANGES = (
    "guidance_interval",
    "guidance_rescale",
    "guidance_projection",
    "guided_channels",
)


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """What to draw. Sample i depends on (seed, i) and these alone, not on batch size or mesh."""

    num: int = option(16, "images to draw (default: 16)", metavar="N", interval="[1, inf)")
    progressive: int = option(
        0,
        "writes OUT-progress.png: each sample a row, the image predicted every K steps",
        metavar="K",
        interval="[0, inf)",
        remedy="a number of steps; 0 shows none",
    )

    classes: tuple[int, ...] = option(
        (),
        "classes in turn (default: all)",
        metavar="I,J,...",
        group=SAMPLES,
        syntax="class numbers separated by commas, as 0,3,7",
    )
    seed: int = option(0, "of all draws (default: 0)", group=SAMPLES, interval=f"[0, {2**32 - 1}]")
    noise: str = option(
        "", "initial noise f32 [N,H,W,C] of latents", metavar="FILE.npy", group=SAMPLES
    )
    # 0 = min(num, 100), rounded up to fit the mesh
    batch_size: int = option(0, "images at a time over all devices", metavar="N", group=SAMPLES)
    decode: str = option(
        "mean",
        "of latents that tell their spread too: their mean, or resampled by it (default: mean)",
        choices=DECODES,
        group=SAMPLES,
    )
    weights: str = option(  # "auto": the average when there is one
        "auto",
        "auto, params, ema, or ema-NAME of another average, as ema-0.999 or ema-power-0.05",
        metavar="NAME",
        group=SAMPLES,
    )
    step: int = option(-1, "checkpoint (default: the newest)", group=SAMPLES)

    sampler: str = option(
        "ddim", "ddim, ddpm, dpmpp_2m, heun, unipc, ...", metavar="NAME", group=SAMPLER
    )
    steps: int = option(50, "denoising steps (default: 50)", group=SAMPLER)
    spacing: str = option(
        "auto",
        "of the steps: leading, trailing, karras:7, ... (default: the process' own)",
        metavar="NAME[:NUMBER]",
        group=SAMPLER,
    )
    # A number that is named as a keyword of some samplers is theirs: see `sampler_options`.
    eta: float = option(
        -1.0,
        "sampler's noise, 0..1 (default: its own)",
        group=SAMPLER,
        interval="[0, 1]",
        remedy="leave it out for the sampler's own",
    )
    temperature: float = option(
        1.0,
        "multiplies the noise of the steps",
        metavar="FACTOR",
        group=SAMPLER,
        interval="[0, inf)",
        remedy="1 is plain",
    )
    churn: tuple[float, ...] = option(
        (),
        "of sampler edm: S_churn[,S_tmin,S_tmax[,S_noise]] (default: 40,0.05,50,1.003)",
        metavar="AMOUNT,...",
        group=SAMPLER,
        syntax="one, three or four numbers separated by commas, as 40,0.05,50,1.003",
    )
    order: int = option(
        0,
        "of sampler unipc (default: 2)",
        metavar="1..3",
        group=SAMPLER,
        interval="[0, 3]",
        remedy="0 is the sampler's own",
    )
    clip_x0: float = option(  # 0 = anywhere
        0.0,
        "keeps predicted latents, of deviation 1, within -VALUE..VALUE",
        metavar="VALUE",
        group=SAMPLER,
        interval="[0, inf)",
        remedy="1 for pixels, about 4 for latents, whose deviation is 1",
    )
    threshold_x0: float = option(  # 0 = none
        0.0,
        "shrinks predicted latents until this quantile of their size is at --clip-x0",
        metavar="QUANTILE",
        group=SAMPLER,
        interval="[0, 1]",
        remedy="a quantile, as 0.995",
    )

    guidance: float = option(
        1.0,
        "1 = conditional model only, >1 extrapolates (default: 1)",
        metavar="SCALE",
        group=GUIDANCE,
        interval="[0, inf)",
        remedy="1 is the plain model",
    )
    guidance_interval: tuple[float, ...] = option(
        (0.0, 1.0),
        "guided times, where 0 is data and 1 the noise end (default: 0,1)",
        metavar="LOW,HIGH",
        group=GUIDANCE,
        syntax="two numbers separated by commas, as 0.2,0.8",
    )
    guidance_rescale: float = option(
        0.0,
        "0..1: how far to go back to the unguided prediction's deviation",
        metavar="PHI",
        group=GUIDANCE,
        interval="[0, 1]",
        remedy="0 = none, 0.7 is usual",
    )
    guidance_projection: tuple[float, ...] = option(
        (),
        "APG: share 0..1 of what lies along the predicted x0, greatest norm of the change",
        metavar="ETA[,NORM]",
        group=GUIDANCE,
        syntax="one number or two separated by commas, as 0,15",
    )
    guided_channels: tuple[int, ...] = option(
        (),
        "of the latent, from 0 (default: all)",
        metavar="I,J,...",
        group=GUIDANCE,
        syntax="channel numbers separated by commas, as 0,1,2",
    )
    guide_workdir: str = option(
        "",
        "run of the worse denoiser (default: this WORKDIR, at another step or other weights)",
        metavar="DIR",
        group=GUIDANCE,
    )
    # -1 = the newest of another run, and of the run itself the one that is sampled
    guide_step: int = option(-1, "its checkpoint (default: its newest)", group=GUIDANCE)
    guide_weights: str = option("auto", "as --weights", metavar="NAME", group=GUIDANCE)

    init_images: str = option(
        "",
        "folder of images, or uint8 [N,H,W,3] as `ldm sample` writes",
        metavar="DIR_OR_NPZ",
        group=IMAGES,
    )
    strength: float = option(
        1.0,
        "share of the steps taken from the noised image; 1 = all, from noise (default: 1)",
        group=IMAGES,
        interval="(0, 1]",
        remedy="1 takes every step, from noise",
    )
    masks: str = option(
        "",
        "white = repaint; one for each image by name, or one for all; .npz: uint8 [N,H,W]",
        metavar="DIR_OR_NPZ",
        group=IMAGES,
    )

    size: tuple[int, ...] = option(
        (),
        "of the samples (default: as trained)",
        metavar="H[,W]",
        group=SIZE,
        syntax="one whole number or two separated by commas, as 512,768",
    )
    tile: int = option(
        0,
        "side of overlapping tiles that are denoised one by one (default: the whole at once)",
        metavar="SIZE",
        group=SIZE,
    )
    tile_overlap: int = option(
        -1, "of neighbouring tiles (default: half of one)", metavar="N", group=SIZE
    )

    @property
    def which(self) -> WhichWeights:
        names = [f.name for f in dataclasses.fields(WhichWeights)]
        return WhichWeights(**{name: getattr(self, name) for name in names})

    @property
    def autoguided(self) -> bool:
        return self.which.autoguided


def check_values(options: SampleOptions) -> None:
    """Raises InputError for what no model can do."""
    check_intervals(options)
    choose("decode", options.decode, DECODES)
    sampler_options(options)
    _check_guidance(options)
    if options.threshold_x0 and not options.clip_x0:
        raise InputError(
            f"threshold-x0 {options.threshold_x0} shrinks that quantile to --clip-x0; give "
            "--clip-x0 too, 1 for pixels"
        )
    _check_images(options)


def sampler_options(options: SampleOptions) -> dict[str, float]:
    """What the sampler is called with beside its inputs; InputError for what it does not have."""
    choose("sampler", options.sampler, sorted(samplers.SAMPLERS))
    _check_churn(options.churn)
    if options.temperature != 1 and options.sampler == "ddim" and options.eta in (-1, 0):
        raise InputError(
            f"temperature {options.temperature} multiplies the noise of the steps, and sampler "
            "'ddim' draws none; give --eta=1 too, or leave it out"
        )
    edm = ("churn", "churn_from", "churn_to", "inflation")
    theirs = {name for sampler in samplers.SAMPLERS for name in samplers.options(sampler)}
    changed = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name in theirs.difference(edm) and getattr(options, field.name) != field.default
    }
    changed |= dict(zip(edm, options.churn, strict=False))
    for name, value in changed.items():
        if name not in samplers.options(options.sampler):
            having = [s for s in samplers.SAMPLERS if name in samplers.options(s)]
            raise InputError(
                f"{name} {value}: sampler {options.sampler!r} has none; leave it out, or use one "
                f"of {having}"
            )
    return changed


def _check_churn(churn: tuple[float, ...]) -> None:
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


def _check_guidance(options: SampleOptions) -> None:
    changed = [
        name.replace("_", "-")
        for name in GUIDANCE_CHANGES
        if getattr(options, name) != getattr(SampleOptions, name)
    ]
    if options.autoguided:
        changed.append("guide-workdir, guide-step or guide-weights")
    if changed and options.guidance == 1:
        raise InputError(
            f"{changed[0]} changes guidance, and guidance 1 is none; give --guidance too, or leave "
            "it out"
        )
    times = options.guidance_interval
    if len(times) != 2 or not 0 <= times[0] < times[1] <= 1:
        raise InputError(
            f"guidance-interval {_listed(times)} must be LOW,HIGH with 0 <= LOW < HIGH <= 1, where "
            "0 is data and 1 the noise end; 0.2,0.8 guides the middle"
        )
    projection = options.guidance_projection
    if projection and not (
        len(projection) <= 2 and 0 <= projection[0] <= 1 and all(n > 0 for n in projection[1:])
    ):
        raise InputError(
            f"guidance-projection {_listed(projection)} must be ETA or ETA,NORM with ETA in 0..1 "
            "and NORM above 0; 0 leaves out all along the prediction, as 0,15"
        )


def _check_images(options: SampleOptions) -> None:
    if not options.init_images:
        for name in ("masks", "strength"):
            if getattr(options, name) != getattr(SampleOptions, name):
                raise InputError(
                    f"{name} {getattr(options, name)} is about images to start from; give "
                    f"--init-images too, or leave --{name} out"
                )
    elif options.strength == 1 and not options.masks:
        raise InputError(
            f"init-images {options.init_images} would have no influence at strength 1 and without "
            "masks; give --strength=0.6 or --masks"
        )


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(str(value) for value in values)
