import dataclasses
import os
import pickle
import resource
import struct
import zipfile

import numpy as np
import pytest

from ldm_jax import files
from ldm_jax.errors import InputError
from ldm_jax.eval import frechet, image_sets, protocol, references
from ldm_jax.eval.frechet import Moments

MADE = references.Made(
    extractor="random_conv",
    extractor_digest="0" * 64,
    resize="none",
    quantiser="round",
    dataset="digits",
)


def gaussian(dim, seed=0, dtype=np.float64):
    x = np.random.default_rng(seed).normal(size=(4 * dim, dim))
    return x.mean(0).astype(dtype), np.cov(x, rowvar=False).astype(dtype)


def refused(match, call, *arguments, **options):
    with pytest.raises(InputError, match=match) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)


def save_pickle(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("names", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_of_other_tools_are_read(tmp_path, names, dtype):
    mu, sigma = gaussian(6, dtype=dtype)
    np.savez(tmp_path / "stats.npz", **{names[0]: mu, names[1]: sigma})
    found = references.load(tmp_path / "stats.npz")
    assert found.sha256 == files.sha256(tmp_path / "stats.npz") and found.num == 0
    one = found.gaussian("2048", 6)
    assert one.mean.dtype == one.covariance.dtype == np.float64
    np.testing.assert_array_equal(one.mean, mu)
    np.testing.assert_array_equal(one.covariance, sigma)
    refused("not of 'spatial2023'", found.gaussian, "spatial2023")
    refused("has 6 features, but the samples' network has 7", found.gaussian, "2048", 7)


def test_adm_file_has_both_statistics_and_its_images(tmp_path):
    (mu, sigma), (mu_s, sigma_s) = gaussian(5), gaussian(3, 1)
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 6, 3), dtype=np.uint8)
    path = tmp_path / "VIRTUAL_labeled.npz"
    arrays = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    np.savez(path, images, np.arange(9), **arrays)
    found = references.load(path)
    np.testing.assert_array_equal(found.gaussian("spatial2023", 3).covariance, sigma_s)
    np.testing.assert_array_equal(found.gaussian("2048", 5).mean, mu)
    pictures = image_sets.open_set(path)
    assert pictures.num == 9 and pictures.digest == found.sha256
    read = pictures.open(4)
    parts = [read(np.arange(2, 6)), read(np.arange(6, 8))]
    np.testing.assert_array_equal(np.concatenate(parts), images[2:8])


@pytest.mark.parametrize("number", [2, 4, 5])
def test_edm2_pickle_is_read_without_running_it(tmp_path, number):
    (mu, sigma), (mu_d, sigma_d) = gaussian(5), gaussian(3, 1)
    content = {
        "num_images": 50_000,
        "fid": {"mu": mu, "sigma": np.asfortranarray(sigma)},
        "fd_dinov2": {"mu": mu_d, "sigma": sigma_d},
    }
    found = references.load(save_pickle(tmp_path / "stats.pkl", content, number))
    assert found.num == 50_000
    np.testing.assert_array_equal(found.gaussian("2048").covariance, sigma)
    np.testing.assert_array_equal(found.gaussian("cls").mean, mu_d)


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_pickle_that_runs_something_is_refused_and_does_not_run(tmp_path):
    path, mark = tmp_path / "stats.pkl", tmp_path / "ran"
    for payload in (Payload(os.system, f"touch {mark}"), Payload(open, str(mark), "w")):
        save_pickle(path, {"fid": payload})
        refused("only NumPy arrays are read", references.load, path)
    # Names that arrays are written with, put to other uses.
    dtype = np.dtype("f8")
    for payload in (
        Payload(np.ndarray, (1 << 40,), dtype),
        Payload(np._core.multiarray._reconstruct, np.ndarray, (1 << 40,), b"b"),
        np.array([{"an": "object"}], object),
        np.array(["text"]),
    ):
        save_pickle(path, {"fid": {"mu": payload, "sigma": payload}})
        refused("stats.pkl", references.load, path)
    assert not mark.exists()
    path.write_bytes(pickle.dumps({"fid": gaussian(3)[0]})[:-20])
    refused("no pickle of plain arrays", references.load, path)
    # A string of an exabyte, in eleven bytes.
    path.write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".")
    refused("no pickle of plain arrays", references.load, path)


@pytest.mark.parametrize(
    "mu, sigma, match",
    [
        (np.zeros(3), np.eye(4), "the rule is floats"),
        (np.zeros((3, 1)), np.eye(3), "the rule is floats"),
        (np.zeros(3, int), np.eye(3), "the rule is floats"),
        (np.array([0, np.nan, 0]), np.eye(3), "not finite"),
        (np.zeros(3), np.eye(3) + np.triu(np.full((3, 3), 1e-3), 1), "not symmetric"),
        (np.zeros(3), np.diag([1, 1, -0.01]), "negative eigenvalue -0.01"),
        (np.zeros(3), -np.eye(3), "negative eigenvalue"),
    ],
)
def test_what_cannot_be_statistics_is_refused(tmp_path, mu, sigma, match):
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    refused(match, references.load, tmp_path / "stats.npz")


