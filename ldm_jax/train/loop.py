"""The loop around a training step: data in, metrics out one step late, checkpoints, clean stops."""

import dataclasses
import fcntl
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from ldm_jax.errors import InputError
from ldm_jax.sharding import put_batch
from ldm_jax.train.checkpoint import Checkpoints
from ldm_jax.train.log import make_writer
from ldm_jax.train.meter import Meter
from ldm_jax.train.snapshots import Snapshots
from ldm_jax.train.state import TrainState, abstract_like
from ldm_jax.train.steps import Step


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a run goes and how often it writes; a resumed run may change all of these."""

    num_steps: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int = 2  # newest ones
    keep_every: int = 0  # and every multiple of this; 0 = none
    eval_every: int = 0  # steps between evaluations, and one at the end; 0 = none
    keep_best: str = ""  # begins the name of the figure whose best checkpoint is kept; "" = none
    max_bad_steps: int = 0  # in a row, of a loss or gradient that is not finite; skipped till then

    def __post_init__(self):
        if self.eval_every < 0:
            raise InputError(f"eval_every {self.eval_every} must be at least 0, which is never")
        if self.keep_best and not self.eval_every:
            raise InputError(
                f"keep_best {self.keep_best!r} is a figure of evaluations, and eval_every is 0; "
                "set --config.eval_every"
            )
        if self.max_bad_steps < 0:
            raise InputError(
                f"max_bad_steps {self.max_bad_steps} must be at least 0, which stops at the first"
            )
        for field in ("num_steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} {getattr(self, field)} must be at least 1")


GREATER_IS_BETTER = ("psnr", "ssim", "is", "precision", "recall", "density", "coverage")
# (state, step) -> figures, and pictures uint8 [H,W,3], both by name.
Evaluate = Callable[[TrainState, int], tuple[dict[str, float], dict[str, np.ndarray]]]


class _StopRequest:
    """Turns SIGTERM and SIGINT into a request to save and stop; a second one ends at once."""

    def __init__(self):
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number


def train(
    config: LoopConfig,
    *,
    workdir: Path,
    name: str,
    state: TrainState,
    step: Step,
    batches: Callable[[int], Generator[dict[str, np.ndarray], None, None]],
    batch_size: int,
    mesh: Mesh,
    evaluate: Evaluate | None = None,
    snapshot_every: int = 0,
) -> TrainState:
    """Runs to `num_steps`, from the newest checkpoint in `workdir` when there is one.

    `batches(start)` yields this process's slices of the global batches from step `start` on: the
    data position is the step and nothing else. Raises whatever the data raises, after saving the
    last complete step; exits with 128 + signal when asked to stop, likewise. Every process calls
    `evaluate`; its figures are a line of their own, written before the checkpoint of their step.
    Power-function averages are kept in `ema/snapshots` every `snapshot_every` steps, 0 = never, and
    at the end.
    """
    is_main = jax.process_index() == 0
    lock = lock_workdir(workdir) if is_main else None
    checkpoints = Checkpoints(
        workdir,
        keep=config.keep_checkpoints,
        keep_every=config.keep_every,
        keep_best=bool(config.keep_best),
    )
    meter, start = Meter(), checkpoints.latest() or 0
    best, score = checkpoints.best() if config.keep_best else 0.0, None
    if start > config.num_steps:
        raise InputError(
            f"num_steps {config.num_steps} is less than the {start} that workdir {workdir} has "
            "done; give a larger number, or train in a new workdir"
        )
    if start:
        like = abstract_like(state)
        jax.tree.map(lambda x: x.delete(), state)  # two states would not fit where one just does
        state, meta = checkpoints.restore(start, like)
        meter = Meter(meta["pending_metrics"], meta.get("skipped_in_a_row", 0))
    snapshots = Snapshots(workdir) if snapshot_every else None
    writer = make_writer(workdir, resume_step=start, is_main=is_main)
    save = lambda: checkpoints.save(state, meter.content(), score)  # noqa: E731
    bar = _progress(name, start, config.num_steps, is_main)
    stream, late, owed = batches(start), None, False
    clock, clock_step = time.perf_counter(), start
    try:
        with _StopRequest() as stop:
            for n in range(start, config.num_steps):
                try:
                    host = next(stream)
                    batch = {name: rows for name, rows in host.items() if name != "index"}
                    batch = put_batch(batch, mesh, batch_size)
                except Exception:
                    # Alone we can save what is done; with peers, they would wait for us in vain.
                    if late is not None and jax.process_count() == 1:
                        _record(late, meter, n, config, writer, clock, clock_step, batch_size)
                        save()
                    raise
                state, metrics = step(state, batch)
                if late is not None:
                    _record(late, meter, n, config, writer, clock, clock_step, batch_size)
                    if n % config.log_every == 0:
                        clock, clock_step = time.perf_counter(), n
                late = metrics, host.get("index", ())
                done, score = n + 1, None
                stopping = bool(stop.signal) or checkpoints.reached_preemption(done)
                last = done == config.num_steps
                saving = stopping or owed or done % config.checkpoint_every == 0 or last
                keeping = snapshots and (done % snapshot_every == 0 or last)
                due = config.eval_every and (done % config.eval_every == 0 or last)
                if saving or keeping or (evaluate and due):
                    _record(late, meter, done, config, writer, clock, clock_step, batch_size)
                    late = None
                if evaluate and due:
                    began = time.perf_counter()
                    try:
                        figures, pictures = evaluate(state, done)
                        score = score_of(figures, config.keep_best)
                        _write_evaluation(figures, pictures, done, writer)
                    except Exception:
                        if jax.process_count() == 1:
                            save()  # what was trained outlives a fault in judging it
                        raise
                    clock += time.perf_counter() - began  # no part of the images per second
                    if score is not None and score > best:
                        best, saving = score, True
                if snapshots and keeping:
                    snapshots.save(state)
                # What cannot take a step may be past mending: the last good checkpoint stays.
                owed = bool(saving and meter.skipped_in_a_row and not (stopping or last))
                if saving and not owed:
                    if snapshots:
                        snapshots.wait()  # else a kill could leave a gap that no resume fills
                    save()
                elif jax.default_backend() == "cpu":
                    # Fake devices share one thread pool; two steps in flight can starve each other.
                    jax.block_until_ready(metrics)
                bar.update(1)
                if stopping:
                    checkpoints.wait()
                    print(f"stopped at step {done}; the same command resumes", file=sys.stderr)
                    raise SystemExit(128 + (stop.signal or signal.SIGTERM))
    finally:
        bar.close()
        if snapshots:
            snapshots.close()
        checkpoints.wait()
        checkpoints.close()
        writer.close()
        stream.close()
        if lock:
            lock.close()
    return state


def lock_workdir(workdir: Path) -> IO[str] | None:
    """Keeps a second training out of `workdir` until the file is closed or the process ends.

    Raises InputError when one is running there. None where the file system knows no locks.
    """
    Path(workdir).mkdir(parents=True, exist_ok=True)
    file = (Path(workdir) / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(
            f"workdir {workdir} is in use by another training; wait for it, stop it or use another"
        ) from error
    except OSError:
        file.close()
        return None
    return file


def _record(late, meter, done, config, writer, clock, clock_step, batch_size) -> None:
    """Takes in the metrics of the `done`-th step and writes a line when one is due."""
    metrics, index = late
    values = meter.add(metrics)
    if meter.skipped_in_a_row:
        figures = f"the loss of step {done} is {values.get('loss')}"
        if "grad_norm" in values:
            figures += f", its gradient's norm {values['grad_norm']}"
        if meter.skipped_in_a_row > config.max_bad_steps:
            if config.max_bad_steps:
                figures += f", and so it was {meter.skipped_in_a_row} times in a row"
            raise InputError(
                f"{figures}: training has diverged, and this was not saved; use a lower "
                "optim.lr or a smaller optim.clip_norm, in a new workdir"
            )
        # Every process tells of the examples that it read.
        examples = ", ".join(str(int(i)) for i in index)
        print(f"{figures}: it is skipped; it had the examples {examples}", file=sys.stderr)
    if done % config.log_every and done != config.num_steps:
        return
    rate = (done - clock_step) / max(time.perf_counter() - clock, 1e-9)
    scalars = meter.flush()
    writer.write_scalars(done, scalars | {"time/images_per_second": rate * batch_size})
    writer.flush()


def _write_evaluation(scalars, images, done, writer) -> None:
    writer.write_scalars(done, {f"eval/{name}": value for name, value in scalars.items()})
    writer.write_images(done, {f"eval/{name}": image for name, image in images.items()})
    writer.flush()


def score_of(figures: dict[str, float], keep_best: str) -> float | None:
    """What is greater the better the figure named is; None where no figure is, or it is not finite.

    Raises InputError where the evaluation has no such figure.
    """
    if not keep_best:
        return None
    for name, value in figures.items():
        if name.startswith(keep_best):
            # Among checkpoints nan would win, and the best so far be removed.
            found = value if math.isfinite(value) else None
            return found if found is None or name.startswith(GREATER_IS_BETTER) else -found
    raise InputError(
        f"keep_best {keep_best!r} begins no figure of the evaluation; it has {sorted(figures)}"
    )


def _progress(name: str, start: int, total: int, is_main: bool) -> tqdm:
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(
        desc=name,
        initial=start,
        total=total,
        unit="step",
        disable=not is_main,
        mininterval=interval,
        maxinterval=interval,
        dynamic_ncols=True,
    )
