"""LPIPS against the lpips package: its linear layers, random VGG16 weights, same numbers.

The package asks torchvision for the VGG16's layers and for nothing else. Here they come from
torch.nn, so that no build of torchvision has to match that of torch.
"""

import functools
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from ldm_jax.errors import InputError
from ldm_jax.interop import pretrained, published
from ldm_jax.jobs import weights
from ldm_jax.models.frozen import lpips as perceptual_net
from tests.parity import reference

pytestmark = pytest.mark.parity

SIZES = [(32, 32), (50, 38)]  # the second halves to odd numbers


def random_vgg16(pretrained=False):
    """torchvision's `vgg16`, as far as LPIPS looks; activations keep their size on the way."""
    torch.manual_seed(0)
    layers, c_in = [], 3
    for b, widths in enumerate(perceptual_net.BLOCKS):
        layers += [torch.nn.MaxPool2d(2, 2)] if b else []
        for width in widths:
            conv = torch.nn.Conv2d(c_in, width, 3, padding=1)
            torch.nn.init.normal_(conv.weight, std=(2 / conv.weight[0].numel()) ** 0.5)
            torch.nn.init.normal_(conv.bias, std=0.1)
            layers += [conv, torch.nn.ReLU(inplace=True)]
            c_in = width
    model = torch.nn.Module()
    model.features = torch.nn.Sequential(*layers)
    return model


@functools.cache
def package():
    """The lpips package, imported over a torchvision that has one function."""
    models = types.ModuleType("torchvision.models")
    models.vgg16 = random_vgg16
    torchvision = types.ModuleType("torchvision")
    torchvision.models = models
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", torchvision)
        patch.setitem(sys.modules, "torchvision.models", models)
        import lpips

    return lpips


def their_model():
    """With the linear layers that the package ships; dropout is off."""
    return package().LPIPS(net="vgg", pnet_rand=True, verbose=False)


def lin_file():
    return Path(package().__file__).parent / "weights" / "v0.1" / "vgg.pth"


@functools.cache
def our_params():
    return pretrained.from_tensors("lpips", reference.tensors(their_model()))


def inputs(height, width):
    x, y = (np.tanh(reference.draw(i, 2, height, width, 3)) for i in (0, 1))
    return x, y, reference.draw(2, 2)


@functools.cache
def our_answers(size):
    """Distances [B], and the gradient of their weighted sum with respect to the first image."""

    @jax.jit
    def answers(params, x, y, cotangent):
        def distance(x):
            return perceptual_net.lpips(params, x, y)

        return reference.our_value_and_pullback(distance, x, cotangent)

    return answers(our_params(), *inputs(*size))


def errors(size, mutate=lambda model: None):
    model = their_model()
    mutate(model)
    x, y, cotangent = inputs(*size)
    x = reference.to_torch(x).requires_grad_()
    distance = model(x, reference.to_torch(y))
    distance.backward(torch.from_numpy(cotangent).reshape(-1, 1, 1, 1))
    theirs = distance.detach().numpy().reshape(-1), reference.from_torch(x.grad)
    return [reference.error(*pair) for pair in zip(our_answers(size), theirs, strict=True)]


@pytest.mark.parametrize("size", SIZES)
def test_distance_and_its_gradient_are_the_reference(size):
    assert max(errors(size)) < 1e-5


def without_scaling(model):
    model.scaling_layer = torch.nn.Identity()


def without_shift(model):
    model.scaling_layer.shift.zero_()


def average_pooling(model):
    model.net.slice5[0] = torch.nn.AvgPool2d(2, 2)


def lines_in_another_order(model):
    weight = model.lin3.model[1].weight
    weight.data = weight.data.flip(1)


def before_the_activation(model):
    del model.net.slice5[-1]


@pytest.mark.parametrize(
    "mutate",
    [
        without_scaling,
        without_shift,
        average_pooling,
        lines_in_another_order,
        before_the_activation,
        torch.nn.Module.train,
    ],
    ids=lambda mutate: mutate.__name__,
)
def test_another_network_is_caught(mutate):
    assert min(errors(SIZES[0], mutate)) > 1e-4


def test_the_job_converts_pytorch_files_and_knows_the_published_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    vgg = tmp_path / "vgg16.pth"
    torch.save(random_vgg16().state_dict(), vgg)
    published.check("lpips", [lin_file()])
    with pytest.raises(InputError, match=r"vgg16\.pth has the sha256"):
        weights.run("lpips", [vgg, lin_file()])
    weights.run("lpips", [vgg, lin_file()], unverified=True)
    loaded, expected = jax.tree.leaves_with_path(pretrained.load("lpips")), our_params()
    assert len(loaded) == len(jax.tree.leaves(expected)) == 31
    for (path, ours), theirs in zip(loaded, jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=str(path))


def test_a_pth_that_is_no_state_dict_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    for content, match in (
        ([torch.zeros(1)], r"a\.pth holds no state dict"),
        ({"state_dict": {"a": 1}}, r"a\.pth holds no state dict"),
        (Path("code"), r"a\.pth holds Python objects .* untrusted"),
    ):
        torch.save(content, path)
        with pytest.raises(InputError, match=match):
            pretrained.read_tensors(path)
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    with pytest.raises(InputError, match=r"a\.pth is damaged .*TorchScript"):
        pretrained.read_tensors(path)
    path.write_bytes(b"not found")
    with pytest.raises(InputError, match=r"a\.pth is damaged"):
        pretrained.read_tensors(path)
