import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from ldm_jax.errors import InputError
from ldm_jax.eval.images_out import grid, load_npz, png_bytes, save_grid, save_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)


def test_png_holds_the_pixels_exactly():
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(png_bytes(IMAGES[0])))), IMAGES[0]
    )


def test_grid_holds_image_i_at_its_row_and_column(tmp_path):
    save_grid(IMAGES, tmp_path / "grid.png", columns=3)
    canvas = np.asarray(Image.open(tmp_path / "grid.png"))
    assert canvas.shape == (2 * 6 + 2, 3 * 4 + 2 * 2, 3)
    for i, image in enumerate(IMAGES):
        top, left = i // 3 * 8, i % 3 * 6
        np.testing.assert_array_equal(canvas[top : top + 6, left : left + 4], image)
    assert (canvas[8:, 12:] == 255).all()


def test_grid_is_no_wider_than_its_images():
    assert grid(IMAGES[:2], columns=10, gap=0).shape == (6, 8, 3)


@pytest.mark.parametrize("labels", [None, np.arange(5, dtype=np.int32)], ids=["bare", "labels"])
def test_npz_comes_back_as_it_was_saved(tmp_path, labels):
    save_npz(IMAGES, labels, tmp_path / "samples.npz")
    images, found = load_npz(tmp_path / "samples.npz")
    np.testing.assert_array_equal(images, IMAGES)
    if labels is None:
        assert found is None
    else:
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, labels)


def test_npz_has_the_names_and_types_of_adm(tmp_path):
    save_npz(IMAGES, np.arange(5), tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert {k: v.dtype for k, v in file.items()} == {"arr_0": np.uint8, "arr_1": np.int64}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": IMAGES.astype(np.float32)}, "uint8"),
        ({"arr_0": IMAGES[..., :1]}, r"\[N,H,W,3\]"),
        ({"arr_0": IMAGES, "arr_1": np.arange(4)}, r"\[5\]"),
        ({"arr_0": IMAGES, "arr_1": np.arange(5.0)}, "integer"),
        ({"images": IMAGES}, "arr_0"),
        ({"arr_0": np.array([{}], object)}, "plain arrays"),
    ],
    ids=["float", "grey", "few labels", "float labels", "no arr_0", "pickle"],
)
def test_wrong_content_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_npz(tmp_path / "bad.npz")


def test_broken_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_npz(tmp_path / "none.npz")
    save_npz(IMAGES, None, tmp_path / "samples.npz")
    whole = (tmp_path / "samples.npz").read_bytes()
    (tmp_path / "samples.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a whole"):
        load_npz(tmp_path / "samples.npz")


def test_header_that_promises_more_than_the_file_holds_is_refused(tmp_path):
    member = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 256, 256, 3)}
    np.lib.format.write_array_header_1_0(member, header)
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as archive:
        archive.writestr("arr_0.npy", member.getvalue() + b"few bytes")
    with pytest.raises(InputError, match="header"):
        load_npz(tmp_path / "liar.npz")
