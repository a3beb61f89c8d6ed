"""How a benchmark's figures are kept: beside the command, versions and devices they came from."""

import os
from pathlib import Path
from typing import Any

from ldm_jax.runs.workdir import describe, write_json
from ldm_jax.sharding import make_mesh

RESULTS = Path(__file__).parent / "results"


def keep(name: str, results: Any, plan: dict[str, Any]) -> Path:
    """Writes results/NAME.json; returns its path."""
    run = describe("bench", {}, make_mesh(), {})
    made_with = {key: run[key] for key in ("git", "python", "packages", "devices")}
    made_with = {"command": f"python -m benchmarks.{name}", **made_with}
    made_with["host"] = {"cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)}
    path = RESULTS / f"{name}.json"
    write_json(path, {"plan": plan, "made_with": made_with, "results": results})
    return path
