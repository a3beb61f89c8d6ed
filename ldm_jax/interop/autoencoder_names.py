"""The first stage's parameters in the state dicts of diffusers and of CompVis' code.

Both maps are read off our own tree, so that they hold for every config: a module's name is
translated, then the part of it, then the leaf.
"""

import re
from collections.abc import Callable
from typing import Any

import jax

from ldm_jax.errors import InputError
from ldm_jax.interop.names import CONV, LINEAR_TO_CONV, SAME, Entry, Names, Transform, flatten
from ldm_jax.models import autoencoder

ADAPTERS = {"encoder": "quant_conv", "decoder": "post_quant_conv"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
LEVEL = re.compile(r"level(\d+)_([a-z]+)(\d*)")

DIFFUSERS_MODULES = {
    "mid_block1": "mid_block.resnets.0",
    "mid_attention": "mid_block.attentions.0",
    "mid_block2": "mid_block.resnets.1",
    "norm_out": "conv_norm_out",
}
DIFFUSERS_PARTS = {
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
}
COMPVIS_MODULES = {
    "mid_block1": "mid.block_1",
    "mid_attention": "mid.attn_1",
    "mid_block2": "mid.block_2",
}
COMPVIS_PARTS = {"shortcut": "nin_shortcut", "out": "proj_out"}


def shapes(config: autoencoder.AutoencoderConfig) -> Any:
    """Our tree of parameters as shapes; none are made."""
    return jax.eval_shape(lambda: autoencoder.init(config, jax.random.key(0)))


def diffusers_names(config: autoencoder.AutoencoderConfig) -> Names:
    """The map to `AutoencoderKL` or `VQModel`; InputError for what these cannot express."""
    if config.latent == "kl" and config.z_channels != config.latent_channels:
        raise InputError(
            f"autoencoder z_channels {config.z_channels} and latent_channels "
            f"{config.latent_channels} must be equal to have names in diffusers' AutoencoderKL"
        )
    if config.width_multipliers[0] != 1:
        raise InputError(
            f"autoencoder width_multipliers {config.width_multipliers} must start with 1 to have "
            "names in diffusers; only models that do can go there"
        )
    last = len(config.width_multipliers) - 1

    def level(side, i, kind, j):
        block = f"{side}.down_blocks.{i}" if side == "encoder" else f"{side}.up_blocks.{last - i}"
        return (
            f"{block}."
            + {
                "block": f"resnets.{j}",
                "attention": f"attentions.{j}",
                "downsample": "downsamplers.0.conv",
                "upsample": "upsamplers.0.conv",
            }[kind]
        )

    return _names(config, level, DIFFUSERS_MODULES, DIFFUSERS_PARTS, attention=LINEAR_TO_CONV)


def compvis_names(config: autoencoder.AutoencoderConfig) -> Names:
    """The map to `AutoencoderKL`, `VQModel` and `VQModelInterface` of CompVis' code."""

    def level(side, i, kind, j):
        return (
            f"{side}.{'down' if side == 'encoder' else 'up'}.{i}."
            + {
                "block": f"block.{j}",
                "attention": f"attn.{j}",
                "downsample": "downsample.conv",
                "upsample": "upsample.conv",
            }[kind]
        )

    return _names(config, level, COMPVIS_MODULES, COMPVIS_PARTS, attention=CONV)


def _names(
    config: autoencoder.AutoencoderConfig,
    level: Callable[[str, int, str, str], str],
    modules: dict[str, str],
    parts: dict[str, str],
    *,
    attention: Transform,
) -> Names:
    if config.latent == "identity":
        raise InputError("an identity first stage has no weights; nothing to import or export")
    names: Names = {}
    for path in flatten(shapes(config)):
        if path == "quantizer/codebook":
            names[path] = Entry(("quantize.embedding.weight",), SAME)
            continue
        side, module, *inner, leaf = path.split("/")
        if module == "adapter":
            theirs = ADAPTERS[side]
        elif found := LEVEL.fullmatch(module):
            i, kind, j = found.groups()
            theirs = level(side, int(i), kind, j)
        else:
            theirs = f"{side}.{modules.get(module, module)}"
        theirs = ".".join([theirs, *(parts.get(part, part) for part in inner)])
        kernel = attention if "attention" in module else CONV
        names[path] = Entry((f"{theirs}.{LEAVES[leaf]}",), kernel if leaf == "kernel" else SAME)
    return names
