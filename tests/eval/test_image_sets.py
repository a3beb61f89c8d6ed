import io
import os
import resource
import zipfile

import numpy as np
from PIL import Image

from ldm_jax.eval import image_sets
from tests.eval.test_references import refused


def test_images_are_streamed_a_batch_at_a_time(tmp_path, monkeypatch):
    """50 000 images of 32 x 32: 150 MB in the file, one batch in memory."""
    path, num = tmp_path / "samples.npz", 50_000
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (num, 32, 32, 3)}
    )
    image = np.arange(3072, dtype=np.uint8).tobytes()
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("arr_0.npy", "w") as file:
        file.write(header.getvalue())
        for _ in range(num // 500):
            file.write(image * 500)
    pictures = image_sets.open_set(path)
    asked = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(
        zipfile.ZipExtFile, "read", lambda self, n=-1: asked.append(n) or read(self, n)
    )
    before, seen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    read_rows = pictures.open(256)
    for start in range(0, num, 256):
        batch = read_rows(np.arange(start, min(start + 256, num)))
        seen += len(batch)
        assert len(batch) <= 256 and batch[-1, -1, -1, -1] == 255
    assert seen == num and max(asked) == 256 * 3072 and min(asked) >= 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB


def paint(path, size=(8, 6), value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


def test_folder_of_images_is_streamed_in_sorted_order(tmp_path):
    for name, value in (("b/1.png", 10), ("a/2.png", 20), ("c.png", 30)):
        paint(tmp_path / name, value=value)
    pictures = image_sets.open_set(tmp_path)
    assert pictures.num == 3
    read = pictures.open(2)
    batches = [read(np.array(i)) for i in ([0, 1], [2], [])]
    assert [b.shape for b in batches] == [(2, 6, 8, 3), (1, 6, 8, 3), (0, 6, 8, 3)]
    assert [int(b[i, 0, 0, 0]) for b in batches for i in range(len(b))] == [20, 10, 30]
    again = image_sets.open_set(tmp_path)
    assert again.digest == pictures.digest
    assert again.open(2)(np.array([1, 2]))[0, 0, 0, 0] == 10
    paint(tmp_path / "d.png")
    assert image_sets.open_set(tmp_path).digest != pictures.digest


def test_other_images_in_files_of_the_same_length_are_other_images(tmp_path):
    """What is kept of a reference's features is found again by its digest."""
    digests = set()
    for value in (10, 20, 10):
        paint(tmp_path / "a.bmp", value=value)
        digests.add((image_sets.open_set(tmp_path).digest, os.path.getsize(tmp_path / "a.bmp")))
    assert len(digests) == 2 and len({size for _, size in digests}) == 1


def test_images_that_cannot_be_measured_together_are_refused(tmp_path):
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.png", size=(6, 8))
    refused(r"different sizes \(a.png \(6, 8\), b.png \(8, 6\)", image_sets.open_set, tmp_path)
    (tmp_path / "b.png").write_bytes(b"no image")
    refused("cannot read image .*b.png", image_sets.open_set, tmp_path)
    Image.new("1", (9000, 9000)).save(tmp_path / "b.png")
    refused("81000000 pixels", image_sets.open_set, tmp_path)
    for array, match in (
        (np.zeros((2, 4, 4, 3), np.float32), "float32"),
        (np.zeros((2, 4, 4), np.uint8), "the rule is uint8"),
        (np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8)), "in Fortran order"),
    ):
        np.savez(tmp_path / "images.npz", array)
        refused(match, image_sets.open_set, tmp_path / "images.npz")
    np.savez(tmp_path / "images.npz", np.zeros((2, 4, 4, 3), np.uint8), np.arange(3))
    refused("one integer per image", image_sets.open_set, tmp_path / "images.npz")
