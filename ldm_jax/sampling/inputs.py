"""What samples start from: their classes, sizes and noise, images and masks of what to repaint."""

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ldm_jax.data import pixels
from ldm_jax.data.folder import image_files, read_image
from ldm_jax.errors import InputError, choose, divides, within
from ldm_jax.eval.images_out import load_npz, read_npz
from ldm_jax.keys import example_keys, key_for
from ldm_jax.models import conditions
from ldm_jax.runs.denoiser import Model
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sampling.options import SampleOptions

WHITE = 128  # from this grey on a mask's pixel is repainted
LABELS = ("balanced", "random")  # how the classes of samples follow each other
CHUNK = 4096  # labels drawn at a time: one compilation, whatever the number of samples


def conditional(run: DenoiserRun) -> bool:
    """Whether the denoiser takes a condition."""
    return bool(run.model.conditions)


def cond_of(run: DenoiserRun, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What of the rows of a batch the denoiser is conditioned on."""
    return {name: rows[name] for name in conditions.entries(run.model.conditions)}


def null_cond(run: DenoiserRun, cond: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The condition that guidance leads away from; what is always kept stays."""
    return conditions.unconditioned(run.model.conditions, cond)


def checked_classes(options: SampleOptions, run: DenoiserRun) -> tuple[int, ...]:
    """The classes that samples take, all of them by default; InputError for unknown ones."""
    count = conditions.num_classes(run.model.conditions)
    if not count:
        if options.classes:
            raise InputError("this denoiser is unconditional; leave out --classes and --guidance")
        return ()
    classes = options.classes or tuple(range(count))
    bad = [c for c in classes if not 0 <= c < count]
    if bad:
        raise InputError(f"class {bad[0]} is unknown; this denoiser has classes 0..{count - 1}")
    return classes


def label_table(
    options: SampleOptions, kind: str = "balanced"
) -> Callable[[np.ndarray], np.ndarray]:
    """indices [n] -> classes int64 [n], of those that checked options name; zeros where none."""
    choose("labels", kind, LABELS)
    classes = np.asarray(options.classes or (0,), np.int64)
    return lambda indices: classes[class_labels(kind, options.seed, indices, len(classes))]


def class_labels(kind: str, seed: int, indices: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [n] in [0, num_classes): the classes of the samples `indices` [n].

    "balanced": the classes in turn, so that any run of them has each equally often, give or take
    one. "random": uniform and independent. The two differ by about 0.1 FID on ImageNet.
    """
    choose("labels", kind, LABELS)
    within("num_classes", num_classes, "[1, inf)")
    indices = np.asarray(indices, np.int64)
    if kind == "balanced":
        return indices % num_classes
    labels = [np.zeros(0, np.int64)]
    for start in range(0, len(indices), CHUNK):
        part = indices[start : start + CHUNK]
        padded = np.pad(part, (0, CHUNK - len(part)))
        drawn = _draw_labels(seed, padded.astype(np.uint32), num_classes)
        labels.append(np.asarray(drawn, np.int64)[: len(part)])
    return np.concatenate(labels)


@jax.jit
def _draw_labels(seed, indices, num_classes):
    keys = example_keys(key_for(seed, "evaluation_labels"), indices)
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_classes))(keys)


def sample_rows(
    run: DenoiserRun,
    index: np.ndarray,
    labels: np.ndarray,
    fields: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> dict[str, Any]:
    """What a program is given of the samples `index` [n], beside noise and images.

    Their conditions are read from their classes `labels` [n] and from `fields`, whose rows are
    taken in turn.
    """
    rows = {"label": labels.astype(np.int32), "position": index.astype(np.int64)}
    rows |= {name: np.asarray(values)[index % len(values)] for name, values in fields.items()}
    for name, condition in run.model.conditions.items():
        for field in condition.fields:
            if field not in rows:
                raise InputError(
                    f"condition {name!r} reads the field {field!r}, and samples are given "
                    f"{sorted(rows)}; give it too"
                )
    return {"index": index.astype(np.int32), **conditions.read(run.model.conditions, rows)}


def image_size(options: SampleOptions, model: Model) -> tuple[int, int]:
    """(height, width) of the samples in pixels."""
    if options.size:
        return options.size[0], options.size[-1]
    factor = model.first_stage.config.factor
    return model.latent_shape[0] * factor, model.latent_shape[1] * factor


def latent_shape(options: SampleOptions, model: Model) -> tuple[int, int, int]:
    """[H,W,C] of what is denoised."""
    factor = model.first_stage.config.factor
    height, width = image_size(options, model)
    return height // factor, width // factor, model.codec.channels


def latent_tiles(options: SampleOptions, model: Model) -> tuple[int, int]:
    """(tile, overlap) in latent pixels."""
    factor = model.first_stage.config.factor
    tile = options.tile // factor
    return tile, tile // 2 if options.tile_overlap == -1 else options.tile_overlap // factor


def check_sizes(options: SampleOptions, model: Model) -> None:
    """Raises InputError for sizes that do not divide or do not fit."""
    factor = model.first_stage.config.factor
    whole = factor * model.run.model.backbone.factor
    size, tile, overlap = options.size, options.tile, options.tile_overlap
    both = "the downsampling of first stage and denoiser"
    if size and (len(size) > 2 or min(size) < 1):
        by = ",".join(map(str, size))
        raise InputError(f"size {by} must be a side or HEIGHT,WIDTH in pixels")
    if tile:
        divides("tile", tile, whole, both)
    for side in size:
        if tile:
            divides("size", side, factor, "the downsampling of the first stage")
        else:
            divides("size", side, whole, both)
    height, width = image_size(options, model)
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


def initial_noise(options: SampleOptions, model: Model) -> dict[str, np.ndarray]:
    """The user's `noise` f32 [num,H,W,C], checked; none when it is drawn from the seed."""
    if not options.noise:
        return {}
    try:
        noise = np.load(options.noise, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"noise file {options.noise} cannot be read ({type(error).__name__}); it must be one "
            "array of floats, as np.save writes"
        ) from error
    if not isinstance(noise, np.ndarray):
        raise InputError(f"noise file {options.noise} holds several arrays; give one as .npy")
    want = (options.num, *latent_shape(options, model))
    if noise.shape != want or noise.dtype.kind != "f":
        raise InputError(
            f"noise file {options.noise} has shape {noise.shape} and type {noise.dtype}; it must "
            f"hold floats of shape {want}"
        )
    if not np.isfinite(noise).all():
        raise InputError(f"noise file {options.noise} holds values that are not finite")
    return {"noise": np.asarray(noise, np.float32)}


def read_images(options: SampleOptions, model: Model) -> dict[str, np.ndarray]:
    """`image` uint8 [N,H,W,3] and `mask` bool [N or 1,H,W], true = repaint; what is asked for.

    A folder's images are resized and cropped as the run's held-out ones are; those of an .npz have
    the size already. At most the `num` first ones are read. Raises InputError for what does not
    fit or cannot be read.
    """
    if not options.init_images:
        return {}
    size, where = image_size(options, model), options.init_images
    names: list[str] = []
    if _is_npz(where):
        images = load_npz(where)[0]
        count = len(images)
        if not count:
            raise InputError(f"init-images {where} holds no images; give one at least")
        _check_size("init-images", where, images.shape[1:3], size)
        images = images[: options.num]
    else:
        names = image_files(where)
        count, kernel = len(names), model.first_stage.run.images.kernel
        pictures = (read_image(where, name) for name in names[: options.num])
        images = np.stack([np.asarray(pixels.cover(p, *size, kernel)) for p in pictures])
    if not options.masks:
        return {"image": images}
    mask = _read_masks(options, size, count, names)
    if not mask.any():
        raise InputError(
            f"masks {options.masks} are white nowhere, so every image would stay as it is; white "
            f"is from {WHITE} on in uint8, and true in bool"
        )
    return {"image": images, "mask": mask}


def _read_masks(
    options: SampleOptions, size: tuple[int, int], count: int, names: list[str]
) -> np.ndarray:
    """For `count` images, whose files, if they are in a folder, have `names`."""
    where = options.masks
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
        return masks[: options.num]
    files = image_files(where)
    _check_count(where, len(files), count)
    for image, mask in zip(names, files, strict=False):
        if len(files) > 1 and _stem(image) != _stem(mask):
            raise InputError(
                f"masks {where}: image {image} would get mask {mask}; masks have their images' "
                "names, or there is one for all"
            )
    return np.stack([_read_mask(where, name, size) for name in files[: options.num]])


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


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _is_npz(where: str) -> bool:
    return Path(where).suffix == ".npz"


def _check_size(name: str, where: str, have: tuple[int, ...], want: tuple[int, int]) -> None:
    if tuple(have) != want:
        raise InputError(
            f"{name} {where} are {have[0]} x {have[1]}, samples {want[0]} x {want[1]}; resize "
            "them, give --size, or a folder of images, which are resized"
        )
