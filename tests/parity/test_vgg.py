"""VGG16's dense features against torch-fidelity's class: fewer channels, random weights."""

import jax
import numpy as np
import pytest
import torch

from ldm_jax.eval.extractors import EXTRACTORS
from ldm_jax.interop import pretrained
from ldm_jax.models.frozen import lpips as perceptual_net
from ldm_jax.models.frozen import vgg
from tests import frozen
from tests.parity import fidelity, reference
from tests.parity.test_inception import picture, to_torch

pytestmark = pytest.mark.parity


def torchvision_vgg16():
    """torchvision's `vgg16()`: trunk, pooling to 7x7, three dense layers with dropout between."""
    layers, c_in = [], 3
    for widths in perceptual_net.BLOCKS:
        for width in widths:
            layers += [torch.nn.Conv2d(c_in, width, 3, padding=1), torch.nn.ReLU()]
            c_in = width
        layers.append(torch.nn.MaxPool2d(2, 2))
    width = vgg.TAPS["fc2_relu"]
    dense = [torch.nn.Linear(c_in * 49, width), torch.nn.ReLU(), torch.nn.Dropout()]
    dense += [torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Dropout()]
    dense += [torch.nn.Linear(width, 10)]
    model = torch.nn.Sequential()
    model.features = torch.nn.Sequential(*layers)
    model.avgpool = torch.nn.AdaptiveAvgPool2d((7, 7))
    model.flatten = torch.nn.Flatten()
    model.classifier = torch.nn.Sequential(*dense)
    return model


def normalize(x, mean, std, inplace):
    def row(v):
        return torch.tensor(v).reshape(1, -1, 1, 1)

    return (x - row(mean)) / row(std)


@pytest.fixture(scope="module")
def narrow():
    with pytest.MonkeyPatch.context() as patch:
        frozen.narrow(patch)
        yield patch


@pytest.fixture(scope="module")
def features(narrow, tmp_path_factory):
    """(ours, theirs before the ReLU, theirs after it), f32 [2,D] each."""
    path = tmp_path_factory.mktemp("vgg") / "random.pth"
    model = reference.randomize(torchvision_vgg16())
    torch.save(model.state_dict(), path)
    module = fidelity.torch_fidelity.feature_extractor_vgg16
    narrow.setattr(module.torchvision.models, "vgg16", torchvision_vgg16, raising=False)
    functional = module.torchvision.transforms.functional
    narrow.setattr(functional, "normalize", normalize, raising=False)
    theirs = fidelity.torch_fidelity.FeatureExtractorVGG16(
        "vgg16", ["fc2", "fc2_relu"], feature_extractor_weights_path=str(path)
    )
    images = np.concatenate([picture(50, 60), picture(50, 60)[:, ::-1]])
    before, after = (a.numpy() for a in theirs(to_torch(images)))
    params = pretrained.load("vgg16", str(path))
    extractor = EXTRACTORS["vgg16"]
    ours = jax.jit(lambda p, x: extractor.apply(p, x))(params, images)["fc2_relu"]
    return np.asarray(ours), before, after


def test_features_are_those_of_torch_fidelity(features):
    ours, _, theirs = features
    assert 0 < (theirs > 0).mean() < 1
    assert reference.error(ours, theirs) < 1e-5


def test_features_before_the_relu_are_others(features):
    ours, before, _ = features
    assert reference.error(ours, before) > 1e-2
