"""Images to start from, what masks keep of them, and samples of other sizes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import pixels
from ldm_jax.diffusion import samplers
from ldm_jax.diffusion.grid import make_grid
from ldm_jax.diffusion.process import make_process
from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, key_for, normal_like
from ldm_jax.models import autoencoder, denoiser
from ldm_jax.sampling.draw import check_options, draw_samples
from ldm_jax.sampling.inputs import known_latents, latent_tiles, read_images
from ldm_jax.sampling.options import SampleOptions
from ldm_jax.sampling.program import compile_sampler, numbers_of, weights_of
from tests.sampling.quick import as_latents, encode, model_of, network, quick  # noqa: F401

FEW = SampleOptions(num=4, steps=4, batch_size=4, spacing="trailing")


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)


@pytest.fixture
def files(tmp_path, images):
    """init.npz of three images, mask.npz whose white stands in the middle, and folders of both."""
    mask = np.zeros((3, 16, 16), np.uint8)
    for i in range(3):
        mask[i, 5 : 9 + i, 4:11] = 255
    np.savez(tmp_path / "init.npz", images)
    np.savez(tmp_path / "mask.npz", mask)
    for kind, arrays in (("init", images), ("mask", mask)):
        (tmp_path / kind).mkdir()
        for i, array in enumerate(arrays):
            Image.fromarray(array).save(tmp_path / kind / f"{'cab'[i]}.png")
    return tmp_path


def editing(files, strength, **changes):
    given = {"init_images": str(files / "init.npz"), "strength": strength}
    return dataclasses.replace(FEW, **given, **changes)


def inpainting(files, **changes):
    given = {"init_images": str(files / "init.npz"), "masks": str(files / "mask.npz")}
    return dataclasses.replace(FEW, **given, **changes)


@pytest.mark.usefixtures("as_latents")
@pytest.mark.parametrize(("strength", "start"), [(0.5, 2), (0.2, 3), (0.99, 0)])
def test_editing_starts_from_the_noised_latents_of_image_i(
    model, images, files, monkeypatch, strength, start
):
    def begun(predict, grid, z, cond, keys):
        assert grid.num_steps == 4 - start
        return z

    monkeypatch.setitem(samplers.SAMPLERS, "ddim", begun)
    got = draw_samples(model, editing(files, strength, seed=3)).images
    grid = make_grid(make_process(model.run.process), 4, "trailing")
    keys = example_keys(key_for(3, "initial_noise"), jnp.arange(4))
    noise = normal_like(keys, jnp.zeros((4, 8, 8, 3)))
    z0 = model.codec.whitening.whiten(encode(None, None, autoencoder.to_unit(images[[0, 1, 2, 0]])))
    want = grid.alpha[start] * np.asarray(z0) + grid.sigma[start] * np.asarray(noise)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_inpainting_keeps_what_is_black(model, images, files):
    got = draw_samples(model, inpainting(files)).images
    white = np.load(files / "mask.npz")["arr_0"][[0, 1, 2, 0]] > 0
    want = images[[0, 1, 2, 0]]
    np.testing.assert_array_equal(got[~white], want[~white])
    assert np.abs(got[white].astype(int) - want[white]).mean() > 20
    assert np.abs(got[0].astype(int) - got[3]).max() > 5  # one image, another sample of it


def test_the_sampler_is_given_latents_that_touch_no_white(model, images, files, monkeypatch):
    def known_of(predict, grid, z, cond, keys, known, every):
        return z, (known.mask * known.z0)[None]

    monkeypatch.setitem(samplers.SAMPLERS, "ddim", known_of)
    settings = inpainting(files, progressive=1)
    program = compile_sampler(model, settings)
    rows = {"index": jnp.arange(3), "label": jnp.arange(3), **read_images(settings, model)}
    numbers = numbers_of(settings, make_process(model.run.process))
    got = program(weights_of(model), numbers, rows)[1][:, 0]
    white = rows["mask"].reshape(3, 8, 2, 8, 2).max((2, 4))
    z0 = np.asarray(model.codec.whitening.whiten(encode(None, None, autoencoder.to_unit(images))))
    np.testing.assert_allclose(got, np.where(white[..., None], 0, z0), atol=1e-5)


def test_a_latent_is_known_where_its_block_is():
    mask = np.random.default_rng(1).random((2, 12, 8)) < 0.1
    known = np.asarray(known_latents(jnp.asarray(mask), 4))
    assert known.shape == (2, 3, 2, 1) and 0 < known.mean() < 1
    for b, y, x in np.ndindex(2, 3, 2):
        block = mask[b, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        assert known[b, y, x, 0] == (not block.any())


def test_folders_are_read_by_name_and_cropped(model, images, files):
    settings = inpainting(files)
    folders = {"init_images": str(files / "init"), "masks": str(files / "mask")}
    got = read_images(dataclasses.replace(settings, **folders), model)
    plain = read_images(settings, model)
    for name in ("image", "mask"):
        np.testing.assert_array_equal(got[name], plain[name][[1, 2, 0]])
    two = read_images(dataclasses.replace(settings, **folders, num=2), model)
    assert len(two["image"]) == len(two["mask"]) == 2

    # Larger ones are shrunk; a pixel that touches white is white.
    big = np.zeros((32, 48), np.uint8)
    big[7, 31] = 255
    (files / "one").mkdir()
    Image.fromarray(big).save(files / "one" / "any.png")
    one = dataclasses.replace(settings, masks=str(files / "one"))
    mask = read_images(one, model)["mask"]
    assert mask.shape == (1, 16, 16) and np.argwhere(mask[0]).tolist() == [[3, 11]]


def test_cover_fills_a_rectangle_from_the_middle():
    grey = np.arange(40, dtype=np.uint8)
    wide = Image.fromarray(np.broadcast_to(grey, (8, 40)).copy())
    np.testing.assert_array_equal(np.asarray(pixels.cover(wide, 8, 20, "box"))[0], grey[10:30])
    np.testing.assert_array_equal(
        np.asarray(pixels.cover(wide.resize((80, 16), 0), 8, 20, "box"))[0], grey[10:30]
    )
    tall = wide.transpose(Image.Transpose.TRANSPOSE)
    assert pixels.cover(tall, 3, 16, "bicubic").size == (16, 3)
    np.testing.assert_array_equal(np.asarray(pixels.square(tall, 8, "box"))[:, 0], grey[16:24])
    rows = Image.fromarray(np.broadcast_to(grey[:8, None], (8, 12)).copy())
    np.testing.assert_array_equal(np.asarray(pixels.cover(rows, 4, 12, "box"))[:, 0], grey[2:6])


@pytest.mark.usefixtures("as_latents")
def test_other_sizes_and_tiles(model, tmp_path, monkeypatch):
    """Pixels that do not mix are the same in an image of any size, in tiles or whole."""
    noise = np.random.default_rng(0).standard_normal((4, 12, 20, 3)).astype(np.float32)
    np.save(tmp_path / "large.npy", noise)
    np.save(tmp_path / "trained.npy", noise[:, :8, 5:13])
    large = dataclasses.replace(FEW, size=(24, 40), noise=str(tmp_path / "large.npy"), guidance=2.0)
    whole = draw_samples(model, large).images
    assert whole.shape == (4, 12, 20, 3)
    trained = dataclasses.replace(large, size=(), noise=str(tmp_path / "trained.npy"))
    np.testing.assert_allclose(draw_samples(model, trained).images, whole[:, :8, 5:13], atol=1e-5)
    sides = []

    def recording(config, params, z_t, t, cond):
        sides.append(z_t.shape[1:3])
        return network(config, params, z_t, t, cond)

    monkeypatch.setattr(denoiser, "apply", recording)
    tiles = dataclasses.replace(large, tile=16, tile_overlap=4)
    np.testing.assert_allclose(draw_samples(model, tiles).images, whole, atol=1e-5)
    assert set(sides) == {(8, 8)}
    assert latent_tiles(tiles, model) == (8, 2)
    assert latent_tiles(dataclasses.replace(tiles, tile_overlap=-1), model) == (8, 4)


def test_progress_ends_on_the_sample(model):
    drawn = draw_samples(model, dataclasses.replace(FEW, num=5, progressive=2))
    assert drawn.progress.shape == (5, 2, 16, 16, 3)
    np.testing.assert_array_equal(drawn.progress[:, -1], drawn.images)
    assert np.abs(drawn.progress[:, 0].astype(int) - drawn.images).max() > 5
    assert draw_samples(model, FEW).progress.size == 0


def test_edited_and_painted_samples_do_not_depend_on_their_batch(model, files):
    settings = dataclasses.replace(inpainting(files), strength=0.75, size=(16, 16), num=5)
    whole = draw_samples(model, dataclasses.replace(settings, batch_size=5)).images
    parts = draw_samples(model, dataclasses.replace(settings, batch_size=2)).images
    assert np.abs(whole.astype(int) - parts).max() <= 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strength": 0.5}, "strength 0.5 is about images.*--init-images"),
        ({"masks": "m"}, "masks m is about images.*--init-images"),
        ({"init_images": "d"}, "init-images d would have no influence .*--strength=0.6"),
        ({"init_images": "d", "strength": 0.0}, r"strength 0.0 must be in \(0, 1\]"),
        ({"init_images": "d", "strength": 1.5}, r"strength 1.5 must be in \(0, 1\]"),
        ({"init_images": "d", "strength": 0.1}, "strength 0.1 of 4 steps is none.* 0.25"),
        ({"size": (24, 30)}, "size 30 must divide by 4.*nearest: 32"),
        ({"size": (16, 16, 3)}, "size 16,16,3 must be a side or HEIGHT,WIDTH"),
        ({"size": (0,)}, "size 0 must be a side"),
        ({"size": (17,), "tile": 16}, "size 17 must divide by 2"),
        ({"tile": 6}, "tile 6 must divide by 4.*nearest: 8"),
        ({"tile": -4}, "tile -4 must divide by 4"),
        ({"tile": 20}, "tile 20 is larger than the image, 16 x 16; use 16"),
        ({"tile_overlap": 4}, "tile-overlap 4 is about tiles; give --tile"),
        ({"tile": 8, "tile_overlap": 8}, "tile-overlap 8 must .*0..6"),
        ({"tile": 8, "tile_overlap": 3}, "tile-overlap 3 must divide by 2"),
        ({"progressive": -1}, "progressive -1 must be"),
        ({"progressive": 5}, "progressive 5 is more than the 4 steps"),
    ],
)
def test_bad_settings_are_refused(model, changes, words):
    with pytest.raises(InputError, match=words):
        check_options(dataclasses.replace(FEW, **changes), model)


def test_images_that_do_not_fit_are_refused(model, images, files):
    np.savez(files / "small.npz", images[:, :8])
    np.savez(files / "none.npz", images[:0])
    np.savez(files / "two.npz", np.zeros((2, 16, 16), np.uint8))
    np.savez(files / "real.npz", np.zeros((3, 16, 16)))
    np.savez(files / "ones.npz", np.ones((1, 16, 16), np.uint8))
    (files / "mask" / "b.png").rename(files / "mask" / "d.png")
    cases = [
        ({"init_images": "small.npz"}, "small.npz are 8 x 16, samples 16 x 16; resize"),
        ({"init_images": "none.npz"}, "none.npz holds no images"),
        ({"init_images": "absent.npz"}, "absent.npz does not exist"),
        ({"init_images": "absent"}, "absent does not exist"),
        ({"masks": "small.npz"}, r"arr_0 is uint8 \(3, 8, 16, 3\)"),
        ({"masks": "real.npz"}, "arr_0 is float64"),
        ({"masks": "ones.npz"}, "ones.npz are white nowhere.*from 128 on"),
        ({"masks": "two.npz"}, "two.npz holds 2 for 3 images; give one for each"),
        ({"init_images": "init", "masks": "mask"}, r"image b.png would get mask c.png"),
    ]
    for changes, words in cases:
        paths = {name: str(files / file) for name, file in changes.items()}
        with pytest.raises(InputError, match=words):
            read_images(dataclasses.replace(inpainting(files), **paths), model)
