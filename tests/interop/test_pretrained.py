"""Published weights of frozen networks become our trees, and nothing else does."""

import io
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ldm_jax import files
from ldm_jax.errors import InputError
from ldm_jax.interop import pretrained, published, vit_names
from ldm_jax.interop.names import flatten
from ldm_jax.models.frozen import clip, dinov2, inception, vgg
from ldm_jax.models.frozen import lpips as perceptual_net
from tests import frozen


@pytest.fixture(scope="module")
def lpips():
    return frozen.lpips()


@pytest.fixture
def narrow(monkeypatch):
    frozen.narrow(monkeypatch)


def test_every_tensor_of_lpips_arrives_where_it_belongs(lpips):
    params = pretrained.from_tensors("lpips", lpips)
    used = 0
    for b, positions in enumerate(frozen.POSITIONS):
        for i, position in enumerate(positions):
            weight = lpips[f"features.{position}.weight"]
            kernel = params[f"conv{b}_{i}"]["kernel"]
            assert kernel[0, 2, 1, 5] == weight[5, 1, 0, 2]  # [H, W, in, out] of [out, in, H, W]
            np.testing.assert_array_equal(kernel, np.einsum("oihw->hwio", weight))
            bias = lpips[f"features.{position}.bias"]
            np.testing.assert_array_equal(params[f"conv{b}_{i}"]["bias"], bias)
            used += 2
        line = lpips[f"lin{b}.model.1.weight"]
        np.testing.assert_array_equal(params[f"lin{b}"], line[0, :, 0, 0])
        used += 1
    assert used == len(lpips)


def test_lpips_under_other_names_is_the_same(lpips, tmp_path):
    of_package = {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)}
    for name, tensor in lpips.items():
        if name.startswith("lin"):
            of_package[name.replace("lin", "lins.", 1)] = tensor
        _, _, tail = name.partition("features.")
        piece = next(
            (b for b, p in enumerate(frozen.POSITIONS) if tail and int(tail.split(".")[0]) in p), 0
        )
        of_package[f"net.slice{piece + 1}.{tail}" if tail else name] = tensor
    with_classifier = lpips | {"classifier.6.weight": np.zeros((1000, 4096), np.float32)}
    expected = flatten(pretrained.from_tensors("lpips", lpips))
    for tensors in (of_package, with_classifier, expected):
        save_file(
            {n: np.ascontiguousarray(t) for n, t in tensors.items()}, tmp_path / "a.safetensors"
        )
        found = flatten(pretrained.load("lpips", str(tmp_path / "a.safetensors")))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_saved_file_loads_bit_for_bit_from_its_default_place(lpips, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    params = pretrained.from_tensors("lpips", lpips)
    path = tmp_path / "ldm_jax" / "weights" / "lpips.safetensors"
    pretrained.save(path, params, {"the test": "0" * 64})
    assert list(path.parent.iterdir()) == [path]
    assert load_file(path).keys() == flatten(perceptual_net.shapes()).keys()
    for loaded in (pretrained.load("lpips"), pretrained.load("lpips", str(path))):
        np.testing.assert_array_equal(loaded["conv4_2"]["kernel"], params["conv4_2"]["kernel"])
        np.testing.assert_array_equal(loaded["lin3"], params["lin3"])
        assert loaded["conv0_0"]["kernel"].dtype == np.float32


def test_a_missing_file_is_refused_with_every_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError) as refused:
        pretrained.load("lpips")
    for words in (
        f"{tmp_path}/ldm_jax/weights/lpips.safetensors is missing",
        "`ldm weights lpips`",
        "--from=vgg16-397923af.pth,vgg.pth",
        "--config.loss.perceptual_weight=0",
    ):
        assert words in str(refused.value)
    with pytest.raises(InputError, match=r"`ldm weights inception --out=absent\.safetensors`"):
        pretrained.load("inception", "absent.safetensors")
    # What cannot be checked is not had without saying so, and nothing is written as .npz.
    with pytest.raises(InputError, match=r"`ldm weights dinov2-vitl14 --unverified`"):
        pretrained.load("dinov2-vitl14")
    with pytest.raises(InputError, match=r"absent\.npz does not exist; check the path"):
        pretrained.load("inception", "absent.npz")


