import ml_dtypes
import numpy as np
import pytest

from ldm_jax.data import fields
from ldm_jax.data.fields import DTYPES, LABEL, MIRRORS, Field
from ldm_jax.errors import InputError

MAP = Field("map", (2, 3), "int32", "flip")
BOTH = np.array([True, True])


def test_a_flipped_map_has_its_width_reversed_and_comes_back():
    values = np.arange(12, dtype=np.int32).reshape(2, 2, 3)
    once = fields.flipped(MAP, {"map": values}, BOTH)
    np.testing.assert_array_equal(once[1], [[8, 7, 6], [11, 10, 9]])
    np.testing.assert_array_equal(fields.flipped(MAP, {"map": once}, BOTH), values)
    deep = Field("deep", (2, 3, 4), "float32", "flip")
    values = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)
    once = fields.flipped(deep, {"deep": values}, BOTH)
    np.testing.assert_array_equal(once[..., 0, :], values[..., 2, :])


def test_only_the_rows_that_flip_are_mirrored_by_the_fields_rule():
    some = np.array([False, True])
    stored = Field("x", (), "float32", "stored")
    arrays = {"x": np.float32([1, 2]), "x_mirrored": np.float32([10, 20])}
    assert fields.flipped(stored, arrays, some).tolist() == [1, 20]
    assert fields.flipped(LABEL, {"label": np.arange(2)}, some).tolist() == [0, 1]
    values = np.arange(12, dtype=np.int32).reshape(2, 2, 3)
    mixed = fields.flipped(MAP, {"map": values}, some)
    np.testing.assert_array_equal(mixed[0], values[0])
    np.testing.assert_array_equal(mixed[1], values[1, :, ::-1])


def test_a_longer_string_of_the_mirrored_image_is_not_cut():
    field = Field("text", (), "str", "stored")
    arrays = {"text": np.array(["left", "up"]), "text_mirrored": np.array(["to the right", "up"])}
    assert fields.flipped(field, arrays, BOTH).tolist() == ["to the right", "up"]


@pytest.mark.parametrize("mirror", MIRRORS)
def test_what_a_field_stores_beside_it_is_what_its_rule_reads(mirror):
    field = Field("x", (2, 2), "float32", mirror)
    arrays = {name: np.zeros((2, 2, 2), np.float32) for name in field.array_names}
    if mirror == "none":
        with pytest.raises(InputError, match=r"^it has no mirrored x but flips are asked for"):
            fields.check_mirrors([LABEL, field], "it")
    else:
        fields.check_mirrors([LABEL, field], "it")
        assert fields.flipped(field, arrays, BOTH).shape == (2, 2, 2)
    assert (fields.without_copy(field) == field) == (mirror != "stored")


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_survive_the_record_and_reach_the_batch(dtype):
    field = Field("x", (2,), dtype)
    values = np.array([["a", "bcd"], ["é", ""]] if dtype == "str" else [[0, 1], [1, 0]])
    values = values.astype(field.batch_dtype)
    stored = fields.checked(field, {"x": values, "other": values}, np.arange(2), "mend it")
    assert set(stored) == {"x"}
    record = fields.to_record(field, stored["x"])
    assert record.dtype.kind != "V"  # which a npy file would not give back
    back = fields.to_batch(field, fields.from_record(field, record))
    np.testing.assert_array_equal(back, values)
    assert back.dtype == values.dtype


def test_bfloat16_is_rounded_once():
    field = Field("x", (), "bfloat16")
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    stored = fields.checked(field, {"x": values}, np.arange(100), "")["x"]
    rounded = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert fields.to_record(field, stored).dtype == np.uint16
    np.testing.assert_array_equal(fields.to_batch(field, stored), rounded)
    assert not np.array_equal(rounded, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.float32([[1, 2], [3, np.inf]]), r"x of example 8 are not finite; mend it"),
        (np.zeros((2, 3), np.float32), r"x of example 7 is float32 \(3,\) but .* float32 \(2,\)"),
        (np.array([["a", "b"]] * 2), r"x of example 7 is <U1 \(2,\) but the field is float32"),
        (None, r"x of example 7 is missing; mend it"),
    ],
)
def test_values_that_are_not_what_the_field_says_are_refused_by_example(values, message):
    arrays = {} if values is None else {"x": values}
    with pytest.raises(InputError, match=message):
        fields.checked(Field("x", (2,), "float32"), arrays, np.array([7, 8]), "mend it")


def test_floats_never_become_integers_nor_numbers_strings():
    for dtype, values in (("int32", np.float32([1.5])), ("str", np.array([1])), ("uint8", [300])):
        with pytest.raises(InputError, match=rf"but the field is {dtype}"):
            fields.checked(Field("x", (), dtype), {"x": np.asarray(values)}, np.arange(1), "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("x", (), "float16"), r"dtype of the field 'x': 'float16' is unknown; choose one of"),
        (("x", (), "int32", "swap"), r"mirror of the field 'x': 'swap' is unknown"),
        (("x", (3,), "int32", "flip"), r"'x' of shape \(3,\) has no width to flip"),
    ],
)
def test_a_field_refuses_what_it_does_not_know(values, message):
    with pytest.raises(InputError, match=message):
        Field(*values)
