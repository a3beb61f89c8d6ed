"""Eight fake devices, strict ranks, key-reuse checks and one compilation cache for every test."""

import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# Tiny programs run for milliseconds and compile for seconds: spend less on compiling them.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jax").startswith("0.10."):  # a flag that XLA does not know ends the process
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"  # a third of the time
os.environ.setdefault("XLA_FLAGS", FAST_COMPILE)

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

import pytest  # noqa: E402

from tests import tiny  # noqa: E402


@pytest.fixture(scope="session")
def first_stage(tmp_path_factory):
    """Workdir of a tiny trained autoencoder, its latents cached."""
    return tiny.trained_autoencoder(tmp_path_factory.mktemp("tiny"))


# The longest files; the rest is short.
LONG = ("train/test_mesh", "train/test_processes", "train/", "jobs/")


def pytest_collection_modifyitems(items):
    """The long files first, so that no worker is left with one of them at the end."""
    tests = Path(__file__).parent

    def place(item):
        return str(item.path.relative_to(tests))

    def rank(item):
        return next((i for i, start in enumerate(LONG) if place(item).startswith(start)), len(LONG))

    items.sort(key=rank)
