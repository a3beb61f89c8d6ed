"""Frozen networks whose weights others published: their files, and our own, as our trees.

Our file is .safetensors: f32, the paths of our tree joined by "/"; as metadata the digests of the
files that it was made from and one of its own tensors, which the format lacks. Only a .pth or a
.bin needs torch to read, and nothing but tensors is taken from it; other pickles and TorchScript
archives are refused.
"""

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.files import digest_arrays, read_npz, replacing, sha256
from ldm_jax.interop import frozen_names, published, tensor_file, torch_file, vit_names
from ldm_jax.interop.names import SAME, Entry, flatten, to_ours
from ldm_jax.models.frozen import clip, dinov2, inception, vgg
from ldm_jax.models.frozen import lpips as perceptual_net

TORCH_SUFFIXES = (".pth", ".bin")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)


class Network(NamedTuple):
    shapes: Callable[[], Any]  # our tree of things with a shape
    params: Callable[[Mapping[str, np.ndarray]], Any]  # of the published tensors
    unused: str  # regular expression of published tensors that it has no use for
    without: str  # how to do without its weights


CLIP_UNUSED = r"logit_scale|\w+\.embeddings\.position_ids"  # the latter count from 0
NETWORKS = {
    "lpips": Network(
        perceptual_net.shapes,
        frozen_names.lpips_params,
        r"classifier\..*|lins\..*|scaling_layer\..*",  # of VGG16; held twice; constants
        "set --config.loss.perceptual_weight=0",
    ),
    "inception": Network(
        inception.shapes,
        frozen_names.inception_params,
        r".*\.num_batches_tracked|fc\.bias",  # the Inception Score takes the logits without it
        "leave out the metrics of Inception features",
    ),
    "vgg16": Network(
        vgg.shapes,
        frozen_names.vgg16_params,
        r"classifier\.6\..*",  # the classes
        "leave out the metrics of VGG features",
    ),
    "clip-vit-b32": Network(
        functools.partial(clip.shapes, clip.VIT_B32),
        functools.partial(vit_names.clip_params, clip.VIT_B32),
        CLIP_UNUSED,
        "leave out the metrics of CLIP features",
    ),
    "clip-vit-l14-336": Network(
        functools.partial(clip.shapes, clip.VIT_L14_336),
        functools.partial(vit_names.clip_params, clip.VIT_L14_336),
        CLIP_UNUSED,
        "leave out the metrics of CLIP features",
    ),
    "dinov2-vitl14": Network(
        functools.partial(dinov2.shapes, dinov2.VIT_L14),
        functools.partial(vit_names.dinov2_params, dinov2.VIT_L14),
        r"embeddings\.mask_token",  # of its training
        "leave out the metrics of DINOv2 features",
    ),
}


class NetworkWeights(NamedTuple):
    """Parameters and where they come from: results name the digest."""

    params: Any
    digest: str  # sha256 hex of the published file, of several files joined, or of the file given
    published: bool  # False: a custom network, whose figures have no published name


def default_path(name: str) -> Path:
    """Where a network's converted weights are kept: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ldm_jax" / "weights" / f"{name}.safetensors"


def load(name: str, file: str = "") -> Any:
    """A network's parameters alone: see `read`."""
    return read(name, file).params


def read(name: str, file: str = "") -> NetworkWeights:
    """A network's parameters f32 from our own file or a published one; "" is `default_path`.

    Raises InputError for a file that is missing, damaged or of another network.
    """
    path = Path(file).expanduser() if file else default_path(name)
    if file and path.suffix != ".safetensors" and not path.is_file():
        raise InputError(f"{path} does not exist; check the path of the weights of {name}")
    if not path.is_file():
        files = ",".join(p.file for p in published.PUBLISHED[name])
        unknown = not all(p.sha256 for p in published.PUBLISHED[name])
        command = f"ldm weights {name}{' --unverified' * unknown}"
        command += f" --out={file}" if file else ""
        raise InputError(
            f"{path} is missing; `{command}` makes it (without a network, `{command} "
            f"--from={files}`), or {NETWORKS[name].without}"
        )
    digests = _origin(path) or [sha256(path)]
    known = published.is_published(name, digests)
    return NetworkWeights(convert(name, [path]), published.joined(digests), known)


def convert(name: str, paths: Sequence[Path]) -> Any:
    """A network's parameters f32 from the files that together hold its tensors.

    Raises InputError for tensors that are missing, left over, of another shape or not finite.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in paths:
        for key, array in _used(name, read_tensors(path)).items():
            if key in tensors:
                raise InputError(f"{path} holds {key} once more; give each file of {name} once")
            tensors[key] = tensor_file.to_f32(path, key, array)
    try:
        return from_tensors(name, tensors)
    except InputError as error:
        names = ", ".join(map(str, paths))
        raise InputError(f"{names}: {error}; those of {name} are expected") from error


def from_tensors(name: str, tensors: Mapping[str, np.ndarray]) -> Any:
    """A network's parameters from tensors by their published names or by ours.

    Each is used once or known as of no use; InputError where one is missing, left over or of
    another shape.
    """
    network, tensors = NETWORKS[name], _used(name, tensors)
    paths = flatten(network.shapes()).keys()
    if tensors.keys() & paths:
        return to_ours({p: Entry((p,), SAME) for p in paths}, tensors, network.shapes())
    return network.params(tensors)


def save(path: Path, params: Mapping[str, Any], origin: Mapping[str, str]) -> None:
    """Writes our own file, whole or not at all; `origin` is {name of a file: sha256}."""
    arrays = {k: np.ascontiguousarray(v, np.float32) for k, v in flatten(params).items()}
    sources = ", ".join(f"{name} sha256:{digest}" for name, digest in origin.items())
    metadata = {"origin": sources, "tensors": digest_arrays(arrays)}
    with replacing(path) as temporary:
        tensor_file.write(temporary, arrays, metadata)


def check_readable(file: str | Path) -> None:
    """Raises InputError unless `read_tensors` knows the kind of file, here and now."""
    suffix = Path(file).suffix
    if suffix not in SUFFIXES:
        raise InputError(
            f"{file} must be one of {', '.join(SUFFIXES)}: other files, pickles and TorchScript "
            "among them, can run code when they are read; if you trust its author, load it where "
            "it was made and save its state dict with safetensors.torch.save_file"
        )
    if suffix in TORCH_SUFFIXES:
        torch_file.require(file)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors, an .npz without pickles, or a .pth or .bin of tensors."""
    check_readable(path)
    if path.suffix in TORCH_SUFFIXES:
        return torch_file.state_dict(path)
    if path.suffix == ".npz":
        return read_npz(path)
    return tensor_file.read_raw(path)


def _used(name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    unused = NETWORKS[name].unused
    return {key: a for key, a in tensors.items() if not re.fullmatch(unused, key)}


def _origin(path: Path) -> list[str]:
    """The digests of what our own file was made from, none for another's file.

    Raises InputError where a tensor is not what it was when it was written.
    """
    metadata = tensor_file.metadata(path) if path.suffix == ".safetensors" else {}
    if "tensors" not in metadata:
        return []
    if digest_arrays(tensor_file.read_raw(path)) != metadata["tensors"]:
        raise InputError(
            f"{path} is damaged: its tensors changed since they were written; make it again"
        )
    return re.findall(r"sha256:([0-9a-f]{64})", metadata.get("origin", ""))
