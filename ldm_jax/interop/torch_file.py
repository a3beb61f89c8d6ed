"""PyTorch's files, which are pickles: read only as far as they hold tensors and plain containers.

`weights_only` had holes before PyTorch 2.10 (CVE-2025-32434, CVE-2026-24747).
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.errors import InputError

OLDEST = (2, 10)  # version of PyTorch
CONVERT = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "d = torch.load(sys.argv[1], map_location='cpu', weights_only=False); "
    "d = d.get('state_dict', d); "
    "save_file({k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}, "
    'sys.argv[2])" IN OUT.safetensors'
)


def require(path: str | Path) -> Any:
    """The torch module; InputError, with the remedy, where it is missing or too old to be safe."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path} takes PyTorch to read: pip install '.[torch]' or pip install torch, or make "
            f"a safetensors file where it is: {CONVERT}"
        ) from error
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if not version or tuple(map(int, version.groups())) < OLDEST:
        raise InputError(
            f"{path}: PyTorch {torch.__version__} can be made to run code by a file; install "
            f"{OLDEST[0]}.{OLDEST[1]} or newer"
        )
    return torch


def state_dict(path: Path) -> dict[str, np.ndarray]:
    """{name: tensor} of a state dict, or of the one under "state_dict"; what is no tensor is left.

    bf16 becomes f32, which NumPy knows. Raises InputError for a file that is damaged, of another
    kind, or that holds more than tensors and so can't be read without trusting it.
    """
    torch = require(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if not found:
            raise _damaged(path, error) from error
        raise InputError(
            f"{path} holds Python objects besides tensors ({found[1]}) and is untrusted: reading "
            "them runs whatever code the file asks for; if you trust its author, make a clean "
            f"file on a machine that has what it needs, then give that: {CONVERT}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(path, error) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else {}
    tensors = {
        name: (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        for name, value in (state.items() if isinstance(state, Mapping) else ())
        if isinstance(name, str) and torch.is_tensor(value)
    }
    if not tensors:
        raise InputError(f"{path} holds no state dict; give a file of weights")
    return tensors


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])[:100]
    return InputError(f"{path} is damaged or no PyTorch file ({reason}); fetch it again")
