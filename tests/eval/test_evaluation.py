"""Sets of images by a frozen network: figures against those of features taken by hand."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from PIL import Image

from ldm_jax import cli
from ldm_jax.errors import InputError
from ldm_jax.eval import evaluation, frechet, inception_score, judge, kernel, neighbours
from ldm_jax.eval.evaluation import evaluate, prepare
from ldm_jax.eval.frechet import Moments
from ldm_jax.eval.image_sets import open_set
from ldm_jax.sharding import MeshConfig, make_mesh
from tests.judged import ADM, RANDOM, digits, features, images_of, judges, one_device, plain  # noqa: F401

N = 48

pytestmark = pytest.mark.usefixtures("judges")


@pytest.fixture(scope="module")
def pictures():
    return digits(2 * N)


@pytest.fixture(scope="module")
def halves(pictures, tmp_path_factory):
    """Both halves, as .npz and as folders, and statistics of the second by --stats-only."""
    root = tmp_path_factory.mktemp("halves")
    for name, part in (("first", pictures[:N]), ("second", pictures[N:])):
        np.savez(root / f"{name}.npz", arr_0=part)
        (root / name).mkdir()
        for i, picture in enumerate(part):
            Image.fromarray(picture).save(root / name / f"{i:03d}.png")
    images = [f"--images={root / 'second'}", f"--out={root / 'stats.npz'}"]
    cli.main(["evaluate", "--extractor=random-conv", "--stats-only", *images])
    np.savez(root / "adm.npz", **adm_like(pictures[:N], pictures[N:]))
    return root


def adm_like(measured, held):
    """Statistics of some images beside others, as ADM has those of all training images."""
    moments = Moments.of(features("inception", measured)["2048"])
    return {"mu": moments.mean, "sigma": moments.covariance, "arr_0": held}


def figures_of(path, reference, folder, settings=RANDOM, **change):
    settings = dataclasses.replace(settings, reference=str(reference), **change)
    images = open_set(str(path))
    prepared = prepare(settings, mesh=one_device(), folder=folder, num=images.num)
    return evaluate(prepared, images, folder / "results.jsonl")


def test_a_set_against_itself(halves, tmp_path):
    figures = figures_of(halves / "first", halves / "first", tmp_path)
    assert [name.split("-")[1] for name in figures] == ["custom"] * 5
    figures = plain(figures)
    assert figures.pop(f"frechet{N}") < 1e-9
    # Density counts the balls that a copy is in: its own, and the neighbours' that reach it.
    assert figures.pop(f"density{N}") >= 1
    assert figures == {f"{name}{N}": 1.0 for name in ("precision", "recall", "coverage")}


def test_figures_are_those_of_features_taken_by_hand(pictures, halves, tmp_path):
    ours = plain(figures_of(halves / "first.npz", halves / "second.npz", tmp_path))
    a, b = (features("random-conv", part)["quarters"] for part in np.split(pictures, 2))
    want = {"frechet": frechet.distance(Moments.of(a), Moments.of(b))}
    want |= dict(zip(("precision", "recall"), neighbours.precision_recall(b, a), strict=True))
    want |= dict(zip(("density", "coverage"), neighbours.density_coverage(b, a), strict=True))
    assert ours == pytest.approx({f"{k}{N}": v for k, v in want.items()}, rel=1e-4)
    assert want["frechet"] > 1e-3 and want["precision"] < 1


def test_kid_of_small_subsets_is_named_by_their_size(pictures, halves, tmp_path):
    files = halves / "first.npz", halves / "second.npz", tmp_path
    figures = figures_of(*files, metrics=("kid",), kid_subset_size=8)
    a, b = (features("random-conv", part)["quarters"] for part in np.split(pictures, 2))
    want = dict(zip((f"kid{N}", f"kid_std{N}"), kernel.kid(a, b, subset_size=8), strict=True))
    assert plain(figures) == pytest.approx(want, rel=1e-4)
    others = figures_of(*files[:2], tmp_path / "other", metrics=("kid",), kid_subset_size=9)
    assert not figures.keys() & others.keys()
    # Without a subset as large as the sets it is no longer left out.
    assert f"kid{N}" in plain(figures_of(*files[:2], tmp_path / "usual", kid_subset_size=8))


def test_statistics_folders_and_files_of_one_set_give_the_same(halves, tmp_path):
    by = {
        name: figures_of(halves / "first", halves / name, tmp_path, metrics=("fid",))
        for name in ("stats.npz", "second.npz", "second")
    }
    names, values = zip(
        *((n, v) for figures in by.values() for n, v in figures.items()), strict=True
    )
    assert len(set(values)) == 1 and len(set(names)) == 3  # a reference is part of the name
    all_of_it = plain(figures_of(halves / "first", halves / "stats.npz", tmp_path))
    assert list(all_of_it) == [f"frechet{N}"]  # all that statistics can give


def test_statistics_and_images_in_one_file_serve_each_its_metrics(pictures, halves, tmp_path):
    """As ADM's: the Gaussian of all training images, and some of them for the manifold."""
    figures = figures_of(halves / "first", halves / "adm.npz", tmp_path, ADM)
    a, b = (features("inception", part) for part in np.split(pictures, 2))
    assert {name.split("-")[1] for name in figures} == {"adm"}
    ours = plain(figures)
    assert ours.pop(f"fid{N}") < 1e-4  # the statistics are those of the images that are judged
    score = inception_score.inception_score_adm(a["logits_unbiased"])
    want = dict(zip((f"is{N}", f"is_std{N}"), score, strict=True))
    both = neighbours.precision_recall(b["2048"], a["2048"])
    want |= dict(zip((f"precision{N}", f"recall{N}"), both, strict=True))
    both = neighbours.density_coverage(b["2048"], a["2048"])
    want |= dict(zip((f"density{N}", f"coverage{N}"), both, strict=True))
    assert ours == pytest.approx(want, rel=1e-4)  # no sFID: the file has no mu_s
    # What else is measured is no part of a figure's name.
    alone = figures_of(halves / "first", halves / "adm.npz", tmp_path, ADM, metrics=("fid",))
    assert figures.items() >= alone.items()


