"""Files of named tensors in the safetensors format, read as f32 whatever they are stored as."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ldm_jax.errors import InputError

MADE_FOR_TORCH = {"format": "pt"}  # which PyTorch's readers ask for


def tensor_names(path: Path) -> list[str]:
    """The names in a file; InputError when it is damaged."""
    with _opened(path) as file:
        return list(file.keys())


def read(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The named tensors as f32; InputError for one that is no floating-point array."""
    with _opened(path) as file:
        return {name: to_f32(path, name, file.get_tensor(name)) for name in names}


def read_raw(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as it is stored."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def metadata(path: Path) -> dict[str, str]:
    """What a file says about itself."""
    with _opened(path) as file:
        return file.metadata() or {}


def to_f32(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """bf16, f16, f32 or f64 -> f32; InputError for integers and the like, and for nan or inf."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(
            f"{path}: {name} holds {array.dtype}, and weights are floating-point numbers; convert "
            "the file to f32, f16 or bf16"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {name} holds values that are not finite; fetch the file again")
    return array


def write(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] = MADE_FOR_TORCH
) -> None:
    """Writes f32 tensors in the order of their names, and what the file says about itself."""
    # The format's writer takes an array's memory as it lies, whatever its strides say.
    arrays = {n: np.ascontiguousarray(tensors[n], np.float32) for n in sorted(tensors)}
    save_file(arrays, path, metadata=dict(metadata))


def _opened(path: Path):
    if not path.is_file():
        raise InputError(f"{path} does not exist; check the path")
    try:
        return safe_open(path, "numpy")
    except SafetensorError as error:
        raise InputError(
            f"{path} is damaged or no safetensors file ({error}); fetch it again"
        ) from error
