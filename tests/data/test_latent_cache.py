import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from ldm_jax.data import latent_cache
from ldm_jax.data.latent_cache import open_cache
from ldm_jax.data.latent_manifest import Spec, load_manifest, plan_shards
from ldm_jax.data.latent_writer import begin, finish, write_shard
from ldm_jax.data.order import Order
from ldm_jax.data.stream import batches
from ldm_jax.errors import InputError

N, PACK, SHARD, SHAPE = 53, 4, 16, (2, 3, 5)
_rng = np.random.default_rng(0)
MOMENTS = _rng.normal(0.3, 2.0, (N, 2, 3, 10)).astype(np.float32)
MIRRORED = MOMENTS[:, :, ::-1] + 1
LABELS = np.arange(N) % 7
CAPTIONS = np.array([f"Bild {i} " + "é" * (i % 5) for i in range(N)])


def spec(**changes):
    values = {
        "encoder_hash": "ab" * 32,
        "images": {"resolution": 16, "crop": "center"},
        "data_fingerprint": "cd" * 32,
        "split": "train",
        "latent_shape": SHAPE,
        "num_examples": N,
        "num_classes": 7,
        "class_names": tuple("abcdefg"),
        "has_captions": True,
        "pack": PACK,
        "shard_examples": SHARD,
    }
    return Spec(**{**values, **changes})


def encoded(shard, size=5):
    """The shard's examples, in batches that fit neither records nor shards."""
    for start in range(shard.start, shard.start + shard.num_examples, size):
        rows = np.arange(start, min(start + size, shard.start + shard.num_examples))
        yield {
            "moments": MOMENTS[rows],
            "moments_mirrored": MIRRORED[rows],
            "label": LABELS[rows],
            "index": rows,
            "caption": CAPTIONS[rows],
        }


def write(directory, size=5, **changes):
    for shard in begin(directory, spec(**changes)):
        write_shard(directory, spec(**changes), shard, encoded(shard, size))
    return finish(directory, spec(**changes))


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    write(directory)
    return directory


@pytest.fixture
def own(tmp_path):
    write(tmp_path / "cache")
    return tmp_path / "cache"


def test_read_gives_back_what_was_written(cached):
    cache = open_cache(cached, verify=True)
    indices = np.random.default_rng(1).permutation(N)
    batch = cache.read(indices, np.arange(N))
    np.testing.assert_array_equal(batch["moments"], MOMENTS[indices])
    np.testing.assert_array_equal(batch["label"], LABELS[indices])
    assert batch["caption"].tolist() == CAPTIONS[indices].tolist()
    assert batch["moments"].dtype == np.float32 and batch["label"].dtype == np.int32
    assert len(cache) == N


def test_records_stand_alone_in_their_file_as_random_reading_wants(cached):
    reader = ArrayRecordReader(str(cached / plan_shards(N, SHARD)[0].name))
    assert "group_size:1," in reader.writer_options_string() and reader.num_records() == 4
    reader.close()


def test_bfloat16_is_rounded_once_and_returned_as_f32(tmp_path):
    write(tmp_path, dtype="bfloat16")
    batch = open_cache(tmp_path).read(np.arange(N), np.arange(N), flip=False)
    rounded = MOMENTS.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(batch["moments"], rounded)
    assert not np.array_equal(rounded, MOMENTS) and batch["moments"].dtype == np.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_are_those_of_the_stored_posterior(tmp_path, dtype):
    manifest = write(tmp_path, dtype=dtype)
    stored = MOMENTS.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else MOMENTS
    mean, logvar = np.split(stored.astype(np.float64).reshape(-1, 10), 2, axis=1)
    variance = np.exp(logvar).mean(0) + mean.var(0)
    np.testing.assert_allclose(manifest.mean, mean.mean(0), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, np.sqrt(variance), rtol=1e-12)
    whole = np.sqrt(np.exp(logvar).mean() + mean.var())
    np.testing.assert_allclose(manifest.global_std, whole, rtol=1e-12)
    np.testing.assert_allclose(open_cache(tmp_path).manifest.std, manifest.std, rtol=0)


def test_flip_takes_mirrored_moments_by_position_alone(cached):
    cache = open_cache(cached)
    positions = np.arange(400)
    batch = cache.read(positions % N, positions, flip=True, seed=2)["moments"]
    mirrored = (batch == MIRRORED[positions % N]).all((1, 2, 3))
    plain = (batch == MOMENTS[positions % N]).all((1, 2, 3))
    assert (mirrored ^ plain).all() and 150 < mirrored.sum() < 250
    assert len(np.unique(mirrored[positions % N == 0])) == 2  # drawn anew each epoch
    some = np.array([399, 7, 260])
    part = cache.read(some % N, some, flip=True, seed=2)["moments"]
    np.testing.assert_array_equal(part, batch[some])
    other = cache.read(positions % N, positions, flip=True, seed=3)["moments"]
    assert not np.array_equal(other, batch)


