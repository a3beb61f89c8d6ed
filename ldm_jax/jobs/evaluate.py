"""`ldm evaluate`: figures of a first stage, of a denoiser's samples, or of a set of images."""

import dataclasses
from collections.abc import Container
from pathlib import Path
from typing import Any

import jax

from ldm_jax.errors import InputError, within
from ldm_jax.eval import published
from ldm_jax.eval.evaluation import evaluate, prepare, write_statistics
from ldm_jax.eval.image_sets import open_set
from ldm_jax.eval.judge import JudgeOptions
from ldm_jax.eval.report import Table
from ldm_jax.files import append_json, utc_now
from ldm_jax.options import Group, option
from ldm_jax.runs.config_files import build
from ldm_jax.runs.denoiser import load_model
from ldm_jax.runs.digit_judge import open_judge, sample_figures
from ldm_jax.runs.first_stage import load_first_stage
from ldm_jax.runs.posterior import NUM as POSTERIOR_NUM
from ldm_jax.runs.posterior import measure_posterior, write_posterior
from ldm_jax.runs.reconstruction import (
    NUM,
    RESULTS,
    find_lpips,
    prepare_judged,
    reconstruction_figures,
)
from ldm_jax.runs.settings import AutoencoderRun, DenoiserRun
from ldm_jax.runs.workdir import read_run
from ldm_jax.sampling.draw import draw_images
from ldm_jax.sampling.inputs import LABELS, conditional
from ldm_jax.sampling.judged import prepare_figures
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sharding import MeshConfig, make_mesh

Figures = dict[str, float]
NUM_DIGITS, NUM_SAMPLES = 1000, 50_000  # samples by the digits' classifier, and by networks
OF_SETS = ("unconditional", "class-conditional", "text-to-image")  # published of sets of images
# Of SampleOptions, what is of `ldm sample` alone; `num` stands in EvaluateOptions.
NOT_SAMPLED = ("num", "progressive", "size", "tile", "tile_overlap")
ALLOW_FEW = JudgeOptions(allow_few=True)
SETS = Group("sets of images", "Measured instead of a run.")
JUDGED = Group("samples that are measured")


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """What the command line asks of an evaluation beside its samples and its judge."""

    num: int = option(
        0, "samples (50000, digits: 1000) or held-out images (10000) to measure", metavar="N"
    )
    dataset: str = option(
        "",
        "prints what was published for it beside ours: celebahq, ffhq, imagenet, ...",
        metavar="NAME",
    )
    posterior: bool = option(
        False,
        "a first stage's posterior noise: its size and what it costs the decoder, of 1000 held-out "
        "images and --seed; writes WORKDIR/posterior.html",
    )
    images: str = option(
        "", "folder of images or .npz; results go to --out", metavar="DIR_OR_NPZ", group=SETS
    )
    out: str = option("", "of --images; with --stats-only a new .npz", metavar="DIR", group=SETS)
    stats_only: bool = option(
        False,
        "writes statistics of --images for a --reference, and measures nothing",
        group=SETS,
    )
    labels: str = option(
        "balanced",
        "the classes in turn, or drawn (default: balanced)",
        choices=LABELS,
        group=JUDGED,
    )
    keep: str = option(
        "", "writes every sample to a new folder, as INDEX.png", metavar="DIR", group=JUDGED
    )


