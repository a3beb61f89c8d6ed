"""`ldm experiment`: arms that differ in what is compared, over seeds, and one table.

Each run trains in WORKDIR/ARM-seedN and is measured: a first stage by its held-out images, a
denoiser by samples drawn in every way that the plan names. Denoisers share WORKDIR/autoencoder; an
arm's own first stage is WORKDIR/autoencoder-ARM. Everything is checked before the first training.
Started again, finished runs are kept and the others go on.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.data.images import open_images
from ldm_jax.errors import InputError
from ldm_jax.eval import evaluation
from ldm_jax.eval.judge import JudgeOptions
from ldm_jax.files import read_json, write_json
from ldm_jax.interop import pretrained
from ldm_jax.jobs import cache_latents, train_autoencoder, train_denoiser
from ldm_jax.runs.build import codec_of, denoising_of, facts_of_config
from ldm_jax.runs.config_files import build, config_dict, group, load_config_file
from ldm_jax.runs.denoiser import Guide, Model, load_model
from ldm_jax.runs.digit_judge import open_judge, sample_figures
from ldm_jax.runs.first_stage import FirstStage
from ldm_jax.runs.reconstruction import RESULTS, find_lpips, reconstruction_figures
from ldm_jax.runs.settings import AutoencoderRun, DenoiserRun
from ldm_jax.runs.workdir import open_experiment, read_run
from ldm_jax.sampling import judged
from ldm_jax.sampling.draw import check_options, draw_images
from ldm_jax.sampling.inputs import initial_noise, read_images
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sharding import MeshConfig, check_batch, make_mesh

Row = dict[str, Any]  # arm, seed, of samples WAY, and figures
Measure = Callable[[str, int, Path], list[Row]]  # arm, seed, folder: trained and measured

WAY = ("sampler", "steps", "guidance", "spacing")  # what a row says of how its samples were drawn
ALIKE = sorted({f.name for f in dataclasses.fields(SampleOptions)} - {*WAY, "num", "batch_size"})
# Figures that a table shows; beside them those of frozen networks, which end in their protocol.
SHOWN = ("psnr_db", "ssim", "sharpness", "lpips", "sample_accuracy", "frechet_samples")


def run(spec: str, workdir: Path) -> list[Row]:
    """Trains and measures every arm for every seed; writes results.json and results.md.

    The file's get_config gives `arms`, {name: fields of a run on top of a base}, and `seeds`; see
    `first_stages` and `denoisers` for the rest. Raises InputError before any training for what
    makes no valid run or is missing, and for a workdir that holds another plan.
    """
    plan, workdir = load_config_file(spec), Path(workdir)
    measure = (denoisers if "denoiser" in plan else first_stages)(plan, workdir)
    open_experiment(workdir, plan)
    rows: list[Row] = []
    # Seed by seed, so that a half-finished experiment already compares every arm.
    for seed in plan["seeds"]:
        for arm in plan["arms"]:
            folder = workdir / f"{arm}-seed{seed}"
            rows += [{"arm": arm, "seed": seed, **row} for row in measure(arm, seed, folder)]
            if jax.process_index() == 0:
                _write(workdir, plan, rows, read_run(folder))
    if jax.process_index() == 0:
        print((workdir / "results.md").read_text(encoding="utf-8"))
    return rows


def _write(workdir: Path, plan: dict[str, Any], rows: Sequence[Row], run: dict[str, Any]) -> None:
    """The figures, beside the plan and what they were made with."""
    made_with = {name: run[name] for name in ("command", "git", "python", "packages", "devices")}
    record = {"plan": plan, "made_with": made_with, "results": rows}
    write_json(workdir / "results.json", record)
    (workdir / "results.md").write_text(table(rows), encoding="utf-8")


def first_stages(plan: dict[str, Any], workdir: Path) -> Measure:
    """First stages by their held-out figures; `first_stage` FILE:VARIANT is the arms' base."""
    _check_names(plan, {"arms", "seeds"}, {"first_stage"})
    base = load_config_file(plan["first_stage"]) if "first_stage" in plan else {}
    runs: dict[tuple[str, int], AutoencoderRun] = {}
    for arm, fields in plan["arms"].items():
        with _in_arm(arm):
            config = _layered(AutoencoderRun, base, fields)
            _check_first_stage(config)
            runs |= {(arm, seed): dataclasses.replace(config, seed=seed) for seed in plan["seeds"]}

    def measure(arm: str, seed: int, folder: Path) -> list[Row]:
        done = folder / "figures.json"
        if done.exists():
            return [read_json(done)]
        config = runs[arm, seed]
        train_autoencoder.run(config, folder)
        figures = reconstruction_figures(folder, lpips=find_lpips(config.loss))
        if jax.process_index() == 0:
            write_json(done, figures)
        return [figures]

    return measure


@dataclasses.dataclass(frozen=True)
class Arm:
    """What a plan says of one kind of denoiser."""

    run: DenoiserRun
    first_stage: AutoencoderRun
    ways: tuple[SampleOptions, ...]


