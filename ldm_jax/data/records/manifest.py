"""What a latent cache is: its plan, its manifest, and the reasons to refuse one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ldm_jax.data import fields
from ldm_jax.data.fields import Field
from ldm_jax.errors import InputError, choose, divides
from ldm_jax.files import digest

FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16")
POSTERIORS = ("gaussian", "point")
MANIFEST, SPEC = "manifest.json", "spec.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything about a cache that is known before the first image is encoded."""

    encoder_hash: str  # sha256 hex of the autoencoder's weights
    images: dict[str, Any]  # the recipe: source, resolution, resize and crop
    data_fingerprint: str  # sha256 hex
    split: str
    latent_shape: tuple[int, int, int]  # (H, W, C)
    num_examples: int
    num_classes: int
    class_names: tuple[str, ...]
    has_captions: bool
    posterior: str = "gaussian"  # moments [H,W,2C]: mean, logvar | "point": the latent [H,W,C]
    dtype: str = "float32"  # of the stored moments
    mirrored: bool = True  # the mirrored image's moments are stored too, so flips stay a draw
    pack: int = 32  # examples in a record
    shard_examples: int = 4096  # examples in a file, whatever the number of hosts
    format_version: int = FORMAT_VERSION
    fields: tuple[Field, ...] = ()  # beyond moments, label and caption

    def __post_init__(self):
        choose("latent cache dtype", self.dtype, DTYPES)
        choose("latent cache posterior", self.posterior, POSTERIORS)
        if min(self.num_examples, self.pack, self.shard_examples) < 1:
            raise InputError(
                f"latent cache of {self.num_examples} examples, {self.shard_examples} a shard, "
                f"{self.pack} a record: each must be at least 1"
            )
        what = "the examples in a record (pack), as records do not cross files"
        divides("latent cache shard_examples", self.shard_examples, self.pack, what)
        # JSON gives lists; equality must not depend on the way round the file.
        object.__setattr__(self, "latent_shape", tuple(self.latent_shape))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        further = (f if isinstance(f, Field) else Field(**f) for f in self.fields)
        object.__setattr__(self, "fields", tuple(further))
        names = [name for field in (fields.INDEX, *self.table) for name in field.array_names]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise InputError(f"latent cache: the field {repeated[0]!r} is there twice; rename one")

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """What one example's moments are: (H, W, 2C) of a Gaussian, (H, W, C) of a point."""
        height, width, channels = self.latent_shape
        return (height, width, 2 * channels if self.posterior == "gaussian" else channels)

    @property
    def table(self) -> tuple[Field, ...]:
        """Everything that a record holds of an example, except its index."""
        captions = (fields.CAPTION,) if self.has_captions else ()
        moments = fields.moments(self.moments_shape, self.dtype)
        table = (moments, fields.LABEL, *captions, *self.fields)
        return table if self.mirrored else tuple(fields.without_copy(f) for f in table)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One planned file: the examples [start, start + num_examples) in data set order."""

    name: str
    start: int
    num_examples: int


@dataclasses.dataclass(frozen=True)
class WrittenShard:
    name: str
    num_examples: int
    num_bytes: int
    sha256: str  # hex, of the whole file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(Spec):
    """A finished cache. The statistics are of latents mean + exp(logvar / 2) eps, or of points."""

    mean: tuple[float, ...]  # [C]
    std: tuple[float, ...]  # [C]
    global_std: float  # over all channels together, about the one global mean
    shards: tuple[WrittenShard, ...]

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        shards = (s if isinstance(s, WrittenShard) else WrittenShard(**s) for s in self.shards)
        object.__setattr__(self, "shards", tuple(shards))

    def hash(self) -> str:
        """sha256 hex of the manifest, and through the shards' checksums of the whole cache."""
        return digest(to_json(self))


def plan_shards(num_examples: int, shard_examples: int) -> tuple[Shard, ...]:
    """The files of a cache; the same whoever writes them."""
    count = -(-num_examples // shard_examples)
    return tuple(
        Shard(
            f"latents-{i:05d}-of-{count:05d}.array_record",
            i * shard_examples,
            min(shard_examples, num_examples - i * shard_examples),
        )
        for i in range(count)
    )


def to_json(spec: Spec) -> str:
    raw = dataclasses.asdict(spec)
    if not spec.fields:
        del raw["fields"]  # older caches have no such entry, and runs compare the text's hash
    return json.dumps(raw, indent=1, sort_keys=True) + "\n"


def load_spec(path: Path) -> Spec:
    """The Spec of a spec.json or of a manifest.json; InputError when it is not one."""
    raw = _load(path)
    names = [f.name for f in dataclasses.fields(Spec)]
    return _build(Spec, {k: v for k, v in raw.items() if k in names}, path)


def load_manifest(directory: Path) -> Manifest:
    """The manifest of a finished cache; InputError when there is none or it is damaged."""
    path = directory / MANIFEST
    if not path.exists():
        state = "is unfinished" if (directory / SPEC).exists() else "is not there"
        raise InputError(
            f"latent cache {directory} {state}: it has no {MANIFEST}; run `ldm cache-latents` "
            "(again) to write it, or put it back where it was"
        )
    return _build(Manifest, _load(path), path)


def refuse_difference(
    directory: Path, have: dict[str, Any], want: dict[str, Any], who: str, remedy: str
) -> None:
    """Raises InputError that names the first field of `want` whose value in `have` differs."""
    for field, wanted in want.items():
        assert field in have, f"a latent cache has no field {field!r}; it has {sorted(have)}"
        if _plain(have[field]) != _plain(wanted):
            raise InputError(
                f"latent cache {directory}: {field} is {_short(have[field])} but {who} "
                f"{_short(wanted)}; {remedy}"
            )


def _load(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); delete the cache and write it again"
        ) from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version is {version!r} but this program reads {FORMAT_VERSION}; write "
            "the cache again with `ldm cache-latents`"
        )
    return raw


def _build(kind: Any, raw: dict[str, Any], path: Path) -> Any:
    try:
        return kind(**raw)
    except TypeError as error:
        raise InputError(f"{path} is damaged ({error}); write the cache again") from error


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))  # tuples and lists are the same on disk


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}… (sha256 {digest(text)[:8]})"
