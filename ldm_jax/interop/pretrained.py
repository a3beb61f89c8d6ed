"""Frozen networks whose weights others published: which files, which names, and our own file.

Our file is .safetensors: f32, the paths of our tree joined by "/", its origin as metadata. The
Inception keeps its published names and layout. Nothing needs torch except reading a .pth.
"""

import hashlib
import os
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ldm_jax.errors import InputError
from ldm_jax.models import perceptual_net


class Published(NamedTuple):
    file: str
    sha256: str
    url: str


PUBLISHED = {
    "lpips": (
        Published(
            "vgg16-397923af.pth",  # torchvision, trained on ImageNet
            "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            "https://download.pytorch.org/models/vgg16-397923af.pth",
        ),
        Published(
            "vgg.pth",  # LPIPS v0.1, md5 d507d7349b931f0638a25a48a722f98a
            "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
            "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/"
            "v0.1/vgg.pth",
        ),
    ),
    "inception": (
        Published(
            "pt_inception-2015-12-05-6726825d.pth",
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
            "pt_inception-2015-12-05-6726825d.pth",
        ),
    ),
}
# How to do without a network's weights.
WITHOUT = {
    "lpips": "set --config.loss.perceptual_weight=0",
    "inception": "leave out the metrics of Inception features",
}
# Enough of the FID Inception to tell it from torchvision's, which has 1000 classes.
INCEPTION_SHAPES = {
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Conv2d_1a_3x3.bn.running_var": (32,),
    "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
    "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
    "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
    "fc.weight": (1008, 2048),
    "fc.bias": (1008,),
}
# VGG16's classifier, and what the lpips package's own state dict holds twice or as constants.
NOT_USED = ("classifier.", "lins.", "scaling_layer.")


def default_path(name: str) -> Path:
    """Where a network's converted weights are kept: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ldm_jax" / "weights" / f"{name}.safetensors"


def load(name: str, file: str = "") -> dict[str, Any]:
    """A network's parameters f32 from our own file; an empty `file` is `default_path`.

    Raises InputError for a file that is missing, damaged or of another network.
    """
    path = Path(file).expanduser() if file else default_path(name)
    if not path.is_file():
        files = ",".join(published.file for published in PUBLISHED[name])
        command = f"ldm weights {name}{f' --out={file}' if file else ''}"
        raise InputError(
            f"{path} is missing; `{command}` makes it (without a network, `{command} "
            f"--from={files}`), or {WITHOUT[name]}"
        )
    return convert(name, [path])


def convert(name: str, paths: Sequence[Path]) -> dict[str, Any]:
    """A network's parameters f32 from the files that together hold its tensors.

    Raises InputError for tensors that are missing, of another shape or not finite.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in paths:
        tensors |= read_tensors(path)
    try:
        return CONVERSIONS[name](tensors)
    except InputError as error:
        raise InputError(f"{', '.join(map(str, paths))}: {error}") from error


def save(path: Path, params: Mapping[str, Any], origin: str) -> None:
    """Writes our own file beside `path` and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {k: np.ascontiguousarray(v, np.float32) for k, v in _flatten(params).items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(arrays, temporary, {"origin": origin})
    temporary.replace(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_published(name: str, paths: Iterable[Path]) -> None:
    """Raises InputError for the first file that is none of the network's published ones."""
    for path in paths:
        found = sha256(path)
        if found not in {published.sha256 for published in PUBLISHED[name]}:
            files = ", ".join(f"{p.file} ({p.sha256[:8]})" for p in PUBLISHED[name])
            raise InputError(
                f"{path} has the sha256 {found[:8]}..; the published files of {name} are {files}: "
                "fetch it again, or add --unverified to convert other weights of the same shapes"
            )


def check_readable(file: str | Path) -> None:
    """Raises InputError unless `read_tensors` knows the kind of file, here and now."""
    suffix = Path(file).suffix
    if suffix not in (".safetensors", ".pth"):
        raise InputError(f"{file} must be a .safetensors or a .pth file; convert it to one of them")
    if suffix == ".pth":
        _torch(file)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors, or of a .pth that holds a state dict and nothing else."""
    check_readable(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(
                f"{path} is no sound .safetensors file ({error}); replace it"
            ) from error
    torch = _torch(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.numpy() for name, tensor in tensors.items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is no plain state dict ({reason}); replace it") from error


def _torch(file: str | Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{file} takes PyTorch to read: pip install '.[torch]', or convert it to .safetensors "
            "elsewhere and give that"
        ) from error
    return torch


def lpips_params(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Tensors by our names, torchvision's or the lpips package's -> the tree of perceptual_net."""
    names = _lpips_names()
    wanted = {path: leaf.shape for path, leaf in _flatten(perceptual_net.shapes()).items()}
    found = {_plain(name): a for name, a in tensors.items() if not name.startswith(NOT_USED)}
    if not found.keys() & set(names.values()):
        names = {path: path for path in names}
    unknown = sorted(found.keys() - set(names.values()))
    if unknown:
        raise InputError(
            f"tensor {unknown[0]!r} is not of VGG16 or LPIPS; give the published files"
        )
    flat = {}
    for path, name in names.items():
        array = _tensor(found, name)
        if name != path and array.ndim == 4:  # a 3x3 kernel OIHW -> HWIO; [1,C,1,1] -> [C]
            array = array.transpose(2, 3, 1, 0) if path.startswith("conv") else array.reshape(-1)
        _check_shape(name, array, wanted[path])
        flat[path] = array
    return _nested(flat)


def _lpips_names() -> dict[str, str]:
    """Our path of each parameter -> torchvision's name, or that of LPIPS's file."""
    names, position = {}, 0
    for b, widths in enumerate(perceptual_net.BLOCKS):
        for i in range(len(widths)):
            names[f"conv{b}_{i}/kernel"] = f"features.{position}.weight"
            names[f"conv{b}_{i}/bias"] = f"features.{position}.bias"
            position += 2  # the convolution and its ReLU
        position += 1  # the pooling
        names[f"lin{b}"] = f"lin{b}.model.1.weight"
    return names


def _plain(name: str) -> str:
    """torchvision's name of a convolution that the lpips package has in a slice."""
    return re.sub(r"^net\.slice\d\.", "features.", name)


def inception_params(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The published tensors, names and layout kept; counters of batches are left out."""
    for name, shape in INCEPTION_SHAPES.items():
        _check_shape(name, _tensor(tensors, name), shape)
    return {
        name: _tensor(tensors, name)
        for name in sorted(tensors)
        if not name.endswith(".num_batches_tracked")
    }


CONVERSIONS = {"lpips": lpips_params, "inception": inception_params}


def _tensor(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in tensors:
        raise InputError(f"tensor {name!r} is missing; give every file of the network")
    array = np.asarray(tensors[name], np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"tensor {name!r} is not finite; give an undamaged file")
    return array


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InputError(
            f"tensor {name!r} arrives in the shape {array.shape}, not {shape}: it is of another "
            "network; give the published files"
        )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = prefix + name
        flat |= _flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