def test_flip_is_refused_without_mirrored_moments(tmp_path):
    write(tmp_path, mirrored=False, has_captions=False)
    cache = open_cache(tmp_path)
    assert set(cache.read(np.arange(3), np.arange(3))) == {"moments", "label"}
    with pytest.raises(InputError, match=r"mirrored is False but flips are asked for"):
        cache.read(np.arange(3), np.arange(3), flip=True)


def test_order_of_a_cache_goes_by_its_records_and_feeds_the_stream(cached):
    cache = open_cache(cached)
    assert cache.order(4) == Order(N, 4, PACK, 64)
    stream = batches(cache.read, cache.order(4), 8, start_step=3)
    batch = next(stream)
    stream.close()
    np.testing.assert_array_equal(batch["moments"], MOMENTS[batch["index"]])


def test_few_records_are_kept_in_memory_and_reading_does_not_depend_on_it(cached, monkeypatch):
    cache = open_cache(cached)
    monkeypatch.setattr(latent_cache, "RECORD_BYTES_KEPT", 6000)
    for start in range(0, N, 7):
        rows = np.arange(start, min(start + 7, N))
        np.testing.assert_array_equal(cache.read(rows, rows)["moments"], MOMENTS[rows])
    kept = sum(a.nbytes for record in cache._kept.values() for a in record.values())
    assert 0 < kept == cache._bytes <= 6000


def test_shards_do_not_depend_on_the_writers_or_their_batches(cached, tmp_path):
    shards = begin(tmp_path, spec())
    assert shards == plan_shards(N, SHARD) and [s.num_examples for s in shards] == [16, 16, 16, 5]
    for process in (1, 0):  # the second process is first
        for shard in shards[process::2]:
            write_shard(tmp_path, spec(), shard, encoded(shard, size=16))
    finish(tmp_path, spec())
    for file in sorted(cached.iterdir()):
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name
    assert load_manifest(cached).hash() == load_manifest(tmp_path).hash()


def test_an_interrupted_cache_continues_and_equals_an_unbroken_one(cached, tmp_path):
    first, second, third, fourth = begin(tmp_path, spec())
    write_shard(tmp_path, spec(), first, encoded(first))
    write_shard(tmp_path, spec(), third, encoded(third))
    stamp = (tmp_path / third.name).stat().st_mtime_ns

    def dies():
        yield next(encoded(second))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, spec(), second, dies())
    assert not (tmp_path / second.name).exists()
    assert begin(tmp_path, spec()) == (second, fourth)
    with pytest.raises(
        InputError, match=r"is unfinished: it has no manifest\.json; run `ldm cache"
    ):
        open_cache(tmp_path)
    write(tmp_path)
    assert (tmp_path / third.name).stat().st_mtime_ns == stamp
    for file in sorted(cached.iterdir()):
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name
    assert begin(tmp_path, spec()) == ()
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in cached.iterdir()}


@pytest.mark.parametrize("harm", ["cut", "changed", "gone", "no note", "broken note"])
def test_a_damaged_shard_is_written_again(own, cached, harm):
    shard = plan_shards(N, SHARD)[1]
    path = own / shard.name
    data = path.read_bytes()
    if harm == "cut":
        path.write_bytes(data[:-7])
    elif harm == "changed":
        path.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    elif harm == "gone":
        path.unlink()
    elif harm == "no note":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text('{"name": ')
    assert begin(own, spec()) == (shard,)
    write(own)
    assert path.read_bytes() == data
    assert (own / "manifest.json").read_bytes() == (cached / "manifest.json").read_bytes()


@pytest.mark.parametrize("lost", ["manifest.json", "spec.json", "none"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype is 'float32' but this run would write 'bfloat16'"),
        ({"encoder_hash": "ef" * 32}, "encoder_hash is 'abab.*' but this run would write 'efef"),
        ({"latent_shape": (2, 3, 4)}, r"latent_shape is \(2, 3, 5\) but .* \(2, 3, 4\)"),
        ({"images": {"resolution": 32}}, "images is {.*'resolution': 16} but"),
    ],
)
def test_another_cache_is_never_overwritten(own, lost, changes, message):
    (own / lost).unlink(missing_ok=True)
    before = {f.name: f.read_bytes() for f in own.iterdir()}
    with pytest.raises(InputError, match=message + ".*; choose another --out"):
        begin(own, spec(**changes))
    assert {f.name: f.read_bytes() for f in own.iterdir()} == before


