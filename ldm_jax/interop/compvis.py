"""First stages as CompVis' latent-diffusion and taming-transformers save them.

A file holds a state dict of PyTorch: a `.ckpt`, or the same tensors as `.safetensors`. Of a whole
latent diffusion model the part under `first_stage_model.` counts.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop import tensor_file, torch_file

PREFIX = "first_stage_model."
# The discriminator and its perceptual network; the moving average, whose names have lost their
# dots: the raw weights are the ones that CompVis' code loads a first stage from.
IGNORED = ("loss.", "model_ema.")
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


def read_file(path: Path) -> dict[str, np.ndarray]:
    """The first stage's tensors as f32, by their names in CompVis' code.

    Raises InputError for a file that is damaged, of an unknown kind, or that holds more than
    tensors and so can't be read without trusting it.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; check the path")
    if path.suffix in TORCH_SUFFIXES:
        state = torch_file.state_dict(path)
        chosen = first_stage_names(state)
        return {name: tensor_file.to_f32(path, full, state[full]) for full, name in chosen.items()}
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
