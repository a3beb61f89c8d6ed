"""The settings of a run: one frozen dataclass per kind of training; `config_files` fills them."""

import dataclasses
from typing import Any

from ldm_jax.data.images import ImagesConfig
from ldm_jax.diffusion.objective import Objective
from ldm_jax.diffusion.perceptual import PerceptualConfig
from ldm_jax.diffusion.process import ProcessConfig
from ldm_jax.errors import InputError, choose, within
from ldm_jax.eval.judge import JudgeOptions
from ldm_jax.models import latents
from ldm_jax.models.autoencoder import AutoencoderConfig
from ldm_jax.models.denoiser import DenoiserConfig
from ldm_jax.sharding import MeshConfig
from ldm_jax.train.adversarial import AdversarialConfig
from ldm_jax.train.denoiser import DenoiserLoss
from ldm_jax.train.ema import EmaConfig
from ldm_jax.train.first_stage import AutoencoderLoss, Recipe
from ldm_jax.train.loop import LoopConfig
from ldm_jax.train.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class Run(LoopConfig):
    """The settings of both trainings, beside the pace of their loop."""

    seed: int = 0
    batch_size: int = 32  # examples per step, over all devices
    accumulate: int = 1  # micro-batches, one after the other, that a step's batch is taken in
    max_bad_steps: int = 10  # in a row, not finite, that are skipped before the run is stopped
    data_threads: int = 2  # that prepare batches ahead, per process
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed {self.seed} must be in 0..2**32 - 1")
        within("accumulate", self.accumulate, "[1, inf)")
        within("data_threads", self.data_threads, "[1, inf)")

    def weights_named(self, name: str) -> str:
        """The weights that a name means: "auto" is the average when there is one."""
        return name if name != "auto" else "ema" if self.ema.decay else "params"


@dataclasses.dataclass(frozen=True)
class AutoencoderRun(Run):
    """`ldm train-autoencoder`; evaluations are of held-out images."""

    eval_images: int = 256  # spread over the split, in each evaluation
    images: ImagesConfig = ImagesConfig()
    model: AutoencoderConfig = AutoencoderConfig()
    loss: AutoencoderLoss = AutoencoderLoss()
    adversarial: AdversarialConfig = AdversarialConfig()
    train: str = "all"  # "all" | "decoder": fine-tune it, and latents already cached stay valid
    init_from: str = ""  # workdir of a first stage whose weights to begin with; empty = random
    optim: OptimConfig = OptimConfig(b1=0.5, b2=0.9)
    ema: EmaConfig = EmaConfig(decay=0.0)

    def __post_init__(self):
        super().__post_init__()
        if self.accumulate > 1 and self.recipe.needs_whole_batches:
            raise InputError(
                f"accumulate {self.accumulate}: an adversary and a codebook are trained on the "
                "whole batch of a step; set --config.accumulate=1, or --config.adversarial.weight=0"
                " with a KL model"
            )
        choose("train", self.train, ("all", "decoder"))
        if self.model.image_channels != 3:
            raise InputError(
                f"model.image_channels {self.model.image_channels} must be 3: images are RGB"
            )
        # EQ-VAE decodes at a quarter of the size too.
        smallest = 64 if self.loss.equivariance_weight else 16
        if self.loss.perceptual_weight and self.model.resolution < smallest:
            raise InputError(
                f"model.resolution {self.model.resolution}: the perceptual loss sees images of at "
                f"least 16 pixels a side, which takes {smallest} here; set "
                "--config.loss.perceptual_weight=0"
            )
        if self.adversarial.gradient_penalty and self.adversarial.discriminator.norm == "batch":
            raise InputError(
                f"adversarial.gradient_penalty {self.adversarial.gradient_penalty}: batch norm "
                "would couple the images whose slopes it penalises; set "
                "--config.adversarial.discriminator.norm=act or none"
            )
        layers = self.adversarial.discriminator.num_layers
        if self.adversarial.weight and self.model.resolution < 3 * 2**layers:
            raise InputError(
                f"model.resolution {self.model.resolution}: a discriminator of {layers} layers "
                f"sees images of at least {3 * 2**layers} pixels a side; use larger images or "
                "--config.adversarial.discriminator.num_layers=2"
            )
        within("eval_images", self.eval_images, "[1, inf)")
        if self.images.resolution != self.model.resolution:
            raise InputError(
                f"images.resolution {self.images.resolution} must equal model.resolution "
                f"{self.model.resolution}; set both"
            )

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.model, self.loss, self.adversarial, self.seed, self.train)


@dataclasses.dataclass(frozen=True)
class Samples:
    """What is drawn and judged at every evaluation of a denoiser."""

    num: int = 0  # 0 = none
    steps: int = 50
    sampler: str = "ddim"
    spacing: str = "auto"
    guidance: float = 1.0  # 1 = conditional model only, >1 extrapolates
    labels: str = "balanced"  # "balanced" | "random"
    seed: int = 0
    batch_size: int = 0  # at a time over all devices; 0 = min(num, 100), rounded up to fit
    judge: JudgeOptions = JudgeOptions()


