"""Statistics of the means and of each measure of their spread, of a cache as it is stored."""

import dataclasses
import json

import numpy as np
import pytest

from ldm_jax.data.records import parts
from ldm_jax.data.records.reader import open_cache
from ldm_jax.models.latents import SPREADS, split_moments, standardisation
from tests.data.records.written import MOMENTS, write

LOGVAR = np.clip(MOMENTS[..., 5:].astype(np.float64), -30, 20)
WANT = {
    "mean": MOMENTS[..., :5].astype(np.float64),
    "logvar": LOGVAR,
    "std": np.exp(LOGVAR / 2),
    "var": np.exp(LOGVAR),
}


@pytest.fixture(scope="module")
def measured(cached):
    return parts.measure(open_cache(cached))


def test_statistics_are_those_of_what_is_stored_and_not_mirrored(measured):
    assert measured.keys() == WANT.keys()
    for name, x in WANT.items():
        np.testing.assert_allclose(measured[name].mean, x.mean((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(measured[name].std, x.std((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(measured[name].global_std, x.std(), rtol=1e-12)


def test_they_do_not_depend_on_how_many_examples_are_read_at_a_time(cached, measured, monkeypatch):
    monkeypatch.setattr(parts, "ROWS", 7)
    for name, part in parts.measure(open_cache(cached)).items():
        np.testing.assert_allclose(part.mean, measured[name].mean, rtol=1e-12)
        assert (part.low, part.high) == (measured[name].low, measured[name].high)


def test_quantiles_are_of_each_channel_to_a_bin(measured):
    x = np.random.default_rng(0).normal([-9, 3], [1, 0.01], (20_000, 2))
    low, high = parts._quantiles(parts._histogram(x))
    want = np.quantile(x, parts.QUANTILES, axis=0, method="inverted_cdf")
    bin_width = 50 / parts.BINS
    assert (np.abs(np.stack([low, high]) - want) <= bin_width).all()
    assert (low <= want[0]).all() and (high >= want[1]).all()
    assert measured["mean"].low == ()
    for name in ("logvar", "std", "var"):  # of so few values, the first and the last
        part, ends = measured[name], (WANT[name].min((0, 1, 2)), WANT[name].max((0, 1, 2)))
        np.testing.assert_allclose([part.low, part.high], ends, rtol=1e-3, atol=1e-3)


def test_log_variances_are_clamped_as_codecs_clamp_them(tmp_path, monkeypatch):
    far = MOMENTS * 20
    monkeypatch.setattr("tests.data.records.written.MOMENTS", far)
    write(tmp_path)
    mean, logvar = (np.asarray(x, np.float64) for x in split_moments(far))
    assert (logvar.min(), logvar.max()) == parts.LOGVAR
    measured = parts.measure(open_cache(tmp_path))
    np.testing.assert_allclose(measured["mean"].mean, mean.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(measured["logvar"].std, logvar.std((0, 1, 2)), rtol=1e-9)
    assert measured["logvar"].low == (-30.0,) * 5 and measured["logvar"].high == (20.0,) * 5


def test_every_half_is_encoded_to_mean_0_and_deviation_1(measured):
    for spread in SPREADS.values():
        white = standardisation(**vars(measured[spread.part]))
        z = np.asarray(white.whiten(np.asarray(spread.of(np.float32(LOGVAR)))), np.float64)
        np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=1e-5)
        np.testing.assert_allclose(z.std((0, 1, 2)), 1, atol=1e-5)


def test_what_is_kept_comes_back_and_is_of_its_cache_alone(own, measured):
    cache = open_cache(own)
    assert parts.load(cache) is None
    before = (own / "manifest.json").read_bytes()
    parts.save(cache, measured)
    assert parts.load(cache) == measured
    assert (own / "manifest.json").read_bytes() == before
    cache.manifest = dataclasses.replace(cache.manifest, dtype="bfloat16")
    assert parts.load(cache) is None
    kept = json.loads((own / parts.PARTS).read_text())
    for harm in ("", "[]", json.dumps(kept | {"parts": {"mean": {"mean": []}}})):
        (own / parts.PARTS).write_text(harm)
        assert parts.load(open_cache(own)) is None


def test_a_folder_that_cannot_be_written_keeps_nothing(own, measured, monkeypatch):
    def refuse(path, content):
        raise PermissionError(path)

    monkeypatch.setattr(parts, "write_json", refuse)
    parts.save(open_cache(own), measured)
    assert parts.load(open_cache(own)) is None
