"""The optimizer of a run, from optax: five algorithms behind one clipping, one schedule, one mask.

Muon orthogonalises the update of hidden matrices: kernels of dense layers and of 1x1 convolutions
(attention, feed-forward, shortcuts, time), each as one matrix even where it fuses two (GEGLU).
Everything else (wider convolutions, first and last layers, embeddings, codebooks, biases, norms)
goes to AdamW at the same learning rate: an orthogonal update is scaled to the RMS of AdamW's.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from ldm_jax.errors import InputError, choose, within
from ldm_jax.sharding import key_name

# Of an update over the learning rate, as AdamW's (Liu et al., 2025, arXiv 2502.16982).
MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The learning rate is what is used: nothing multiplies it by batch or device counts."""

    name: str = "adamw"  # "adamw" | "adam" | "adafactor" | "lion" | "muon"
    lr: float = 1e-4
    schedule: str = "constant"  # "constant" | "cosine" | "rsqrt" | "edm2"
    final_lr_fraction: float = 0.0  # what "cosine" has come to after num_steps updates
    decay_steps: int = 70_000  # updates after which "rsqrt" and "edm2" fall; EDM2's are these
    warmup_steps: int = 0  # linear from 0
    b1: float = 0.9  # of adafactor: momentum, 0 = keep none; lion's published are 0.9, 0.99
    b2: float = 0.999
    eps: float = 1e-8  # of adamw and adam
    momentum: float = 0.95  # of muon's matrices, Nesterov's
    weight_decay: float = 0.0  # times the learning rate, decoupled; not for adam
    weight_decay_mask: str = "all"  # "all" | "matrices": kernels of rank >= 2 alone
    clip_norm: float = 0.0  # global gradient norm; 0 = no clipping

    def __post_init__(self):
        for name in ("lr", "warmup_steps", "weight_decay", "clip_norm", "final_lr_fraction", "eps"):
            within(f"optim {name}", getattr(self, name), "[0, inf)")
        for name in ("b1", "b2", "momentum"):
            within(f"optim {name}", getattr(self, name), "[0, 1)")
        within("optim decay_steps", self.decay_steps, "[1, inf)")
        choose("optim name", self.name, OPTIMIZERS)
        choose("optim schedule", self.schedule, SCHEDULES)
        choose("optim weight_decay_mask", self.weight_decay_mask, MASKS)
        if self.name == "adam" and self.weight_decay:
            raise InputError(
                f"optim name 'adam' has no weight decay, weight_decay is {self.weight_decay}; set "
                "--config.optim.weight_decay=0 or --config.optim.name=adamw"
            )


def constant(config: OptimConfig, num_steps: int) -> optax.Schedule:
    return _after_warmup(config, optax.constant_schedule(config.lr))


