"""Snapshots of power-function averages over a training, from which any width is made afterwards."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from ldm_jax.train.checkpoint import write_alone
from ldm_jax.train.ema import power_name
from ldm_jax.train.state import TrainState

PREFIX = power_name(0)[:-1]


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
            name: ocp.args.StandardSave(tree)
            for name, tree in state.averages.items()
            if name.startswith(PREFIX)
        }
        if not self._manager.save(step, args=ocp.args.Composite(**items), force=True):
            raise RuntimeError(f"snapshot of step {step} was not written to {self.folder}")

    def kept(self) -> list[tuple[int, float]]:
        """(step, width) of every average there is, by step."""
        found = []
        for step in sorted(self._manager.all_steps()):
            names = sorted(p.name for p in (self.folder / str(step)).iterdir() if p.is_dir())
            widths = [n.removeprefix(PREFIX) for n in names if n.startswith(PREFIX)]
            found += [(step, float(width)) for width in widths]
        return found

    def load(self, step: int, width: float, like: Any) -> Any:
        """One average, placed as `like` (shapes, types, shardings) says."""
        name = power_name(width)
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(like)})
        return self._manager.restore(step, args=args)[name]

    def wait(self) -> None:
        """Blocks until everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()
