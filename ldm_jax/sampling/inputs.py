"""Images to start from and masks of what to repaint, and the sizes that samples may have."""

from pathlib import Path, PurePosixPath

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ldm_jax.data import pixels
from ldm_jax.data.folder import image_files, read_image
from ldm_jax.errors import InputError
from ldm_jax.eval.images_out import load_npz, read_npz
from ldm_jax.runs.denoiser import Model
from ldm_jax.sampling.options import SampleOptions

WHITE = 128  # from this grey on a mask's pixel is repainted


def image_size(settings: SampleOptions, model: Model) -> tuple[int, int]:
    """(height, width) of the samples in pixels."""
    if settings.size:
        return settings.size[0], settings.size[-1]
    factor = model.first_stage.config.factor
    return model.latent_shape[0] * factor, model.latent_shape[1] * factor


def latent_shape(settings: SampleOptions, model: Model) -> tuple[int, int, int]:
    """[H,W,C] of what is denoised."""
    factor = model.first_stage.config.factor
    height, width = image_size(settings, model)
    return height // factor, width // factor, model.codec.channels


def latent_tiles(settings: SampleOptions, model: Model) -> tuple[int, int]:
    """(tile, overlap) in latent pixels."""
    factor = model.first_stage.config.factor
    tile = settings.tile // factor
    return tile, tile // 2 if settings.tile_overlap == -1 else settings.tile_overlap // factor


def check_sizes(settings: SampleOptions, model: Model) -> None:
    """Raises InputError for sizes that do not divide or do not fit."""
    factor = model.first_stage.config.factor
    whole = factor * model.run.model.backbone.factor
    size, tile, overlap = settings.size, settings.tile, settings.tile_overlap
    if size and (len(size) > 2 or min(size) < 1):
        raise InputError(f"size {_by(size)} must be a side or HEIGHT,WIDTH in pixels")
    if tile < 0 or tile % whole:
        raise InputError(
            f"tile {tile} must be positive and divide by {whole}, the downsampling of first stage "
            f"and denoiser; nearest: {_nearest(tile, whole)}"
        )
    rule = factor if tile else whole
    bad = [side for side in size if side % rule]
    if bad:
        of = "first stage" if tile else "first stage and denoiser"
        raise InputError(
            f"size {_by(size)} must divide by {rule}, the downsampling of the {of}; nearest: "
            f"{_by(tuple(_nearest(side, rule) for side in size))}"
        )
    height, width = image_size(settings, model)
    if tile > min(height, width):
        raise InputError(
            f"tile {tile} is larger than the image, {height} x {width}; use "
            f"{max(whole, min(height, width) // whole * whole)} or leave it out"
        )
    if overlap != -1 and not tile:
        raise InputError(f"tile-overlap {overlap} is about tiles; give --tile too")
    if overlap != -1 and (not 0 <= overlap < tile or overlap % factor):
        raise InputError(
            f"tile-overlap {overlap} must divide by {factor}, the first stage's downsampling, and "
            f"be in 0..{tile - factor} for tiles of {tile}; half a tile is usual"
        )


def read_images(settings: SampleOptions, model: Model) -> dict[str, np.ndarray]:
    """`image` uint8 [N,H,W,3] and `mask` bool [N or 1,H,W], true = repaint; what is asked for.

    A folder's images are resized and cropped as the run's held-out ones are; those of an .npz have
    the size already. At most the `num` first ones are read. Raises InputError for what does not
    fit or cannot be read.
    """
    if not settings.init_images:
        return {}
    size, where = image_size(settings, model), settings.init_images
    names: list[str] = []
    if _is_npz(where):
        images = load_npz(where)[0]
        count = len(images)
        if not count:
            raise InputError(f"init-images {where} holds no images; give one at least")
        _check_size("init-images", where, images.shape[1:3], size)
        images = images[: settings.num]
    else:
        names = image_files(where)
        count, kernel = len(names), model.first_stage.run.images.kernel
        read = lambda name: pixels.cover(read_image(where, name), *size, kernel)  # noqa: E731
        images = np.stack([np.asarray(read(name)) for name in names[: settings.num]])
    if not settings.masks:
        return {"image": images}
    mask = _read_masks(settings, size, count, names)
    if not mask.any():
        raise InputError(
            f"masks {settings.masks} are white nowhere, so every image would stay as it is; white "
            f"is from {WHITE} on in uint8, and true in bool"
        )
    return {"image": images, "mask": mask}


def _read_masks(
    settings: SampleOptions, size: tuple[int, int], count: int, names: list[str]
) -> np.ndarray:
    """For `count` images, whose files, if they are in a folder, have `names`."""
    where = settings.masks
    if _is_npz(where):
        masks = read_npz(where).get("arr_0", np.zeros(0))
        masks = masks[..., 0] if masks.ndim == 4 and masks.shape[-1] == 1 else masks
        if masks.ndim != 3 or masks.dtype not in (np.uint8, np.bool_):
            raise InputError(
                f"masks {where}: arr_0 is {masks.dtype} {masks.shape}; the rule is uint8 or bool "
                "[N,H,W], where 255 or true is repainted"
            )
        _check_size("masks", where, masks.shape[1:], size)
        _check_count(where, len(masks), count)
        masks = masks if masks.dtype == np.bool_ else masks >= WHITE
        return masks[: settings.num]
    files = image_files(where)
    _check_count(where, len(files), count)
    stem = lambda name: str(PurePosixPath(name).with_suffix(""))  # noqa: E731
    for image, mask in zip(names, files, strict=False):
        if len(files) > 1 and stem(image) != stem(mask):
            raise InputError(
                f"masks {where}: image {image} would get mask {mask}; masks have their images' "
                "names, or there is one for all"
            )
    return np.stack([_read_mask(where, name, size) for name in files[: settings.num]])


def _read_mask(where: str, name: str, size: tuple[int, int]) -> np.ndarray:
    """bool [H,W]: true where any of what a pixel covers is white."""
    grey = np.asarray(read_image(where, name).convert("L"))
    white = Image.fromarray((grey >= WHITE).astype(np.float32))
    return np.asarray(pixels.cover(white, *size, "box")) > 0


def known_latents(mask: jax.Array, factor: int) -> jax.Array:
    """bool [B,H,W], true = repaint, -> f32 [B,H/f,W/f,1], 1 where no pixel of the f x f is."""
    b, height, width = mask.shape
    blocks = mask.reshape(b, height // factor, factor, width // factor, factor)
    return 1.0 - jnp.any(blocks, axis=(2, 4))[..., None].astype(jnp.float32)


def _check_count(where: str, have: int, images: int) -> None:
    if have not in (1, images):
        raise InputError(
            f"masks {where} holds {have} for {images} images; give one for each, or one for all"
        )


def _is_npz(where: str) -> bool:
    return Path(where).suffix == ".npz"


def _check_size(name: str, where: str, have: tuple[int, ...], want: tuple[int, int]) -> None:
    if tuple(have) != want:
        raise InputError(
            f"{name} {where} are {have[0]} x {have[1]}, samples {want[0]} x {want[1]}; resize "
            "them, give --size, or a folder of images, which are resized"
        )


def _nearest(side: int, rule: int) -> int:
    return max(1, round(side / rule)) * rule


def _by(size: tuple[int, ...]) -> str:
    return ",".join(str(side) for side in size)
