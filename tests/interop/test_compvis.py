"""Which tensors of a CompVis file are the first stage's; the PyTorch files are in tests/parity."""

import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ldm_jax.errors import InputError
from ldm_jax.interop import compvis
from ldm_jax.interop.autoencoder_names import compvis_names
from ldm_jax.interop.names import to_theirs
from tests.interop.test_names import VQ, drawn

OTHERS = (
    "loss.discriminator.main.0.weight",
    "loss.logvar",
    "model_ema.encoderconv_inweight",
    "model_ema.decay",
)


def test_losses_and_averages_are_left_and_nothing_else():
    names = ["encoder.conv_in.bias", "quantize.used", *OTHERS]
    kept = {"encoder.conv_in.bias", "quantize.used"}
    assert set(compvis.first_stage_names(names)) == kept
    whole = [f"{compvis.PREFIX}{n}" for n in names] + ["model.diffusion_model.out.0.bias", "betas"]
    assert compvis.first_stage_names(whole) == {f"{compvis.PREFIX}{n}": n for n in kept}


@pytest.mark.parametrize("prefix", ["", compvis.PREFIX])
def test_a_safetensors_file_is_read(tmp_path, prefix):
    tensors = to_theirs(compvis_names(VQ), drawn(VQ))
    stored = {
        f"{prefix}{n}": np.ascontiguousarray(a).astype(ml_dtypes.bfloat16)
        for n, a in tensors.items()
    }
    stored |= {f"{prefix}{n}": np.zeros(2, np.int64) for n in OTHERS}
    save_file(stored, tmp_path / "x.safetensors")
    read = compvis.read_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(read[name], expected, err_msg=name)


def test_names_of_diffusers_are_refused():
    with pytest.raises(InputError, match=r"config\.json"):
        compvis.first_stage_names(["encoder.down_blocks.0.resnets.0.conv1.bias"])


def test_without_torch_a_ckpt_is_refused_with_two_remedies(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match=r"pip install torch.*save_file"):
        compvis.read_file(tmp_path / "x.ckpt")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        compvis.read_file(tmp_path / "x.ckpt")
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(InputError, match=r"\.npz.*\.safetensors"):
        compvis.read_file(tmp_path / "x.npz")
