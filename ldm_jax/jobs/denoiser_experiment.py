"""`ldm experiment` on denoisers: one first stage, arms that share its latents, samples compared.

WORKDIR/autoencoder is trained and cached first, then each WORKDIR/ARM-seedN, whose samples are
drawn in every way that the plan names and judged on the digits. Started again, what is finished is
kept.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.diffusion.process import make_process
from ldm_jax.errors import InputError
from ldm_jax.files import read_json, write_json
from ldm_jax.jobs import cache_latents, train_autoencoder, train_denoiser
from ldm_jax.runs.config_files import build, config_dict, load_config_file
from ldm_jax.runs.denoiser import load_model
from ldm_jax.runs.digit_judge import open_judge, sample_figures
from ldm_jax.runs.settings import AutoencoderRun, DenoiserRun
from ldm_jax.sampling.draw import draw_images
from ldm_jax.sampling.options import SampleOptions, check_values
from ldm_jax.sampling.program import check_steps

FIRST_STAGE = "autoencoder"
HOW = ("sampler", "steps", "guidance", "spacing")  # what a row says of its way of sampling
ALIKE = {f.name for f in dataclasses.fields(SampleOptions)} - {*HOW, "num", "batch_size"}
Row = dict[str, Any]  # arm, seed, how it was sampled, its figures


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a plan of denoisers says, built and checked."""

    first_stage: AutoencoderRun
    arms: dict[str, DenoiserRun]
    samples: dict[str, tuple[SampleOptions, ...]]  # of each arm
    seeds: tuple[int, ...]


def read_plan(plan: dict[str, Any]) -> Plan:
    """A file's plan; InputError for a field that makes no valid run, before any training.

    `first_stage` and `denoiser` are FILE:VARIANT; `arms` gives each one's fields on top of
    `denoiser`, `samples` each one's list of `ldm sample`'s settings.
    """
    wanted = {"first_stage", "denoiser", "arms", "samples", "seeds"}
    if plan.keys() != wanted or not plan["arms"] or not plan["seeds"]:
        raise InputError(f"an experiment on denoisers must give {sorted(wanted)}, none of it empty")
    if plan["samples"].keys() != plan["arms"].keys():
        raise InputError(
            f"samples are of {sorted(plan['samples'])}, arms are {sorted(plan['arms'])}; give the "
            "same names"
        )
    base = load_config_file(plan["denoiser"])
    checked = Plan(
        build(AutoencoderRun, load_config_file(plan["first_stage"])),
        {
            arm: build(DenoiserRun, config_dict(DenoiserRun, base, fields).to_dict(), arm)
            for arm, fields in plan["arms"].items()
        },
        {
            arm: tuple(build(SampleOptions, dict(fields), arm) for fields in several)
            for arm, several in plan["samples"].items()
        },
        tuple(int(seed) for seed in plan["seeds"]),
    )
    source = checked.first_stage.images.source
    if source != "digits":
        raise InputError(
            f"first_stage has images.source {source!r}, and experiments on denoisers are judged on "
            "the digits; train others one by one, and use `ldm evaluate`"
        )
    for arm, ways in checked.samples.items():
        _check_ways(arm, checked.arms[arm], ways)
    return checked


def _check_ways(arm: str, config: DenoiserRun, ways: Sequence[SampleOptions]) -> None:
    """InputError for ways of sampling that are none for this arm, or that no row would tell."""
    if not ways:
        raise InputError(f"samples of {arm!r} are empty; name one way of sampling at least")
    process = make_process(config.process)
    for way in ways:
        check_values(way)
        check_steps(way, process)
        other = [name for name in sorted(ALIKE) if getattr(way, name) != getattr(ways[0], name)]
        if other:
            raise InputError(
                f"samples of {arm!r} differ in {other[0]}; an arm's may differ in {list(HOW)}"
            )


def run(plan: Plan, workdir: Path) -> list[Row]:
    """Trains, samples and judges; a row for every arm, seed and way of sampling."""
    workdir = Path(workdir)
    train_autoencoder.run(plan.first_stage, workdir / FIRST_STAGE)
    cache_latents.run(workdir / FIRST_STAGE, cache_latents.CacheOptions())
    first_stage = str((workdir / FIRST_STAGE).absolute())
    rows: list[Row] = []
    # Seed by seed, so that a half-finished experiment already compares every arm.
    for seed in plan.seeds:
        for arm, denoiser in plan.arms.items():
            folder = workdir / f"{arm}-seed{seed}"
            config = dataclasses.replace(denoiser, seed=seed, autoencoder=first_stage)
            for figures in _figures(config, folder, plan.samples[arm]):
                rows.append({"arm": arm, "seed": seed, **figures})
    return rows


def _figures(config: DenoiserRun, folder: Path, ways: Sequence[SampleOptions]) -> list[Row]:
    done = folder / "figures.json"
    rows: list[Row] = read_json(done) if done.exists() else []
    if len(rows) == len(ways):
        return rows
    train_denoiser.run(config, folder)
    model = load_model(folder, ways[0].which)
    judge = open_judge(model.first_stage, model.mesh, folder.parent / "classifier.npz")
    for way in ways[len(rows) :]:
        figures = sample_figures(judge, *draw_images(model, way))
        how = {name: getattr(way, name) for name in HOW}
        rows.append({**how, **figures})
        print(f"{folder.name} {' '.join(map(str, how.values()))}: {figures['sample_accuracy']:.4f}")
        if jax.process_index() == 0:
            write_json(done, rows)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: accuracy and Fréchet distance, means over the seeds, a line per way of sampling.

    Ways with a sampler and a number of steps in common are told apart by what differs.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    ways = list(dict.fromkeys(_way(row) for row in rows))
    called = Counter(way[:2] for way in ways)
    lines = [f"| sampler | steps | {' | '.join(arms)} |", f"|---|---|{'---|' * len(arms)}"]
    for way in ways:
        cells = []
        for arm in arms:
            found = [row for row in rows if row["arm"] == arm and _way(row) == way]
            accuracy, frechet = (
                np.mean([row[name] for row in found] or [np.nan])
                for name in ("sample_accuracy", "frechet_samples")
            )
            cells.append(f"{100 * accuracy:.1f} % / {frechet:.2f}" if found else "")
        name = ", ".join(map(str, (way[0], *way[2]))) if called[way[:2]] > 1 else way[0]
        lines.append(f"| {name} | {way[1]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _way(row: Row) -> tuple[str, int, tuple[str, ...]]:
    """Sampler, steps, and in words what else tells a way from others."""
    others = {name: row[name] for name in HOW if name in row and name not in ("sampler", "steps")}
    return row["sampler"], row["steps"], tuple(f"{n} {value}" for n, value in others.items())
