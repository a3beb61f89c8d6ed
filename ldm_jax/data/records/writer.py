"""Writing a latent cache: any number of hosts, each shard whole or absent, the manifest last.

for shard in begin(directory, spec)[process::processes]:
    write_shard(directory, spec, shard, encoded_batches(shard))
# … every process has finished …
finish(directory, spec)
"""

import dataclasses
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from ldm_jax.data import fields
from ldm_jax.data.records.manifest import (
    MANIFEST,
    SPEC,
    Manifest,
    Shard,
    Spec,
    WrittenShard,
    load_spec,
    plan_shards,
    refuse_difference,
    to_json,
)
from ldm_jax.errors import InputError
from ldm_jax.files import sha256, write_text

Batch = dict[str, np.ndarray]
_MEND = "mend the example in its source"
_REMEDY = {
    "moments": "the latents of this autoencoder are unusable: check its weights and its "
    "reconstructions"
}


def begin(directory: str | Path, spec: Spec) -> tuple[Shard, ...]:
    """The shards still to be written, after noting in `directory` what the cache is to be.

    Shards of an interrupted run are kept. With several processes, call it on each before any of
    them writes. Raises InputError when the directory holds another cache, naming the field.
    """
    if "://" in str(directory):
        raise InputError(
            f"latent cache {directory} must be a local or mounted path; mount the bucket (gcsfuse)"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, SPEC):
        if (directory / name).exists():
            refuse_difference(
                directory,
                dataclasses.asdict(load_spec(directory / name)),
                dataclasses.asdict(spec),
                "this run would write",
                "choose another --out, or delete the directory to write it anew",
            )
    if not (directory / SPEC).exists():
        write_text(directory / SPEC, to_json(spec))
    return missing_shards(directory, spec)


def missing_shards(directory: str | Path, spec: Spec) -> tuple[Shard, ...]:
    """The planned shards that are absent, or whose file is not the one that its note describes."""
    shards = plan_shards(spec.num_examples, spec.shard_examples)
    return tuple(s for s in shards if _written(Path(directory), s) is None)


def write_shard(directory: str | Path, spec: Spec, shard: Shard, batches: Iterable[Batch]) -> None:
    """Writes one shard from its examples, in data set order, in batches of any size.

    A batch holds the arrays of `spec.table` [b, ...] by name, moments as f32, and "index" int [b].
    Raises InputError, naming example and field, for what is missing, not finite, or not what the
    field says. Until the last byte is on disk the shard does not exist.
    """
    path = Path(directory) / shard.name
    partial = path.with_name(f"{path.name}.partial")
    channels = spec.latent_shape[-1]
    sums = {name: np.zeros(channels) for name in ("mean", "mean_squared", "variance")}
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    written = 0
    try:
        for batch in _packed(batches, spec.pack):
            record = _checked(batch, spec, shard.start + written)
            _add(sums, record["moments"], spec)
            writer.write(_encode(record, spec))
            written += len(record["index"])
        assert written == shard.num_examples, f"{shard} got {written} examples"
    finally:
        writer.close()
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    done = WrittenShard(shard.name, written, partial.stat().st_size, sha256(partial))
    note = {**dataclasses.asdict(done), "sums": {k: v.tolist() for k, v in sums.items()}}
    partial.replace(path)
    write_text(path.with_suffix(".json"), json.dumps(note) + "\n")


def finish(directory: str | Path, spec: Spec) -> Manifest:
    """Joins the shards' notes into the manifest; one process calls it when all shards are there.

    Doing it again writes the same manifest.
    """
    directory = Path(directory)
    notes = []
    for shard in plan_shards(spec.num_examples, spec.shard_examples):
        note = _note(directory, shard)
        assert note is not None, f"{shard.name} is missing in {directory}: finish() came too early"
        notes.append(note)
    # Notes are added in the order of the shards, so that the sums do not depend on who wrote when.
    total = {k: np.sum([n["sums"][k] for n in notes], axis=0) for k in notes[0]["sums"]}
    count = spec.num_examples * spec.latent_shape[0] * spec.latent_shape[1]
    mean = total["mean"] / count
    second = (total["mean_squared"] + total["variance"]) / count  # E[z^2], [C]
    manifest = Manifest(
        **{f.name: getattr(spec, f.name) for f in dataclasses.fields(Spec)},
        mean=mean.tolist(),
        std=np.sqrt(second - mean**2).tolist(),
        global_std=float(np.sqrt(second.mean() - mean.mean() ** 2)),
        shards=tuple(WrittenShard(**{k: v for k, v in n.items() if k != "sums"}) for n in notes),
    )
    write_text(directory / MANIFEST, to_json(manifest))
    return manifest


def _packed(batches: Iterable[Batch], pack: int) -> Iterator[Batch]:
    """The same rows in batches of `pack`; the last one may be short."""
    held: Batch | None = None
    for batch in batches:
        batch = {k: np.asarray(v) for k, v in batch.items()}
        held = {k: np.concatenate([held[k], batch[k]]) for k in held} if held else batch
        while len(held["index"]) >= pack:
            yield {k: v[:pack] for k, v in held.items()}
            held = {k: v[pack:] for k, v in held.items()}
    if held and len(held["index"]):
        yield held


def _checked(batch: Batch, spec: Spec, start: int) -> Batch:
    """The arrays of a record, each of its field's dtype."""
    index = batch["index"]
    assert np.array_equal(index, np.arange(start, start + len(index))), (
        f"the examples from {start} on must come in order, not {index}"
    )
    record = fields.checked(fields.INDEX, batch, index, "")
    for field in spec.table:
        record |= fields.checked(field, batch, index, _REMEDY.get(field.name, _MEND))
    return record


def _add(sums: dict[str, np.ndarray], moments: np.ndarray, spec: Spec) -> None:
    """Adds up what is stored, rounded as it is, over examples and grid."""
    mean = moments.astype(np.float64)
    if spec.posterior == "gaussian":
        mean, logvar = np.split(mean, 2, axis=-1)
        sums["variance"] += np.exp(np.clip(logvar, -30, 20)).sum((0, 1, 2))
    sums["mean"] += mean.sum((0, 1, 2))
    sums["mean_squared"] += (mean**2).sum((0, 1, 2))


def _encode(record: Batch, spec: Spec) -> bytes:
    table = {name: field for field in spec.table for name in field.array_names}
    # The first three come first whatever the table: a record's bytes depend on the order.
    names = dict.fromkeys(("moments", "label", "index", *table))
    arrays = {n: fields.to_record(table.get(n, fields.INDEX), record[n]) for n in names}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _note(directory: Path, shard: Shard) -> dict | None:
    try:
        note = json.loads((directory / shard.name).with_suffix(".json").read_text())
        valid = (note["name"], note["num_examples"]) == (shard.name, shard.num_examples)
        return note if valid and {"num_bytes", "sha256", "sums"} <= note.keys() else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # an unreadable note is no note: the shard is written again


def _written(directory: Path, shard: Shard) -> dict | None:
    note, path = _note(directory, shard), directory / shard.name
    if note is None or not path.exists() or path.stat().st_size != note["num_bytes"]:
        return None
    return note if sha256(path) == note["sha256"] else None
