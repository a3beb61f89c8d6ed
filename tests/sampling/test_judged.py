"""Samples drawn to be measured: image i is `ldm sample`'s, whatever the batches and the stops."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ldm_jax.errors import InputError
from ldm_jax.eval import evaluation
from ldm_jax.models import denoiser
from ldm_jax.runs.denoiser import Guide
from ldm_jax.sampling import judged
from ldm_jax.sampling.draw import draw_images
from ldm_jax.sampling.inputs import class_labels, label_table
from ldm_jax.sampling.judged import compile_samples, prepare_figures, reference_of, sampling
from ldm_jax.sampling.options import SampleOptions
from tests.judged import RANDOM, digits, images_of, judges  # noqa: F401
from tests.sampling.quick import BAD, model_of, network, quick  # noqa: F401

pytestmark = pytest.mark.usefixtures("judges")
NUM = 20
SETTINGS = SampleOptions(num=NUM, steps=2, guidance=2.0, batch_size=8, seed=3)


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def drawn(model):
    """Of `ldm sample`; made while the quick model stands in."""
    with pytest.MonkeyPatch.context() as patch:
        quick.__wrapped__(patch)
        return draw_images(model, SETTINGS)[0]


def read_all(images, size=8):
    read = images.open(size)
    rows = [np.arange(at, min(at + images.rows, images.num)) for at in range(0, NUM, images.rows)]
    return np.concatenate([read(part) for part in rows])


@pytest.mark.parametrize("size", [8, 5])
def test_samples_are_those_of_ldm_sample_in_any_batches(model, drawn, size):
    settings = dataclasses.replace(SETTINGS, batch_size=size)
    images = compile_samples(model, settings, "balanced")(model, None)
    assert (images.num, images.rows) == (NUM, size)
    np.testing.assert_array_equal(read_all(images), drawn)
    assert images.open(size)(np.arange(0)).shape == (0, *drawn.shape[1:])
    # Any of them alone, as another process draws it.
    np.testing.assert_array_equal(images.open(size)(np.arange(17, 20)), drawn[17:])
    assert len(np.unique(drawn, axis=0)) == NUM


def test_labels_are_those_of_the_tables(model, monkeypatch):
    """The model writes its label into its samples."""

    def shown(config, params, z_t, t, cond):
        return 0 * z_t + (0.3 * cond["label"][:, None, None, None] if cond else 0)

    monkeypatch.setattr(denoiser, "apply", shown)
    settings = dataclasses.replace(SETTINGS, classes=(1, 4, 2), guidance=1.0)
    seen = {}
    for kind in ("balanced", "random"):
        images = compile_samples(model, settings, kind)(model, None)
        seen[kind] = read_all(images)[:, 0, 0, 0].astype(int)

    def shade(classes):
        return 140 + 19 * np.asarray(classes)

    drawn = class_labels("random", SETTINGS.seed, np.arange(NUM), 3)
    np.testing.assert_allclose(seen["random"], shade((1, 4, 2))[drawn], atol=9)
    want = [1, 4, 2] * 6 + [1, 4]
    np.testing.assert_allclose(seen["balanced"], shade(want), atol=9)
    assert label_table(SampleOptions(), "random")(np.arange(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["balanced", "random"])
def test_label_of_a_sample_depends_on_seed_and_index_alone(kind):
    whole = class_labels(kind, 3, np.arange(5000), 10)
    some = np.array([4999, 17, 4096, 0, 17])
    np.testing.assert_array_equal(class_labels(kind, 3, some, 10), whole[some])
    assert whole.dtype == np.int64 and whole.min() == 0 and whole.max() == 9
    assert len(class_labels(kind, 3, some[:0], 10)) == 0


def test_balanced_labels_are_even_in_any_run_and_random_ones_are_not():
    even = np.bincount(class_labels("balanced", 0, np.arange(13, 1018), 10))
    assert even.max() - even.min() <= 1
    drawn = class_labels("random", 0, np.arange(10_000), 10)
    counts = np.bincount(drawn)
    assert 20 < counts.std() < 60  # 30 for independent draws
    assert np.mean(drawn[1:] == drawn[:-1]) == pytest.approx(0.1, abs=0.01)
    assert (drawn != class_labels("random", 1, np.arange(10_000), 10)).mean() > 0.8


def test_labels_without_classes_are_refused():
    with pytest.raises(InputError, match="labels 'none' is unknown"):
        class_labels("none", 0, np.arange(3), 10)
    with pytest.raises(InputError, match="num_classes 0"):
        class_labels("random", 0, np.arange(3), 0)


@pytest.mark.parametrize(
    ("change", "labels", "words"),
    [
        ({}, "sorted", "labels 'sorted' is unknown"),
        ({"noise": "noise.npy"}, "balanced", "noise 'noise.npy' is of `ldm sample`"),
        ({"init_images": "x", "strength": 0.5}, "balanced", "init_images 'x' is of `ldm sample`"),
        ({"sampler": "dice"}, "balanced", "sampler 'dice' is unknown"),
        ({"classes": (10,)}, "balanced", "class 10 is unknown"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, change, labels, words):
    with pytest.raises(InputError, match=words):
        compile_samples(model, dataclasses.replace(SETTINGS, **change), labels)


@pytest.fixture
def run(model, monkeypatch, tmp_path):
    """(model, judge, labels, keep, changes of the options) -> figures, by a workdir's folder."""
    real = images_of(digits(30))
    monkeypatch.setattr(judged, "reference_of", lambda judge, stage: real)

    def run(of=model, judge=RANDOM, labels="balanced", keep=None, **change):
        options = dataclasses.replace(SETTINGS, **change)
        return prepare_figures(of, options, judge, tmp_path, labels=labels, keep=keep)[0](of)

    return run


