"""Two processes joined by jax.distributed compute what one does."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ldm_jax.data.records.reader import open_cache
from ldm_jax.jobs import evaluate
from ldm_jax.sharding import MeshConfig, make_mesh
from ldm_jax.train.log import read_metrics
from tests import judged
from tests.train import test_mesh

WORKER = Path(__file__).with_name("worker.py")


def test_two_processes_equal_one(first_stage, tmp_path):
    """2 processes of 4 devices: batches, draws, losses, figures and checkpoint are those of one."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4 "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    arguments = [str(WORKER), str(first_stage), str(tmp_path), f"localhost:{port}"]
    processes = [
        subprocess.Popen(
            ["timeout", "-s", "KILL", "360", sys.executable, *arguments, str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [p.communicate()[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]

    mesh = make_mesh(MeshConfig(8, 1, 1))
    want = test_mesh.batches_and_draws(mesh, first_stage)
    with np.load(tmp_path / "draws.npz") as got:
        leaves = jax.tree.leaves(want)
        assert len(got.files) == len(leaves)
        for name, leaf in zip(got.files, leaves, strict=True):
            np.testing.assert_array_equal(got[name], leaf)

    (evaluated,) = (m for m in read_metrics(tmp_path / "autoencoder") if "loss" not in m)
    alone = evaluate.reconstruction_figures(tmp_path / "autoencoder", limit=21)
    assert evaluated.pop("step") == alone.pop("step") == 10
    assert evaluated == pytest.approx({f"eval/{k}": v for k, v in alone.items()}, abs=1e-3)

    both = json.loads((tmp_path / "figures.json").read_text())
    for stage in both:
        shutil.rmtree(tmp_path / stage / "evaluation")  # with the references that they measured
    alone = judged.evaluate_trained(tmp_path, step=10)
    for stage, prefix in (("autoencoder", "rfrechet"), ("denoiser", "frechet")):
        assert next(iter(both[stage])).startswith(prefix)
        assert both[stage] == pytest.approx(alone[stage], rel=1e-6)

    for stage in ("autoencoder", "denoiser"):
        alone = tmp_path / f"{stage}-alone"
        test_mesh.run(stage, "1 device", alone, first_stage)
        np.testing.assert_allclose(
            test_mesh.losses(tmp_path / stage), test_mesh.losses(alone), rtol=1e-5
        )
        # What two processes wrote goes on in one.
        state = test_mesh.run(stage, "1 device", tmp_path / stage, first_stage, num_steps=11)
        assert int(state.step) == 11
    # Two processes of four devices write the cache that one of eight wrote, up to rounding.
    one, both = (
        open_cache(d / "train", verify=True)
        for d in (first_stage / "latents", tmp_path / "latents")
    )
    assert len(both.manifest.shards) > 1
    np.testing.assert_allclose(both.manifest.std, one.manifest.std, rtol=1e-6)
    everything = np.arange(len(one))
    got, want = (cache.read(everything, everything, flip=True, seed=1) for cache in (both, one))
    np.testing.assert_array_equal(got["label"], want["label"])
    np.testing.assert_allclose(got["moments"], want["moments"], atol=1e-4)
