"""`ldm experiment`: arms that differ in what is compared, over seeds, and one report.

Each run trains in WORKDIR/ARM-seedN and is measured: a first stage by its held-out images, a
denoiser by samples drawn in every way that the plan names. Denoisers share WORKDIR/autoencoder; an
arm's own first stage is WORKDIR/autoencoder-ARM. Everything is checked before the first training.
Started again, finished runs are kept and the others go on.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ldm_jax.eval.comparison import Row, contrast_table, contrasts, markdown, table
from ldm_jax.eval.spectrum import Spectrum
from ldm_jax.files import read_json, write_json, write_text
from ldm_jax.jobs import cache_latents, train_autoencoder, train_denoiser
from ldm_jax.runs import experiment_report, pace
from ldm_jax.runs.denoiser import load_model
from ldm_jax.runs.plan import (
    Arm,
    load_plan,
    read_denoisers,
    read_first_stages,
    shared_first_stage,
    training_order,
)
from ldm_jax.runs.reconstruction import find_lpips, reconstruction_figures
from ldm_jax.runs.settings import AutoencoderRun, DenoiserRun
from ldm_jax.runs.workdir import open_experiment, read_run
from ldm_jax.sampling.ways import prepare_measure, read_ways

FIGURES = "figures.json"
LONG = ("frequency", "spectrum")  # of a row: for the report, not for tables


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared: arms, and how one run of them is trained and measured."""

    arms: Mapping[str, Arm]
    kept: Callable[[str, Path], list[Row]]  # (arm, folder): rows of a finished run, else none
    prepare: Callable[[str], None]  # what the runs of an arm share
    measure: Callable[[str, int, int, Path], list[Row]]  # (arm, seed, steps, folder)
    reals: Callable[[], Spectrum] | None = None  # the spectrum that samples are held against


def run(spec: str, workdir: Path, images: str = "") -> list[Row]:
    """Trains and measures every arm for every seed; writes results.json, .md and report.html.

    The file's get_config gives `arms`, {name: fields of a run on top of a base}, and `seeds`; see
    `first_stages` and `denoisers` for the rest. An arm of `as_long_as` (ARM, YARDSTICK) has as many
    steps as take ARM's time at YARDSTICK's speed. `contrasts`, {name: {arm: coefficient}}, are
    summed seed by seed. A folder of `images` takes the place of the plan's. Raises InputError
    before any training for what makes no valid run or is missing, and for a workdir that holds
    another plan.
    """
    plan, workdir = load_plan(spec, images), Path(workdir)
    study = (denoisers if "denoiser" in plan else first_stages)(plan, workdir)
    open_experiment(workdir, plan)
    arms, seeds = study.arms, plan["seeds"]
    # Seed by seed, so that a half-finished experiment already compares every arm.
    runs = [(arm, seed) for seed in seeds for arm in training_order(arms)]
    found = {run: study.kept(run[0], _folder(workdir, *run)) for run in runs}
    done = [run for run in runs if found[run]]

    def write() -> None:
        if jax.process_index() == 0:
            given = f" --images={images}" if images else ""
            command = f"ldm experiment --config={spec}{given} --workdir={workdir}"
            order = [(arm, seed) for seed in seeds for arm in arms if found[arm, seed]]
            rows = [{"arm": a, "seed": s, **row} for a, s in order for row in found[a, s]]
            _write(workdir, plan, study, rows, command, read_run(_folder(workdir, *done[-1])))

    for arm, seed in [run for run in runs if run not in done]:
        left = [run for run in runs if run not in done]
        _announce(workdir, arms, done, left)
        study.prepare(arm)
        steps = pace.find_steps(workdir, arms, arm, seeds[0])
        folder = _folder(workdir, arm, seed)
        with pace.timed(workdir, folder.name):
            found[arm, seed] = study.measure(arm, seed, steps, folder)
        done.append((arm, seed))
        write()
    write()
    if jax.process_index() == 0:
        print((workdir / "results.md").read_text(encoding="utf-8"))
    return [
        {"arm": arm, "seed": seed, **_short(row)}
        for seed in seeds
        for arm in arms
        for row in found[arm, seed]
    ]


def _folder(workdir: Path, arm: str, seed: int) -> Path:
    return workdir / f"{arm}-seed{seed}"


def _short(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in LONG}


def _announce(
    workdir: Path,
    arms: Mapping[str, Arm],
    done: Sequence[tuple[str, int]],
    left: Sequence[tuple[str, int]],
) -> None:
    """The line before a run: which one it is, and what all take."""
    if jax.process_index():
        return
    times, (arm, seed) = pace.read_times(workdir), left[0]
    line = f"run {len(done) + 1} of {len(done) + len(left)}: {arm} seed {seed}"
    rest = pace.seconds_left(times, pace.known_steps(workdir, arms), done, left)
    if rest:
        spent = pace.in_words(sum(times.values()))
        line += f" ({spent} done, about {pace.in_words(rest)} left)"
    print(line, flush=True)


