"""Random tensors with the names and shapes of published files; networks made narrow for speed."""

import numpy as np
import pytest

from ldm_jax.interop.names import flatten
from ldm_jax.models.frozen import inception, vgg
from ldm_jax.models.frozen import lpips as perceptual_net

# Position of each convolution among the layers of torchvision's VGG16, block by block.
POSITIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def narrow(patch: pytest.MonkeyPatch) -> None:
    """Sixteenths of the channels of VGG16 and the Inception; names and wiring stay."""

    def thin(part):
        if isinstance(part, inception.Conv):
            return part._replace(features=part.features // 16)
        if isinstance(part, inception.Block):
            return part._replace(branches=thin(part.branches))
        return part if isinstance(part, str) else tuple(thin(p) for p in part)

    patch.setattr(inception, "STEM", thin(inception.STEM))
    patch.setattr(inception, "BLOCKS", {n: thin(b) for n, b in inception.BLOCKS.items()})
    blocks = tuple(tuple(w // 16 for w in widths) for widths in perceptual_net.BLOCKS)
    patch.setattr(perceptual_net, "BLOCKS", blocks)
    patch.setattr(vgg, "TAPS", {"fc2_relu": 16})


def lpips() -> dict[str, np.ndarray]:
    """The two published files of LPIPS."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    tensors, c_in = {}, 3
    for b, (positions, widths) in enumerate(zip(POSITIONS, perceptual_net.BLOCKS, strict=True)):
        for position, width in zip(positions, widths, strict=True):
            tensors[f"features.{position}.weight"] = draw(width, c_in, 3, 3)
            tensors[f"features.{position}.bias"] = draw(width)
            c_in = width
        tensors[f"lin{b}.model.1.weight"] = draw(1, c_in, 1, 1)
    return tensors


def vgg16() -> dict[str, np.ndarray]:
    """torchvision's VGG16 with its classes."""
    tensors = {name: t for name, t in lpips().items() if name.startswith("features")}
    rng = np.random.default_rng(1)
    shapes = vgg.shapes()
    for layer, position in (("fc1", 0), ("fc2", 3)):
        kernel = rng.random(shapes[layer]["kernel"].shape[::-1], np.float32) - np.float32(0.5)
        tensors[f"classifier.{position}.weight"] = kernel
        tensors[f"classifier.{position}.bias"] = rng.random(len(kernel), np.float32)
    classes = {"weight": (10, vgg.TAPS["fc2_relu"]), "bias": (10,)}
    return tensors | {f"classifier.6.{n}": np.ones(s, np.float32) for n, s in classes.items()}


def fid_inception() -> dict[str, np.ndarray]:
    """The published FID Inception with its batch norms.

    He's initialisation and norms of all sizes: PyTorch's own lets the last features vanish, and
    then no difference shows.
    """
    rng = np.random.default_rng(0)
    shapes = {path: leaf.shape for path, leaf in flatten(inception.shapes()).items()}
    kernels = [path for path in shapes if path.endswith("/kernel") and path != "logits/kernel"]
    tensors = {}
    for path in kernels:
        height, width, c_in, c_out = shapes[path]
        name = path.removesuffix("/kernel").replace("/", ".")
        bound = (6 / (height * width * c_in)) ** 0.5  # uniform: the normal draw takes seconds
        kernel = rng.random((c_out, c_in, height, width), np.float32)
        norm = rng.random((4, c_out), np.float32)
        tensors[f"{name}.conv.weight"] = (2 * kernel - 1) * np.float32(bound)
        tensors[f"{name}.bn.weight"] = 0.7 + 0.6 * norm[0]
        tensors[f"{name}.bn.bias"] = 0.4 * (norm[1] - 0.5)
        tensors[f"{name}.bn.running_mean"] = 0.4 * (norm[2] - 0.5)
        tensors[f"{name}.bn.running_var"] = 0.5 + norm[3]
        tensors[f"{name}.bn.num_batches_tracked"] = np.zeros((), np.int64)
    fc = rng.random(shapes["logits/kernel"][::-1], np.float32) - np.float32(0.5)
    return tensors | {"fc.weight": fc, "fc.bias": np.zeros(1008, np.float32)}
