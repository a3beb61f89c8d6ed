"""Metrics on disk: `metrics.jsonl` always, TensorBoard events beside it, no TensorFlow anywhere.

The writers speak clu's MetricWriter interface (write_scalars, write_images, write_texts,
write_hparams, flush, close), so that anything written for clu takes them.
"""

# Protocol buffers make their classes when they are imported, out of a type checker's sight.
# pyright: reportAttributeAccessIssue=false

import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from ldm_jax.files import write_text


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

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts go to TensorBoard only."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Hyper-parameters stand in run.json."""

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

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        values = [
            summary_pb2.Summary.Value(
                tag=f"{k}/text_summary",
                metadata=text_metadata.create_summary_metadata(k, ""),
                tensor=make_tensor_proto([v.encode()], dtype="string", shape=(1,)),
            )
            for k, v in texts.items()
        ]
        self._add(step, summary=summary_pb2.Summary(value=values))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self.write_texts(0, {"config": "```\n" + json.dumps(dict(hparams), indent=2) + "\n```"})

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

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for writer in self._writers:
            writer.write_texts(step, texts)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write_hparams(hparams)

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