def test_open_cache_refuses_a_manifest_that_does_not_fit_naming_the_field(cached):
    fits = {"encoder_hash": "ab" * 32, "latent_shape": [2, 3, 5], "images": spec().images}
    open_cache(cached, expect=fits)
    message = "encoder_hash is 'abab.*' but the autoencoder given has 'efef.*'; use what made"
    with pytest.raises(InputError, match=message):
        open_cache(cached, expect={**fits, "encoder_hash": "ef" * 32})
    with pytest.raises(InputError, match=r"latent_shape is \(2, 3, 5\) but this run expects"):
        open_cache(cached, expect={**fits, "latent_shape": (2, 3, 4)})
    with pytest.raises(AssertionError, match=r"no field 'latent_shap'"):
        open_cache(cached, expect={"latent_shap": 1})


def test_open_cache_refuses_what_is_missing_short_or_changed(own):
    with pytest.raises(InputError, match=r"nowhere is not there.*run `ldm cache-latents`"):
        open_cache(own / "nowhere")
    path = own / plan_shards(N, SHARD)[2].name
    data = path.read_bytes()
    path.write_bytes(data[:800] + bytes([data[800] ^ 1]) + data[801:])
    open_cache(own)
    with pytest.raises(InputError, match=r"00002-of-00004.* has another sha256"):
        open_cache(own, verify=True)
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match=rf"00002.* has {len(data) - 1} bytes but .* {len(data)}"):
        open_cache(own)
    path.unlink()
    with pytest.raises(InputError, match=r"00002-of-00004.* is missing; run `ldm cache-latents`"):
        open_cache(own)


def test_read_names_a_damaged_or_exchanged_shard(own):
    first, second = (own / s.name for s in plan_shards(N, SHARD)[:2])
    data = second.read_bytes()
    second.write_bytes(data[:300] + bytes(len(data) - 300))
    with pytest.raises(InputError, match=r"record in latents-00001-of-00004.* cannot be read"):
        open_cache(own).read(np.arange(16, 32), np.arange(16))
    manifest = json.loads((own / "manifest.json").read_text())
    second.write_bytes(first.read_bytes())
    manifest["shards"][1]["num_bytes"] = len(first.read_bytes())
    (own / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"latents-00001.*it holds the examples \[0 1 2 3\]"):
        open_cache(own).read(np.array([16]), np.array([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is 2 but this program reads 1"),
        ({"surprise": 2}, "is damaged .*surprise"),
        ({"shards": []}, "the manifest's 0 shards are not those of 53 examples"),
    ],
)
def test_open_cache_refuses_a_strange_manifest(own, change, message):
    path = own / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        open_cache(own)
    path.write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json cannot be read"):
        open_cache(own)


def test_manifest_comes_back_from_disk_as_it_was(cached):
    manifest = load_manifest(cached)
    assert {f.name: getattr(manifest, f.name) for f in dataclasses.fields(Spec)} == (
        dataclasses.asdict(spec())
    )
    assert dataclasses.replace(manifest, split="held_out").hash() != manifest.hash()


def test_moments_that_are_not_finite_are_refused_and_leave_no_shard(tmp_path):
    shard = begin(tmp_path, spec())[1]

    def broken():
        for batch in encoded(shard):
            moments = batch["moments"].copy()
            moments[batch["index"] == 27, 0, 0, 0] = np.nan
            yield {**batch, "moments": moments}

    with pytest.raises(
        InputError, match=r"moments of example 27 are not finite.*check its weights"
    ):
        write_shard(tmp_path, spec(), shard, broken())
    assert shard in begin(tmp_path, spec())


def test_a_shard_with_other_examples_than_planned_is_a_defect(tmp_path):
    first, second, *_ = begin(tmp_path, spec())
    with pytest.raises(AssertionError, match=r"must come in order"):
        write_shard(tmp_path, spec(), first, encoded(second))
    with pytest.raises(AssertionError, match=r"got 5 examples"):
        write_shard(tmp_path, spec(), first, [next(encoded(first))])
    with pytest.raises(AssertionError, match=r"too early"):
        finish(tmp_path, spec())
    assert len(begin(tmp_path, spec())) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype 'float16' is unknown; choose one of"),
        ({"pack": 5}, "shard_examples 16 must divide by pack 5.*nearest: 15"),
        ({"num_examples": 0}, "cache of 0 examples"),
    ],
)
def test_spec_refuses_what_cannot_be_written(changes, message):
    with pytest.raises(InputError, match=message):
        spec(**changes)


def test_begin_refuses_an_address_it_cannot_rename_in():
    with pytest.raises(InputError, match=r"gs://bucket/x must be a local or mounted path"):
        begin("gs://bucket/x", spec())
