"""Checkpoints through orbax: written in the background, restored on any mesh, never half there.

One folder per step holds the items `params`, those of the averages by their names (`ema`,
`ema-0.999`, ...), `optimizer`, `extra` (when the training carries more) and `meta` (JSON), so that
a later job can read one of them alone. `ema/snapshots` keeps power-function averages over a whole
training, from which any width is made afterwards.
"""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from ldm_jax.errors import InputError
from ldm_jax.sharding import key_name
from ldm_jax.train.ema import POWER, power_name
from ldm_jax.train.state import TrainState

logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def write_alone() -> None:
    """Has one process write its arrays whole.

    Replicas share the writing of what they hold alike; with one writer the slicing for that costs
    several times the writing itself.
    """
    if jax.process_count() == 1:
        alone = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
        ocp.type_handlers.register_type_handler(jax.Array, alone, override=True)


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int = 2,
        keep_every: int = 0,
        keep_best: bool = False,
        read_only: bool = False,
    ):
        """Keeps the newest `keep`, when keep_every > 0 every multiple of it, and perhaps the best.

        read_only leaves the folder alone: the run that it belongs to may be writing in it.
        """
        write_alone()
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        if keep_best:
            best = checkpoint_managers.BestN(
                get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,
            best_fn=_score if keep_best else None,
        )
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._mark = Path(workdir) / ".checkpointed"
        if not read_only and self._mark.exists() and self.latest() is None:
            raise InputError(
                f"workdir {workdir} had checkpoints and holds none now; put them back, or use a "
                "new workdir to start afresh"
            )

    def latest(self) -> int | None:
        """The newest complete step, by number; None when there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """All complete steps."""
        return list(self._manager.all_steps())

    def best(self) -> float:
        """The greatest score that a checkpoint was saved with; -inf where none was."""
        scores = [self._manager.metrics(step) for step in self.all_steps()]
        return max((_score(metrics) for metrics in scores if metrics), default=-math.inf)

    def save(self, state: TrainState, meta: dict[str, Any], score: float | None = None) -> None:
        """Starts writing the state; returns as soon as its buffers are safe to donate.

        The checkpoint of the greatest `score` is the best one.
        """
        step = int(state.step)
        if step in self.all_steps():
            return
        self._write(step, _trees(state), meta, score)
        if jax.process_index() == 0 and len(self.all_steps()) > 1:
            self._mark.touch()

    def save_params(self, step: int, params: Any, meta: dict[str, Any]) -> None:
        """Starts writing weights alone, which `load_weights` reads and no training resumes."""
        self._write(step, {"params": params}, meta)

    def _write(
        self, step: int, trees: dict[str, Any], meta: dict[str, Any], score: float | None = None
    ) -> None:
        items: dict[str, Any] = {name: ocp.args.StandardSave(x) for name, x in trees.items()}
        items["meta"] = ocp.args.JsonSave({**meta, "step": step})
        metrics = None if score is None else {"score": score}
        args = ocp.args.Composite(**items)
        if not self._manager.save(step, args=args, metrics=metrics, force=True):
            raise RuntimeError(f"checkpoint of step {step} was not written to {self.folder}")

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of `step`, placed as `like` (shapes, types, shardings) says, and its meta.

        Raises InputError when the checkpoint lacks an item or holds one of another shape.
        """
        restored = self._restore(step, _trees(like), with_meta=True)
        state = TrainState(
            step=jax.device_put(jnp.asarray(step, jnp.int32), like.step.sharding),
            params=restored["params"],
            opt_state=restored["optimizer"],
            averages={name: restored[name] for name in like.averages},
            extra=restored["extra"] if like.extra else {},
        )
        return state, dict(restored["meta"])

    def restore_item(self, step: int, name: str, like: Any) -> Any:
        """One item, `params`, `ema` or `ema-NAME`, placed as `like` says."""
        return self._restore(step, {name: like})[name]

    def items(self, step: int) -> set[str]:
        """The names of what a checkpoint holds."""
        return {p.name for p in (self.folder / str(step)).iterdir() if p.is_dir()}

    def _restore(self, step: int, trees: dict[str, Any], *, with_meta: bool = False) -> Any:
        where = f"checkpoint {self.folder / str(step)}"
        missing = sorted(set(trees) - self.items(step))
        if missing:
            raise InputError(
                f"{where} lacks {missing}: it was written under another configuration; restore "
                "that configuration or start in a new workdir"
            )
        for name, tree in trees.items():
            self._check_tree(where, name, step, tree)
        args: dict[str, Any] = {
            name: ocp.args.StandardRestore(tree) for name, tree in trees.items()
        }
        if with_meta:
            args["meta"] = ocp.args.JsonRestore()
        return self._manager.restore(step, args=ocp.args.Composite(**args))

    def _check_tree(self, where: str, name: str, step: int, tree: Any) -> None:
        handler = ocp.StandardCheckpointHandler()
        stored: Any = handler.metadata(epath.Path(self.folder / str(step) / name))
        stored = getattr(stored, "item_metadata", stored)
        stored = getattr(stored, "tree", stored)
        have, want = _shapes(stored), _shapes(tree)
        lines = [f"{k} is missing" for k in sorted(want.keys() - have.keys())]
        lines += [f"{k} is unexpected" for k in sorted(have.keys() - want.keys())]
        lines += [
            f"{k} has shape {have[k]}, the configuration gives {want[k]}"
            for k in sorted(want.keys() & have.keys())
            if have[k] != want[k]
        ]
        if lines:
            more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
            raise InputError(
                f"{where}: {name} does not fit: {'; '.join(lines[:3])}{more}; use the "
                "configuration it was written under or a new workdir"
            )

    def wait(self) -> None:
        """Blocks until everything that was saved is on disk."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0 and self._manager.latest_step() is not None:
            self._mark.touch()

    def close(self) -> None:
        self._manager.close()

    def reached_preemption(self, step: int) -> bool:
        """Whether the machine is being taken away, the same answer on every process."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)