def test_neighbours_are_by_the_second_network_where_a_preset_has_one(pictures, halves, tmp_path):
    settings = dataclasses.replace(ADM, preset="torch_fidelity")
    figures = figures_of(halves / "first", halves / "second", tmp_path, settings)
    a, b = (features("vgg16", part)["fc2_relu"] for part in np.split(pictures, 2))
    assert figures.keys() == {n for n in figures if "-torch_fidelity-" in n}
    ours = plain(figures)
    want = neighbours.precision_recall(b, a)
    assert (ours[f"precision{N}"], ours[f"recall{N}"]) == pytest.approx(want)
    a, b = (features("inception", part)["2048"] for part in np.split(pictures, 2))
    assert ours[f"fid{N}"] == pytest.approx(
        frechet.distance(Moments.of(a), Moments.of(b)), rel=1e-4
    )


def test_weights_that_nobody_published_are_named_so(pictures, tmp_path, monkeypatch):
    read = judge.read_weights

    def read_others(name, file):
        return read(name, file)._replace(published=name != "vgg16")

    monkeypatch.setattr(judge, "read_weights", read_others)
    settings = dataclasses.replace(
        ADM, preset="torch_fidelity", metrics=("fid", "precision_recall")
    )
    mesh, images = one_device(), images_of(pictures)
    prepared = prepare(settings, mesh=mesh, folder=tmp_path, num=images.num, reference=images)
    names = list(evaluate(prepared, images, tmp_path / "results.jsonl"))
    assert [name.split("-")[:2] for name in names] == [
        [f"{metric}{2 * N}", "custom"] for metric in ("frechet", "precision", "recall")
    ]


