"""Folders of diffusers: config.json is our config, and what is not ours is refused by name."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from ldm_jax.errors import InputError
from ldm_jax.interop import diffusers
from ldm_jax.models import autoencoder
from ldm_jax.runs.config_files import build
from tests.interop.test_names import KL, VQ


def written(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    "config", [KL, VQ, autoencoder.AutoencoderConfig()], ids=["kl", "vq", "default"]
)
def test_a_config_goes_both_ways(tmp_path, config):
    fields = diffusers.read_config(written(tmp_path, diffusers.describe(config)))
    assert build(autoencoder.AutoencoderConfig, diffusers.architecture(fields)) == config


def test_absent_fields_have_the_defaults_of_diffusers(tmp_path):
    fields = diffusers.read_config(written(tmp_path, {"_class_name": "VQModel"}))
    config = build(autoencoder.AutoencoderConfig, diffusers.architecture(fields))
    assert (config.width, config.num_res_blocks, config.resolution) == (64, 1, 32)
    assert (config.z_channels, config.latent_channels) == (3, 3)
    assert config.quantizer.codebook_size == 256
    assert diffusers.kept(fields)["scaling_factor"] == 0.18215


def test_attention_is_placed_by_level_whatever_the_resolution(tmp_path):
    fields = diffusers.read_config(written(tmp_path, diffusers.describe(KL)))
    config = build(autoencoder.AutoencoderConfig, diffusers.architecture(fields, resolution=64))
    assert (config.resolution, config.attention_resolutions) == (64, (16,))
    assert diffusers.architecture(fields | {"sample_size": 18})["resolution"] == 256


@pytest.mark.parametrize(
    ("config", "fields", "words"),
    [
        (KL, {"_class_name": "AutoencoderTiny"}, ["AutoencoderTiny", "VQModel"]),
        (KL, {"use_quant_conv": False}, ["use_quant_conv", "False", "True"]),
        (KL, {"act_fn": "gelu"}, ["act_fn", "gelu"]),
        (KL, {"mystery": 1}, ["mystery"]),
        (VQ, {"norm_type": "spatial"}, ["norm_type", "spatial", "group"]),
        (VQ, {"shift_factor": 0.1}, ["shift_factor"]),
        (KL, {"down_block_types": ["DownEncoderBlock2D"]}, ["down_block_types", "3 of"]),
        (KL, {"up_block_types": ["UpDecoderBlock2D"] * 3}, ["up_block_types", "mirror"]),
        (KL, {"block_out_channels": [8, 12, 16]}, ["block_out_channels", "multiples"]),
        (KL, {"out_channels": 4}, ["out_channels", "in_channels"]),
        (KL, {"block_out_channels": "wide"}, ["damaged"]),
    ],
)
def test_what_we_have_no_model_for_is_refused_by_name(tmp_path, config, fields, words):
    folder = written(tmp_path, diffusers.describe(config) | fields)
    with pytest.raises(InputError) as caught:
        diffusers.architecture(diffusers.read_config(folder))
    for word in words:
        assert word in str(caught.value)


def test_a_folder_without_a_model_is_refused_with_where_one_is(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        diffusers.read_config(tmp_path)
    (tmp_path / "vae").mkdir()
    written(tmp_path / "vae", diffusers.describe(KL))
    with pytest.raises(InputError, match=str(tmp_path / "vae")):
        diffusers.read_config(tmp_path)
    with pytest.raises(InputError, match="safe_serialization"):
        diffusers.read_tensors(tmp_path / "vae")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        diffusers.read_config(tmp_path)


def test_old_names_of_attention_are_read_as_todays(tmp_path):
    old = "decoder.mid_block.attentions.0."
    one = np.ones(2, np.float32)
    parts = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    names = [f"{old}{part}.{leaf}" for part in parts for leaf in ("weight", "bias")]
    save_file({n: one for n in [*names, "key.bias"]}, tmp_path / diffusers.WEIGHTS)
    expected = [f"{old}{part}.{leaf}" for part in parts.values() for leaf in ("weight", "bias")]
    assert set(diffusers.read_tensors(tmp_path)) == {*expected, "key.bias"}


def test_an_export_is_unscaled_at_our_resolution():
    fields = diffusers.describe(dataclasses.replace(VQ, resolution=64, attention_resolutions=()))
    assert (fields["sample_size"], fields["scaling_factor"]) == (64, 1.0)
