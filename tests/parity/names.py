"""Our parameters by their names in the state dicts of diffusers; numpy only, no torch.

A map is {our path: (their names, transform)}: paths are joined by "/", and a transform turns their
tensors into our array and back. Several names for one path are tensors that we keep in one array.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.models import autoencoder, unet


class Transform(NamedTuple):
    to_ours: Callable[..., np.ndarray]  # their tensors, one argument each -> our array
    to_theirs: Callable[[np.ndarray], tuple[np.ndarray, ...]]  # our array -> their tensors


class Entry(NamedTuple):
    theirs: tuple[str, ...]
    transform: Transform


Names = dict[str, Entry]

SAME = Transform(lambda a: a, lambda a: (a,))
CONV = Transform(lambda w: w.transpose(2, 3, 1, 0), lambda w: (w.transpose(3, 2, 0, 1),))  # OIHW
LINEAR = Transform(lambda w: w.T, lambda w: (w.T,))
# A 1x1 convolution that one side writes as a linear map.
LINEAR_TO_CONV = Transform(lambda w: w.T[None, None], lambda w: (w[0, 0].T,))
CONV_TO_LINEAR = Transform(lambda w: w[:, :, 0, 0].T, lambda w: (w.T[:, :, None, None],))


def qkv_kernel(heads: int) -> Transform:
    """Linear q, k and v [C, C] each <-> one kernel [C, 3C] with columns by head, then q, k, v."""
    return _joined(LINEAR, heads)


def qkv_bias(heads: int) -> Transform:
    """Biases of q, k and v [C] each <-> one bias [3C] by head, then q, k, v."""
    return _joined(SAME, heads)


def _joined(each: Transform, heads: int) -> Transform:
    def to_ours(*qkv):
        parts = [each.to_ours(a) for a in qkv]
        split = [a.reshape(*a.shape[:-1], heads, -1) for a in parts]
        return np.stack(split, axis=-2).reshape(*parts[0].shape[:-1], -1)

    def to_theirs(a):
        split = a.reshape(*a.shape[:-1], heads, 3, -1)
        parts = [split[..., i, :].reshape(*a.shape[:-1], -1) for i in range(3)]
        return tuple(each.to_theirs(part)[0] for part in parts)

    return Transform(to_ours, to_theirs)


def autoencoder_names(config: autoencoder.Config) -> Names:
    """The map to `AutoencoderKL`, which has no latent narrower or wider than its bottleneck."""
    if config.z_channels != config.latent_channels:
        raise InputError(
            f"autoencoder z_channels {config.z_channels} and latent_channels "
            f"{config.latent_channels} must be equal to have names in diffusers' AutoencoderKL"
        )
    names: Names = {}
    widths = [config.width * m for m in config.width_multipliers]
    levels = len(widths)
    attends = [config.resolution // 2**i in config.attention_resolutions for i in range(levels)]

    for side in ("encoder", "decoder"):
        names |= _conv(f"{side}/conv_in", f"{side}.conv_in")
        names |= _res_block(f"{side}/mid_block1", f"{side}.mid_block.resnets.0")
        names |= _attention_of_convs(f"{side}/mid_attention", f"{side}.mid_block.attentions.0")
        names |= _res_block(f"{side}/mid_block2", f"{side}.mid_block.resnets.1")
        names |= _norm(f"{side}/norm_out", f"{side}.conv_norm_out")
        names |= _conv(f"{side}/conv_out", f"{side}.conv_out")
    names |= _conv("encoder/adapter", "quant_conv")
    names |= _conv("decoder/adapter", "post_quant_conv")

    def level(ours, theirs, i, blocks, width_in):
        for j in range(blocks):
            shortcut = j == 0 and width_in != widths[i]
            block = f"{theirs}.resnets.{j}"
            entries = _res_block(f"{ours}/level{i}_block{j}", block, shortcut=shortcut)
            if attends[i]:
                entries |= _attention_of_convs(
                    f"{ours}/level{i}_attention{j}", f"{theirs}.attentions.{j}"
                )
            yield entries

    for i in range(levels):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        finer = widths[max(i - 1, 0)]
        coarser = widths[min(i + 1, levels - 1)]
        for entries in level("encoder", down, i, config.num_res_blocks, finer):
            names |= entries
        for entries in level("decoder", up, i, config.num_res_blocks + 1, coarser):
            names |= entries
        if i != levels - 1:
            names |= _conv(f"encoder/level{i}_downsample", f"{down}.downsamplers.0.conv")
        if i:
            names |= _conv(f"decoder/level{i}_upsample", f"{up}.upsamplers.0.conv")
    return names


def unet_names(config: unet.Config, context_dim: int) -> Names:
    """The map to `UNet2DConditionModel`, or to `UNet2DModel` where context_dim is 0."""
    if context_dim and config.resample_in_blocks:
        raise InputError(
            "unet resample_in_blocks has no names in diffusers' UNet2DConditionModel; "
            "set it to False, or drop the context"
        )
    names: Names = {}
    widths = [config.width * m for m in config.width_multipliers]
    levels = len(widths)

    def attention(ours, theirs, width):
        if context_dim:
            return _spatial_transformer(ours, theirs, config.transformer_depth)
        return _attention_of_heads(ours, theirs, config.heads(width))

    def resample(ours, theirs):
        if config.resample_in_blocks:
            return _res_block(ours, theirs, time=True)
        return _conv(ours, f"{theirs}.conv")

    names |= _linear("time_in", "time_embedding.linear_1")
    names |= _linear("time_out", "time_embedding.linear_2")
    names |= _conv("conv_in", "conv_in")
    names |= _res_block("mid_block1", "mid_block.resnets.0", time=True)
    names |= attention("mid_attention", "mid_block.attentions.0", widths[-1])
    names |= _res_block("mid_block2", "mid_block.resnets.1", time=True)
    names |= _norm("norm_out", "conv_norm_out")
    names |= _conv("conv_out", "conv_out")
    for i, width in enumerate(widths):
        down, up = f"down_blocks.{i}", f"up_blocks.{levels - 1 - i}"
        for ours, theirs, blocks in (
            (f"down{i}", down, config.num_res_blocks),
            (f"up{i}", up, config.num_res_blocks + 1),
        ):
            for j in range(blocks):
                # Going up, the skip that is joined always changes the width.
                shortcut = theirs == up or (j == 0 and width != widths[max(i - 1, 0)])
                names |= _res_block(
                    f"{ours}_block{j}", f"{theirs}.resnets.{j}", shortcut=shortcut, time=True
                )
                if 2**i in config.attention_factors:
                    names |= attention(f"{ours}_attention{j}", f"{theirs}.attentions.{j}", width)
        if i != levels - 1:
            names |= resample(f"down{i}_downsample", f"{down}.downsamplers.0")
        if i:
            names |= resample(f"up{i}_upsample", f"{up}.upsamplers.0")
    return names


def to_ours(names: Names, tensors: Mapping[str, np.ndarray], shapes: Any) -> Any:
    """Their tensors -> our nested dicts of arrays; `shapes` is our tree, of things with a `shape`.

    Raises InputError for a tensor that is missing, left over or of another shape.
    """
    wanted = flatten(shapes)
    _check_same("our parameters", set(names), "the map", set(wanted))
    _check_same(
        "tensors", {n for e in names.values() for n in e.theirs}, "the checkpoint", set(tensors)
    )
    params: dict[str, Any] = {}
    for path, (theirs, transform) in names.items():
        array = transform.to_ours(*(np.asarray(tensors[name]) for name in theirs))
        if array.shape != wanted[path].shape:
            raise InputError(
                f"{', '.join(theirs)} gives {path} the shape {array.shape}; the config needs "
                f"{wanted[path].shape}: choose the config that the checkpoint was trained with"
            )
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return params


def to_theirs(names: Names, params: Any) -> dict[str, np.ndarray]:
    """Our nested dicts of arrays -> their state dict; the inverse of `to_ours`."""
    arrays = flatten(params)
    _check_same("our parameters", set(names), "the tree", set(arrays))
    tensors: dict[str, np.ndarray] = {}
    for path, (theirs, transform) in names.items():
        tensors |= zip(theirs, transform.to_theirs(np.asarray(arrays[path])), strict=True)
    return tensors


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {path: leaf}, paths joined by "/"."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    join = lambda name: f"{prefix}/{name}" if prefix else name  # noqa: E731
    return {path: x for name, sub in tree.items() for path, x in flatten(sub, join(name)).items()}


def _check_same(what, wanted, where, found):
    missing, unused = sorted(wanted - found), sorted(found - wanted)
    if missing or unused:
        raise InputError(
            f"{what} do not match {where}: {len(missing)} missing {missing[:3]}, {len(unused)} not "
            f"used {unused[:3]}; choose the config that the checkpoint was trained with"
        )


def _pair(ours, theirs, kernel, transform):
    return {
        f"{ours}/{kernel}": Entry((f"{theirs}.weight",), transform),
        f"{ours}/bias": Entry((f"{theirs}.bias",), SAME),
    }


def _conv(ours, theirs):
    return _pair(ours, theirs, "kernel", CONV)


def _linear(ours, theirs):
    return _pair(ours, theirs, "kernel", LINEAR)


def _norm(ours, theirs):
    return _pair(ours, theirs, "scale", SAME)


def _res_block(ours, theirs, *, shortcut=False, time=False):
    names = {}
    for i in (1, 2):
        names |= _norm(f"{ours}/norm{i}", f"{theirs}.norm{i}")
        names |= _conv(f"{ours}/conv{i}", f"{theirs}.conv{i}")
    if shortcut:
        names |= _conv(f"{ours}/shortcut", f"{theirs}.conv_shortcut")
    if time:
        names |= _linear(f"{ours}/time", f"{theirs}.time_emb_proj")
    return names


def _attention_of_convs(ours, theirs):
    names = _norm(f"{ours}/norm", f"{theirs}.group_norm")
    for our, their in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
        names |= _pair(f"{ours}/{our}", f"{theirs}.{their}", "kernel", LINEAR_TO_CONV)
    return names


def _attention_of_heads(ours, theirs, heads):
    qkv = [f"{theirs}.to_{x}" for x in "qkv"]
    return {
        **_norm(f"{ours}/norm", f"{theirs}.group_norm"),
        f"{ours}/qkv/kernel": Entry(tuple(f"{x}.weight" for x in qkv), qkv_kernel(heads)),
        f"{ours}/qkv/bias": Entry(tuple(f"{x}.bias" for x in qkv), qkv_bias(heads)),
        **_linear(f"{ours}/out", f"{theirs}.to_out.0"),
    }


def _spatial_transformer(ours, theirs, depth):
    names = _norm(f"{ours}/norm", f"{theirs}.norm")
    names |= _pair(f"{ours}/in", f"{theirs}.proj_in", "kernel", CONV_TO_LINEAR)
    names |= _pair(f"{ours}/out", f"{theirs}.proj_out", "kernel", CONV_TO_LINEAR)
    for i in range(depth):
        our, their = f"{ours}/block{i}", f"{theirs}.transformer_blocks.{i}"
        for k in (1, 2, 3):
            names |= _norm(f"{our}_norm{k}", f"{their}.norm{k}")
        for kind, attention in (("self", "attn1"), ("cross", "attn2")):
            for x in "qkv":
                path = f"{our}_{kind}/{x}/kernel"
                names[path] = Entry((f"{their}.{attention}.to_{x}.weight",), LINEAR)
            names |= _linear(f"{our}_{kind}/out", f"{their}.{attention}.to_out.0")
        names |= _linear(f"{our}_feed_forward/in", f"{their}.ff.net.0.proj")
        names |= _linear(f"{our}_feed_forward/out", f"{their}.ff.net.2")
    return names
