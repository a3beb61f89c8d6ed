"""Files of tensors: any floating-point type comes in as f32, and damage is refused."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ldm_jax.errors import InputError
from ldm_jax.interop import tensor_file

VALUES = np.array([[1.0, -2.5, 0.15625], [3e-3, 1e4, -0.0]])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_every_floating_point_type_is_read_as_f32_exactly(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    stored = VALUES.astype(dtype)
    save_file({"x": stored, "y": stored}, path)
    assert tensor_file.tensor_names(path) == ["x", "y"]
    read = tensor_file.read(path, ["x"])
    assert read.keys() == {"x"}
    assert read["x"].dtype == np.float32
    np.testing.assert_array_equal(read["x"], stored.astype(np.float32))


def test_a_turned_array_is_written_as_its_values(tmp_path):
    path = tmp_path / "x.safetensors"
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    tensor_file.write(path, {"x": turned})
    np.testing.assert_array_equal(load_file(path)["x"], turned)


def test_integers_are_refused_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"used": np.arange(3)}, path)
    with pytest.raises(InputError, match="used holds int64"):
        tensor_file.read(path, ["used"])


def test_a_damaged_or_missing_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="does not exist"):
        tensor_file.tensor_names(path)
    save_file({"x": VALUES}, path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="damaged"):
        tensor_file.tensor_names(path)
