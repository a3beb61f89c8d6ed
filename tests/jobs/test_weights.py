"""`ldm weights`: converts what was published, refuses the rest, and leaves nothing half done."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from ldm_jax import cli, files
from ldm_jax.errors import InputError
from ldm_jax.interop import pretrained, published
from ldm_jax.jobs import weights
from tests import frozen
from tests.jobs.test_errors import refused


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache, empty; no proxy between the tests and this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache" / "ldm_jax" / "weights"


@pytest.fixture
def inception(tmp_path, monkeypatch):
    frozen.narrow(monkeypatch)
    path = tmp_path / "published.safetensors"
    save_file(frozen.fid_inception(), path)
    return path


def publish(monkeypatch, path, url=None):
    """Lets `path` be the published file of the Inception network."""
    part = published.Published(path.name, files.sha256(path), url or path.as_uri())
    monkeypatch.setitem(published.PUBLISHED, "inception", (part,))
    return part


def test_two_files_become_one_that_loads(tmp_path, capsys, cache):
    tensors = frozen.lpips()
    parts = [tmp_path / "vgg16.safetensors", tmp_path / "lin.safetensors"]
    save_file({n: t for n, t in tensors.items() if n.startswith("features")}, parts[0])
    save_file({n: t for n, t in tensors.items() if n.startswith("lin")}, parts[1])
    arguments = ["weights", "lpips", f"--from={parts[1]},{parts[0]}", "--unverified"]
    cli.main(arguments)
    out = cache / "lpips.safetensors"
    assert capsys.readouterr().out.strip() == str(out)
    params = pretrained.load("lpips")
    np.testing.assert_array_equal(params["lin4"], tensors["lin4.model.1.weight"].reshape(-1))
    before = out.read_bytes()
    assert "is there already" in refused(capsys, arguments)
    assert out.read_bytes() == before
    cli.main(
        ["weights", "lpips", f"--from={out}", "--unverified", f"--out={tmp_path}/a.safetensors"]
    )
    assert pretrained.load("lpips", f"{tmp_path}/a.safetensors").keys() == params.keys()


def test_another_file_is_refused_until_it_is_said(inception, capsys, cache):
    arguments = ["weights", "inception", f"--from={inception}"]
    line = refused(capsys, arguments)
    for words in (str(inception), files.sha256(inception)[:8], "6726825d", "--unverified"):
        assert words in line
    assert not cache.exists()
    cli.main([*arguments, "--unverified"])
    weights = pretrained.read("inception")
    assert (weights.digest, weights.published) == (files.sha256(inception), False)


def test_a_published_file_is_taken_and_its_digest_kept(inception, cache, monkeypatch):
    part = publish(monkeypatch, inception)
    path = weights.run("inception", [inception])
    with safe_open(path, "numpy") as file:
        assert file.metadata()["origin"] == f"{inception.name} sha256:{part.sha256}"
    assert pretrained.read("inception")[1:] == (part.sha256, True)
    assert inception.exists()


def test_without_files_the_published_ones_are_fetched(inception, cache, monkeypatch):
    publish(monkeypatch, inception)
    path = weights.run("inception")
    assert path == cache / "inception.safetensors"
    assert list(cache.iterdir()) == [path]


def test_a_fetched_file_is_not_fetched_again(inception, cache, monkeypatch):
    part = publish(monkeypatch, inception, "http://127.0.0.1:9/published.safetensors")
    cache.mkdir(parents=True)
    kept = cache / inception.name
    kept.write_bytes(inception.read_bytes()[:-4])
    with pytest.raises(InputError, match="cannot be fetched"):
        weights.fetch("inception", part, cache)
    kept.write_bytes(inception.read_bytes())
    assert weights.fetch("inception", part, cache) == kept


def test_a_download_that_differs_is_refused_and_removed(inception, cache, monkeypatch):
    publish(monkeypatch, inception)
    content = inception.read_bytes()
    inception.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"arrived with the sha256.*--from"):
        weights.run("inception")
    assert list(cache.iterdir()) == []


def test_without_a_network_the_url_and_the_way_around_it_are_named(
    inception, capsys, cache, monkeypatch
):
    url = "http://127.0.0.1:9/published.safetensors"
    publish(monkeypatch, inception, url)
    line = refused(capsys, ["weights", "inception"])
    for words in (url, "refused", "--from=published.safetensors"):
        assert words in line
    assert list(cache.iterdir()) == []


def test_wrong_arguments_are_refused_before_any_work(inception, capsys, tmp_path, cache):
    absent = tmp_path / "absent.safetensors"
    out = tmp_path / "out.npz"
    for arguments, words in (
        ([f"--from={absent}"], "absent.safetensors is no file"),
        ([f"--from={inception}", f"--out={out}"], "out.npz must end in .safetensors"),
        ([f"--from={tmp_path / 'weights.pkl'}"], "weights.pkl must be one of .safetensors"),
    ):
        assert words in refused(capsys, ["weights", "inception", *arguments])
    save_file({"fc.weight": np.zeros(1008, np.float32)}, absent)
    line = refused(capsys, ["weights", "inception", f"--from={absent}", "--unverified"])
    assert "absent.safetensors: " in line
    assert "missing" in line
    assert not cache.exists()
    assert not out.exists()


def test_files_without_a_known_digest_are_fetched_only_when_that_is_said(
    inception, capsys, cache, monkeypatch
):
    part = published.Published("unknown.safetensors", "", inception.as_uri())
    monkeypatch.setitem(published.PUBLISHED, "inception", (part,))
    for arguments in ([], [f"--from={inception}"]):
        line = refused(capsys, ["weights", "inception", *arguments])
        assert "is not known here" in line and "--unverified" in line
    assert not cache.exists()
    cli.main(["weights", "inception", "--unverified"])
    weights = pretrained.read("inception")
    assert (weights.digest, weights.published) == (files.sha256(inception), False)
    assert [path.name for path in cache.iterdir()] == ["inception.safetensors"]


def test_every_network_can_be_asked_for(capsys):
    line = refused(capsys, ["weights", "of-another"])
    for name in pretrained.NETWORKS:
        assert f"'{name}'" in line or name in line