@pytest.mark.parametrize(("dataset", "model"), [("celebahq", "LDM-4"), ("imagenet", "LDM-4-G")])
def test_published_figures_are_printed_below_ours(halves, tmp_path, capsys, dataset, model):
    flags = [f"--reference={halves / 'second'}", "--preset=adm", f"--dataset={dataset}"]
    cli.main(["evaluate", f"--images={halves / 'first'}", f"--out={tmp_path / 'out'}", *flags])
    lines = capsys.readouterr().out.splitlines()
    marked = [line.startswith("published: ") for line in lines]
    ours = marked.index(True)
    assert marked == [False] * ours + [True] * (len(lines) - ours)
    assert lines[0].split()[0].startswith(f"fid{N}-adm-") and ours == 8
    assert any(line.startswith(f"published: {model} ") and "[arXiv" in line for line in lines)
    (line,) = map(json.loads, (tmp_path / "out" / "evaluation.jsonl").read_text().splitlines())
    assert len(line["figures"]) == ours


def test_an_inception_score_takes_no_reference(pictures, tmp_path):
    settings = dataclasses.replace(ADM, metrics=("inception_score",))
    images = images_of(pictures)
    prepared = prepare(settings, mesh=one_device(), folder=tmp_path, num=images.num)
    (score, _) = evaluate(prepared, images, tmp_path / "results.jsonl").values()
    want = inception_score.inception_score_adm(features("inception", pictures)["logits_unbiased"])
    assert score == pytest.approx(want[0], rel=1e-5)
    with pytest.raises(InputError, match="nothing to compare with; name it with --reference"):
        prepare(ADM, mesh=one_device(), folder=tmp_path, num=images.num)


def test_figures_do_not_depend_on_the_devices(pictures, tmp_path):
    images, real = images_of(pictures), images_of(pictures[:N], "real")
    for mesh in (one_device(), make_mesh(MeshConfig())):
        prepared = prepare(
            RANDOM, mesh=mesh, folder=tmp_path / f"{mesh.size}", num=2 * N, reference=real
        )
        figures = evaluate(prepared, images, tmp_path / f"{mesh.size}.jsonl")
        if mesh.size == 1:
            want = figures
    assert figures == pytest.approx(want, rel=1e-6)


def test_a_singular_covariance_is_refused_unless_allowed(pictures, tmp_path, monkeypatch):
    settings = dataclasses.replace(RANDOM, metrics=("fid",))
    few = dataclasses.replace(settings, allow_few=True)
    real = images_of(pictures)

    def begin(settings, num, reference):
        prepare(settings, mesh=one_device(), folder=tmp_path, num=num, reference=reference)

    with pytest.raises(InputError, match="what is judged: 6 images for 6 features"):
        begin(settings, 6, real)
    begin(settings, 7, real)
    begin(few, 6, real)
    with pytest.raises(InputError, match="the reference: 6 images for 6 features"):
        begin(settings, 7, images_of(pictures[:6]))
    infinite = dataclasses.replace(settings, metrics=("fid_infinity",))
    many = images_of(np.tile(pictures, (2, 1, 1, 1)))
    begin(infinite, 150, many)
    monkeypatch.setattr(evaluation, "smallest_part", lambda num: num // 25)
    with pytest.raises(
        InputError, match=r"smallest part that fid_infinity takes .* 6 images for 6"
    ):
        begin(infinite, 150, many)
    assert not list(tmp_path.iterdir())


def test_a_reference_is_measured_once_for_what_is_asked_of_it(pictures, tmp_path):
    images, calls = images_of(pictures), []
    real = images_of(pictures[:N], "real")
    counted = dataclasses.replace(real, open=lambda rows: calls.append(rows) or real.open(rows))
    results, times = [], []
    for metrics in (("fid",), (), (), ("fid",), ("inception_score",)):
        settings = dataclasses.replace(ADM, metrics=metrics)
        prepared = prepare(
            settings, mesh=one_device(), folder=tmp_path, num=2 * N, reference=counted
        )
        results.append(evaluate(prepared, images, tmp_path / "results.jsonl"))
        times.append(len(calls))
    assert times == [1, 2, 2, 2, 2]
    assert results[0] == results[3] and results[1] == results[2]
    assert results[1].items() >= {**results[0], **results[4]}.items()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["figures"] for line in lines] == results
    assert lines[0]["protocol"]["sampling"]["reference"] == real.digest