FiguresOf = Callable[[SampleOptions], dict[str, float]]
Judge = Callable[[Model, Path], FiguresOf]  # of a trained model and its folder


def denoisers(plan: dict[str, Any], workdir: Path) -> Measure:
    """Denoisers by their samples.

    `first_stage` and `denoiser` are FILE:VARIANT, the latter the arms' base; `samples` gives each
    arm's list of `ldm sample`'s options; `judge` the fields of JudgeOptions, and without it the
    digits' classifier judges. An arm's `first_stage` takes the place of the plan's: FILE:VARIANT,
    or fields on top of it.
    """
    _check_names(plan, {"first_stage", "denoiser", "arms", "samples", "seeds"}, {"judge"})
    if plan["samples"].keys() != plan["arms"].keys():
        raise InputError(
            f"samples are of {sorted(plan['samples'])}, arms are {sorted(plan['arms'])}; give the "
            "same names"
        )
    shared = _layered(AutoencoderRun, load_config_file(plan["first_stage"]))
    folders, arms = {shared: workdir / "autoencoder"}, {}
    for name in plan["arms"]:
        with _in_arm(name):
            arms[name] = arm = _read_arm(plan, name)
            folders.setdefault(arm.first_stage, workdir / f"autoencoder-{name}")
            if arm.first_stage.images != shared.images:
                raise InputError(
                    f"its first stage has {arm.first_stage.images}, and the plan's has "
                    f"{shared.images}; arms are compared on the same images"
                )
            _check_arm(arm, plan["seeds"])
    judge = _choose_judge(plan, workdir, list(arms.values()))

    @functools.cache
    def trained(first_stage: AutoencoderRun) -> str:
        folder = folders[first_stage]
        train_autoencoder.run(first_stage, folder)
        cache_latents.run(folder, cache_latents.CacheOptions())
        return str(folder.absolute())

    def measure(name: str, seed: int, folder: Path) -> list[Row]:
        done, arm = folder / "figures.json", arms[name]
        rows: list[Row] = read_json(done) if done.exists() else []
        if len(rows) == len(arm.ways):
            return rows
        where = trained(arm.first_stage)
        config = dataclasses.replace(arm.run, seed=seed, autoencoder=where)
        train_denoiser.run(config, folder)
        model = load_model(folder, arm.ways[0].which)
        figures_of = judge(model, folder)
        for way in arm.ways[len(rows) :]:
            rows.append({name: getattr(way, name) for name in WAY} | figures_of(way))
            if jax.process_index() == 0:
                print(f"{folder.name}: {rows[-1]}")
                write_json(done, rows)
        return rows

    return measure


def _read_arm(plan: dict[str, Any], name: str) -> Arm:
    fields, ways = dict(plan["arms"][name]), plan["samples"][name]
    first = fields.pop("first_stage", {})
    named = isinstance(first, str)
    return Arm(
        _layered(DenoiserRun, load_config_file(plan["denoiser"]), fields),
        _layered(
            AutoencoderRun,
            load_config_file(first if named else plan["first_stage"]),
            {} if named else first,
        ),
        tuple(build(SampleOptions, way, "samples") for way in ways),
    )


def _choose_judge(plan: dict[str, Any], workdir: Path, arms: Sequence[Arm]) -> Judge:
    """The frozen network of `judge`, its reference measured once, or the digits' classifier."""
    if "judge" not in plan:
        source = arms[0].first_stage.images.source
        if source != "digits":
            raise InputError(
                f"first_stage has images.source {source!r}, and the classifier knows the digits "
                'only; give the plan a `judge`, as {"preset": "adm"}'
            )
        return functools.partial(_by_classifier, workdir / "classifier.npz")
    options, stub = build(JudgeOptions, plan["judge"], "judge"), _untrained(arms[0])
    prepared = {
        num: evaluation.prepare(
            options,
            mesh=stub.mesh,
            folder=workdir / "evaluation",
            num=num,
            reference=judged.reference_of(options, stub.first_stage),
        )
        for num in sorted({way.num for arm in arms for way in arm.ways})
    }
    for arm in arms:
        for way in arm.ways:
            judged.compile_samples(_untrained(arm, way), way, "balanced")
    return functools.partial(_by_network, prepared)


def _by_classifier(classifier: Path, model: Model, folder: Path) -> FiguresOf:
    judge = open_judge(model.first_stage, model.mesh, classifier)
    return lambda way: sample_figures(judge, *draw_images(model, way))


def _by_network(
    prepared: dict[int, evaluation.Evaluation], model: Model, folder: Path
) -> FiguresOf:
    def figures_of(way: SampleOptions) -> dict[str, float]:
        return evaluation.evaluate(
            prepared[way.num],
            judged.compile_samples(model, way, "balanced")(model, None),
            folder / RESULTS,
            labels=judged.labels_kind(model.run, "balanced"),
            sampling=judged.sampling(check_options(way, model), model),
            record={"step": model.step},
        )

    return figures_of