def test_figures_are_those_of_the_images_of_ldm_sample(run, model, drawn, tmp_path):
    figures = run()
    images = images_of(drawn)
    prepared = evaluation.prepare(
        RANDOM, mesh=model.mesh, folder=tmp_path / "set", num=NUM, reference=images_of(digits(30))
    )
    want = evaluation.evaluate(prepared, images, tmp_path / "set.jsonl")
    assert list(figures.values()) == list(want.values())
    assert run(batch_size=5) == figures


def test_what_changes_a_sample_changes_the_name_and_weights_do_not(run, model, monkeypatch):
    """Whatever is drawn: here it is always the same."""

    def same(model, options, labels):
        return lambda model, keep: images_of(digits(options.num))

    monkeypatch.setattr(judged, "compile_samples", same)
    first = run()
    changes = ({"guidance": 3.0}, {"steps": 3}, {"seed": 4}, {"num": 21}, {"sampler": "euler"})
    changes += ({"classes": (1, 2)}, {"eta": 0.5}, {"labels": "random"})
    named = [set(first)] + [set(run(**change)) for change in changes]
    named.append(set(run(dataclasses.replace(model, which="params"))))
    assert all(not a & b for i, a in enumerate(named) for b in named[:i])
    assert run(dataclasses.replace(model, params=BAD, step=9)) == first
    assert run(judge=dataclasses.replace(RANDOM, allow_few=True)) == first
    assert run(batch_size=5) == first


def test_the_line_names_step_weights_and_protocol(run, model, tmp_path):
    figures = run()
    (line,) = map(json.loads, (tmp_path / "evaluation.jsonl").read_text().splitlines())
    assert line["figures"] == figures and line["step"] == 6
    assert line["images"].startswith("ema of step 6, weights ")
    protocol = line["protocol"]
    assert (protocol["num"], protocol["labels"]) == (NUM, "balanced")
    how = {"sampler": "ddim", "steps": 2, "guidance": 2, "seed": 3, "weights": "ema"}
    assert protocol["sampling"].items() >= how.items()
    assert not {"batch_size", "step"} & protocol["sampling"].keys()