def test_rounding_of_f32_is_no_reason_to_refuse(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 40)).astype(np.float32)
    np.savez(tmp_path / "stats.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False).astype("f4"))
    references.load(tmp_path / "stats.npz")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "stats.npz"
    refused("does not exist", references.load, path)
    refused("is a folder", references.load, tmp_path)
    np.savez(path, arr_0=np.zeros((2, 2, 2, 3), np.uint8))
    refused("holds no statistics", references.load, path)
    np.savez(path, mu=np.zeros(3), sigma=np.array([object()]))
    refused("not a whole .npz file of plain arrays", references.load, path)
    path.write_bytes(path.read_bytes()[:-30])
    refused("not a whole .npz", references.load, path)


def lie(path, shape, descr="<f8", data=b"", pad=0):
    """An .npz whose header promises `shape`."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}{' ' * pad}\n"
    header = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text.encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("mu.npy", "sigma.npy", "arr_0.npy"):
            archive.writestr(name, header + data)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (1 << 36,)},
        {"shape": (5,), "data": bytes(41)},
        {"shape": (1,), "descr": "|O", "data": bytes(8)},
        {"shape": (1,), "data": bytes(8), "pad": 1 << 20},
    ],
    ids=["too little", "too much", "objects", "endless header"],
)
def test_lying_headers_are_refused_before_anything_is_allocated(tmp_path, options):
    path = lie(tmp_path / "liar.npz", **options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused("not a whole .npz", references.load, path)
    refused("not a whole .npz", image_sets.open_set, path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_honest_headers_of_absurd_sizes_are_refused(tmp_path, monkeypatch):
    path = lie(tmp_path / "wide.npz", (20_000,), data=bytes(160_000))
    refused("at most 16384", references.load, path)
    monkeypatch.setattr(image_sets, "MAX_PIXELS", 90_000)
    path = lie(tmp_path / "vast.npz", (1, 900, 900, 3), "|u1", bytes(2_430_000))
    refused("810000 pixels an image", image_sets.open_set, path)


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "stats.npz"
    mu, sigma = gaussian(16)
    np.savez(path, mu=mu, sigma=sigma)
    content = bytearray(path.read_bytes())
    content[content.index(sigma.tobytes()) + 5] ^= 1
    path.write_bytes(content)
    refused("Bad CRC-32", references.load, path)


def test_our_own_file_is_read_back_merged_and_readable_by_others(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32) + 3
    taps = {"2048": x, "spatial2023": x[:, :3], "random": x[:, :2]}
    parts = []
    for name, rows in (("a", slice(0, 20)), ("b", slice(20, 60))):
        moments = {tap: Moments.of(f[rows]) for tap, f in taps.items()}
        references.save(tmp_path / f"{name}.npz", moments, MADE)
        parts.append(references.load(tmp_path / f"{name}.npz"))
    assert [p.num for p in parts] == [20, 40] and parts[0].made == MADE
    whole = references.merge(*parts)
    for tap, f in taps.items():
        assert whole[tap].count == 60
        np.testing.assert_allclose(whole[tap].outer, Moments.of(f).outer, rtol=1e-13)
        one = parts[0].gaussian(tap)
        np.testing.assert_allclose(one.covariance, np.cov(f[:20], rowvar=False), atol=1e-6)
    with np.load(tmp_path / "a.npz") as plain:  # as TTUR and ADM name them
        np.testing.assert_array_equal(plain["mu"], parts[0].gaussian("2048").mean)
        np.testing.assert_array_equal(plain["sigma_s"], parts[0].gaussian("spatial2023").covariance)

    references.save(tmp_path / "c.npz", whole, dataclasses.replace(MADE, resize="box"))
    other = references.load(tmp_path / "c.npz")
    refused("resize is 'none' and 'box'", references.merge, parts[0], other)
    np.savez(tmp_path / "theirs.npz", **dict(zip(("mu", "sigma"), gaussian(5), strict=True)))
    theirs = references.load(tmp_path / "theirs.npz")
    refused("not our own", references.merge, parts[0], theirs)

    fields = {f: getattr(MADE, f) for f in ("extractor", "extractor_digest", "quantiser")}
    how = protocol.Protocol(
        preset="custom",
        extractor_published=False,
        tap="random",
        resize="box",
        num=9,
        labels="none",
        **fields,
    )
    refused("made with resize 'none'", references.refuse_other_features, parts[0], how)
    references.refuse_other_features(other, how)
    references.refuse_other_features(theirs, how)


def test_our_own_file_of_another_schema_or_out_of_step_is_refused(tmp_path, monkeypatch):
    path, moments = tmp_path / "own.npz", {"2048": Moments.of(np.eye(5)[:, :2])}
    monkeypatch.setattr(references, "SCHEMA", 2)
    references.save(path, moments, MADE)
    monkeypatch.undo()
    refused("has schema 2, this program reads 1", references.load, path)
    references.save(path, moments, MADE)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "mu": arrays["mu"] + 1e-3})
    refused("sums and mean of '2048' disagree", references.load, path)


def test_too_few_images_are_refused_unless_allowed(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 5))
    references.save(tmp_path / "few.npz", {"2048": Moments.of(x)}, MADE)
    refused("5 images for 5 features .* take at least 6", references.load, tmp_path / "few.npz")
    found = references.load(tmp_path / "few.npz", allow_few=True)
    one = found.gaussian("2048")
    assert frechet.frechet_distance(*one, *one) < 1e-9
    references.check_enough(6, 5, "samples")
