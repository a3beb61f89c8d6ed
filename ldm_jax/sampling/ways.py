"""The ways in which an experiment's denoisers are sampled: read, checked, measured.

Samples are drawn once for each way, in memory, and given to every judge there is.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.data.images import open_images
from ldm_jax.errors import InputError, choose
from ldm_jax.eval import evaluation
from ldm_jax.eval.comparison import WAY, Row, picture_name
from ldm_jax.eval.image_sets import ImageStream, open_split
from ldm_jax.eval.images_out import save_grid
from ldm_jax.eval.judge import JudgeOptions
from ldm_jax.eval.spectrum import Spectrum, high_frequency_power
from ldm_jax.files import digest_of
from ldm_jax.runs.build import codec_of, facts_of_config
from ldm_jax.runs.config_files import build, group
from ldm_jax.runs.denoiser import Guide, Model
from ldm_jax.runs.digit_judge import DigitJudge, open_judge, sample_figures
from ldm_jax.runs.first_stage import FirstStage
from ldm_jax.runs.plan import Arm, check_tuple, in_arm
from ldm_jax.runs.reconstruction import NUM, RESULTS, spread
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sampling import judged
from ldm_jax.sampling.draw import Draw, check_options, compile_draw
from ldm_jax.sampling.inputs import conditional, initial_noise, read_images
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sharding import MeshConfig, make_mesh
from ldm_jax.train.ema import average_names

Ways = tuple[SampleOptions, ...]
Measure = Callable[[Model, SampleOptions, Path], Row]

SPLITS = ("train", "held_out")  # what samples are held against
# Where the plan names no judge. One's own images are as many as they are, and arms are held against
# them alike.
JUDGE = {
    "preset": "custom",
    "extractor": "random-conv",
    "kid_subset_size": 100,
    "allow_few": True,
}
SHOWN = 10  # samples, the first ones, that are kept to look at
READ = 500  # real images in memory at a time
FIELDS = {field.name for field in dataclasses.fields(SampleOptions)}
DIFFER = tuple(name for name in WAY if name in FIELDS)  # what the ways of an arm differ in
ALIKE = sorted(FIELDS - {*DIFFER, "batch_size"})
ALIKE_OF_ALL = ("num", "seed")  # what no arm may have of its own


def read_ways(plan: Mapping[str, Any], arms: Mapping[str, Arm]) -> dict[str, Ways]:
    """The plan's `samples`, a list for all arms or one for each by name, checked with the arms."""
    samples = plan["samples"]
    if isinstance(samples, list | tuple):
        samples = dict.fromkeys(arms, samples)
    if group(samples, "samples").keys() != arms.keys():
        raise InputError(
            f"samples are of {sorted(samples)}, arms are {sorted(arms)}; give the same names, or "
            "one tuple for all"
        )
    ways: dict[str, Ways] = {}
    for name, arm in arms.items():
        check_tuple(samples[name], f"samples.{name}")
        with in_arm(name):
            ways[name] = tuple(build(SampleOptions, way, "samples") for way in samples[name])
            _check_ways(arm, ways[name])
    first = next(iter(ways.values()))[0]
    for name, of_arm in ways.items():
        for field in ALIKE_OF_ALL:
            if getattr(of_arm[0], field) != getattr(first, field):
                raise InputError(
                    f"arm {name!r}: its samples have {field} {getattr(of_arm[0], field)}, others "
                    f"{getattr(first, field)}; arms are compared on as many samples of one noise"
                )
    return ways


def _check_ways(arm: Arm, ways: Ways) -> None:
    """InputError for ways in which the arm cannot be sampled, and for those that differ oddly."""
    if not ways:
        raise InputError("its samples are empty; name one way of sampling at least")
    for way in ways:
        for name in ALIKE:
            if getattr(way, name) != getattr(ways[0], name):
                raise InputError(f"its samples differ in {name}; they may differ in {list(DIFFER)}")
        choose("weights", way.weights, ("auto", "params", *average_names(arm.run.ema)))
        stub = untrained(arm, way)
        options = check_options(way, stub)
        # For their errors alone: the files are read again when there is a model to draw from.
        initial_noise(options, stub)
        read_images(options, stub)
    if len({tuple(getattr(way, name) for name in DIFFER) for way in ways}) < len(ways):
        raise InputError("its samples name one way twice; leave one out")


def untrained(arm: Arm, way: SampleOptions = SampleOptions()) -> Model:
    """The model that an arm's training ends with, but for its numbers: what checks need."""
    assert isinstance(arm.run, DenoiserRun) and arm.first_stage
    first_stage = FirstStage(arm.first_stage, {}, 0, "")
    guide = Guide(Path(), arm.run, {}, 0, "") if way.autoguided else None
    facts, mesh = facts_of_config(arm.run, arm.first_stage.model), make_mesh(MeshConfig())
    codec = codec_of(arm.run, facts)
    return Model(arm.run, {}, 0, "", first_stage, codec, facts.latent_shape, mesh, guide)