@dataclasses.dataclass(frozen=True)
class DenoiserRun(Run):
    """`ldm train-denoiser`; evaluations are losses of held-out latents, on fixed draws."""

    batch_size: int = 64  # latents per step, over all devices
    loss_bins: int = 0  # equal intervals of time whose losses are logged apart; 0 = none
    eval_examples: int = 1024  # held-out latents, spread over the split, in each evaluation
    samples: Samples = Samples()  # judged then too
    autoencoder: str = ""  # workdir of the first stage
    latents: str = ""  # latent cache; empty = AUTOENCODER/latents
    flip: bool = False  # train on mirrored images half of the time
    codec: str = "sample"  # what the denoiser's latent is, a name in models.latents.CODECS
    whitening: str = "global"  # "global" 1/std | "channel" mean and std of each | "none" | "fixed"
    scale_factor: tuple[float, ...] = ()  # "fixed": (z - shift_factor) * scale_factor,
    shift_factor: tuple[float, ...] = ()  # one number or one a channel
    model: DenoiserConfig = DenoiserConfig()
    process: ProcessConfig = ProcessConfig()
    objective: Objective = Objective()
    loss: DenoiserLoss = DenoiserLoss()
    lpl: PerceptualConfig = PerceptualConfig()  # the latent perceptual loss beside it
    init_from: str = ""  # workdir of a denoiser's run whose weights to begin with; empty = random
    init_weights: str = "params"  # of those: "params" | "ema" | "ema-NAME"
    init_optimizer: str = "restart"  # | "keep": its moments and count, for "params" alone
    init_averages: str = "restart"  # | "keep": go on from its averages of the same decays
    optim: OptimConfig = OptimConfig(weight_decay=0.01)

    def __post_init__(self):
        super().__post_init__()
        within("eval_examples", self.eval_examples, "[1, inf)")
        if self.samples.num and not self.eval_every:
            raise InputError(
                f"samples.num {self.samples.num} are judged at every evaluation, and eval_every is "
                "0; set --config.eval_every"
            )
        within("loss_bins", self.loss_bins, "[0, inf)", "0 logs none")
        if self.codec not in latents.SPREADS and self.loss.second_half_weight != 1:
            raise InputError(
                f"loss.second_half_weight {self.loss.second_half_weight} is of codecs with a "
                f"spread, {list(latents.SPREADS)}, and codec is {self.codec!r}; leave it 1"
            )
        self._check_init()
        self._check_lpl()

    def _check_lpl(self) -> None:
        lpl = self.lpl
        if not lpl.active:
            for field in dataclasses.fields(lpl):
                if getattr(lpl, field.name) != field.default:
                    raise InputError(
                        f"lpl.{field.name} {getattr(lpl, field.name)} is of a loss that has no "
                        "weight; set --config.lpl.target_ratio=0.25, or --config.lpl.weight"
                    )
            return
        if lpl.target_ratio and self.objective.uncertainty:
            raise InputError(
                f"lpl.target_ratio {lpl.target_ratio} with objective.uncertainty "
                f"{self.objective.uncertainty}: a ratio to a likelihood, which may be negative, "
                "says nothing; set --config.lpl.weight in its place"
            )
        first = lpl.start_step + (lpl.calibration_steps * lpl.every if lpl.target_ratio else 0)
        if first >= self.num_steps:
            raise InputError(
                f"lpl would weigh in at step {first} (start_step {lpl.start_step}"
                + (f", calibration_steps {lpl.calibration_steps}" if lpl.target_ratio else "")
                + f"), and num_steps is {self.num_steps}; train longer, or lower these"
            )

    def _check_init(self) -> None:
        for name in ("init_optimizer", "init_averages"):
            choose(name, getattr(self, name), ("restart", "keep"))
        kept = [n for n in ("init_optimizer", "init_averages") if getattr(self, n) == "keep"]
        if not self.init_from:
            if kept or self.init_weights != "params":
                raise InputError(
                    f"{(*kept, 'init_weights')[0]} is about the run of init_from, and that is "
                    "empty; name its workdir with --config.init_from=DIR"
                )
            return
        if kept and self.init_weights != "params":
            raise InputError(
                f"{kept[0]} 'keep' with init_weights {self.init_weights!r}: the optimizer and the "
                "averages are of the trained parameters; set --config.init_weights=params, or "
                "restart them"
            )
        if self.init_optimizer == "keep" and self.optim.schedule == "cosine":
            raise InputError(
                "init_optimizer 'keep' goes on with the count of updates, which a cosine schedule "
                "would have ended; set --config.optim.schedule=constant, or restart it"
            )
        if self.init_optimizer == "keep" and self.objective.uncertainty:
            raise InputError(
                f"init_optimizer 'keep' with objective.uncertainty {self.objective.uncertainty}: "
                "that begins anew, and its moments would not; set --config.init_optimizer=restart"
            )
        if self.init_averages == "keep" and self.ema.power:
            raise InputError(
                f"init_averages 'keep' with ema.power {self.ema.power}: their widths are shares of "
                "one training; set --config.init_averages=restart, or leave them out"
            )


def todays(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """A run's plain values in today's words; those of earlier versions are still understood."""
    if cls is not DenoiserRun:
        return values
    values = dict(values)
    loss, model = values.get("loss"), values.get("model")
    if isinstance(loss, dict) and "label_dropout" in loss:
        kept = {n: v for n, v in loss.items() if n != "label_dropout"}
        values["loss"] = {**kept, "condition_dropout": loss["label_dropout"]}
    if isinstance(model, dict) and isinstance(model.get("conditioner"), dict):
        kept = {n: v for n, v in model.items() if n != "conditioner"}
        row = {"kind": "class", **model["conditioner"]}
        row = {"kind": "none"} if row["kind"] == "none" else row
        rows, more = {"class": row} if model["conditioner"] else {}, kept.get("conditions", {})
        # What is no group of rows is left as it is, to be refused.
        values["model"] = {**kept, "conditions": rows | more if isinstance(more, dict) else more}
    return values


def todays_override(cls: type, argument: str) -> str:
    """`--config.field=value` in today's words."""
    if cls is not DenoiserRun:
        return argument
    for old, new in (
        ("--config.loss.label_dropout=", "--config.loss.condition_dropout="),
        ("--config.model.conditioner.", "--config.model.conditions.class."),
    ):
        if argument.startswith(old):
            return new + argument.removeprefix(old)
    return argument
