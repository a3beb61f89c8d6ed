"""The U-Net's parameters in the state dicts of diffusers."""

from ldm_jax.errors import InputError
from ldm_jax.interop.names import (
    CONV,
    CONV_TO_LINEAR,
    LINEAR,
    SAME,
    Entry,
    Names,
    qkv_bias,
    qkv_kernel,
)
from ldm_jax.models import unet


def unet_names(config: unet.UNetConfig, context_dim: int) -> Names:
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
            return _res_block(ours, theirs)
        return _conv(ours, f"{theirs}.conv")

    names |= _linear("time_in", "time_embedding.linear_1")
    names |= _linear("time_out", "time_embedding.linear_2")
    names |= _conv("conv_in", "conv_in")
    names |= _res_block("mid_block1", "mid_block.resnets.0")
    names |= attention("mid_attention", "mid_block.attentions.0", widths[-1])
    names |= _res_block("mid_block2", "mid_block.resnets.1")
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
                names |= _res_block(f"{ours}_block{j}", f"{theirs}.resnets.{j}", shortcut=shortcut)
                if 2**i in config.attention_factors:
                    names |= attention(f"{ours}_attention{j}", f"{theirs}.attentions.{j}", width)
        if i != levels - 1:
            names |= resample(f"down{i}_downsample", f"{down}.downsamplers.0")
        if i:
            names |= resample(f"up{i}_upsample", f"{up}.upsamplers.0")
    return names


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


def _res_block(ours, theirs, *, shortcut=False):
    names = _linear(f"{ours}/time", f"{theirs}.time_emb_proj")
    for i in (1, 2):
        names |= _norm(f"{ours}/norm{i}", f"{theirs}.norm{i}")
        names |= _conv(f"{ours}/conv{i}", f"{theirs}.conv{i}")
    if shortcut:
        names |= _conv(f"{ours}/shortcut", f"{theirs}.conv_shortcut")
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
