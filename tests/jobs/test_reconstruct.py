"""`ldm reconstruct`: every image once, as the run's recipe says; a whole OUT or none."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm_jax import cli
from ldm_jax.data import pixels
from ldm_jax.eval.reconstruction import psnr, ssim
from ldm_jax.jobs import reconstruct
from ldm_jax.runs.first_stage import load_first_stage
from ldm_jax.runs.reconstruction import reconstruct as through
from ldm_jax.sharding import MeshConfig, make_mesh
from tests.jobs.test_errors import contents, refused


def picture(width, height, seed):
    x = np.random.default_rng(seed).normal(size=(height, width, 3)).cumsum(0).cumsum(1)
    return Image.fromarray(np.round(np.clip(128 + 10 * x, 0, 255)).astype(np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eleven images of many sizes, kinds and folders, and what is no image."""
    root = tmp_path_factory.mktemp("photos")
    (root / "deep" / "er").mkdir(parents=True)
    for i in range(8):
        picture(20 + i, 16, i).save(root / f"{i}.png")
    picture(9, 30, 8).save(root / "deep" / "a.jpg")
    picture(8, 8, 9).save(root / "deep" / "er" / "b.c.webp")
    picture(50, 50, 10).save(root / "deep" / "z.JPEG")
    (root / "notes.txt").write_text("no image")
    (root / "metadata.jsonl").write_text("{}")
    return root


@pytest.fixture(scope="module")
def command(first_stage, photos):
    return ["reconstruct", f"--workdir={first_stage}", f"--images={photos}"]


@pytest.fixture(scope="module")
def done(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "new" / "out"
    cli.main([*command, f"--out={out}", "--batch-size=8"])
    return out


NAMES = [*(f"{i}.png" for i in range(8)), "deep/a.jpg", "deep/er/b.c.webp", "deep/z.JPEG"]


def test_each_image_is_reconstructed_under_its_name(done, photos, first_stage):
    mesh = make_mesh(MeshConfig())
    stage = load_first_stage(first_stage, mesh)
    squares = [pixels.square(Image.open(photos / n).convert("RGB"), 8, "bicubic") for n in NAMES]
    originals = np.stack([np.asarray(s) for s in squares])
    want = through(stage, originals, mesh)
    record = json.loads((done / "reconstruction.json").read_text())
    assert list(record["images"]) == NAMES
    got = np.stack([np.asarray(Image.open(done / f"{n.rpartition('.')[0]}.png")) for n in NAMES])
    np.testing.assert_allclose(got.astype(int), want, atol=1)
    assert want.std() > 1
    quality = [record["images"][n]["psnr_db"] for n in NAMES]
    np.testing.assert_allclose(quality, psnr(originals, got), rtol=1e-12)
    assert record["mean"] == {"psnr_db": pytest.approx(np.mean(quality))}  # 8 pixels: no SSIM
    assert (record["size"], record["step"], record["kernel"]) == (8, 3, "bicubic")
    assert record["encoder_hash"] == stage.encoder_hash
    # Originals beside their reconstructions, four pairs to a row.
    grid = np.asarray(Image.open(done / "grid.png"))
    assert grid.shape == (3 * 8 + 2 * 2, 8 * 8 + 7 * 2, 3)
    np.testing.assert_array_equal(grid[10:18, 20:28], originals[5])
    np.testing.assert_array_equal(grid[10:18, 30:38], got[5])
    assert len(contents(done)) == len(NAMES) + 2
    assert [p.name for p in done.parent.iterdir()] == ["out"]


def test_another_size_goes_through_the_same_weights(command, tmp_path, capsys):
    cli.main([*command, f"--out={tmp_path / 'out'}", "--size=24"])
    record = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert record["size"] == 24 and set(record["mean"]) == {"psnr_db", "ssim"}
    rebuilt = np.asarray(Image.open(tmp_path / "out" / "3.png"))
    assert rebuilt.shape == (24, 24, 3)
    assert "ssim" in capsys.readouterr().out
    first = record["images"]["3.png"]
    photo = reconstruct.read_image(command[2].removeprefix("--images="), "3.png")
    original = np.asarray(pixels.square(photo, 24, "bicubic"))
    assert first["ssim"] == pytest.approx(ssim(original[None], rebuilt[None])[0])


def test_a_negative_batch_size_is_refused_and_the_current_folder_is_a_place(
    first_stage, tmp_path, capsys, monkeypatch
):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    picture(8, 8, 0).save(tmp_path / "in" / "a.png")
    monkeypatch.chdir(tmp_path / "out")
    arguments = [f"--workdir={first_stage}", f"--images={tmp_path / 'in'}", "--out=."]
    line = refused(capsys, ["reconstruct", *arguments, "--batch-size=-1"])
    assert "--batch-size -1 must be at least 0" in line
    cli.main(["reconstruct", *arguments])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("a.png", "grid.png", "reconstruction.json")
    }


@pytest.mark.parametrize("size", [-8, 7])
def test_a_size_that_does_not_divide_is_refused(command, tmp_path, capsys, size):
    line = refused(capsys, [*command, f"--out={tmp_path / 'out'}", f"--size={size}"])
    assert f"--size {size} must divide by 2" in line and "nearest: " in line
    assert not (tmp_path / "out").exists()


def test_an_out_that_holds_something_or_lies_inside_is_refused(command, photos, tmp_path, capsys):
    before = contents(photos)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        line = refused(capsys, [*command, f"--out={tmp_path / name}"])
        assert "exists and is no empty folder" in line
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine").read_text() == "mine"
    (tmp_path / "link").symlink_to(photos)
    for place in (photos / "out", photos / "deep" / ".." / "out", tmp_path / "link" / "out"):
        assert "lies inside --images" in refused(capsys, [*command, f"--out={place}"])
    assert contents(photos) == before


def test_folders_without_images_are_refused(first_stage, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name, words in (("empty", "holds no images"), ("absent", "does not exist")):
        arguments = [f"--workdir={first_stage}", f"--images={tmp_path / name}"]
        line = refused(capsys, ["reconstruct", *arguments, f"--out={tmp_path / 'out'}"])
        assert words in line and name in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [("a.png", "a.jpg"), ("grid.jpg",)])
def test_images_of_one_name_are_refused(first_stage, tmp_path, capsys, names):
    (tmp_path / "in").mkdir()
    for name in names:
        picture(8, 8, 0).save(tmp_path / "in" / name)
    arguments = [f"--workdir={first_stage}", f"--images={tmp_path / 'in'}"]
    line = refused(capsys, ["reconstruct", *arguments, f"--out={tmp_path / 'out'}"])
    assert f"would both become {names[0].partition('.')[0]}.png" in line


def test_a_broken_image_is_named_and_leaves_no_half_of_an_out(first_stage, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(9):
        picture(8, 8, i).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "9.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    arguments = [f"--workdir={first_stage}", f"--images={tmp_path / 'in'}", "--batch-size=8"]
    line = refused(capsys, ["reconstruct", *arguments, f"--out={tmp_path / 'out'}"])
    assert "cannot decode image" in line and "9.png" in line
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_workdir_without_a_run_is_refused(photos, tmp_path, capsys):
    arguments = [f"--workdir={tmp_path}", f"--images={photos}", f"--out={tmp_path / 'out'}"]
    assert "holds no run.json" in refused(capsys, ["reconstruct", *arguments])
