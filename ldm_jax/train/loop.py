"""The loop around a training step: data in, metrics out one step late, checkpoints, clean stops."""

import contextlib
import dataclasses
import fcntl
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from tqdm import tqdm

from ldm_jax.errors import InputError, within
from ldm_jax.sharding import anywhere, put_batch
from ldm_jax.train.checkpoint import Checkpoints
from ldm_jax.train.hooks import Hook, Report
from ldm_jax.train.log import Meter, make_writer
from ldm_jax.train.state import TrainState
from ldm_jax.train.step import Trainer


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a run goes and how often it writes; a resumed run may change all of these."""

    num_steps: int = 1000
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2  # newest ones
    keep_every: int = 0  # and every multiple of this; 0 = none
    eval_every: int = 0  # steps between evaluations, and one at the end; 0 = none
    keep_best: str = ""  # begins the name of the figure whose best checkpoint is kept; "" = none
    max_bad_steps: int = 0  # in a row, of a loss or gradient that is not finite; skipped till then

    def __post_init__(self):
        within("eval_every", self.eval_every, "[0, inf)", "0 is never")
        if self.keep_best and not self.eval_every:
            raise InputError(
                f"keep_best {self.keep_best!r} is a figure of evaluations, and eval_every is 0; "
                "set --config.eval_every"
            )
        within("max_bad_steps", self.max_bad_steps, "[0, inf)", "0 stops at the first")
        for field in ("num_steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            within(field, getattr(self, field), "[1, inf)")


GREATER_IS_BETTER = ("psnr", "ssim", "is", "precision", "recall", "density", "coverage")
Batches = Generator[dict[str, np.ndarray], None, None]


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
    trainer: Trainer,
    frozen: Any,
    batches: Callable[[int], Batches],
    *,
    workdir: Path,
    name: str,
    on_start: Callable[[], None] | None = None,
    start_from: tuple[Any, dict[str, Any]] | None = None,
    hooks: Sequence[Hook] = (),
) -> TrainState:
    """Runs to `num_steps`, from the newest checkpoint in `workdir` when there is one.

    Else it begins with a fresh state, or as `Trainer.init_from` makes it of `start_from`.
    `batches(start)` yields this process's slices of the global batches from step `start` on: the
    data position is the step and nothing else. `on_start` is called once the workdir is locked and
    can be gone on with, before anything is written there. Raises whatever the data or a hook
    raises, after saving the last complete step; exits with 128 + signal when asked to stop,
    likewise. The figures of all hooks that are due at a step are one line, written before the
    checkpoint of their step.
    """
    is_main = jax.process_index() == 0
    with contextlib.ExitStack() as opened:
        lock = lock_for_all(workdir)
        if lock:
            opened.callback(lock.close)
        checkpoints = Checkpoints(
            workdir,
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
            keep_best=bool(config.keep_best),
        )
        opened.callback(checkpoints.close)
        opened.callback(checkpoints.wait)
        start = checkpoints.latest() or 0
        if start > config.num_steps:
            raise InputError(
                f"num_steps {config.num_steps} is less than the {start} that workdir {workdir} has "
                "done; give a larger number, or train in a new workdir"
            )
        state, meter = _begin(trainer, checkpoints, start, start_from)
        if on_start:
            on_start()
        best = checkpoints.best() if config.keep_best else 0.0
        writer = make_writer(workdir, resume_step=start, is_main=is_main)
        opened.callback(writer.close)
        log = _Log(config, writer, meter, _batch_size(trainer), start)
        stream, owed, score = batches(start), False, None
        opened.callback(stream.close)
        for hook in reversed(hooks):
            opened.callback(hook.close)
        bar = _progress(name, start, config.num_steps, is_main)
        opened.callback(bar.close)
        with _StopRequest() as stop:
            for n in range(start, config.num_steps):
                try:
                    host = next(stream)
                    batch = {name: host[name] for name in trainer.batch_spec}
                    batch = put_batch(batch, trainer.mesh, log.batch_size)
                except Exception:
                    # Alone we can save what is done; with peers, they would wait for us in vain.
                    if log.waiting and jax.process_count() == 1:
                        log.take_in(n)
                        checkpoints.save(state, meter.content(), score)
                    raise
                state, metrics = trainer.step(state, frozen, batch)
                log.take_in(n)
                log.waiting = metrics, host.get("index", ())
                done, score = n + 1, score if owed else None
                stopping = bool(stop.signal) or checkpoints.reached_preemption(done)
                last = done == config.num_steps
                saving = stopping or owed or done % config.checkpoint_every == 0 or last
                due = [hook for hook in hooks if done % hook.every == 0 or last]
                if saving or due:
                    log.take_in(done)
                if due:
                    try:
                        figures = log.report(done, due, state)
                        if figures:
                            score = score_of(figures, config.keep_best)
                    except Exception:
                        if jax.process_count() == 1:
                            # What was trained outlives a fault in judging it.
                            for hook in hooks:
                                hook.settle()
                            checkpoints.save(state, meter.content(), None)
                        raise
                    saving = saving or (score is not None and score > best)
                # What cannot take a step may be past mending: the last good checkpoint stays, and
                # the next good step is saved with the score of the weights it started from.
                owed = bool(saving and meter.skipped_in_a_row and not (stopping or last))
                if saving and not owed:
                    for hook in hooks:
                        hook.settle()  # else a kill could leave a gap that no resume fills
                    checkpoints.save(state, meter.content(), score)
                    best = best if score is None else max(best, score)
                elif jax.default_backend() == "cpu":
                    # Fake devices share one thread pool; two steps in flight can starve each other.
                    jax.block_until_ready(metrics)
                bar.update(1)
                if stopping:
                    checkpoints.wait()
                    print(f"stopped at step {done}; the same command resumes", file=sys.stderr)
                    raise SystemExit(128 + (stop.signal or signal.SIGTERM))
    return state


def _begin(
    trainer: Trainer,
    checkpoints: Checkpoints,
    start: int,
    start_from: tuple[Any, dict[str, Any]] | None,
) -> tuple[TrainState, Meter]:
    """The state to go on from, and the metrics that no line has yet."""
    if not start:
        state = trainer.init() if start_from is None else trainer.init_from(*start_from)
        return state, Meter()
    state, meta = checkpoints.restore(start, trainer.abstract_state)
    return state, Meter(meta["pending_metrics"], meta.get("skipped_in_a_row", 0))


def _batch_size(trainer: Trainer) -> int:
    return next(iter(trainer.batch_spec.values())).shape[0]


class _Log:
    """Takes in each step's metrics one step late, so that no step waits for a number."""

    def __init__(self, config: LoopConfig, writer: Any, meter: Meter, batch_size: int, start: int):
        self.config, self.writer, self.meter, self.batch_size = config, writer, meter, batch_size
        self.waiting: tuple[Any, Any] | None = None  # metrics of a step, and its examples
        self._clock, self._since = time.perf_counter(), start

    def take_in(self, done: int) -> None:
        """Takes in the metrics of the `done`-th step, and writes a line when one is due."""
        if self.waiting is None:
            return
        (metrics, index), self.waiting = self.waiting, None
        values = self.meter.add(metrics)
        if self.meter.skipped_in_a_row:
            self._skipped(done, values, index)
        if done % self.config.log_every and done != self.config.num_steps:
            return
        rate = (done - self._since) / max(time.perf_counter() - self._clock, 1e-9)
        speed = {"time/images_per_second": rate * self.batch_size}
        self.writer.write_scalars(done, self.meter.flush() | speed)
        self.writer.flush()
        self._clock, self._since = time.perf_counter(), done

    def _skipped(self, done: int, values: dict[str, float], index: Any) -> None:
        figures = f"the loss of step {done} is {values.get('loss')}"
        if "grad_norm" in values:
            figures += f", its gradient's norm {values['grad_norm']}"
        in_a_row = self.meter.skipped_in_a_row
        if in_a_row > self.config.max_bad_steps:
            if self.config.max_bad_steps:
                figures += f", and so it was {in_a_row} times in a row"
            raise InputError(
                f"{figures}: training has diverged, and this was not saved; use a lower "
                "optim.lr or a smaller optim.clip_norm, in a new workdir"
            )
        # Every process tells of the examples that it read.
        examples = ", ".join(str(int(i)) for i in index)
        print(f"{figures}: it is skipped; it had the examples {examples}", file=sys.stderr)

    def report(self, done: int, hooks: Sequence[Hook], state: TrainState) -> dict[str, float]:
        """Runs the hooks and writes what they find; the figures of all of them."""
        began = time.perf_counter()
        reports = [hook.run(state, done) for hook in hooks]
        figures, pictures = {}, {}
        reporter: dict[str, Hook] = {}
        for hook, report in zip(hooks, reports, strict=True):
            report = report or Report()
            for name in (*report.figures, *report.pictures):
                other = reporter.setdefault(name, hook)
                if other is not hook:
                    raise ValueError(f"{other.run} and {hook.run} both report {name!r}")
            figures |= report.figures
            pictures |= report.pictures
        if figures or pictures:
            self.writer.write_scalars(done, {f"eval/{n}": x for n, x in figures.items()})
            self.writer.write_images(done, {f"eval/{n}": x for n, x in pictures.items()})
            self.writer.flush()
        self._clock += time.perf_counter() - began  # no part of the images per second
        return figures


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


def lock_for_all(workdir: Path) -> IO[str] | None:
    """`lock_workdir` by the first process; its refusal reaches all, which else would wait for it.

    Every process must call it.
    """
    lock, refusal = None, None
    if jax.process_index() == 0:
        try:
            lock = lock_workdir(workdir)
        except InputError as error:
            refusal = error
    if anywhere(refusal is not None):
        raise refusal or InputError(
            f"workdir {workdir} is refused by the first process, which says why"
        )
    return lock


def score_of(figures: dict[str, float], keep_best: str) -> float | None:
    """What is greater the better the figure named is; None where no figure is, or it is not finite.

    Raises InputError where an evaluation has no such figure.
    """
    if not keep_best or not figures:
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
