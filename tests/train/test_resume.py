"""A killed run, started again, equals one that was never stopped: bit for bit, both stages."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ldm_jax.diffusion.perceptual import PerceptualConfig
from ldm_jax.jobs import train_autoencoder, train_denoiser
from ldm_jax.train.checkpoint import Checkpoints
from ldm_jax.train.log import read_metrics
from tests import tiny

STEPS = 12


def settings(stage, first_stage):
    if stage == "autoencoder":
        return dataclasses.replace(tiny.AUTOENCODER, num_steps=STEPS, checkpoint_every=4)
    return dataclasses.replace(
        tiny.DENOISER,
        num_steps=STEPS,
        checkpoint_every=4,
        log_every=3,  # a kill then falls inside an interval of the mean
        flip=True,
        loss_bins=2,
        eval_every=5,
        eval_examples=20,  # more than a batch
        ema=tiny.AVERAGES,
        # Calibrated over steps on both sides of the checkpoint that the killed run goes on from.
        lpl=PerceptualConfig(target_ratio=0.25, calibration_steps=4, start_step=2),
        autoencoder=str(first_stage),
    )


def train(stage, first_stage, workdir):
    job = {"autoencoder": train_autoencoder, "denoiser": train_denoiser}[stage]
    return job.run(settings(stage, first_stage), Path(workdir), jax.devices()[:1])


def without_times(workdir):
    lines = read_metrics(workdir)
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def kept(workdir):
    """(step, name) of every snapshot."""
    folder = workdir / "ema" / "snapshots"
    return sorted(p.relative_to(folder).parts[:2] for p in folder.glob("*/power-*"))


def kill_in_the_middle(stage, first_stage, workdir):
    """Starts the same training in a process of its own and ends it with SIGKILL at step 6 or 7."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        [sys.executable, __file__, stage, str(first_stage), str(workdir)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        # The worker dawdles before each batch, so this finds it between its two checkpoints.
        if (workdir / "checkpoints" / "4").is_dir() and (workdir / "asked_for_batch_6").exists():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output[-3000:]


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_killed_and_resumed_equals_unbroken(stage, first_stage, tmp_path):
    unbroken = train(stage, first_stage, tmp_path / "unbroken")
    broken = tmp_path / "broken"
    kill_in_the_middle(stage, first_stage, broken)

    checkpoints = Checkpoints(broken)
    assert checkpoints.latest() == 4
    checkpoints.close()
    resumed = train(stage, first_stage, broken)

    assert int(resumed.step) == STEPS
    assert jax.tree.structure(resumed) == jax.tree.structure(unbroken)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(resumed), jax.tree.leaves(unbroken), strict=True
    ):
        got, want = np.asarray(got), np.asarray(want)
        assert got.tobytes() == want.tobytes(), jax.tree_util.keystr(path)
    assert without_times(broken) == without_times(tmp_path / "unbroken")
    assert kept(broken) == kept(tmp_path / "unbroken")
    # It learned something, and the averages are not the weights: equality above says something.
    lines = without_times(broken)
    first, *_, last = [line for line in lines if "loss" in line]
    if stage == "denoiser":
        judged = [line for line in lines if "eval/loss" in line]
        assert [line["step"] for line in judged] == [5, 10, 12]
        assert len({line["eval/loss"] for line in judged}) == 3
        assert all({"eval/loss_bin/0", "eval/loss_bin/1"} < set(line) for line in judged)
        assert 0 < last["loss_bin/1"] < last["loss_bin/0"]  # noise is told best where it is all
    name = "loss_diffusion" if stage == "denoiser" else "loss"
    assert last[name] < first[name]
    same = jax.tree.map(np.array_equal, resumed.weights, resumed.params)
    assert not all(jax.tree.leaves(same))


def dawdle(workdir):
    """Slows the data down and leaves a mark, so that the parent can aim."""
    from ldm_jax.data import stream

    batches = stream.batches

    def slow(*arguments, **options):
        for n, batch in enumerate(batches(*arguments, **options)):
            if n >= 6:
                (Path(workdir) / f"asked_for_batch_{n}").touch()
                time.sleep(1.0)
            yield batch

    stream.batches = slow


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  the same devices and flags as the parent's

    dawdle(sys.argv[3])
    train(*sys.argv[1:])
