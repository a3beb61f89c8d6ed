"""What runs beside a training: every so many steps, and once more at its end.

A hook is given the state after a step and may report figures and pictures. It changes nothing of
the training, and what was trained outlives a fault in it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.train.checkpoint import Snapshots
from ldm_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Report:
    """What a hook has found; both by name. They are written as `eval/NAME`."""

    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # uint8 [H,W,3]


def nothing() -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Hook:
    every: int  # steps
    run: Callable[[TrainState, int], Report | None]  # (state, steps done); on every process
    settle: Callable[[], None] = nothing  # before a checkpoint: what a resume will not do again
    close: Callable[[], None] = nothing  # at the end, whatever it is
    # Names of what it reports, one that ends in "-" goes on; None = not known before it runs.
    figures: tuple[str, ...] | None = None


def check_keep_best(keep_best: str, hooks: Sequence[Hook]) -> None:
    """InputError where all hooks declare their figures and `keep_best` begins none of them."""
    names = [name for hook in hooks for name in hook.figures or ()]
    if not keep_best or any(hook.figures is None for hook in hooks):
        return
    for name in names:
        if name.startswith(keep_best) or (name.endswith("-") and keep_best.startswith(name)):
            return
    raise InputError(
        f"keep_best {keep_best!r} begins no figure of the evaluations, which are {sorted(names)}; "
        "name one of these with --config.keep_best"
    )


def snapshots(workdir: Path, every: int) -> Hook:
    """Keeps the power-function averages in WORKDIR/ema/snapshots, for `ldm ema`."""
    opened: list[Snapshots] = []  # at the first one: a refused start leaves no folder

    def keep(state: TrainState, step: int) -> None:
        if not opened:
            opened.append(Snapshots(workdir))
        opened[0].save(state)

    def settle() -> None:
        for kept in opened:
            kept.wait()

    def close() -> None:
        for kept in opened:
            kept.close()

    return Hook(every, keep, settle, close, figures=())
