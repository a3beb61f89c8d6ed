import dataclasses
import hashlib

import pytest

from ldm_jax.data.fields import Field
from ldm_jax.data.records.manifest import (
    Manifest,
    Spec,
    WrittenShard,
    load_manifest,
    load_spec,
    to_json,
)
from ldm_jax.errors import InputError
from tests.data import toy
from tests.data.records.written import spec


def test_manifest_comes_back_from_disk_as_it_was(cached):
    manifest = load_manifest(cached)
    assert {f.name: getattr(manifest, f.name) for f in dataclasses.fields(Spec)} == (
        dataclasses.asdict(spec())
    )
    assert dataclasses.replace(manifest, split="held_out").hash() != manifest.hash()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype 'float16' is unknown; choose one of"),
        ({"pack": 5}, "shard_examples 16 must divide by 5, .*pack.*nearest: 15"),
        ({"num_examples": 0}, "cache of 0 examples"),
    ],
)
def test_spec_refuses_what_cannot_be_written(changes, message):
    with pytest.raises(InputError, match=message):
        spec(**changes)


def test_text_without_further_fields_is_that_of_the_first_version():
    # Runs compare these digests when they resume.
    text = to_json(spec())
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "0716a697d0bf83e05103d266b0a7425c7e56940a1d01201b833863d51cb82a96"
    )
    assert spec().table == spec(fields=()).table
    values = {f.name: getattr(spec(), f.name) for f in dataclasses.fields(Spec)}
    shard = WrittenShard("x", 53, 9, "ef" * 32)
    manifest = Manifest(**values, mean=(0.5,) * 5, std=(1.25,) * 5, global_std=1.5, shards=(shard,))
    assert manifest.hash() == "c1f872039822eb8d6e308e47b42a38ca493a45584c055d1dea9d1c9af4b58c7c"


def test_further_fields_come_back_from_disk_as_they_were(tmp_path):
    rich = spec(fields=(toy.SEMANTIC, toy.CLIP))
    (tmp_path / "spec.json").write_text(to_json(rich))
    back = load_spec(tmp_path / "spec.json")
    assert back == rich and back.fields == (toy.SEMANTIC, toy.CLIP)
    assert [f.name for f in back.table] == ["moments", "label", "caption", "semantic", "clip"]
    assert [f.mirror for f in spec(mirrored=False, fields=back.fields).table] == [
        "none",
        "keep",
        "keep",
        "flip",
        "none",
    ]
    damaged = to_json(rich).replace('"shape"', '"size"')
    (tmp_path / "spec.json").write_text(damaged)
    with pytest.raises(InputError, match=r"is damaged .*size"):
        load_spec(tmp_path / "spec.json")


@pytest.mark.parametrize("name", ["label", "index", "moments_mirrored", "caption"])
def test_a_further_field_may_not_take_a_name(name):
    with pytest.raises(InputError, match=rf"the field '{name}' is there twice; rename one"):
        spec(fields=(Field(name, (), "int32"),))