def _score(metrics: Any) -> float:
    return metrics["score"]


def _trees(state: TrainState) -> dict[str, Any]:
    """The items of arrays of a state, by name; empty ones are not written."""
    extra = {"extra": state.extra} if state.extra else {}
    return {"params": state.params, "optimizer": state.opt_state, **extra, **state.averages}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape. Named tuples are stored by field or index: only keys' texts count."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        "/".join(key_name(k) for k in path): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def has_checkpoint(workdir: Path) -> bool:
    """Whether a training can go on from what `workdir` holds."""
    if not (Path(workdir) / "checkpoints").is_dir():
        return False
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        return checkpoints.latest() is not None
    finally:
        checkpoints.close()


@dataclasses.dataclass(frozen=True)
class RunWeights:
    """Which weights of a run a later job uses, and the step they are from."""

    params: Any
    step: int
    which: str  # "ema" | "params" | "ema-NAME"


def load_weights(workdir: Path, like: Any, *, which: str, step: int | None = None) -> RunWeights:
    """Parameters of a finished or running training, for sampling, caching and evaluation.

    `like` gives shapes and shardings; `which` is "ema", "params" or "ema-NAME". Raises InputError
    when the checkpoint lacks them: one never stands in for the other.
    """
    nothing = InputError(f"workdir {workdir} holds no checkpoint; train it first")
    if not (Path(workdir) / "checkpoints").is_dir():
        raise nothing
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        step = checkpoints.latest() if step is None else step
        if step is None:
            raise nothing
        if not (checkpoints.folder / str(step)).is_dir():
            raise InputError(
                f"workdir {workdir} holds no checkpoint of step {step}; it has "
                f"{sorted(checkpoints.all_steps())}"
            )
        known = {n for n in checkpoints.items(step) if n == "params" or n.startswith("ema")}
        if which not in {"params", "ema", *known}:
            raise InputError(
                f"workdir {workdir} holds no weights {which!r} at step {step}; it has "
                f"{sorted(known)}"
            )
        return RunWeights(checkpoints.restore_item(step, which, like), step, which)
    finally:
        checkpoints.close()


def save_params(workdir: Path, params: Any, step: int, meta: dict[str, Any]) -> None:
    """Writes a checkpoint of weights alone, which `load_weights` reads and no training resumes."""
    checkpoints = Checkpoints(workdir)
    try:
        checkpoints.save_params(step, params, meta)
        checkpoints.wait()
    finally:
        checkpoints.close()


class Snapshots:
    """`ema/snapshots/STEP/power-WIDTH` of one run directory; all of them are kept."""

    def __init__(self, workdir: Path, *, read_only: bool = False):
        write_alone()
        self.folder = Path(workdir).absolute() / "ema" / "snapshots"
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,
            # The checkpoints' manager waits at barriers of its own.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix="snapshots"
            ),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState) -> None:
        """Starts writing; returns as soon as the buffers are safe to donate.

        What a resumed run comes by again, it has made again, and it is left as it is.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {
            name.removeprefix("ema-"): ocp.args.StandardSave(tree)
            for name, tree in state.averages.items()
            if name.startswith(POWER)
        }
        if not self._manager.save(step, args=ocp.args.Composite(**items), force=True):
            raise RuntimeError(f"snapshot of step {step} was not written to {self.folder}")

    def kept(self) -> list[tuple[int, float]]:
        """(step, width) of every average there is, by step."""
        found = []
        for step in sorted(self._manager.all_steps()):
            names = sorted(p.name for p in (self.folder / str(step)).iterdir() if p.is_dir())
            widths = [n.removeprefix("power-") for n in names if n.startswith("power-")]
            found += [(step, float(width)) for width in widths]
        return found

    def load(self, step: int, width: float, like: Any) -> Any:
        """One average, placed as `like` (shapes, types, shardings) says."""
        name = power_name(width).removeprefix("ema-")
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(like)})
        return self._manager.restore(step, args=args)[name]

    def wait(self) -> None:
        """Blocks until everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()