def run(
    workdir: Path | None,
    options: EvaluateOptions,
    samples: SampleOptions,
    judge: JudgeOptions | None,
) -> None:
    """Measures what the command line names; `samples.num` stands in `options`.

    Without a judge, a first stage is measured by its reconstructions' PSNR, SSIM and LPIPS, samples
    of the digits by a classifier, all else by preset "adm". Raises InputError for options of
    another kind of evaluation.
    """
    if (workdir is None) == (not options.images):
        raise InputError("give --workdir=DIR of a run, or --images=DIR_OR_NPZ of a set of images")
    if options.images:
        if options.posterior:
            raise InputError("--posterior is of a first stage, not of --images; leave one out")
        _refuse_sampling(options, samples, "a set of images is measured whole")
        if not options.out:
            raise InputError("--images needs --out: a folder of results, a file with --stats-only")
        out, judge = Path(options.out), judge or JudgeOptions()
        if not options.stats_only:
            image_set(options.images, out, judge, dataset=options.dataset)
        elif options.dataset:
            raise InputError("--stats-only compares with nothing; leave --dataset out")
        else:
            statistics(options.images, out, judge)
        return
    if options.stats_only or options.out:
        raise InputError("--out and --stats-only belong to --images; leave them out")
    if read_run(workdir)["job"] != "train-autoencoder":
        if options.posterior:
            raise InputError(
                f"--posterior is of a first stage, and {workdir} holds a denoiser; give the "
                "workdir of its autoencoder, or leave it out"
            )
        denoiser(
            workdir,
            dataclasses.replace(samples, num=options.num),
            judge,
            labels=options.labels,
            keep=Path(options.keep) if options.keep else None,
            dataset=options.dataset,
        )
        return
    known = {"num", "step", "weights"} | ({"seed"} if options.posterior else set())
    _refuse_sampling(options, samples, "this workdir holds a first stage", known)
    if options.posterior:
        if options.dataset or judge not in (None, ALLOW_FEW):
            raise InputError(
                "--posterior has figures of its own, that nobody published; leave --dataset and "
                "the flags of frozen networks, but for --allow-few, out"
            )
        posterior(
            workdir,
            num=options.num or POSTERIOR_NUM,
            step=samples.step,
            weights=samples.weights,
            seed=samples.seed,
            allow_few=judge is not None,
        )
        return
    first_stage(
        workdir,
        judge,
        num=options.num or NUM,
        step=samples.step,
        weights=samples.weights,
        dataset=options.dataset,
    )


def first_stage(
    workdir: Path,
    judge: JudgeOptions | None = None,
    *,
    num: int = NUM,
    step: int = -1,
    weights: str = "auto",
    dataset: str = "",
) -> Figures:
    """Figures of reconstructions of at most `num` held-out images, printed and appended.

    PSNR, SSIM and, with its weights at hand, LPIPS; with a judge also rFID and its kin. Those of
    the checkpoint `step`, -1 = the newest; `weights` are "ema", "params", or "auto", the average
    when there is one. What was published of `dataset` is printed beside ours.
    """
    rows, record = _published(dataset, "reconstruction"), read_run(workdir)
    within("num", num, "[1, inf)")
    which = {"limit": num, "step": step, "weights": weights}
    judged = None
    if judge is not None:
        judged = prepare_judged(workdir, judge, make_mesh(MeshConfig()), **which)
    lpips = find_lpips(build(AutoencoderRun, record["config"]).loss)
    figures = reconstruction_figures(workdir, **which, lpips=lpips)
    _note(workdir, record["job"], which, figures)
    figures |= judged() if judged else {}
    _show(figures, rows)
    return figures


def posterior(
    workdir: Path,
    *,
    num: int = POSTERIOR_NUM,
    step: int = -1,
    weights: str = "auto",
    seed: int = 0,
    allow_few: bool = False,
) -> Figures:
    """Figures of a first stage's posterior noise, of at most `num` held-out images.

    Printed, appended, and drawn in WORKDIR/posterior.html; see `runs.posterior`. Raises InputError
    for a first stage whose latents are points.
    """
    record = read_run(workdir)
    within("num", num, "[1, inf)")
    mesh = make_mesh(MeshConfig())
    stage = load_first_stage(workdir, mesh, step=step, weights=weights)
    lpips = find_lpips(stage.run.loss)
    found = measure_posterior(stage, mesh, limit=num, seed=seed, lpips=lpips, allow_few=allow_few)
    which = {"limit": num, "step": step, "weights": weights, "posterior": True, "seed": seed}
    _note(workdir, record["job"], which, found.figures)
    if jax.process_index() == 0:
        flags = f"--num={num} --step={step} --weights={weights} --seed={seed}"
        command = f"ldm evaluate --workdir={workdir} --posterior {flags}"
        path = write_posterior(found, workdir, command + " --allow-few" * allow_few)
        for table in found.tables:
            _print_table(table)
        print(f"{found.verdict}\n{path}")
    return found.figures


