"""Metrics: means between two lines of `metrics.jsonl`, and TensorBoard events beside them.

The writers have the methods of clu's MetricWriter that are called here; TensorFlow is nowhere.
"""

# Protocol buffers make their classes when they are imported, out of a type checker's sight.
# pyright: reportAttributeAccessIssue=false

import io
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from ldm_jax.files import write_text


class Meter:
    """Means of metrics since the last log line; its content goes into checkpoints.

    So the metrics of a resumed run equal those of an unbroken one bit for bit, wherever it stopped.
    Of a pair "name/sum" and "name/count" the line has `name`, the sums over the counts, where
    anything was counted. Skipped steps are counted as "skipped_steps" and left out of the means.
    """

    def __init__(self, pending: list[dict[str, float]] | None = None, skipped_in_a_row: int = 0):
        self.pending = list(pending or [])
        self.skipped_in_a_row = skipped_in_a_row

    def content(self) -> dict[str, Any]:
        """What a checkpoint keeps. A copy: it is written while the next steps add theirs."""
        return {"pending_metrics": list(self.pending), "skipped_in_a_row": self.skipped_in_a_row}

    def add(self, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """Takes in a step's metrics and gives them as numbers; blocks until the step has run."""
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        if values.pop("skipped", 0.0) or not math.isfinite(values.get("loss", 0.0)):
            self.pending.append({"skipped": 1.0})
            self.skipped_in_a_row += 1
        else:
            self.pending.append(values)
            self.skipped_in_a_row = 0
        return values

    def flush(self) -> dict[str, float]:
        """The line of the steps since the last one."""
        counted = [m for m in self.pending if "skipped" not in m]
        skipped = len(self.pending) - len(counted)
        self.pending = []
        line = {}
        for name in dict.fromkeys(name for m in counted for name in m):
            values = [m[name] for m in counted if name in m]
            if name.endswith("/sum"):
                count = sum(m[f"{name[:-4]}/count"] for m in counted if name in m)
                line |= {name[:-4]: sum(values) / count} if count else {}
            elif not name.endswith("/count"):
                line[name] = float(np.mean(values))
        return line | ({"skipped_steps": float(skipped)} if skipped else {})


class JsonlWriter:
    """One JSON object a line: {"step": n, name: value, ...}; floats keep every bit."""

    def __init__(self, workdir: Path):
        self._path = Path(workdir) / "metrics.jsonl"
        self._file = self._path.open("a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        line = {"step": int(step), **{k: float(v) for k, v in scalars.items()}}
        self._file.write(json.dumps(line) + "\n")

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Images go to TensorBoard only."""

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()


class TensorBoardWriter:
    """Event files in `workdir`, for the `tensorboard` program."""

    def __init__(self, workdir: Path, *, resume_step: int = 0):
        self._writer = EventFileWriter(str(workdir))
        # Tells TensorBoard to forget what an interrupted run wrote after its last checkpoint: it
        # drops the events from this step on, this one included.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(resume_step + 1, session_log=start)

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=int(step), **content))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [
            summary_pb2.Summary.Value(tag=k, simple_value=float(v)) for k, v in scalars.items()
        ]
        self._add(step, summary=summary_pb2.Summary(value=values))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """uint8 images [H,W,3], by name."""
        values = []
        for name, array in images.items():
            buffer = io.BytesIO()
            Image.fromarray(np.asarray(array)).save(buffer, "PNG")
            height, width = array.shape[:2]
            image = summary_pb2.Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue()
            )
            values.append(summary_pb2.Summary.Value(tag=name, image=image))
        self._add(step, summary=summary_pb2.Summary(value=values))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MultiWriter:
    """Hands every call to each of its writers."""

    def __init__(self, writers: list[Any]):
        self._writers = writers

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for writer in self._writers:
            writer.write_images(step, images)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def make_writer(workdir: Path, *, resume_step: int, is_main: bool) -> MultiWriter:
    """The writers of a run; only the first process writes.

    Lines of `metrics.jsonl` that an interrupted run wrote after `resume_step` are dropped first:
    they are about to be written again.
    """
    if not is_main:
        return MultiWriter([])
    workdir = Path(workdir)
    _truncate(workdir / "metrics.jsonl", resume_step)
    return MultiWriter([JsonlWriter(workdir), TensorBoardWriter(workdir, resume_step=resume_step)])


def _truncate(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the torn last line of a killed run
    write_text(path, "".join(line + "\n" for line in kept))


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`, oldest first."""
    path = Path(workdir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
