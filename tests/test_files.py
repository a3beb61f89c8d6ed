import hashlib
import json

import ml_dtypes
import numpy as np
import pytest

from ldm_jax import files
from ldm_jax.errors import InputError


def writers():
    return {
        "bytes": (files.write_bytes, b"new"),
        "text": (files.write_text, "new é"),
        "json": (files.write_json, {"a": [1, 2.5]}),
        "npz": (files.write_npz, {"a": np.arange(3), "b/c": np.eye(2)}),
    }


def read(kind, path):
    match kind:
        case "bytes":
            return path.read_bytes()
        case "text":
            return path.read_text()
        case "json":
            return files.read_json(path)
    return {name: array.tolist() for name, array in files.read_npz(path).items()}


@pytest.mark.parametrize("kind", writers())
def test_what_is_written_comes_back(tmp_path, kind):
    write, content = writers()[kind]
    write(tmp_path / "new folder" / "file", content)
    want = {k: a.tolist() for k, a in content.items()} if kind == "npz" else content
    assert read(kind, tmp_path / "new folder" / "file") == want


@pytest.mark.parametrize("kind", writers())
def test_file_is_replaced_in_one_move(tmp_path, monkeypatch, kind):
    """Killed between writing and renaming, the old file stands whole."""
    write, content = writers()[kind]
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def killed(self, target):
        assert target == path and self.stat().st_size > 0
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(path, content)
    assert path.read_bytes() == b"old"
    write(path, content)
    assert path.read_bytes() != b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_file_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    events = []
    fsync, replace = files.os.fsync, files.Path.replace

    def synced(number):
        events.append(("fsync", files.os.fstat(number).st_size))
        fsync(number)

    def replaced(self, target):
        events.append(("replace", self.stat().st_size))
        return replace(self, target)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.Path, "replace", replaced)
    files.write_bytes(tmp_path / "file", b"four")
    assert events == [("fsync", 4), ("replace", 4)]


def test_old_file_stays_whole_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def broken(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, broken)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_written_file_is_as_readable_as_any_other(tmp_path):
    files.write_bytes(tmp_path / "ours", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_damaged_json_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json is damaged .*; put back a copy"):
        files.read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match=r"x\.json is damaged .*; run it again"):
        files.read_json(tmp_path / "x.json", "run it again")


def test_digest_of_a_file_is_sha256_and_a_missing_one_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert files.sha256(tmp_path / "file") == files.digest("abc") == files.digest(b"abc") == want
    assert files.digest_of(["a", b"b", "c"]) == want
    with pytest.raises(InputError, match="none does not exist"):
        files.sha256(tmp_path / "none")
    with pytest.raises(InputError, match="is a folder"):
        files.sha256(tmp_path)


def test_digest_of_json_is_of_values_and_not_of_their_order():
    value = {"b": [1, "é"], "a": 0.5}
    text = json.dumps(value, sort_keys=True)
    assert text.startswith('{"a": 0.5, "b": [1')
    assert files.digest_json(value) == hashlib.sha256(text.encode()).hexdigest()
    assert files.digest_json(dict(reversed(value.items()))) == files.digest_json(value)


def test_digest_of_arrays_is_of_names_types_shapes_and_values():
    arrays = {"b": np.arange(6.0).reshape(2, 3), "a": np.zeros(2, np.float32)}
    text = b"head" + b"a <f4 (2,)" + bytes(8) + b"b <f8 (2, 3)" + arrays["b"].tobytes()
    found = files.digest_arrays(arrays, "head")
    assert found == hashlib.sha256(text).hexdigest()
    assert files.digest_arrays(dict(reversed(arrays.items())), "head") == found
    turned = arrays | {"b": np.asfortranarray(arrays["b"])}
    assert files.digest_arrays(turned, "head") == found
    half = np.zeros(2, ml_dtypes.bfloat16)
    changes = ({"b": arrays["b"].T}, {"a": np.zeros(2, "i4")}, {"a": half}, {"c": np.zeros(1)})
    others = [files.digest_arrays(arrays | change, "head") for change in changes]
    assert len({found, files.digest_arrays(arrays), *others}) == 6
