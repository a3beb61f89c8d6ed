"""Folders of diffusers' `AutoencoderKL` and `VQModel`: config.json and one safetensors file."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.files import write_json
from ldm_jax.interop import tensor_file
from ldm_jax.interop.autoencoder_names import diffusers_names
from ldm_jax.interop.names import to_theirs
from ldm_jax.models import autoencoder

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
CLASSES = {"kl": "AutoencoderKL", "vq": "VQModel"}
VERSION = "0.36.0"  # of the format: the lower bound of the `parity` extra

# Fields with their values where a config.json lacks them.
ARCHITECTURE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
}
ARCHITECTURES = {
    "AutoencoderKL": ARCHITECTURE | {"latent_channels": 4},
    "VQModel": ARCHITECTURE
    | {"latent_channels": 3, "num_vq_embeddings": 256, "vq_embed_dim": None},
}
# What our models always do.
FIXED = {
    "AutoencoderKL": {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True},
    "VQModel": {"act_fn": "silu", "norm_type": "group"},
}
# What changes nothing in the network; an import remembers it for the next export.
NOTES = {"sample_size": 32, "scaling_factor": 0.18215, "force_upcast": False}
KEPT = {
    "AutoencoderKL": NOTES
    | {"force_upcast": True, "shift_factor": None, "latents_mean": None, "latents_std": None},
    "VQModel": NOTES | {"lookup_from_codebook": False},
}
# Names of attention's linear maps before diffusers 0.15.
OLD_PARTS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of config.json with defaults filled in.

    Raises InputError for another class, an unknown field, and a value that we have no model for.
    """
    path = folder / CONFIG
    if not path.is_file():
        inside = [name for name in ("vae", "vqvae") if (folder / name / CONFIG).is_file()]
        remedy = f"give {folder / inside[0]}" if inside else "give the folder of one model"
        raise InputError(f"{folder} holds no {CONFIG}; {remedy}")
    try:
        fields = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); fetch it again") from error
    name = fields.get("_class_name")
    if name not in ARCHITECTURES:
        raise InputError(
            f"{path} describes a {name!r}; first stages that can be imported are "
            f"{' and '.join(ARCHITECTURES)}"
        )
    known = ARCHITECTURES[name] | FIXED[name] | KEPT[name]
    for field, value in fields.items():
        if field in FIXED[name] and value != FIXED[name][field]:
            raise InputError(
                f"{path}: {field} is {value!r}, and ldm_jax has only {FIXED[name][field]!r}; "
                "this model cannot be imported"
            )
        if field not in known and not field.startswith("_"):
            raise InputError(
                f"{path}: {field} is a field that ldm_jax does not know for {name}; what it "
                "changes would be lost, so this model cannot be imported"
            )
    return {"_class_name": name} | known | {k: v for k, v in fields.items() if k in known}


def architecture(fields: dict[str, Any], resolution: int = 0) -> dict[str, Any]:
    """Fields of config.json -> those of `AutoencoderConfig` that they decide, as plain values.

    `resolution` (0: the sample_size) places attention, which config.json gives by level. Raises
    InputError for a model that is none of ours.
    """

    def refuse(field, rule):
        raise InputError(f"{CONFIG}: {field} is {fields[field]!r}; ldm_jax needs {rule}")

    try:
        widths = [int(width) for width in fields["block_out_channels"]]
        down, up = list(fields["down_block_types"]), list(fields["up_block_types"])
        levels = len(widths)
        kinds = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
        if len(down) != levels or not set(down) <= set(kinds):
            refuse("down_block_types", f"{levels} of {' or '.join(kinds)}")
        if up != [k.replace("DownEncoder", "UpDecoder") for k in reversed(down)]:
            refuse("up_block_types", "the mirror image of down_block_types")
        if any(width % widths[0] for width in widths):
            refuse("block_out_channels", "multiples of the first")
        if fields["in_channels"] != fields["out_channels"]:
            refuse("out_channels", f"as many as in_channels, {fields['in_channels']}")
        size = resolution or fields["sample_size"]
        if not isinstance(size, int) or size % 2 ** (levels - 1):
            size = 256
        found = {
            "latent": {name: latent for latent, name in CLASSES.items()}[fields["_class_name"]],
            "resolution": size,
            "image_channels": fields["in_channels"],
            "width": widths[0],
            "width_multipliers": tuple(width // widths[0] for width in widths),
            "num_res_blocks": fields["layers_per_block"],
            "attention_resolutions": tuple(size // 2**i for i in range(levels) if kinds[down[i]]),
            "middle_attention": fields["mid_block_add_attention"],
            "z_channels": fields["latent_channels"],
            "latent_channels": fields.get("vq_embed_dim") or fields["latent_channels"],
            "norm_groups": fields["norm_num_groups"],
        }
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{CONFIG} is damaged ({error}); fetch it again") from error
    if found["latent"] == "vq":
        found["quantizer"] = {"codebook_size": fields["num_vq_embeddings"]}
    return found


def kept(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that an import remembers for the next export."""
    return {name: fields[name] for name in KEPT[fields["_class_name"]]}


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The folder's weights as f32, under the names of today's diffusers."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(
            f"{folder} holds no {WEIGHTS}; write it with diffusers' "
            "save_pretrained(FOLDER, safe_serialization=True)"
        )
    tensors = tensor_file.read(path, tensor_file.tensor_names(path))
    return {_todays(name): array for name, array in tensors.items()}


def _todays(name: str) -> str:
    if ".attentions." not in name:
        return name
    return ".".join(OLD_PARTS.get(part, part) for part in name.split("."))


def write_folder(
    folder: Path, config: autoencoder.AutoencoderConfig, params: Any, notes: dict[str, Any]
) -> None:
    """Writes a model that diffusers' `from_pretrained` reads; `notes` are fields of KEPT.

    Raises InputError for a folder that holds something, and for what diffusers cannot express.
    """
    tensors = to_theirs(diffusers_names(config), params)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; name a new folder")
    fields = describe(config) | notes
    folder.mkdir(parents=True, exist_ok=True)
    tensor_file.write(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, fields)


def describe(config: autoencoder.AutoencoderConfig) -> dict[str, Any]:
    """config.json of a model, latents not scaled; the inverse of `architecture`."""
    name, attends = CLASSES[config.latent], config.attends
    fields = {
        "_class_name": name,
        "_diffusers_version": VERSION,
        **KEPT[name],
        **FIXED[name],
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attends)],
        "block_out_channels": [config.width * m for m in config.width_multipliers],
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.middle_attention,
        "latent_channels": config.z_channels,
        "sample_size": config.resolution,
        "scaling_factor": 1.0,
    }
    if config.latent == "vq":
        fields |= {
            "num_vq_embeddings": config.quantizer.codebook_size,
            "vq_embed_dim": config.latent_channels,
        }
    return fields
