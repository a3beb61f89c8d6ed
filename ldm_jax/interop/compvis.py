"""First stages as CompVis' latent-diffusion and taming-transformers save them.

A file holds a state dict of PyTorch: a `.ckpt`, or the same tensors as `.safetensors`. Of a whole
latent diffusion model the part under `first_stage_model.` counts.
"""

import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop import tensor_file

PREFIX = "first_stage_model."
# The discriminator and its perceptual network; the moving average, whose names have lost their
# dots: the raw weights are the ones that CompVis' code loads a first stage from.
IGNORED = ("loss.", "model_ema.")
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
CONVERT = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "d = torch.load(sys.argv[1], map_location='cpu', weights_only=False); "
    "d = d.get('state_dict', d); "
    "save_file({k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}, "
    'sys.argv[2])" IN.ckpt OUT.safetensors'
)


def read_file(path: Path) -> dict[str, np.ndarray]:
    """The first stage's tensors as f32, by their names in CompVis' code.

    Raises InputError for a file that is damaged, of an unknown kind, or that holds more than
    tensors and so can't be read without trusting it.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; check the path")
    if path.suffix in TORCH_SUFFIXES:
        state = _torch_state_dict(path)
        chosen = first_stage_names(state)
        return {
            name: tensor_file.to_f32(path, full, _to_numpy(state[full]))
            for full, name in chosen.items()
        }
    if path.suffix == ".safetensors":
        chosen = first_stage_names(tensor_file.tensor_names(path))
        tensors = tensor_file.read(path, chosen)
        return {chosen[full]: array for full, array in tensors.items()}
    raise InputError(
        f"{path} ends in {path.suffix!r}; weights come as .safetensors or as one of "
        f"{', '.join(TORCH_SUFFIXES)}"
    )


def first_stage_names(names: Iterable[str]) -> dict[str, str]:
    """{name in the file: name in the first stage}, for the first stage's weights alone."""
    names = list(names)
    inside = [name for name in names if name.startswith(PREFIX)] or names
    stripped = {name: name.removeprefix(PREFIX) for name in inside}
    for name in stripped.values():
        if ".down_blocks." in name:
            raise InputError(
                f"{name} is a name of diffusers, not of CompVis; give the folder that the file is "
                "in, with its config.json"
            )
    return {full: name for full, name in stripped.items() if not name.startswith(IGNORED)}


def _torch_state_dict(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path} is a PyTorch file and torch is not installed; install it with "
            f"`pip install torch`, or make a safetensors file where it is: {CONVERT}"
        ) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if not found:
            raise _damaged(path, error) from error
        raise InputError(
            f"{path} holds Python objects besides tensors ({found[1]}) and is untrusted: reading "
            "them runs whatever code the file asks for; if you trust its author, make a clean "
            f"file on a machine that has what it needs, then import that: {CONVERT}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    state = {name: value for name, value in state.items() if torch.is_tensor(value)}
    if not state:
        raise InputError(f"{path} holds no state dict; give a checkpoint of a first stage")
    return state


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])[:100]
    return InputError(f"{path} is damaged or no PyTorch file ({reason}); fetch it again")


def _to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as it is, except that numpy knows no bfloat16: that becomes f32."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
