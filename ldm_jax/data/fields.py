"""What an example holds: a table of fields, from the source through the record to the batch."""

import dataclasses
from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np

from ldm_jax.errors import InputError, choose

DTYPES = ("bool", "uint8", "int32", "int64", "float32", "bfloat16", "str")
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Field:
    """One entry of every example, stored in a cache as it is here.

    The shape is that of one example. bfloat16 is a format on disk: a batch has it as float32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  # a name of DTYPES
    mirror: str = "keep"  # what it is in the mirrored image; a name of MIRRORS

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(self.shape))  # JSON gives lists
        choose(f"dtype of the field {self.name!r}:", self.dtype, DTYPES)
        choose(f"mirror of the field {self.name!r}:", self.mirror, MIRRORS)
        if self.is_map and len(self.shape) < 2:
            raise InputError(
                f"the field {self.name!r} of shape {self.shape} has no width to flip; give it the "
                "shape (H, W, ...) or another mirror"
            )

    @property
    def is_map(self) -> bool:
        """Whether it is a map of the picture, [H,W,...], and so is cropped as the picture is."""
        return self.mirror == "flip"

    @property
    def array_names(self) -> tuple[str, ...]:
        """The arrays that hold it: with the rule "stored", the mirrored image's stands beside."""
        return (self.name, f"{self.name}_mirrored") if self.mirror == "stored" else (self.name,)

    @property
    def batch_dtype(self) -> np.dtype:
        return np.dtype(np.float32 if self.dtype == "bfloat16" else self.dtype)


def _keep(field: Field, arrays: Arrays) -> np.ndarray:
    return arrays[field.name]


def _flip(field: Field, arrays: Arrays) -> np.ndarray:
    return arrays[field.name][:, :, ::-1]


def _stored(field: Field, arrays: Arrays) -> np.ndarray:
    return arrays[f"{field.name}_mirrored"]


def _none(field: Field, arrays: Arrays) -> np.ndarray:
    raise AssertionError(f"{field.name} cannot be mirrored: check_mirrors() was not called")


# The values [b, *shape] of mirrored images from the arrays of a field.
MIRRORS: dict[str, Callable[[Field, Arrays], np.ndarray]] = {
    "keep": _keep,  # the same in both, such as a label
    "flip": _flip,  # a map [H,W,...], its width axis reversed
    "stored": _stored,  # NAME_mirrored stands beside it
    "none": _none,  # unknown: with such a field nothing may be mirrored
}

LABEL = Field("label", (), "int32")
CAPTION = Field("caption", (), "str")
INDEX = Field("index", (), "int64")


def moments(shape: tuple[int, int, int], dtype: str) -> Field:
    """The posterior's parameters. An encoder is not equivariant: mirrored, they are stored too."""
    return Field("moments", shape, dtype, "stored")


def image(resolution: int) -> Field:
    """The picture itself, RGB in 0..255."""
    return Field("image", (resolution, resolution, 3), "uint8", "flip")


def without_copy(field: Field) -> Field:
    """The field where no mirrored copies are stored."""
    return dataclasses.replace(field, mirror="none") if field.mirror == "stored" else field


def check_mirrors(fields: Iterable[Field], where: str) -> None:
    """Raises InputError where a field is not known of mirrored images."""
    unknown = [field.name for field in fields if field.mirror == "none"]
    if unknown:
        raise InputError(
            f"{where} has no mirrored {', '.join(unknown)} but flips are asked for; turn flip off, "
            "or store what the mirrored images have"
        )


def flipped(field: Field, arrays: Arrays, flips: np.ndarray) -> np.ndarray:
    """The field's values [b, *shape], where `flips` bool [b] is set those of the mirrored image."""
    values = arrays[field.name]
    if not flips.any():
        return values
    there = MIRRORS[field.mirror](field, {n: arrays[n][flips] for n in field.array_names})
    # Strings of the mirrored image may be longer, and numpy would cut them.
    out = values.astype(np.promote_types(values.dtype, there.dtype))
    out[flips] = there
    return out


def checked(field: Field, arrays: Arrays, examples: np.ndarray, remedy: str) -> Arrays:
    """The field's arrays [b, *shape] alone, by name, cast to its dtype.

    `examples` [b] are their numbers. Raises InputError, naming the example, where an array is
    missing, has another shape or kind of number, or is not finite.
    """
    out = {}
    for name in field.array_names:
        values = arrays.get(name)
        if values is None:
            raise InputError(f"{name} of example {examples[0]} is missing; {remedy}")
        if values.shape[1:] != field.shape or not _casts(values.dtype, field):
            raise InputError(
                f"{name} of example {examples[0]} is {values.dtype} {values.shape[1:]} but the "
                f"field is {field.dtype} {field.shape}; {remedy}"
            )
        out[name] = values.astype(_dtype(field), copy=False)
        if field.dtype in ("float32", "bfloat16"):
            finite = np.isfinite(out[name]).reshape(len(values), -1).all(axis=1)
            if not finite.all():
                bad = examples[int(np.argmin(finite))]
                raise InputError(f"{name} of example {bad} are not finite; {remedy}")
    return out


def to_record(field: Field, values: np.ndarray) -> np.ndarray:
    """Checked values as a npy file holds them: bfloat16, which it does not know, as its bits."""
    return values.view(np.uint16) if field.dtype == "bfloat16" else values


def from_record(field: Field, values: np.ndarray) -> np.ndarray:
    return values.view(ml_dtypes.bfloat16) if field.dtype == "bfloat16" else values


def empty(field: Field, count: int) -> np.ndarray:
    """Room for `count` values; `to_batch` gives strings the width that the longest needs."""
    return np.empty((count, *field.shape), object if field.dtype == "str" else _dtype(field))


def to_batch(field: Field, values: np.ndarray) -> np.ndarray:
    """Checked values as a batch has them."""
    return values.astype(field.batch_dtype, copy=False)


def _dtype(field: Field) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if field.dtype == "bfloat16" else field.dtype)


def _casts(dtype: np.dtype, field: Field) -> bool:
    """Whether at most width is lost: no float becomes an integer, no number a string."""
    return np.can_cast(dtype, field.batch_dtype, "same_kind") and (
        field.dtype != "str" or dtype.kind == "U"
    )