def cosine(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Half a cosine from the end of the warm-up to the end of the run.

    It comes to `final_lr_fraction` after the last update: with 0 that one still moves.
    """
    steps = max(1, num_steps - config.warmup_steps)
    return _after_warmup(
        config, optax.cosine_decay_schedule(config.lr, steps, config.final_lr_fraction)
    )


def rsqrt(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """lr / sqrt(1 + n / decay_steps), n counted from the end of the warm-up.

    Zhai et al., CVPR 2022 ("Scaling Vision Transformers"), without their cool-down.
    """
    return _after_warmup(config, lambda n: config.lr / jnp.sqrt(1 + n / config.decay_steps))


def edm2(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """lr / sqrt(max(n / decay_steps, 1)) times the ramp, both counted from the start.

    Karras et al., CVPR 2024 ("Analyzing and Improving the Training Dynamics of Diffusion Models");
    their ramp is 0 at the first update, ours is 1 / warmup_steps.
    """
    ramp = optax.linear_schedule(0.0, 1.0, config.warmup_steps) if config.warmup_steps else None

    def rate(n):
        falling = config.lr / jnp.sqrt(jnp.maximum(n / config.decay_steps, 1.0))
        return falling * ramp(n + 1) if ramp else falling

    return rate


SCHEDULES: dict[str, Callable[[OptimConfig, int], optax.Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "rsqrt": rsqrt,
    "edm2": edm2,
}


def _after_warmup(config: OptimConfig, main: optax.Schedule) -> optax.Schedule:
    if not config.warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, config.lr, config.warmup_steps)
    # Shifted by one, so that the first update already moves.
    return optax.join_schedules([lambda n: warmup(n + 1), main], [config.warmup_steps])


def learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates done."""
    return SCHEDULES[config.schedule](config, num_steps)


def matrices(params: Any) -> Any:
    """True for kernels of rank >= 2, False for biases, norms, embeddings and codebooks."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: key_name(path[-1]) == "kernel" and p.ndim >= 2, params
    )


MASKS: dict[str, Callable[[Any], Any] | None] = {"all": None, "matrices": matrices}


def muon_dimensions(params: Any, edges: Collection[str]) -> Any:
    """Which axes of a hidden matrix are its two, None for what AdamW takes; the module says why.

    `edges` are the names of a model's first and last layers.
    """

    def dimensions(path, p):
        names = [key_name(k) for k in path]
        hidden = names[-1] == "kernel" and not set(names) & set(edges)
        matrix = p.ndim == 2 or (p.ndim == 4 and p.shape[:2] == (1, 1))
        return MuonDimensionNumbers(-2, -1) if hidden and matrix else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _adamw(
    config: OptimConfig, rate: optax.Schedule, edges: Collection[str] = ()
) -> optax.GradientTransformation:
    mask = MASKS[config.weight_decay_mask]
    return optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=mask,
    )


def _adam(
    config: OptimConfig, rate: optax.Schedule, edges: Collection[str]
) -> optax.GradientTransformation:
    return optax.adam(rate, b1=config.b1, b2=config.b2, eps=config.eps)


def _lion(
    config: OptimConfig, rate: optax.Schedule, edges: Collection[str]
) -> optax.GradientTransformation:
    mask = MASKS[config.weight_decay_mask]
    return optax.lion(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=mask)


def _adafactor(
    config: OptimConfig, rate: optax.Schedule, edges: Collection[str]
) -> optax.GradientTransformation:
    """Absolute steps, so that AdamW's learning rate is about right; factored from 128 x 128 on."""

    def decay(n: Any) -> Any:  # optax's is not times the rate
        return config.weight_decay * rate(n)

    return optax.adafactor(
        rate,
        multiply_by_parameter_scale=False,
        momentum=config.b1 or None,
        weight_decay_rate=decay if config.weight_decay else None,
        weight_decay_mask=MASKS[config.weight_decay_mask],
    )


def _muon(
    config: OptimConfig, rate: optax.Schedule, edges: Collection[str]
) -> optax.GradientTransformation:
    def dimensions(params: Any) -> Any:
        return muon_dimensions(params, edges)

    def labels(params: Any) -> Any:
        found = dimensions(params)
        return jax.tree.map(lambda _, d: "adamw" if d is None else "muon", params, found)

    # optax's muon would give the rest to AdamW with Nesterov's momentum: another update.
    matrices = optax.contrib.muon(
        rate,
        beta=config.momentum,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=MUON_RMS,
    )
    return optax.partition({"muon": matrices, "adamw": _adamw(config, rate)}, labels)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adam": _adam,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


def clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """optax.clip_by_global_norm, to which `update(..., norm=...)` may give the norm.

    A step knows it already; taken once more it would be another kernel for every parameter.
    """

    def update(updates: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any) -> Any:
        norm = optax.tree.norm(updates) if norm is None else norm

        def clip(g: jax.Array) -> jax.Array:
            return jax.lax.select(norm < limit, g, (g / norm.astype(g.dtype)) * limit)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: OptimConfig, num_steps: int, edges: Collection[str] = ()
) -> optax.GradientTransformationExtraArgs:
    """Clipping, then the optimizer with decoupled weight decay; see `clip_by_norm`.

    `edges` are the names of the model's first and last layers, which Muon leaves to AdamW.

    The state is made of trees like the parameters, so it is sharded as they are; Adafactor's row
    and column statistics, of lower rank, are replicated.
    """
    clip = clip_by_norm(config.clip_norm) if config.clip_norm else optax.identity()
    rate = learning_rate(config, num_steps)
    return optax.chain(clip, OPTIMIZERS[config.name](config, rate, edges))
