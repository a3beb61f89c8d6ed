import ml_dtypes
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from ldm_jax.data.fields import Field
from ldm_jax.data.records.manifest import load_manifest, plan_shards
from ldm_jax.data.records.reader import open_cache
from ldm_jax.data.records.writer import begin, finish, write_shard
from ldm_jax.errors import InputError
from tests.data.records.written import MOMENTS, SHARD, N, encoded, spec, write


def test_records_stand_alone_in_their_file_as_random_reading_wants(cached):
    reader = ArrayRecordReader(str(cached / plan_shards(N, SHARD)[0].name))
    assert "group_size:1," in reader.writer_options_string() and reader.num_records() == 4
    reader.close()


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


def test_begin_refuses_an_address_it_cannot_rename_in():
    with pytest.raises(InputError, match=r"gs://bucket/x must be a local or mounted path"):
        begin("gs://bucket/x", spec())


def test_further_fields_are_checked_and_named_with_their_example(tmp_path):
    fields = (Field("embedding", (2,), "float32"),)
    good = np.random.default_rng(0).normal(size=(N, 2)).astype(np.float32)
    broken = good.copy()
    broken[6, 1] = np.inf
    for values, message in (
        (broken, r"embedding of example 6 are not finite; mend the example"),
        (good[:, :1], r"embedding of example 0 is float32 \(1,\) but the field is float32 \(2,\)"),
        (good.astype(str), r"embedding of example 0 is <U32 .* but the field is float32"),
    ):
        with pytest.raises(InputError, match=message):
            write(tmp_path, arrays={"embedding": values}, fields=fields)
    with pytest.raises(InputError, match=r"embedding of example 0 is missing"):
        write(tmp_path, fields=fields)
    with pytest.raises(InputError, match=r"fields is .*'name': 'embedding'.* would write \(\)"):
        begin(tmp_path, spec())
    write(tmp_path, arrays={"embedding": good}, fields=fields)
