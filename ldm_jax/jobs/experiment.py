"""`ldm experiment`: the same runs but for what is compared, over seeds, and one table.

A plan with `samples` is one of denoisers: see `denoiser_experiment`. Of first stages, each run
trains in its own folder of the workdir, WORKDIR/ARM-seedN, and is evaluated on the held-out images.
Started again, finished runs are kept and the others go on.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.files import read_json, write_json
from ldm_jax.jobs import denoiser_experiment, evaluate, train_autoencoder
from ldm_jax.runs.config_files import build, load_config_file
from ldm_jax.runs.settings import AutoencoderRun
from ldm_jax.runs.workdir import open_experiment, read_run

Results = dict[str, list[dict[str, float]]]  # arm -> figures of each seed


def run(spec: str, workdir: Path) -> Any:
    """Trains and measures every arm for every seed; writes results.json and results.md.

    The file's get_config gives {"arms": {name: fields of a run}, "seeds": (...)}, for denoisers
    more. Raises InputError for fields of an arm that make no valid run, before any training.
    """
    plan = load_config_file(spec)
    compare = _denoisers if "samples" in plan else _first_stages
    results = compare(spec, plan, Path(workdir))
    if jax.process_index() == 0:
        print((Path(workdir) / "results.md").read_text(encoding="utf-8"))
    return results


def _denoisers(spec: str, plan: dict[str, Any], workdir: Path) -> list[denoiser_experiment.Row]:
    checked = denoiser_experiment.read_plan(plan)
    open_experiment(workdir, plan)
    rows = denoiser_experiment.run(checked, workdir)
    if jax.process_index() == 0:
        made_with = read_run(workdir / denoiser_experiment.FIRST_STAGE)
        _write(workdir, plan, rows, made_with, denoiser_experiment.table(rows))
    return rows


def _first_stages(spec: str, plan: dict[str, Any], workdir: Path) -> Results:
    if not {"arms", "seeds"} <= plan.keys() or not plan["arms"] or not plan["seeds"]:
        raise InputError(f"experiment {spec} must give `arms` and `seeds`, at least one of each")
    runs = {
        arm: [build(AutoencoderRun, {**fields, "seed": int(seed)}, arm) for seed in plan["seeds"]]
        for arm, fields in plan["arms"].items()
    }
    open_experiment(workdir, plan)
    # Seed by seed, so that a half-finished experiment already compares every arm.
    results: Results = {arm: [] for arm in runs}
    for i in range(len(plan["seeds"])):
        for arm, of_arm in runs.items():
            folder = workdir / f"{arm}-seed{of_arm[i].seed}"
            results[arm].append(_figures(of_arm[i], folder))
            if jax.process_index() == 0:
                _write(workdir, plan, results, read_run(folder), table(results))
    return results


def _figures(run: AutoencoderRun, folder: Path) -> dict[str, float]:
    """Figures of one run, which is trained first unless that is done."""
    done = folder / "figures.json"
    if done.exists():
        return read_json(done)
    train_autoencoder.run(run, folder)
    figures = evaluate.reconstruction_figures(folder, lpips=evaluate.find_lpips(run.loss))
    if jax.process_index() == 0:
        write_json(done, figures)
    return figures


def _write(
    workdir: Path, plan: dict[str, Any], results: Any, run: dict[str, Any], table: str
) -> None:
    """The figures, beside the plan and what they were made with."""
    made_with = {name: run[name] for name in ("command", "git", "python", "packages", "devices")}
    record = {"plan": plan, "made_with": made_with, "results": results}
    write_json(workdir / "results.json", record)
    (workdir / "results.md").write_text(table, encoding="utf-8")


COLUMNS = ("psnr_db", "ssim", "sharpness", "lpips")


def table(results: Results) -> str:
    """A Markdown table: of each arm the mean over seeds and, with several, their deviation.

    Its columns are those of COLUMNS that every run was measured by.
    """
    rows = [figures for of_arm in results.values() for figures in of_arm]
    columns = [name for name in COLUMNS if all(name in figures for figures in rows)]
    lines = [
        f"| arm | seeds | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for arm, figures in results.items():
        if figures:
            cells = [_mean_and_deviation([f[name] for f in figures]) for name in columns]
            lines.append(f"| {arm} | {len(figures)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_and_deviation(values: list[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean
