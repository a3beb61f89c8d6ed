"""What is written can be read back: every bit, every event, nothing of a lost stretch."""

import ast
import importlib.util
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm_jax.train import log
from ldm_jax.train.log import (
    JsonlWriter,
    Meter,
    MultiWriter,
    TensorBoardWriter,
    make_writer,
    read_metrics,
)


def write(workdir, steps, resume_step=0):
    writer = make_writer(workdir, resume_step=resume_step, is_main=True)
    for step in steps:
        writer.write_scalars(step, {"loss": step / 7})
    writer.close()


def test_metrics_keep_every_bit(tmp_path):
    values = [1 / 3, math.pi * 1e-300, 5e-324, 1e308, -0.0, float(np.float32(0.1)), 2.0**-149]
    values += np.random.default_rng(0).normal(size=50).tolist()
    writer = JsonlWriter(tmp_path)
    for step, value in enumerate(values):
        writer.write_scalars(step, {"x": np.float64(value), "y": np.float32(1.5)})
    writer.close()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(len(values)))
    assert [float(line["x"]).hex() for line in lines] == [float(v).hex() for v in values]
    assert {line["y"] for line in lines} == {1.5}


def test_metrics_that_are_not_finite_come_back(tmp_path):
    writer = JsonlWriter(tmp_path)
    writer.write_scalars(1, {"a": math.nan, "b": math.inf})
    writer.close()
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["a"]) and line["b"] == math.inf


def test_flushed_lines_are_on_disk_before_the_writer_closes(tmp_path):
    writer = JsonlWriter(tmp_path)
    writer.write_scalars(1, {"a": 1.0})
    writer.flush()
    assert len(read_metrics(tmp_path)) == 1
    writer.close()


def test_resumed_run_drops_the_lines_that_it_writes_again(tmp_path):
    write(tmp_path, [2, 4, 6, 8])
    kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:2]
    write(tmp_path, [6], resume_step=5)
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 6]
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:2] == kept


def test_resumed_run_keeps_the_line_of_its_checkpoint(tmp_path):
    write(tmp_path, [2, 4, 6])
    write(tmp_path, [], resume_step=4)
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4]


def test_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, [2, 4, 6])
    whole = path.read_text()
    last = whole.splitlines()[-1] + "\n"
    for length in range(1, len(last) - 1):
        path.write_text(whole[: -len(last)] + last[:length])
        write(tmp_path, [6], resume_step=4)
        assert path.read_text() == whole


def test_run_from_the_start_begins_with_no_lines(tmp_path):
    write(tmp_path, [2, 4])
    write(tmp_path, [2])
    assert [line["step"] for line in read_metrics(tmp_path)] == [2]


def test_only_the_first_process_writes(tmp_path):
    writer = make_writer(tmp_path, resume_step=0, is_main=False)
    writer.write_scalars(1, {"loss": 1.0})
    writer.write_images(1, {})
    writer.flush()
    writer.close()
    assert not list(tmp_path.iterdir())


def events(workdir):
    accumulator = EventAccumulator(str(workdir))
    accumulator.Reload()
    return accumulator


def test_tensorboard_reads_scalars_and_images(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    writer = TensorBoardWriter(tmp_path)
    writer.write_scalars(3, {"loss": 0.25, "lr": 1e-4})
    writer.write_scalars(6, {"loss": 0.125})
    writer.write_images(6, {"samples": image})
    writer.close()
    read = events(tmp_path)
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(3, 0.25), (6, 0.125)]
    np.testing.assert_allclose(read.Scalars("lr")[0].value, 1e-4, rtol=1e-6)
    (shown,) = read.Images("samples")
    assert (shown.step, shown.width, shown.height) == (6, 7, 5)
    np.testing.assert_array_equal(Image.open(io.BytesIO(shown.encoded_image_string)), image)


def test_tensorboard_forgets_what_an_interrupted_run_wrote_after_its_checkpoint(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3], resume_step=2)
    assert [e.step for e in events(tmp_path).Scalars("loss")] == [1, 2, 3]


def test_every_writer_gets_every_call():
    class Recorder:
        def __init__(self):
            self.calls = []

        def __getattr__(self, name):
            return lambda *arguments: self.calls.append((name, *arguments))

    recorders = [Recorder(), Recorder()]
    writer = MultiWriter(recorders)
    writer.write_scalars(1, {"a": 1.0})
    writer.write_images(1, {})
    writer.flush()
    writer.close()
    names = [call[0] for call in recorders[0].calls]
    assert names == ["write_scalars", "write_images", "flush", "close"]
    assert recorders[0].calls == recorders[1].calls


def clu_interface():
    """Method -> argument names of clu's MetricWriter, read without importing it (or TensorFlow)."""
    package = Path(importlib.util.find_spec("clu").submodule_search_locations[0])
    tree = ast.parse((package / "metric_writers" / "interface.py").read_text())
    (cls,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "MetricWriter"]
    return {
        f.name: [a.arg for a in f.args.args] for f in cls.body if isinstance(f, ast.FunctionDef)
    }


@pytest.mark.parametrize("writer", [MultiWriter, JsonlWriter, TensorBoardWriter])
def test_writers_speak_the_interface_of_clu(writer):
    interface = clu_interface()
    for name in ("write_scalars", "write_images", "flush", "close"):
        method = getattr(writer, name)
        assert list(method.__code__.co_varnames[: method.__code__.co_argcount]) == interface[name]
    ours = {n for n in vars(writer) if n.startswith("write_")}
    assert ours <= interface.keys()


def test_logging_loads_no_tensorflow():
    code = f"import sys, {log.__name__}; print([m for m in sys.modules if m == 'tensorflow'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_lines_are_plain_json(tmp_path):
    write(tmp_path, [7])
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 7, "loss": 1.0}


def test_meter_gives_f64_means_and_empties():
    meter = Meter([{"a": 1.0}])
    meter.add({"a": jnp.float32(0.1)})
    meter.add({"a": jnp.float32(0.2)})
    assert meter.flush() == {"a": np.mean([1.0, float(np.float32(0.1)), float(np.float32(0.2))])}
    assert meter.pending == []


def test_meter_divides_sums_by_counts_and_leaves_out_what_was_not_counted():
    meter = Meter()
    for total, count in ((3.0, 1.0), (0.0, 0.0), (5.0, 3.0)):
        meter.add({"a/sum": total, "a/count": count, "b/sum": 0.0, "b/count": 0.0})
    assert meter.flush() == {"a": 2.0}


def test_skipped_steps_are_counted_and_left_out_of_the_means():
    meter = Meter()
    meter.add({"loss": 1.0, "skipped": 0.0})
    meter.add({"loss": 9.0, "skipped": 1.0})
    meter.add({"loss": float("nan"), "skipped": 0.0})
    assert meter.skipped_in_a_row == 2
    assert meter.content() == {
        "pending_metrics": [{"loss": 1.0}, {"skipped": 1.0}, {"skipped": 1.0}],
        "skipped_in_a_row": 2,
    }
    meter.add({"loss": 4.0})
    assert meter.skipped_in_a_row == 0
    assert meter.flush() == {"loss": 2.5, "skipped_steps": 2.0}