def _write(
    workdir: Path,
    plan: dict[str, Any],
    study: Study,
    rows: Sequence[Row],
    command: str,
    run: dict[str, Any],
) -> None:
    """The figures, beside the plan and what they were made with, and the page of all of it."""
    made_with = {name: run[name] for name in ("command", "git", "python", "packages", "devices")}
    record = {"plan": plan, "made_with": made_with, "results": [_short(row) for row in rows]}
    times = pace.read_times(workdir)
    record |= {"steps": pace.known_steps(workdir, study.arms), "seconds": times}
    differences = contrasts(rows, plan.get("contrasts", {}))
    tables = [table(rows), *([contrast_table(differences)] if differences else [])]
    if "contrasts" in plan:
        record["contrasts"] = differences
    write_json(workdir / "results.json", record)
    write_text(workdir / "results.md", markdown(tables))
    experiment_report.write(
        workdir,
        plan,
        study.arms,
        rows,
        command=command,
        tables=tables,
        times=times,
        reals=study.reals() if study.reals else None,
    )


def first_stages(plan: dict[str, Any], workdir: Path) -> Study:
    """First stages by their held-out figures; `first_stage` FILE:VARIANT is the arms' base."""
    arms = read_first_stages(plan)

    def kept(arm: str, folder: Path) -> list[Row]:
        done = folder / FIGURES
        return [read_json(done)] if done.exists() else []

    def measure(arm: str, seed: int, steps: int, folder: Path) -> list[Row]:
        config = dataclasses.replace(arms[arm].run, seed=seed, num_steps=steps)
        assert isinstance(config, AutoencoderRun)
        train_autoencoder.run(config, folder)
        figures = reconstruction_figures(folder, lpips=find_lpips(config.loss))
        if jax.process_index() == 0:
            write_json(folder / FIGURES, figures)
        return [figures]

    return Study(arms, kept, lambda arm: None, measure)


def denoisers(plan: dict[str, Any], workdir: Path) -> Study:
    """Denoisers by their samples.

    `first_stage` and `denoiser` are FILE:VARIANT, the latter the arms' base. An arm's `first_stage`
    takes the place of the plan's: FILE:VARIANT, or fields on top of it; its `init_from` is the arm
    whose run of the same seed it begins with. `samples` gives a tuple of `ldm sample`'s options,
    for all arms or for each by name. Digits are judged by their classifier; all other images, and
    digits too where the plan has a `judge`, the fields of JudgeOptions, by frozen networks, against
    the split that `reference` names, "train" or "held_out".
    """
    arms = read_denoisers(plan)
    ways = read_ways(plan, arms)
    measure_way, reals = prepare_measure(plan, arms, ways, workdir)
    folders = {shared_first_stage(plan): workdir / "autoencoder"}
    for name, arm in arms.items():
        folders.setdefault(arm.first_stage, workdir / f"autoencoder-{name}")

    @functools.cache
    def trained(first_stage: AutoencoderRun) -> str:
        folder = folders[first_stage]
        with pace.timed(workdir, folder.name):
            train_autoencoder.run(first_stage, folder)
            cache_latents.run(folder, cache_latents.CacheOptions())
        return str(folder.absolute())

    def measured(folder: Path) -> list[Row]:
        done = folder / FIGURES
        return read_json(done) if done.exists() else []

    def kept(name: str, folder: Path) -> list[Row]:
        rows = measured(folder)
        return rows if len(rows) == len(ways[name]) else []

    def measure(name: str, seed: int, steps: int, folder: Path) -> list[Row]:
        arm = arms[name]
        assert isinstance(arm.run, DenoiserRun) and arm.first_stage
        start = str(_folder(workdir, arm.start, seed).absolute()) if arm.start else ""
        config = dataclasses.replace(
            arm.run,
            seed=seed,
            num_steps=steps,
            autoencoder=trained(arm.first_stage),
            init_from=start,
        )
        train_denoiser.run(config, folder)
        load, rows = functools.cache(functools.partial(load_model, folder)), measured(folder)
        for way in ways[name][len(rows) :]:
            rows.append(measure_way(load(way.which), way, folder))
            if jax.process_index() == 0:
                print(f"{folder.name}: {_short(rows[-1])}")
                write_json(folder / FIGURES, rows)
        return rows

    def prepare(name: str) -> None:
        trained(arms[name].first_stage)

    return Study(arms, kept, prepare, measure, reals)