def prepare_measure(
    plan: Mapping[str, Any], arms: Mapping[str, Arm], ways: Mapping[str, Ways], workdir: Path
) -> tuple[Measure, Callable[[], Spectrum]]:
    """measure(model, way, folder) -> a row; and () -> the spectrum of the real images.

    Digits are judged by their classifier, which WORKDIR/classifier.npz keeps, and other images,
    or all where the plan has a `judge`, by frozen networks; a spectrum is taken of both. The
    folder takes the first samples as a picture. Raises InputError for what cannot be judged.
    """
    stub = untrained(next(iter(arms.values())))
    config, num = stub.first_stage.run.images, next(iter(ways.values()))[0].num
    split = plan.get("reference", SPLITS[0])
    choose("reference", split, SPLITS)
    digits = config.source == "digits"
    by_network = None
    if "judge" in plan or not digits:
        options = build(JudgeOptions, plan.get("judge", JUDGE), "judge")
        for name, of_arm in ways.items():
            with in_arm(name):
                judged.refuse_files(of_arm[0])
        reference = None if options.reference else open_split(config, split)
        prepared = evaluation.prepare(
            options,
            mesh=stub.mesh,
            folder=workdir / "evaluation",
            num=num,
            reference=reference,
        )
        if reference and "judge" not in plan:
            _note_few(min(num, reference.num), max(prepared.judge.taps.values()))
        by_network = functools.partial(_by_network, prepared)
    programs: dict[str, Draw] = {}
    classifiers: dict[str, DigitJudge] = {}

    @functools.cache
    def reals() -> Spectrum:
        chosen = spread(len(open_images(config, split, augment=False)), NUM)
        return spectrum_of(open_split(config, split, chosen))

    def measure(model: Model, way: SampleOptions, folder: Path) -> Row:
        drawn = _program(programs, model, way)(model)
        row: Row = {name: getattr(way, name) for name in DIFFER}
        if digits:
            where = model.run.autoencoder
            if where not in classifiers:
                path = workdir / "classifier.npz"
                classifiers[where] = open_judge(model.first_stage, model.mesh, path)
            row |= _by_classifier(classifiers[where], model, drawn.images, drawn.labels)
        if by_network:
            row |= by_network(model, way, drawn.images, folder)
        row |= against(Spectrum.of(drawn.images), reals())
        if jax.process_index() == 0:
            save_grid(drawn.images[:SHOWN], folder / picture_name(row), SHOWN)
        return row

    return measure, reals


def _note_few(num: int, width: int) -> None:
    if num <= width and jax.process_index() == 0:
        print(
            f"note: a Fréchet distance of {num} images in {width} features measures their number "
            f"too: compare arms by it, and nothing else; from {width + 1} images on it is sound",
            file=sys.stderr,
        )


def spectrum_of(images: ImageStream) -> Spectrum:
    """Of all of them, a block in memory at a time."""
    read, found = images.open(READ), None
    for start in range(0, images.num, READ):
        part = Spectrum.of(read(np.arange(start, min(start + READ, images.num))))
        found = found.merge(part) if found else part
    assert found, f"no {images.name}"
    return found


def against(ours: Spectrum, reals: Spectrum) -> Row:
    """What a row says of a spectrum: itself and, of images of one size, figures against reals."""
    row: Row = {"frequency": ours.frequency.tolist(), "spectrum": ours.power.tolist()}
    if not np.array_equal(ours.modes, reals.modes):
        return row
    high = high_frequency_power(reals)
    ratio = {"high_frequency_ratio": high_frequency_power(ours) / high} if high else {}
    return {**ratio, "spectrum_distance": ours.distance(reals), **row}


def _program(programs: dict[str, Draw], model: Model, way: SampleOptions) -> Draw:
    """One compiled sampler for all models of an architecture; weights are what it is given."""
    guide = model.guide and dataclasses.replace(model.guide, workdir=Path(), params={})
    bare = dataclasses.replace(
        model,
        params={},
        first_stage=dataclasses.replace(model.first_stage, params={}),
        guide=guide,
    )
    options, run = dataclasses.replace(way, weights="auto", step=-1), model.run
    shown = [run.model, run.process, run.objective, run.loss, model.codec, model.latent_shape]
    shown += [model.first_stage.config, guide and guide.run, options]
    key = repr(shown)
    if key not in programs:
        programs[key] = compile_draw(bare, options)
    return programs[key]


def _by_classifier(
    judge: DigitJudge, model: Model, images: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    figures = sample_figures(judge, images, labels)
    if not conditional(model.run):
        del figures["sample_accuracy"]  # no class was asked for
    return figures


def _by_network(
    prepared: evaluation.Evaluation,
    model: Model,
    way: SampleOptions,
    images: np.ndarray,
    folder: Path,
) -> dict[str, float]:
    stream = ImageStream(
        len(images), lambda rows: images.__getitem__, "samples", digest_of([memoryview(images)])
    )
    return evaluation.evaluate(
        prepared,
        stream,
        folder / RESULTS,
        labels=judged.labels_kind(model.run, "balanced"),
        sampling=judged.sampling(check_options(way, model), model),
        record={"step": model.step},
    )
