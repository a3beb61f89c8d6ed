"""Names of first stages in other libraries: one for each tensor, both ways, strangers refused."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.interop import names
from ldm_jax.interop.autoencoder_names import compvis_names, diffusers_names, shapes
from ldm_jax.models import autoencoder, quantizer

KL = autoencoder.AutoencoderConfig(
    resolution=16,
    width=8,
    width_multipliers=(1, 1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=4,
)
VQ = dataclasses.replace(
    KL,
    latent="vq",
    latent_channels=2,
    middle_attention=False,
    quantizer=quantizer.QuantizerConfig(codebook_size=5),
)
CONFIGS = {"kl": KL, "vq": VQ}
LIBRARIES = {"diffusers": diffusers_names, "CompVis": compvis_names}

# Some of the names that the released checkpoints have, and what they hold.
PUBLISHED = {
    ("diffusers", "kl"): {
        "encoder.conv_in.weight": (8, 3, 3, 3),
        "encoder.down_blocks.2.attentions.0.to_q.weight": (16, 16),
        "encoder.down_blocks.0.downsamplers.0.conv.bias": (8,),
        "encoder.mid_block.attentions.0.group_norm.weight": (16,),
        "encoder.conv_out.weight": (8, 16, 3, 3),
        "decoder.up_blocks.0.attentions.1.to_out.0.bias": (16,),
        "decoder.up_blocks.1.resnets.0.conv_shortcut.weight": (8, 16, 1, 1),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.bias": (4,),
    },
    ("CompVis", "kl"): {
        "encoder.conv_in.weight": (8, 3, 3, 3),
        "encoder.down.2.attn.0.q.weight": (16, 16, 1, 1),
        "encoder.down.0.downsample.conv.bias": (8,),
        "encoder.mid.attn_1.norm.weight": (16,),
        "encoder.conv_out.weight": (8, 16, 3, 3),
        "decoder.up.2.attn.1.proj_out.bias": (16,),
        "decoder.up.1.block.0.nin_shortcut.weight": (8, 16, 1, 1),
        "decoder.norm_out.bias": (8,),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.bias": (4,),
    },
    ("CompVis", "vq"): {
        "encoder.mid.block_2.conv2.weight": (16, 16, 3, 3),
        "encoder.conv_out.weight": (4, 16, 3, 3),
        "quant_conv.weight": (2, 4, 1, 1),
        "post_quant_conv.weight": (4, 2, 1, 1),
        "quantize.embedding.weight": (5, 2),
    },
}


@functools.cache
def drawn(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes(config))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_names_are_one_for_each_tensor_and_go_both_ways(config, library):
    name_map = LIBRARIES[library](config)
    used = [name for entry in name_map.values() for name in entry.theirs]
    assert len(set(used)) == len(used)
    theirs = names.to_theirs(name_map, drawn(config))
    back = names.to_ours(name_map, theirs, shapes(config))
    jax.tree.map(np.testing.assert_array_equal, back, drawn(config))


@pytest.mark.parametrize(("library", "kind"), PUBLISHED)
def test_names_and_shapes_are_the_published(library, kind):
    theirs = names.to_theirs(LIBRARIES[library](CONFIGS[kind]), drawn(CONFIGS[kind]))
    for name, shape in PUBLISHED[library, kind].items():
        assert theirs[name].shape == shape, name


def test_a_convolution_is_turned_not_reshaped():
    kernel = drawn(KL)["encoder"]["conv_in"]["kernel"]
    theirs = names.to_theirs(compvis_names(KL), drawn(KL))["encoder.conv_in.weight"]
    assert theirs[5, 1, 0, 2] == kernel[0, 2, 1, 5]


def test_tensors_that_do_not_fit_are_named_three_at_most_with_their_count():
    name_map = compvis_names(KL)
    theirs = names.to_theirs(name_map, drawn(KL))
    theirs["encoder.conv_in.weight"] = theirs["encoder.conv_in.weight"][..., 0]
    for name in [n for n in theirs if n.startswith("decoder.up.1.")]:
        theirs[name + "_"] = theirs.pop(name)
    with pytest.raises(InputError) as caught:
        names.to_ours(name_map, theirs, shapes(KL))
    line = str(caught.value)
    assert "\n" not in line
    count = len([n for n in theirs if n.endswith("_")])
    assert f"{count} missing: decoder.up.1.block.0.conv1.bias, " in line
    assert f"{count} unknown: decoder.up.1.block.0.conv1.bias_, " in line
    assert "1 of another shape: encoder.conv_in.weight (8, 3, 3) instead of (8, 3, 3, 3);" in line
    assert len(re.findall(r"decoder\.up\.1\.\S+", line)) == 6


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        (dict(latent_channels=3), "latent_channels"),
        (dict(width_multipliers=(2, 2, 2)), "width_multipliers"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(fields, word):
    with pytest.raises(InputError, match=word):
        diffusers_names(dataclasses.replace(KL, **fields))


def test_a_first_stage_without_weights_is_refused():
    identity = autoencoder.AutoencoderConfig(
        latent="identity", width_multipliers=(1,), latent_channels=3
    )
    with pytest.raises(InputError, match="no weights"):
        compvis_names(identity)