def test_weights_know_whose_they_are(narrow, tmp_path, monkeypatch):
    """What is not the published file is a custom network, however it came to us."""
    source, own = tmp_path / "a.safetensors", tmp_path / "own.safetensors"
    save_file(frozen.fid_inception(), source)
    digest = files.sha256(source)
    assert pretrained.read("inception", str(source))[1:] == (digest, False)
    pretrained.save(own, pretrained.load("inception", str(source)), {source.name: digest})
    assert pretrained.read("inception", str(own))[1:] == (digest, False)
    known = published.Published("a.pth", digest, "")
    monkeypatch.setitem(published.PUBLISHED, "inception", (known,))
    for file in (source, own):
        assert pretrained.read("inception", str(file))[1:] == (digest, True)
    # Copied without what it says of itself, it is known by nothing.
    save_file(load_file(own), own)
    assert pretrained.read("inception", str(own))[1:] == (files.sha256(own), False)


def test_a_changed_bit_of_our_own_file_is_found(narrow, tmp_path):
    path = tmp_path / "own.safetensors"
    params = pretrained.from_tensors("inception", frozen.fid_inception())
    pretrained.save(path, params, {"a.pth": "0" * 64})
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"own\.safetensors is damaged: its tensors changed"):
        pretrained.read("inception", str(path))


def test_digests_of_several_files_join_whatever_their_order():
    two = ["b" * 64, "a" * 64]
    assert published.joined(two) == published.joined(two[::-1]) != published.joined(two[:1])
    assert published.joined(two[:1]) == two[0]
    lpips = [part.sha256 for part in published.PUBLISHED["lpips"]]
    assert published.is_published("lpips", lpips[::-1])
    assert not published.is_published("lpips", lpips[:1])
    assert not published.is_published("dinov2-vitl14", [""])


def test_folding_is_the_norm_after_the_convolution(narrow):
    """In f64 on one pixel; the folded numbers are rounded to f32 once."""
    tensors = frozen.fid_inception()
    params = flatten(pretrained.from_tensors("inception", tensors))
    shapes = {path: leaf.shape for path, leaf in flatten(inception.shapes()).items()}
    assert {path: a.shape for path, a in params.items()} == shapes
    for path in shapes:
        if path.endswith("/bias"):
            layer = path.removesuffix("/bias")
            theirs = layer.replace("/", ".")
            w = tensors[f"{theirs}.conv.weight"].astype(np.float64)
            x = np.random.default_rng(1).standard_normal(w.shape[1:])
            gain, shift, mean, variance = (
                tensors[f"{theirs}.bn.{part}"].astype(np.float64)
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            y = (w * x).sum((1, 2, 3))
            expected = (y - mean) / np.sqrt(variance + 1e-3) * gain + shift
            kernel = params[f"{layer}/kernel"].astype(np.float64)
            found = (kernel * x.transpose(1, 2, 0)[..., None]).sum((0, 1, 2)) + params[path]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(params["logits/kernel"], tensors["fc.weight"].T)


def test_a_dense_layer_after_a_map_takes_its_rows_in_our_order(narrow):
    tensors = frozen.vgg16()
    kernel = pretrained.from_tensors("vgg16", tensors)["fc1"]["kernel"]
    channels = perceptual_net.BLOCKS[-1][-1]
    weight = tensors["classifier.0.weight"].reshape(-1, channels, 7, 7)  # [out, C, H, W]
    assert kernel.reshape(7, 7, channels, -1)[2, 5, 3, 4] == weight[4, 3, 2, 5]
    assert kernel.shape == vgg.shapes()["fc1"]["kernel"].shape


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_a_vision_transformer_with_too_little_or_too_much_is_refused(kind):
    """That each tensor arrives where it belongs is seen in the comparisons with PyTorch."""
    if kind == "clip":
        config = clip.ClipConfig(clip.Tower(8, 2, 2), clip.Tower(4, 2, 2), 8, 4, 6, 16, 5)
        convert, count = vit_names.clip_params, 2 * 2 * 16 + 2 * 4 + 3 + 2
    else:
        config = dinov2.DinoConfig(8, 2, 2, patch=4, grid=3)
        convert, count = vit_names.dinov2_params, 2 * 18 + 6
    with pytest.raises(InputError, match=f"{count} missing.*1 unknown: stranger"):
        convert(config, {"stranger": np.zeros(1, np.float32)})


def test_lpips_that_does_not_fit_is_refused(lpips):
    name = "features.10.weight"
    without = {n: t for n, t in lpips.items() if n != name}
    of_vgg19 = {"features.16.weight": np.zeros((256, 256, 3, 3), np.float32)}
    for tensors, match in (
        (without, r"1 missing: features\.10\.weight"),
        ({n: t for n, t in lpips.items() if "features" in n}, r"5 missing: lin0\.model"),
        (lpips | {name: lpips[name][:, :64]}, r"of another shape: features\.10.* \(256, 128, 3"),
        (lpips | {"lin2.model.1.weight": np.ones((1, 128, 1, 1), np.float32)}, r"\(1, 256, 1, 1"),
        (lpips | {"features.0.bias": np.zeros(3, np.float32)}, r"features\.0\.bias \(3,\)"),
        (lpips | of_vgg19, r"1 unknown: features\.16\.weight"),
        ({}, "31 missing"),
    ):
        with pytest.raises(InputError, match=match):
            pretrained.from_tensors("lpips", tensors)


def test_another_inception_is_refused(narrow):
    tensors = frozen.fid_inception()
    with pytest.raises(InputError, match=r"fc\.weight \(1000, 128\) instead of \(1008, 128\)"):
        pretrained.from_tensors("inception", tensors | {"fc.weight": np.zeros((1000, 128))})
    with pytest.raises(InputError, match=r"1 unknown: AuxLogits\.conv0"):
        pretrained.from_tensors("inception", tensors | {"AuxLogits.conv0": np.zeros(1)})
    negative = {"Mixed_7c.branch1x1.bn.running_var": np.full(20, -1.0, np.float32)}
    with pytest.raises(InputError, match="running variance is negative"):
        pretrained.from_tensors("inception", tensors | negative)
    del tensors["Mixed_6b.branch7x7_2.conv.weight"]
    with pytest.raises(InputError, match=r"1 missing: Mixed_6b\.branch7x7_2\.conv\.weight"):
        pretrained.from_tensors("inception", tensors)


def test_every_kind_of_file_gives_the_same_network(narrow, tmp_path):
    tensors = frozen.vgg16()
    save_file(tensors, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **tensors)
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    save_file(half, tmp_path / "half.safetensors")
    expected = flatten(pretrained.load("vgg16", str(tmp_path / "a.safetensors")))
    assert {a.dtype for a in expected.values()} == {np.dtype(np.float32)}
    found = flatten(pretrained.load("vgg16", str(tmp_path / "a.npz")))
    rounded = flatten(pretrained.load("vgg16", str(tmp_path / "half.safetensors")))
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array)
        np.testing.assert_array_equal(rounded[path], array.astype(np.float16).astype(np.float32))


