"""The run directory: `run.json` says what ran, and a second start is held against it."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ldm_jax.errors import InputError
from ldm_jax.files import read_json, utc_now, write_json
from ldm_jax.interop.names import flatten
from ldm_jax.runs.config_files import build, to_json

PACKAGES = ("ldm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# What a resumed run may change: how long, where and how often, never what is computed.
FREE_FIELDS = (
    "num_steps",
    "mesh",
    "accumulate",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "max_bad_steps",
    "eval_every",
    "keep_best",
    "samples",
    "eval_images",
    "init_from",  # its weights' hash counts
    "eval_examples",
    "loss_bins",
    "data_threads",
)


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and dirty flag of the checkout that holds the code; empty outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def describe(job: str, config: dict[str, Any], mesh: Mesh, data: dict[str, Any]) -> dict[str, Any]:
    """The content of run.json."""
    device = mesh.devices.flat[0]
    return {
        "job": job,
        "config": config,
        "data": data,
        "command": sys.argv,
        "started": utc_now(),
        "git": git_state(Path(__file__).parent),
        "python": sys.version.split()[0],
        "packages": {p: _version(p) for p in PACKAGES},
        "mesh": dict(mesh.shape),
        "devices": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": int(mesh.devices.size),
            "processes": jax.process_count(),
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def read_run(workdir: str | Path, job: str = "") -> dict[str, Any]:
    """run.json of a workdir; raises InputError where there is none, or one of another `job`."""
    path = Path(workdir) / "run.json"
    if not Path(workdir).exists():
        raise InputError(
            f"workdir {workdir} is not there; check the path, and where it is a run that another "
            "one names, put it back where it was"
        )
    if not path.is_file():
        raise InputError(
            f"workdir {workdir} holds no run.json: it is not the run directory of a training; "
            "check the path"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"job", "config", "data"} - set(record)
        if missing:
            raise KeyError(missing)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}); put back a copy, or use a new workdir"
        ) from error
    if job and record["job"] != job:
        raise InputError(
            f"workdir {workdir} belongs to `ldm {record['job']}`, not `ldm {job}`; use another "
            "workdir"
        )
    return record


def open_run(workdir: Path, job: str, config: Any, mesh: Mesh, data: dict[str, Any]) -> None:
    """Writes the run.json of `check_run`."""
    write_record(workdir, check_run(workdir, job, config, mesh, data))


def write_record(workdir: Path, record: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        write_json(Path(workdir) / "run.json", record)


def check_run(
    workdir: Path, job: str, config: Any, mesh: Mesh, data: dict[str, Any]
) -> dict[str, Any]:
    """The run.json of a start that fits what stands in the workdir; nothing is written.

    `config` is the run's dataclass; `data` names what it trains on. Raises InputError naming the
    first fields that differ. Earlier starts are kept under `history`.
    """
    workdir, path = Path(workdir), Path(workdir) / "run.json"
    record = describe(job, to_json(config), mesh, data)
    if path.exists():
        check_trainable(workdir)
        previous = read_run(workdir, job)
        # A field that is newer than the run had its default then.
        previous["config"] = to_json(build(type(config), previous["config"]))
        check_same(workdir, previous, record)
        history = previous.pop("history", [])
        record["history"] = [
            *history,
            {k: previous[k] for k in ("started", "command", "git", "mesh")},
        ]
    elif any((workdir / "checkpoints").glob("[0-9]*")):
        raise InputError(
            f"workdir {workdir} holds checkpoints but no run.json; move them away or use a "
            "new workdir"
        )
    return record


def open_experiment(workdir: Path, plan: dict[str, Any]) -> None:
    """Notes what an experiment compares; InputError when the workdir holds another one."""
    path, plan = Path(workdir) / "experiment.json", json.loads(json.dumps(plan))
    if (Path(workdir) / "run.json").exists():
        raise InputError(f"workdir {workdir} is a training's run directory; use a new workdir")
    if path.exists() and read_json(path) != plan:
        raise InputError(
            f"workdir {workdir} holds an experiment with another plan ({path}); give that "
            "configuration back or use a new workdir"
        )
    if jax.process_index() == 0:
        write_json(path, plan)


def check_trainable(workdir: Path) -> None:
    """Raises InputError for a run of imported weights, which has no optimizer to go on with."""
    record = read_run(workdir) if (Path(workdir) / "run.json").exists() else {}
    if "imported" in record:
        raise InputError(
            f"workdir {workdir} holds imported or averaged weights and cannot be trained further; "
            f"train in a new workdir that starts from them, with --config.init_from={workdir}"
        )


def check_same(workdir: Path, previous: dict[str, Any], record: dict[str, Any]) -> None:
    for part in ("config", "data"):
        old, new = flatten(previous[part], "."), flatten(record[part], ".")
        different = [
            f"{key} is {old.get(key, 'absent')!r} there and {new.get(key, 'absent')!r} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key, "absent") != new.get(key, "absent")
            and not (part == "config" and _is_free(key, new))
        ]
        if different:
            more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
            raise InputError(
                f"workdir {workdir} was started with another {part}: {'; '.join(different[:3])}"
                f"{more}; give the old values back or use a new workdir"
            )


def _is_free(key: str, config: dict[str, Any]) -> bool:
    """Whether a resumed run may change a field; the cosine depends on the length."""
    if key == "num_steps":
        return config.get("optim.schedule") != "cosine"
    if key == "accumulate" and (config.get("lpl.weight") or config.get("lpl.target_ratio")):
        return config.get("lpl.share") == 1  # of each part rows are chosen for themselves
    return key.split(".")[0] in FREE_FIELDS
