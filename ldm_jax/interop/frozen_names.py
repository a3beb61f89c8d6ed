"""Tensors of the published VGG16, LPIPS and FID Inception -> our trees; numpy only."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop.names import CONV, LINEAR, SAME, Entry, Names, Transform, flatten, to_ours
from ldm_jax.models.frozen import inception, vgg
from ldm_jax.models.frozen import lpips as perceptual_net

Tensors = Mapping[str, np.ndarray]

BATCH_NORM_EPSILON = 1e-3  # of the FID Inception, which is also that of torchvision's
LINE = Transform(lambda w: w.reshape(-1), lambda w: (w.reshape(1, -1, 1, 1),))


def lpips_params(tensors: Tensors) -> Any:
    """Tensors by torchvision's names or the lpips package's -> the tree of perceptual_net."""
    found = {_plain(name): array for name, array in tensors.items()}
    lines = range(len(perceptual_net.BLOCKS))
    names = _trunk() | {f"lin{b}": Entry((f"lin{b}.model.1.weight",), LINE) for b in lines}
    return to_ours(names, found, perceptual_net.shapes())


def vgg16_params(tensors: Tensors) -> Any:
    """Tensors by torchvision's names -> the tree of vgg."""
    shapes = vgg.shapes()
    channels = perceptual_net.BLOCKS[-1][-1]
    names = _trunk()
    for layer, position, kernel in (("fc1", 0, _flattened(channels)), ("fc2", 3, LINEAR)):
        names[f"{layer}/kernel"] = Entry((f"classifier.{position}.weight",), kernel)
        names[f"{layer}/bias"] = Entry((f"classifier.{position}.bias",), SAME)
    return to_ours(names, tensors, shapes)


def inception_params(tensors: Tensors) -> Any:
    """Tensors by the names of PyTorch's ports -> the tree of inception, norms folded."""
    kernels = [path.removesuffix("/kernel") for path in flatten(inception.shapes())]
    layers = [path for path in kernels if path != "logits" and not path.endswith("/bias")]
    names: Names = {"logits/kernel": Entry(("fc.weight",), LINEAR)}
    shapes: dict[str, Any] = {"logits/kernel": inception.shapes()["logits"]["kernel"]}
    ours = flatten(inception.shapes())
    for path in layers:
        theirs = path.replace("/", ".")
        names[f"{path}/kernel"] = Entry((f"{theirs}.conv.weight",), CONV)
        shapes[f"{path}/kernel"] = ours[f"{path}/kernel"]
        for part in ("weight", "bias", "running_mean", "running_var"):
            names[f"{path}/{part}"] = Entry((f"{theirs}.bn.{part}",), SAME)
            shapes[f"{path}/{part}"] = ours[f"{path}/bias"]
    return fold(to_ours(names, tensors, shapes))


def fold(tree: Any, epsilon: float = BATCH_NORM_EPSILON) -> Any:
    """Kernels with the batch norm that follows them -> kernels and biases f32, computed in f64."""
    if "running_var" not in tree:
        return {
            name: fold(sub, epsilon) if isinstance(sub, Mapping) else sub
            for name, sub in tree.items()
        }
    kernel, weight, bias, mean, variance = (
        np.asarray(tree[name], np.float64)
        for name in ("kernel", "weight", "bias", "running_mean", "running_var")
    )
    if (variance < 0).any():
        raise InputError("a running variance is negative; give an undamaged file")
    scale = weight / np.sqrt(variance + epsilon)
    return {
        "kernel": (kernel * scale).astype(np.float32),
        "bias": (bias - mean * scale).astype(np.float32),
    }


def _trunk() -> Names:
    """Our path of each convolution's parameters -> torchvision's name."""
    names, position = {}, 0
    for b, widths in enumerate(perceptual_net.BLOCKS):
        for i in range(len(widths)):
            names[f"conv{b}_{i}/kernel"] = Entry((f"features.{position}.weight",), CONV)
            names[f"conv{b}_{i}/bias"] = Entry((f"features.{position}.bias",), SAME)
            position += 2  # the convolution and its ReLU
        position += 1  # the pooling
    return names


def _plain(name: str) -> str:
    """torchvision's name of a convolution that the lpips package has in a slice."""
    return re.sub(r"^net\.slice\d\.", "features.", name)


def _flattened(channels: int) -> Transform:
    """A dense layer on a map flattened [C,H,W] by PyTorch and [H,W,C] by us."""

    def to_ours(w):
        side = round((w.shape[1] / channels) ** 0.5)
        w = w.reshape(len(w), channels, side, side).transpose(2, 3, 1, 0)
        return w.reshape(-1, w.shape[-1])

    def to_theirs(w):
        side = round((w.shape[0] / channels) ** 0.5)
        w = w.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)
        return (w.reshape(len(w), -1),)

    return Transform(to_ours, to_theirs)