def lying_npz(path, shape):
    """An .npz whose header promises `shape` over 8 bytes of data."""
    header = io.BytesIO()
    told = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, told)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fc1.npy", header.getvalue() + bytes(8))


def test_files_that_lie_or_could_run_code_are_refused(tmp_path):
    path = tmp_path / "weights.npz"
    lying_npz(path, (10**6, 10**6))  # 4 TB, were it believed
    with pytest.raises(InputError, match=r"weights\.npz is not a whole \.npz"):
        pretrained.load("vgg16", str(path))
    np.savez(path, fc1=np.array([{}], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"weights\.npz is not a whole \.npz file of plain arrays"):
        pretrained.load("vgg16", str(path))
    for name in ("weights.pkl", "inception-2015-12-05.pt", "weights"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match=rf"{name} must be one of .*safetensors.*save_file"):
            pretrained.load("inception", str(tmp_path / name))


def test_the_error_of_a_file_names_it(tmp_path, lpips):
    path = tmp_path / "part.safetensors"
    save_file({"lin0.model.1.weight": lpips["lin0.model.1.weight"]}, path)
    with pytest.raises(InputError, match=r"part\.safetensors: .*30 missing: features\.0\.bias"):
        pretrained.load("lpips", str(path))
    with pytest.raises(InputError, match=r"part\.safetensors holds lin0.* once more"):
        pretrained.convert("lpips", [path, path])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"part\.safetensors is damaged"):
        pretrained.load("lpips", str(path))
    save_file(lpips | {"features.0.bias": np.full(64, np.nan, np.float32)}, path)
    with pytest.raises(InputError, match=r"part\.safetensors: features\.0\.bias .*not finite"):
        pretrained.load("lpips", str(path))


def test_a_pth_without_torch_is_refused_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install '\.\[torch\]'"):
        pretrained.read_tensors(tmp_path / "vgg.pth")


def test_every_network_says_where_its_files_are():
    assert published.PUBLISHED.keys() == pretrained.NETWORKS.keys()
    for part in [part for parts in published.PUBLISHED.values() for part in parts]:
        assert part.file.endswith(pretrained.SUFFIXES)
        assert part.url.endswith(part.file.rpartition(".")[2])
        assert len(part.sha256) == (0 if published.HUB in part.url else 64)
        if part.sha256 and "-" in part.file:  # PyTorch's convention
            digits = part.file.removesuffix(".pth").split("-")[-1]
            assert part.sha256.startswith(digits)
