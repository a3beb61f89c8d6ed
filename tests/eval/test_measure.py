"""What images are held against: measured once, resumed where it stopped, refused if another's."""

import dataclasses
import json

import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval import evaluation as image_evaluation
from ldm_jax.eval import judge as image_judge
from ldm_jax.eval import measure as image_reference
from ldm_jax.eval.evaluation import evaluate, prepare
from ldm_jax.eval.measure import open_set
from tests.judged import ADM, RANDOM, digits, images_of, judges, one_device  # noqa: F401

N = 48

pytestmark = pytest.mark.usefixtures("judges")


@pytest.fixture(scope="module")
def pictures():
    return digits(2 * N)


def test_a_reference_is_measured_once_for_what_is_asked_of_it(pictures, tmp_path):
    images, calls = images_of(pictures), []
    real = images_of(pictures[:N], "real")
    counted = dataclasses.replace(real, open=lambda rows: calls.append(rows) or real.open(rows))
    results, times = [], []
    for metrics in (("fid",), (), (), ("fid",), ("inception_score",)):
        settings = dataclasses.replace(ADM, metrics=metrics)
        evaluation = prepare(settings, mesh=one_device(), folder=tmp_path, num=2 * N, own=counted)
        results.append(evaluate(evaluation, images, tmp_path / "results.jsonl"))
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
    accumulate = image_reference.accumulate
    saving = lambda *a, **k: accumulate(*a, **k, save_every=1, save_seconds=0.0)  # noqa: E731
    monkeypatch.setattr(image_reference, "accumulate", saving)


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
        return prepare(RANDOM, mesh=one_device(), folder=folder, num=images.num, own=real)

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
    own = {"arr_0": pictures}
    np.savez(tmp_path / "set.npz", **own)
    settings = dataclasses.replace(ADM, preset="custom", extractor="inception")
    write = lambda settings, name: image_evaluation.write_statistics(  # noqa: E731
        settings, open_set(str(tmp_path / "set.npz")), mesh=one_device(), out=tmp_path / name
    )
    write(settings, "ours.npz")
    begin("ours.npz")  # the same network, resize and weights: the preset's name makes no odds
    with pytest.raises(InputError, match=r"was made with resize 'tf1_bilinear', but .* 'pil_bicu"):
        begin("ours.npz", preset="clean")
    read = image_judge.read_weights
    other = lambda name, file: read(name, file)._replace(digest="0" * 64)  # noqa: E731
    monkeypatch.setattr(image_judge, "read_weights", other)
    with pytest.raises(InputError, match=r"ours.npz was made with extractor_digest '.*', but"):
        begin("ours.npz")
    with pytest.raises(
        InputError, match=r"no metric can be had; 'fid': .* of 'quarters' or images"
    ):
        begin("ours.npz", RANDOM)
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".*"))  # nothing is left of making statistics
