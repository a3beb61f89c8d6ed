"""Metrics between two log lines: means over the steps that counted, and which ones were skipped."""

import math
from typing import Any

import jax
import numpy as np


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
