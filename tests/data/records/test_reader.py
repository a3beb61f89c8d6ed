import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from ldm_jax.data.order import Order
from ldm_jax.data.records import reader
from ldm_jax.data.records.manifest import plan_shards
from ldm_jax.data.records.reader import open_cache
from ldm_jax.data.stream import batches
from ldm_jax.errors import InputError
from tests.data import toy
from tests.data.records.written import (
    CAPTIONS,
    LABELS,
    MIRRORED,
    MOMENTS,
    PACK,
    SHARD,
    N,
    spec,
    write,
)


def test_read_gives_back_what_was_written(cached):
    cache = open_cache(cached, verify=True)
    indices = np.random.default_rng(1).permutation(N)
    batch = cache.read(indices, np.arange(N))
    np.testing.assert_array_equal(batch["moments"], MOMENTS[indices])
    np.testing.assert_array_equal(batch["label"], LABELS[indices])
    assert batch["caption"].tolist() == CAPTIONS[indices].tolist()
    assert batch["moments"].dtype == np.float32 and batch["label"].dtype == np.int32
    assert len(cache) == N


def test_bfloat16_is_rounded_once_and_returned_as_f32(tmp_path):
    write(tmp_path, dtype="bfloat16")
    batch = open_cache(tmp_path).read(np.arange(N), np.arange(N), flip=False)
    rounded = MOMENTS.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(batch["moments"], rounded)
    assert not np.array_equal(rounded, MOMENTS) and batch["moments"].dtype == np.float32


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
    with pytest.raises(InputError, match=r"has no mirrored moments but flips are asked for"):
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
    monkeypatch.setattr(reader, "RECORD_BYTES_KEPT", 6000)
    for start in range(0, N, 7):
        rows = np.arange(start, min(start + 7, N))
        np.testing.assert_array_equal(cache.read(rows, rows)["moments"], MOMENTS[rows])
    kept = sum(a.nbytes for record in cache._kept.values() for a in record.values())
    assert 0 < kept == cache._bytes <= 6000


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


FURTHER = (toy.SEMANTIC, toy.TOKENS, toy.EMBEDDING, toy.CLIP, toy.NOTE)


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """A cache with further fields, and their arrays."""
    examples = [toy.example(i, toy.RESOLUTION) for i in range(N)]
    names = [name for field in FURTHER for name in field.array_names]
    arrays = {name: np.stack([e[name] for e in examples]) for name in names}
    directory = tmp_path_factory.mktemp("rich")
    write(directory, arrays=arrays, fields=FURTHER)
    return directory, arrays


def test_further_fields_come_back_bit_for_bit_beside_what_there_always_was(rich, cached):
    directory, arrays = rich
    indices = np.random.default_rng(2).permutation(N)
    batch = open_cache(directory, verify=True).read(indices, np.arange(N))
    assert set(batch) == {"moments", "label", "caption", *(f.name for f in FURTHER)}
    for field in FURTHER:
        np.testing.assert_array_equal(batch[field.name], arrays[field.name][indices])
        assert batch[field.name].dtype == arrays[field.name].dtype
    plain = open_cache(cached).read(indices, np.arange(N))
    for name, values in plain.items():
        np.testing.assert_array_equal(batch[name], values)


def test_one_draw_mirrors_every_field_by_its_rule(rich):
    directory, arrays = rich
    positions = np.arange(200)
    rows = positions % N
    batch = open_cache(directory).read(rows, positions, flip=True, seed=2)
    flips = (batch["moments"] == MIRRORED[rows]).all((1, 2, 3))
    assert 60 < flips.sum() < 140
    np.testing.assert_array_equal(
        batch["semantic"][flips], arrays["semantic"][rows][flips, :, ::-1]
    )
    np.testing.assert_array_equal(batch["semantic"][~flips], arrays["semantic"][rows][~flips])
    np.testing.assert_array_equal(batch["clip"][:, 0] < 0, flips)
    np.testing.assert_array_equal(np.strings.startswith(batch["note"], "right"), flips)
    for name in ("tokens", "embedding"):
        np.testing.assert_array_equal(batch[name], arrays[name][rows])
    some = np.array([199, 3, 60])
    part = open_cache(directory).read(some % N, some, flip=True, seed=2)
    for name, values in part.items():
        np.testing.assert_array_equal(values, batch[name][some])


def test_flips_are_refused_where_a_stored_copy_was_left_out(rich, tmp_path):
    write(tmp_path, arrays=rich[1], fields=FURTHER, mirrored=False)
    cache = open_cache(tmp_path)
    assert cache.read(np.arange(3), np.arange(3))["clip"].tolist() == [[i] * 4 for i in range(3)]
    with pytest.raises(InputError, match=r"no mirrored moments, clip, note but flips"):
        cache.read(np.arange(3), np.arange(3), flip=True)


def test_a_record_that_lacks_a_field_is_damaged(rich, tmp_path):
    shutil.copytree(rich[0], tmp_path / "cache")
    path = tmp_path / "cache" / "manifest.json"
    raw = json.loads(path.read_text())
    for change, message in (
        ({"name": "depth"}, r"cannot be read \('depth.*run `ldm cache-latents`"),
        ({"shape": [4, 16]}, r"semantic has shape \(4, 8, 8\), the field \(4, 16\)"),
    ):
        fields = [{**raw["fields"][0], **change}, *raw["fields"][1:]]
        path.write_text(json.dumps({**raw, "fields": fields}))
        with pytest.raises(InputError, match=message):
            open_cache(tmp_path / "cache").read(np.arange(2), np.arange(2))