def _check_names(plan: dict[str, Any], needed: set[str], optional: set[str]) -> None:
    if not needed <= plan.keys() <= needed | optional or not all(plan[name] for name in needed):
        raise InputError(
            f"the plan has {sorted(plan)}; it must give {sorted(needed)}, none of it empty, and "
            f"may give {sorted(optional)}"
        )
    samples = group(plan.get("samples", {}), "samples")
    group(plan["arms"], "arms")
    for name, fields in plan["arms"].items():
        group(fields, f"arms.{name}")
    for name in {"first_stage", "denoiser"} & plan.keys():
        if not isinstance(plan[name], str):
            raise InputError(f"{name} is {plan[name]!r}; it must be the text FILE:VARIANT")
    several = {"seeds": plan["seeds"]} | {f"samples.{arm}": ways for arm, ways in samples.items()}
    for name, value in several.items():
        if not isinstance(value, list | tuple):
            raise InputError(f"{name} is {value!r}; it must be a tuple")


@contextlib.contextmanager
def _in_arm(name: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"arm {name!r}: {error}") from error


def _layered(cls: type, *layers: dict[str, Any]) -> Any:
    return build(cls, config_dict(cls, *layers).to_dict())


def _check_first_stage(config: AutoencoderRun) -> None:
    """InputError for a batch that does not divide, and for images or weights that are missing."""
    check_batch(config.batch_size, make_mesh(config.mesh), parts=config.accumulate)
    for split in ("train", "held_out"):
        open_images(config.images, split, augment=False)
    if config.loss.perceptual_weight:
        pretrained.load("lpips", config.loss.perceptual_file)
    if config.init_from:
        read_run(Path(config.init_from))


def _check_arm(arm: Arm, seeds: Sequence[int]) -> None:
    """InputError for a first stage, a denoiser and ways of sampling that do not go together."""
    config, ways = arm.run, arm.ways
    _check_first_stage(arm.first_stage)
    for name in ("autoencoder", "latents"):
        if getattr(config, name):
            raise InputError(
                f"{name} {getattr(config, name)!r} is the experiment's to set; name a first stage "
                "to train with `first_stage`"
            )
    for seed in seeds:
        dataclasses.replace(config, seed=seed)  # for its errors alone
    check_batch(config.batch_size, make_mesh(config.mesh), parts=config.accumulate)
    source = open_images(arm.first_stage.images, "train", augment=False)
    facts = dataclasses.replace(
        facts_of_config(config, arm.first_stage.model),
        fields={field.name: field.shape for field in source.fields},
        num_classes=source.num_classes,
    )
    denoising_of(config, facts)
    if not ways:
        raise InputError("its samples are empty; name one way of sampling at least")
    for way in ways:
        for name in ALIKE:
            if getattr(way, name) != getattr(ways[0], name):
                raise InputError(f"its samples differ in {name}; they may differ in {list(WAY)}")
        stub = _untrained(arm, way)
        options = check_options(way, stub)
        # For their errors alone: the files are read again when there is a model to draw from.
        initial_noise(options, stub)
        read_images(options, stub)


def _untrained(arm: Arm, way: SampleOptions = SampleOptions()) -> Model:
    """The model that an arm's training ends with, but for its numbers: what checks need."""
    first_stage = FirstStage(arm.first_stage, {}, 0, "")
    guide = Guide(Path(), arm.run, {}, 0, "") if way.autoguided else None
    facts, mesh = facts_of_config(arm.run, arm.first_stage.model), make_mesh(MeshConfig())
    codec = codec_of(arm.run, facts)
    return Model(arm.run, {}, 0, "", first_stage, codec, facts.latent_shape, mesh, guide)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table: of each arm and way of sampling the figures' mean ± deviation over seeds.

    Rows of one way stand together. Guidance and spacing are columns where they differ.
    """
    found = [name for name in WAY if any(name in row for row in rows)]
    differ = [name for name in found if len({row.get(name) for row in rows}) > 1]
    keys = [*(name for name in found if name in ("sampler", "steps", *differ)), "arm"]
    groups: dict[tuple[Any, ...], list[dict[str, float]]] = {}
    for row in rows:
        figures = {
            name.rsplit("-", 1)[0]: value
            for name, value in row.items()
            if name in SHOWN or "-" in name
        }
        groups.setdefault(tuple(row.get(name, "") for name in keys), []).append(figures)
    ways = list(dict.fromkeys(key[:-1] for key in groups))
    columns = list(dict.fromkeys(name for runs in groups.values() for f in runs for name in f))
    head = [*keys, "seeds", *columns]
    lines = [head, ["---"] * len(head)]
    for key, runs in sorted(groups.items(), key=lambda item: ways.index(item[0][:-1])):
        cells = [_cell([f[name] for f in runs if name in f]) for name in columns]
        lines.append([*map(str, key), str(len(runs)), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(values: Sequence[float]) -> str:
    """Mean ± deviation to three decimals, of small figures to three digits; empty of none."""
    if not values:
        return ""
    mean = float(np.mean(values))
    decimals = max(3, 2 - math.floor(math.log10(abs(mean)))) if mean and math.isfinite(mean) else 3
    several = f" ± {np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else ""
    return f"{mean:.{decimals}f}{several}"
