import dataclasses

import pytest

from ldm_jax.data.records.manifest import Spec, load_manifest
from ldm_jax.errors import InputError
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