def denoiser(
    workdir: Path,
    options: SampleOptions = SampleOptions(num=0),
    judge: JudgeOptions | None = None,
    *,
    labels: str = "balanced",
    keep: Path | None = None,
    dataset: str = "",
) -> Figures:
    """Figures of a denoiser's samples, printed and appended to WORKDIR/evaluation.jsonl.

    `options.num` 0 is 1000 samples of the digits by a classifier, which WORKDIR/classifier.npz
    keeps, and else 50000 by frozen networks, against the training images or what the judge names.
    `labels` and `keep` as in `sampling.judged.compile_samples`; they belong to frozen networks.
    """
    record = read_run(workdir)
    run = build(DenoiserRun, record["config"])
    task = "class-conditional" if conditional(run) else "unconditional"
    rows = _published(dataset, task)
    source = read_run(Path(run.autoencoder))["config"].get("images", {}).get("source")
    by_classifier = judge is None and source == "digits"
    number = options.num or (NUM_DIGITS if by_classifier else NUM_SAMPLES)
    options = dataclasses.replace(options, num=number)
    if by_classifier:
        if labels != "balanced" or keep:
            raise InputError(
                "--labels and --keep belong to frozen networks, and these digits are measured "
                "by a classifier; leave them out, or add --extractor=random-conv"
            )
        model = load_model(workdir, options.which)
        classifier = open_judge(model.first_stage, model.mesh, Path(workdir) / "classifier.npz")
        figures = sample_figures(classifier, *draw_images(model, options))
        figures |= {"step": float(model.step)}
        _note(workdir, record["job"], dataclasses.asdict(options), figures)
    else:
        model, judge = load_model(workdir, options.which), judge or JudgeOptions()
        measure, _ = prepare_figures(model, options, judge, workdir, labels=labels, keep=keep)
        figures = measure(model)
    _show(figures, rows)
    return figures


def image_set(
    path: str, out: Path, judge: JudgeOptions = JudgeOptions(), *, dataset: str = ""
) -> Figures:
    """Figures of a folder of images or an .npz, printed; OUT/evaluation.jsonl takes them."""
    rows, images = _published(dataset, *OF_SETS), open_set(path)
    evaluation = prepare(
        judge, mesh=make_mesh(MeshConfig()), folder=Path(out) / "evaluation", num=images.num
    )
    figures = evaluate(evaluation, images, Path(out) / RESULTS)
    _show(figures, rows)
    return figures


def statistics(path: str, out: Path, judge: JudgeOptions = JudgeOptions()) -> None:
    """Writes the statistics of a folder of images or an .npz as `out`, a judge's reference."""
    if judge.reference or judge.metrics:
        raise InputError("--stats-only compares with nothing; leave --reference and --metrics out")
    if out.suffix != ".npz" or out.exists():
        raise InputError(f"--out={out} must be a new file that ends in .npz; give another")
    mesh = make_mesh(MeshConfig())
    write_statistics(judge, open_set(path), mesh=mesh, out=out)


def _refuse_sampling(
    options: EvaluateOptions, samples: SampleOptions, what: str, known: Container[str] = ()
) -> None:
    """InputError for flags, but those `known`, that are about samples and not about `what`."""
    for some, names in (
        (options, ("num", "labels", "keep")),
        (samples, [field.name for field in dataclasses.fields(samples)]),
    ):
        for name in names:
            value = getattr(some, name)
            if name not in known and value != getattr(type(some), name):
                raise InputError(
                    f"--{name.replace('_', '-')} {value!r} is about samples, and {what}; leave it "
                    "out"
                )


def _note(workdir: Path, job: str, options: dict[str, Any], figures: Figures) -> None:
    """A line of figures that stand outside of any protocol."""
    line = {"job": job, "time": utc_now(), "settings": options, "figures": figures}
    if jax.process_index() == 0:
        append_json(Path(workdir) / RESULTS, line)


def _published(dataset: str, *tasks: str) -> list[published.Row]:
    """What was published of a data set; InputError for one nobody published of."""
    if not dataset:
        return []
    rows = [row for task in tasks for row in published.lookup(dataset, task)]
    if not rows:
        known = sorted({name for task in tasks for name in published.datasets(task)})
        raise InputError(
            f"dataset {dataset!r} has no published {' or '.join(tasks)} figures; there are "
            f"those of {known}"
        )
    return rows


def _print_table(table: Table) -> None:
    """Its columns as wide as their cells; the first to the left, the others to the right."""
    rows = [table.head, *table.rows]
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        line = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"{name:{first}}{line}")
    print()


def _show(figures: Figures, rows: list[published.Row]) -> None:
    """Ours, then the published ones."""
    if jax.process_index() == 0:
        for name, value in figures.items():
            print(f"{name:40s} {value:.4f}")
        for row in rows:
            print(published.describe(row))
