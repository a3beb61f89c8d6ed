"""Reading a latent cache: posterior moments by example, in batches, from packed records."""

import collections
import dataclasses
import io
import threading
from pathlib import Path
from typing import Any

import grain.python as grain
import numpy as np

from ldm_jax.data import draws, fields
from ldm_jax.data.order import Order
from ldm_jax.data.records.manifest import (
    Manifest,
    load_manifest,
    plan_shards,
    refuse_difference,
)
from ldm_jax.errors import InputError
from ldm_jax.files import sha256

Batch = dict[str, np.ndarray]
RECORD_BYTES_KEPT = 1 << 30  # of decoded records; two windows of the order should fit
_HEAL = "run `ldm cache-latents` again: it writes only the shards that are missing or damaged"
# numpy parses headers by `ast`, which in CPython 3.11 may fail where two threads are in it at once.
_PARSING = threading.Lock()
_WHO = {"encoder_hash": "the autoencoder given has"}


@dataclasses.dataclass(frozen=True)
class _WholeFile:
    """array_record's FileInstruction: sparing it from opening every file to count."""

    filename: str
    take: int  # records
    examples_in_shard: int
    skip: int = 0


class LatentCache:
    """A finished cache; safe to read from several threads."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory = directory
        self.manifest = manifest
        self._table = manifest.table
        files = []
        for shard in manifest.shards:
            records = -(-shard.num_examples // manifest.pack)
            files.append(_WholeFile(str(directory / shard.name), records, records))
        self._source = grain.ArrayRecordDataSource(files)
        self._kept: collections.OrderedDict[int, Batch] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.manifest.num_examples

    def order(self, seed: int, window: int = 64) -> Order:
        """The shuffled order in which reading stays inside few records."""
        return Order(len(self), seed, block=self.manifest.pack, window=window)

    def read(
        self, indices: np.ndarray, positions: np.ndarray, *, flip: bool = False, seed: int = 0
    ) -> Batch:
        """{"moments": f32 [b, *moments_shape], "label": int32 [b]} and the other fields by name.

        Moments are the mean, then logvar, along the last axis, or the latent itself. With `flip`,
        an example is mirrored with probability 1/2, drawn from (seed, stream position) alone, and
        every field follows its rule.
        Raises InputError when the cache lacks a field of mirrored images or is damaged.
        """
        table = self._table
        flips = np.zeros(len(indices), bool)
        if flip:
            fields.check_mirrors(table, f"latent cache {self.directory}")
            flips = draws.uniforms(seed, "flip", positions)[:, 0] < 0.5
        numbers, slots = np.divmod(np.asarray(indices, np.int64), self.manifest.pack)
        records = self._records(np.unique(numbers))
        batch = {f.name: fields.empty(f, len(indices)) for f in table}
        for number, record in records.items():
            rows = np.flatnonzero(numbers == number)
            for field in table:
                names = field.array_names if flip else (field.name,)
                arrays = {name: record[name][slots[rows]] for name in names}
                batch[field.name][rows] = fields.flipped(field, arrays, flips[rows])
        return {f.name: fields.to_batch(f, batch[f.name]) for f in table}

    def _records(self, numbers: np.ndarray) -> dict[int, Batch]:
        """The decoded records, those lately used from memory."""
        with self._lock:
            found = {}
            for number in map(int, numbers):
                if number in self._kept:
                    self._kept.move_to_end(number)
                    found[number] = self._kept[number]
        absent = [n for n in map(int, numbers) if n not in found]
        if absent:
            for number, data in zip(absent, self._fetch(absent), strict=True):
                found[number] = self._decode(number, data)
            with self._lock:
                for number in absent:
                    self._keep(number, found[number])
        return found

    def _fetch(self, numbers: list[int]) -> Any:
        try:
            return self._source.__getitems__(numbers)
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise self._damaged(numbers, error) from error

    def _decode(self, number: int, data: bytes) -> Batch:
        try:
            with _PARSING, np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                record = dict(arrays)
            start = number * self.manifest.pack
            end = min(start + self.manifest.pack, len(self))
            if not np.array_equal(record["index"], np.arange(start, end)):
                raise ValueError(f"it holds the examples {record['index']}, not {start}..{end - 1}")
            for field in self._table:
                for name in field.array_names:
                    shape = record[name].shape  # KeyError names what is missing
                    if shape != (end - start, *field.shape):
                        raise ValueError(f"{name} has shape {shape}, the field {field.shape}")
                    record[name] = fields.from_record(field, record[name])
        except Exception as error:  # zipfile, numpy and struct each raise their own
            raise self._damaged([number], error) from error
        return record

    def _damaged(self, numbers: list[int], error: Exception) -> InputError:
        shards = sorted({n * self.manifest.pack // self.manifest.shard_examples for n in numbers})
        names = [self.manifest.shards[s].name for s in shards]
        return InputError(
            f"latent cache {self.directory}: a record in {', '.join(names)} cannot be read "
            f"({error}); {_HEAL}"
        )

    def _keep(self, number: int, record: Batch) -> None:
        if number not in self._kept:
            self._kept[number] = record
            self._bytes += sum(a.nbytes for a in record.values())
        while self._bytes > RECORD_BYTES_KEPT and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self._bytes -= sum(a.nbytes for a in old.values())


def open_cache(
    directory: str | Path, *, expect: dict[str, Any] | None = None, verify: bool = False
) -> LatentCache:
    """Opens a finished cache whose manifest has the values of `expect`, by field name.

    Raises InputError when there is no finished cache, when a field differs (naming it), when a
    file is missing or of another size, and with `verify` when a file's checksum differs.
    """
    directory = Path(directory)
    manifest = load_manifest(directory)
    have = dataclasses.asdict(manifest)
    for field, wanted in (expect or {}).items():
        who = _WHO.get(field, "this run expects")
        remedy = "use what made this cache, or run `ldm cache-latents` with another --out"
        refuse_difference(directory, have, {field: wanted}, who, remedy)
    planned = plan_shards(manifest.num_examples, manifest.shard_examples)
    names = [[(s.name, s.num_examples) for s in shards] for shards in (planned, manifest.shards)]
    if names[0] != names[1]:
        raise InputError(
            f"latent cache {directory}: the manifest's {len(manifest.shards)} shards are not those "
            f"of {manifest.num_examples} examples, {manifest.shard_examples} a shard; {_HEAL}"
        )
    for shard in manifest.shards:
        path = directory / shard.name
        if not path.exists():
            raise InputError(f"latent cache {directory}: {shard.name} is missing; {_HEAL}")
        size = path.stat().st_size
        if size != shard.num_bytes:
            raise InputError(
                f"latent cache {directory}: {shard.name} has {size} bytes but the manifest says "
                f"{shard.num_bytes}; {_HEAL}"
            )
        if verify and sha256(path) != shard.sha256:
            raise InputError(
                f"latent cache {directory}: {shard.name} has another sha256 than the manifest "
                f"says, {shard.sha256}; {_HEAL}"
            )
    return LatentCache(directory, manifest)