class Broken(Exception):
    pass


@pytest.fixture
def often(monkeypatch):
    """Every call's features are saved."""
    saving = functools.partial(evaluation.accumulate, save_every=1, save_seconds=0.0)
    monkeypatch.setattr(evaluation, "accumulate", saving)


@pytest.mark.usefixtures("often")
def test_a_stopped_evaluation_goes_on_bit_for_bit(pictures, tmp_path):
    images, real = images_of(pictures), images_of(pictures[::-1], "reversed")
    asked = []

    def stopping(after):
        def read(indices):
            if len(asked) == after:
                raise Broken
            asked.append(indices)
            return pictures[indices]

        return dataclasses.replace(images, open=lambda rows: read)

    def begin(folder):
        return prepare(RANDOM, mesh=one_device(), folder=folder, num=images.num, reference=real)

    want = evaluate(begin(tmp_path / "whole"), images, tmp_path / "whole.jsonl")
    with pytest.raises(Broken):
        evaluate(begin(tmp_path / "stopped"), stopping(3), tmp_path / "stopped.jsonl")
    assert len(asked) == 3 and not (tmp_path / "stopped.jsonl").exists()
    got = evaluate(begin(tmp_path / "stopped"), stopping(None), tmp_path / "stopped.jsonl")
    assert got == want
    np.testing.assert_array_equal(np.concatenate(asked), np.arange(len(pictures)))
    # The features are gone with the figures, the reference's stay for the next evaluation.
    (left,) = (tmp_path / "stopped").iterdir()
    assert left.name.startswith("reference-")


def test_a_reference_by_another_network_is_refused_before_any_work(pictures, tmp_path, monkeypatch):
    def begin(reference, settings=ADM, **change):
        change |= {"reference": str(tmp_path / reference)}
        settings = dataclasses.replace(settings, **change)
        prepare(settings, mesh=one_device(), folder=tmp_path / "x", num=2 * N)

    np.savez(tmp_path / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(InputError, match="'2048' has 7 features, but the samples' network has 6"):
        begin("wide.npz")
    with pytest.raises(InputError, match=r"'sfid': it takes .* statistics of 'spatial2023' or im"):
        begin("wide.npz", metrics=("fid", "sfid"))
    np.savez(tmp_path / "set.npz", arr_0=pictures)
    settings = dataclasses.replace(ADM, preset="custom", extractor="inception")
    pictures = open_set(str(tmp_path / "set.npz"))
    out = tmp_path / "ours.npz"
    evaluation.write_statistics(settings, pictures, mesh=one_device(), out=out)
    begin("ours.npz")  # the same network, resize and weights: the preset's name makes no odds
    with pytest.raises(InputError, match=r"was made with resize 'tf1_bilinear', but .* 'pil_bicu"):
        begin("ours.npz", preset="clean")
    read = judge.read_weights

    def read_others(name, file):
        return read(name, file)._replace(digest="0" * 64)

    monkeypatch.setattr(judge, "read_weights", read_others)
    with pytest.raises(InputError, match=r"ours.npz was made with extractor_digest '.*', but"):
        begin("ours.npz")
    with pytest.raises(
        InputError, match=r"no metric can be had; 'fid': .* of 'quarters' or images"
    ):
        begin("ours.npz", RANDOM)
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".*"))  # nothing is left of making statistics
