"""Published weights of frozen networks become our trees, and nothing else does."""

import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ldm_jax.errors import InputError
from ldm_jax.interop import pretrained
from ldm_jax.models import perceptual_net

# Position of each convolution among the layers of torchvision's VGG16, block by block.
POSITIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def published_lpips():
    """Random tensors with the names and shapes of the two published files."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    tensors, c_in = {}, 3
    for b, (positions, widths) in enumerate(zip(POSITIONS, perceptual_net.BLOCKS, strict=True)):
        for position, width in zip(positions, widths, strict=True):
            tensors[f"features.{position}.weight"] = draw(width, c_in, 3, 3)
            tensors[f"features.{position}.bias"] = draw(width)
            c_in = width
        tensors[f"lin{b}.model.1.weight"] = draw(1, c_in, 1, 1)
    return tensors


def published_inception():
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in pretrained.INCEPTION_SHAPES.items()
    }


@pytest.fixture(scope="module")
def lpips():
    return published_lpips()


def test_every_tensor_of_lpips_arrives_where_it_belongs(lpips):
    params = pretrained.lpips_params(lpips)
    used = 0
    for b, positions in enumerate(POSITIONS):
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


def test_lpips_under_other_names_is_the_same(lpips):
    of_package = {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)}
    for name, tensor in lpips.items():
        if name.startswith("lin"):
            of_package[name.replace("lin", "lins.", 1)] = tensor
        _, _, tail = name.partition("features.")
        piece = next(
            (b for b, p in enumerate(POSITIONS) if tail and int(tail.split(".")[0]) in p), 0
        )
        of_package[f"net.slice{piece + 1}.{tail}" if tail else name] = tensor
    with_classifier = lpips | {"classifier.6.weight": np.zeros((1000, 4096), np.float32)}
    expected = pretrained._flatten(pretrained.lpips_params(lpips))
    for tensors in (of_package, with_classifier, expected):
        found = pretrained._flatten(pretrained.lpips_params(tensors))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_saved_file_loads_bit_for_bit_from_its_default_place(lpips, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    params = pretrained.lpips_params(lpips)
    path = tmp_path / "ldm_jax" / "weights" / "lpips.safetensors"
    pretrained.save(path, params, "the test")
    assert list(path.parent.iterdir()) == [path]
    assert load_file(path).keys() == pretrained._flatten(perceptual_net.shapes()).keys()
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


def test_lpips_that_does_not_fit_is_refused(lpips):
    name = "features.10.weight"
    without = {n: t for n, t in lpips.items() if n != name}
    of_vgg19 = {"features.16.weight": np.zeros((256, 256, 3, 3), np.float32)}
    for tensors, match in (
        (without, "'features.10.weight' is missing"),
        ({n: t for n, t in lpips.items() if "features" in n}, "'lin0.model.1.weight' is missing"),
        (lpips | {name: lpips[name][:, :64]}, r"'features.10.weight'.*\(256, 128, 3, 3\)|\(3, 3"),
        (lpips | {"lin2.model.1.weight": np.ones((1, 128, 1, 1), np.float32)}, r"\(128,\), not"),
        (lpips | {"features.0.bias": np.zeros(3, np.float32)}, r"'features.0.bias'.*\(3,\)"),
        (lpips | {name: np.full_like(lpips[name], np.nan)}, "not finite"),
        (lpips | of_vgg19, "'features.16.weight' is not of VGG16"),
        ({}, "is missing"),
    ):
        with pytest.raises(InputError, match=match):
            pretrained.lpips_params(tensors)


def test_inception_keeps_its_names_and_loses_its_counters(tmp_path):
    tensors = published_inception()
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    counter = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}
    save_file(half | counter, tmp_path / "half.safetensors")
    params = pretrained.load("inception", str(tmp_path / "half.safetensors"))
    assert params.keys() == tensors.keys()
    for name, tensor in half.items():
        assert params[name].dtype == np.float32
        np.testing.assert_array_equal(params[name], tensor.astype(np.float32))


def test_another_inception_is_refused():
    tensors = published_inception()
    with pytest.raises(InputError, match=r"'fc.weight'.*\(1000, 2048\), not \(1008, 2048\)"):
        pretrained.inception_params(tensors | {"fc.weight": np.zeros((1000, 2048))})
    del tensors["Mixed_6b.branch7x7_2.conv.weight"]
    with pytest.raises(InputError, match=r"branch7x7_2\.conv.weight' is missing"):
        pretrained.inception_params(tensors)


def test_the_error_of_a_file_names_it(tmp_path, lpips):
    path = tmp_path / "part.safetensors"
    save_file({"lin0.model.1.weight": lpips["lin0.model.1.weight"]}, path)
    with pytest.raises(InputError, match=r"part\.safetensors: tensor 'features\.0\.weight'"):
        pretrained.load("lpips", str(path))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"part\.safetensors is no sound"):
        pretrained.load("lpips", str(path))
    with pytest.raises(InputError, match=r"weights\.pkl must be a \.safetensors or a \.pth"):
        pretrained.read_tensors(tmp_path / "weights.pkl")


def test_a_pth_without_torch_is_refused_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install '\.\[torch\]'"):
        pretrained.read_tensors(tmp_path / "vgg.pth")


def test_names_of_published_files_begin_with_their_digests():
    for published in [p for parts in pretrained.PUBLISHED.values() for p in parts]:
        assert published.url.endswith("/" + published.file)
        assert len(published.sha256) == 64
        if "-" in published.file:  # PyTorch's convention
            digits = published.file.removesuffix(".pth").split("-")[-1]
            assert published.sha256.startswith(digits)
