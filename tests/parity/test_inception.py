"""The FID Inception and the resizes against torch-fidelity: random weights, same features.

torch-fidelity's class is used as it is, on a file that the test wrote.
"""

import functools

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ldm_jax.eval import resize
from ldm_jax.eval.extractors import EXTRACTORS
from ldm_jax.interop import pretrained
from ldm_jax.models.frozen import inception
from tests import frozen
from tests.parity import fidelity, reference

pytestmark = pytest.mark.parity

TAPS = ["64", "192", "768", "2048", "logits_unbiased"]
SIZES = [(32, 32), (64, 48), (256, 256), (299, 299), (427, 300)]
SIZE = SIZES[1]  # of the mutants
TOLERANCE = 1e-5
TRUE_RESIZE = fidelity.torch_fidelity.feature_extractor_inceptionv3
TRUE_RESIZE = TRUE_RESIZE.interpolate_bilinear_2d_like_tensorflow1x


def picture(height, width):
    """uint8 [1,H,W,3]: waves with noise, so that there are smooth places and edges."""
    rng = np.random.default_rng(height)
    y, x = np.mgrid[:height, :width][..., None]
    phases = rng.uniform(0, 6, 3)
    waves = np.sin(0.11 * y + phases) * np.cos(0.07 * x + phases) * 90 + 120
    return np.clip(waves + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)[None]


def to_torch(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({n: torch.from_numpy(t) for n, t in frozen.fid_inception().items()}, path)
    return path


def their_features(file, images, mutate=lambda model, patch: None):
    """{tap: f32 [B,D]} of torch-fidelity's class, after `mutate`."""
    theirs = fidelity.torch_fidelity.FeatureExtractorInceptionV3(
        "inception", TAPS, feature_extractor_weights_path=str(file)
    )
    spatial = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, x, y: spatial.append(y))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        mutate(theirs, patch)
        out = dict(zip(TAPS, map(np.asarray, theirs(to_torch(images))), strict=True))
    channels_last = reference.from_torch(spatial[0][:, :7])
    return out | {"spatial2023": channels_last.reshape(len(images), -1)}


@pytest.fixture(scope="module")
def our_features(file):
    """{size: {tap: f32 [1,D]}}; one compilation, as the network sees 299 pixels always."""
    params = pretrained.load("inception", str(file))
    resized = np.concatenate([resize.tf1_bilinear(picture(*s), inception.SIDE) for s in SIZES])
    out = jax.device_get(jax.jit(inception.apply)(params, resized))
    return {s: {tap: a[i : i + 1] for tap, a in out.items()} for i, s in enumerate(SIZES)}


@pytest.mark.parametrize("size", SIZES)
def test_features_are_those_of_torch_fidelity(our_features, file, size):
    theirs = their_features(file, picture(*size))
    assert theirs.keys() == inception.TAPS.keys() == our_features[size].keys()
    for tap, expected in theirs.items():
        assert np.abs(expected).mean() > 1e-2, tap  # random weights can let everything vanish
        assert reference.error(our_features[size][tap], expected) < TOLERANCE, tap


def padding_counted(model, patch):
    average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1)
    patch.setattr(F, "avg_pool2d", lambda x, **how: average(x, count_include_pad=True))


def average_in_the_last_block(model, patch):
    maximum, average = F.max_pool2d, F.avg_pool2d

    def pool(x, kernel_size, stride, padding=0, *more, **how):
        if padding:
            return average(x, kernel_size, stride, padding, count_include_pad=False)
        return maximum(x, kernel_size, stride, padding, *more, **how)

    patch.setattr(F, "max_pool2d", pool)


def resized_by(patch, function):
    module = fidelity.torch_fidelity.feature_extractor_inceptionv3
    patch.setattr(module, "interpolate_bilinear_2d_like_tensorflow1x", function)


def half_pixel_resize(model, patch):
    resized_by(patch, lambda x, size, **how: F.interpolate(x, size, mode="bilinear"))


def another_epsilon(model, patch):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-5


def bf16_inputs(model, patch):
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda module, x: (x[0].bfloat16().float(),))


def scaled_by_127(model, patch):
    """x / 127.5 - 1 instead of (x - 128) / 128."""
    resized_by(patch, lambda x, **how: TRUE_RESIZE(x, **how) * (128 / 127.5))


def fed_with_unit_images(model, patch):
    resized_by(patch, lambda x, **how: TRUE_RESIZE(x, **how) / 255)


@pytest.mark.parametrize(
    "mutate",
    [
        padding_counted,
        average_in_the_last_block,
        half_pixel_resize,
        another_epsilon,
        bf16_inputs,
        scaled_by_127,
        fed_with_unit_images,
    ],
    ids=lambda mutate: mutate.__name__,
)
def test_another_network_is_caught(our_features, file, mutate):
    theirs = their_features(file, picture(*SIZE), mutate)
    errors = {tap: reference.error(our_features[SIZE][tap], a) for tap, a in theirs.items()}
    assert errors["2048"] > 30 * TOLERANCE


def test_spatial_features_flattened_as_pytorch_has_them_are_others(our_features, file):
    theirs = their_features(file, picture(*SIZE))["spatial2023"].reshape(17, 17, 7)
    swapped = theirs.transpose(2, 0, 1).reshape(1, -1)
    assert reference.error(our_features[SIZE]["spatial2023"], swapped) > 1e-2


@pytest.mark.parametrize("size", SIZES)
def test_the_resize_of_tensorflow_is_that_of_torch_fidelity_bit_for_bit(size):
    images = picture(*size)
    theirs = TRUE_RESIZE(to_torch(images).float(), size=(299, 299), align_corners=False)
    compiled = jax.jit(lambda x: resize.tf1_bilinear(x, 299))
    for ours in (compiled(images), resize.tf1_bilinear(images, 299)):
        np.testing.assert_array_equal(ours, reference.from_torch(theirs))


@pytest.mark.parametrize("size", [(32, 32), (427, 300)])
def test_other_resizes_are_those_they_are_named_after(size):
    images = picture(*size)
    x = to_torch(images).float()
    half_pixel = F.interpolate(x, (224, 224), mode="bilinear")
    bicubic = F.interpolate(x, (224, 224), mode="bicubic", antialias=True)
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in images[0].transpose(2, 0, 1)]
    pil = np.stack([p.resize((224, 224), Image.Resampling.BICUBIC) for p in planes], -1)
    for name, expected in (
        ("torch_bilinear", reference.from_torch(half_pixel)),
        ("torch_bicubic_aa", reference.from_torch(bicubic)),  # torch's weights are of f32
        ("pil_bicubic", pil.clip(0, 255)[None]),
    ):
        ours = resize.RESIZES[name](images, 224)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-2, err_msg=name)


def test_the_extractor_resizes_as_its_name_says(our_features, file):
    """Its network takes the resized images and nothing else is done to them."""
    extractor = EXTRACTORS["inception"]
    assert (extractor.resize, extractor.side) == ("tf1_bilinear", 299)
    assert extractor.network is inception.apply