def test_a_guide_is_named_by_the_checkpoint_that_was_found(model):
    settings = dataclasses.replace(SETTINGS, guide_weights="params")
    guide = Guide(None, model.run, BAD, 4, "params")
    led = sampling(settings, dataclasses.replace(model, guide=guide))
    assert (led["guide_step"], led["guide_weights"]) == (4, "params")
    assert "guide_step" not in sampling(SETTINGS, model)


class Broken(Exception):
    pass


@pytest.fixture
def stop(monkeypatch):
    """stop(n) breaks the measuring after n more calls; gives the indices of all samples."""
    accumulate, drawn, left = evaluation.accumulate, [], []

    def saving(folder, protocol, measure, rows, **options):
        def call(indices):
            if protocol.labels != "none" and left:  # samples, no reference
                left[0] -= 1
                if left[0] < 0:
                    left.clear()
                    raise Broken
            if protocol.labels != "none":
                drawn.extend(indices.tolist())
            return measure(indices)

        return accumulate(folder, protocol, call, rows, **options, save_every=1, save_seconds=0.0)

    def stop(calls):
        left[:] = [calls]
        return drawn

    monkeypatch.setattr(evaluation, "accumulate", saving)
    return stop


def test_a_stopped_evaluation_draws_nothing_again(run, stop, tmp_path):
    drawn = stop(2)
    with pytest.raises(Broken):
        run()
    assert drawn == list(range(16))
    figures = run()
    assert drawn == list(range(NUM))
    (tmp_path / "evaluation.jsonl").unlink()
    assert run() == figures
    assert drawn == 2 * list(range(NUM))  # nothing was left of the first one


def test_samples_of_other_weights_are_never_joined(run, stop, model):
    other = dataclasses.replace(model, params=BAD)  # of the same step
    want, of_other = run(), run(other)
    assert want != of_other
    drawn = stop(2)
    with pytest.raises(Broken):
        run()
    del drawn[:]
    assert run(other) == of_other and drawn == list(range(NUM))
    stage = dataclasses.replace(model.first_stage, params={"decoder": jnp.ones(2)})
    run(dataclasses.replace(model, first_stage=stage))
    assert drawn == 2 * list(range(NUM))
    assert run() == want and drawn == [*range(NUM), *range(NUM), *range(16, NUM)]


def pngs(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def test_what_was_measured_is_kept_where_it_is_asked_for(run, stop, drawn, tmp_path):
    keep = tmp_path / "samples"
    stop(1)
    with pytest.raises(Broken):
        run()  # with nothing kept: the next one begins anew
    stop(2)
    with pytest.raises(Broken):
        run(keep=keep)
    assert len(list(keep.iterdir())) == 16
    figures = run(keep=keep)
    assert [path.name for path in sorted(keep.iterdir())] == [f"{i:06d}.png" for i in range(NUM)]
    np.testing.assert_array_equal(pngs(keep), drawn)
    with pytest.raises(InputError, match=r"keep .*samples must be a new or an empty folder"):
        run(keep=keep)
    assert run() == figures


def test_images_of_the_run_are_opened_only_where_they_are_the_reference(model):
    gone = dataclasses.replace(model.first_stage.run.images, source="folder", path="/absent")
    stage = dataclasses.replace(
        model.first_stage, run=dataclasses.replace(model.first_stage.run, images=gone)
    )
    assert reference_of(dataclasses.replace(RANDOM, reference="x.npz"), stage) is None
    with pytest.raises(InputError, match="/absent"):
        reference_of(RANDOM, stage)
    own = reference_of(RANDOM, model.first_stage)
    assert own.num > 100 and own.open(4)(np.arange(3, 5)).shape == (2, 16, 16, 3)
    assert own.open(4)(np.arange(0)).shape == (0, 16, 16, 3)
    assert own.digest != reference_of(RANDOM, model_of_8(model).first_stage).digest


def model_of_8(model):
    """Its images of another resolution."""
    run = model.first_stage.run
    small = dataclasses.replace(
        run,
        images=dataclasses.replace(run.images, resolution=8),
        model=dataclasses.replace(run.model, resolution=8),
    )
    return dataclasses.replace(model, first_stage=dataclasses.replace(model.first_stage, run=small))
