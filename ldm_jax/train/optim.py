"""The optimizer of a run, from optax."""

import dataclasses
import math

import optax

from ldm_jax.errors import InputError

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class Config:
    """AdamW. The learning rate is what is used: nothing multiplies it by batch or device counts."""

    lr: float = 1e-4
    schedule: str = (
        "constant"  # after warm-up; "cosine" falls to final_lr_fraction at the last step
    )
    final_lr_fraction: float = 0.0
    warmup_steps: int = 0  # linear from 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 0.0  # global gradient norm; 0 = no clipping

    def __post_init__(self):
        for name in ("lr", "warmup_steps", "weight_decay", "clip_norm", "final_lr_fraction", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"optim {name} {getattr(self, name)} must be finite and not negative"
                )
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optim {name} {getattr(self, name)} must be in [0, 1)")
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"optim schedule {self.schedule!r} is unknown; choose one of {SCHEDULES}"
            )


def learning_rate(config: Config, num_steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates done."""
    warmup = optax.linear_schedule(0.0, config.lr, config.warmup_steps)
    if config.schedule == "cosine":
        decay_steps = max(1, num_steps - config.warmup_steps)
        main = optax.cosine_decay_schedule(config.lr, decay_steps, config.final_lr_fraction)
    else:
        main = optax.constant_schedule(config.lr)
    if not config.warmup_steps:
        return main
    # Shifted by one, so that the first update already moves.
    return lambda n: optax.join_schedules([warmup, main], [config.warmup_steps])(n + 1)


def make_optimizer(config: Config, num_steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW with decoupled weight decay."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        learning_rate(config, num_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return optax.chain(clip, adamw)
