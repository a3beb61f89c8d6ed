"""Imports and exports against the libraries themselves: folders by diffusers, .ckpt by torch."""

import dataclasses
import functools
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm_jax.errors import InputError
from ldm_jax.interop import compvis as compvis_files
from ldm_jax.interop import torch_file
from ldm_jax.jobs import export_weights, import_weights
from ldm_jax.models import autoencoder
from ldm_jax.runs.first_stage import load_first_stage
from ldm_jax.sharding import MeshConfig, make_mesh
from tests import tiny
from tests.parity import compvis, reference
from tests.parity.test_autoencoder import CONFIGS, inputs

pytestmark = pytest.mark.parity

GAUSSIAN = dataclasses.replace(CONFIGS["attends inside"], z_channels=4, latent_channels=3)
QUANTIZED = dataclasses.replace(CONFIGS["vq-f4, narrower latent"], attention_resolutions=(8,))
FREE = CONFIGS["vq-f4 without attention"]


def compvis_model(config):
    return reference.randomize(compvis.FirstStage(config))


def overrides(config):
    images = dataclasses.replace(tiny.AUTOENCODER.images, resolution=config.resolution)
    return tiny.overrides(dataclasses.replace(tiny.AUTOENCODER, images=images, model=config))


def import_file(path, workdir, config):
    import_weights.run(path, workdir, "configs/autoencoder.py:digits", overrides(config))
    return load_first_stage(workdir, make_mesh(MeshConfig()))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_folder_of_diffusers_comes_back_bit_for_bit(tmp_path, config):
    model = reference.randomize(reference.first_stage(config))
    model.register_to_config(scaling_factor=0.3)
    model.save_pretrained(tmp_path / "in")
    import_weights.run(tmp_path / "in", tmp_path / "w", "", [])
    export_weights.run(tmp_path / "w", tmp_path / "out")
    kind = getattr(
        diffusers, json.loads((tmp_path / "in" / "config.json").read_text())["_class_name"]
    )
    back, told = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    theirs, ours = model.state_dict(), back.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    unchanged = {k: v for k, v in model.config.items() if not k.startswith("_")}
    assert {k: back.config[k] for k in unchanged} == unchanged


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("config", [GAUSSIAN, QUANTIZED, FREE], ids=["kl", "vq", "free"])
def test_a_ckpt_in_compvis_names_gives_the_same_numbers(tmp_path, config, prefix):
    model = compvis_model(config)
    state = compvis.checkpoint(model, prefix)
    torch.save(state, tmp_path / "model.ckpt")
    stage = import_file(tmp_path / "model.ckpt", tmp_path / "w", config)
    x, _, z, _ = inputs(config)
    encode, decode = compiled(config)
    theirs = reference.from_torch(model.encode(reference.to_torch(x)))
    assert reference.error(encode(stage.params, x), theirs) < 1e-4
    theirs = reference.from_torch(model.decode(reference.to_torch(z)))
    assert reference.error(decode(stage.params, z), theirs) < 1e-4


@functools.cache
def compiled(config):
    return (
        jax.jit(functools.partial(autoencoder.encode, config)),
        jax.jit(functools.partial(autoencoder.decode, config)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_and_double_weights_are_read_as_f32(tmp_path, dtype):
    model = compvis_model(FREE).to(dtype)
    state = compvis.checkpoint(model)["state_dict"]
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    save_file(state, tmp_path / "model.safetensors")
    expected = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    for file in ("model.ckpt", "model.safetensors"):
        read = compvis_files.read_file(tmp_path / file)
        assert read.keys() == expected.keys()
        for name, tensor in expected.items():
            assert read[name].dtype == np.float32
            np.testing.assert_array_equal(read[name], tensor, err_msg=name)


class Callback:
    """Stands for the callbacks of Lightning that released checkpoints contain."""


def test_a_ckpt_with_objects_is_refused_as_untrusted_and_can_be_cleaned(tmp_path, monkeypatch):
    state = compvis.checkpoint(compvis_model(FREE)) | {"callbacks": {Callback: {"best": 1}}}
    path = tmp_path / "model.ckpt"
    torch.save(state, path)
    with pytest.raises(InputError) as caught:
        compvis_files.read_file(path)
    line = str(caught.value)
    assert "\n" not in line
    for word in ("model.ckpt", "Callback", "untrusted", torch_file.CONVERT):
        assert word in line
    clean = tmp_path / "model.safetensors"
    monkeypatch.setattr("sys.argv", ["-c", str(path), str(clean)])
    program = torch_file.CONVERT.split('"')[1]
    exec(program, {})
    read = compvis_files.read_file(clean)
    np.testing.assert_array_equal(
        read["quant_conv.bias"], state["state_dict"]["quant_conv.bias"].numpy()
    )


class Payload:
    """Reading it by an ordinary unpickler writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_ckpt_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": {"x": Payload(tmp_path / "ran")}}, tmp_path / "model.ckpt")
    with pytest.raises(InputError, match="untrusted"):
        compvis_files.read_file(tmp_path / "model.ckpt")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_state_dict_is_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    for damage in (b"", b"not a checkpoint", b"PK\x03\x04 half a file"):
        path.write_bytes(damage)
        with pytest.raises(InputError, match="damaged or no PyTorch file"):
            compvis_files.read_file(path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="no state dict"):
        compvis_files.read_file(path)
