"""`ldm cache-latents`: the images of a first stage's run, encoded once."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from ldm_jax.data import images
from ldm_jax.data.fields import CAPTION, LABEL
from ldm_jax.data.records import writer
from ldm_jax.data.records.manifest import Manifest, Shard, Spec
from ldm_jax.errors import InputError
from ldm_jax.options import option
from ldm_jax.runs.first_stage import Encode, FirstStage, compile_encoder, load_first_stage
from ldm_jax.sharding import MeshConfig, check_batch, make_mesh, wait_for_all


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    mirrored: bool = option(True, "mirrored images too, so that flips stay a draw")
    dtype: str = option(
        "float32", "of the moments (default: float32)", choices=("float32", "bfloat16")
    )
    batch_size: int = option(
        0, "images per step of one process (default: 32 for each of its devices)", metavar="N"
    )
    shard_examples: int = option(16384, "examples per shard file (default: 16384)", metavar="N")
    pack: int = option(32, "examples per record (default: 32)", metavar="N")
    splits: tuple[str, ...] = option(
        images.SPLITS,
        f"which splits to encode (default: {','.join(images.SPLITS)})",
        metavar="NAME,...",
    )

    def __post_init__(self):
        if not self.splits:
            raise InputError(f"splits are empty; name some of {list(images.SPLITS)}")


def run(workdir: Path, options: CacheOptions, out: Path | None = None) -> dict[str, Manifest]:
    """Writes OUT/train and OUT/held_out, or goes on with what an interrupted run left there.

    Shards are dealt out to the processes; each encodes its own over its own devices, so hosts never
    wait for each other before the end, and the files do not depend on how many there are.
    """
    out = Path(out) if out else Path(workdir) / "latents"
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    options = dataclasses.replace(options, batch_size=options.batch_size or 32 * mesh.devices.size)
    check_batch(options.batch_size, mesh, "--batch-size")
    first_stage = load_first_stage(workdir, mesh)
    sources = {
        split: images.open_images(first_stage.run.images, split, augment=False)
        for split in options.splits
    }
    encode = compile_encoder(first_stage, mesh, options.batch_size, options.mirrored)
    manifests = {}
    for split, source in sources.items():
        spec = make_spec(first_stage, source, split, options)
        todo = writer.begin(out / split, spec)[jax.process_index() :: jax.process_count()]
        wait_for_all(f"latents-begin-{split}")
        for shard in todo:
            batches = _encoded(encode, source, shard, options.batch_size)
            writer.write_shard(out / split, spec, shard, batches)
        wait_for_all(f"latents-end-{split}")
        if jax.process_index() == 0:
            manifests[split] = writer.finish(out / split, spec)
        wait_for_all(f"latents-finished-{split}")
    return manifests


def make_spec(
    first_stage: FirstStage, source: images.ImageSplit, split: str, options: CacheOptions
) -> Spec:
    """What the cache of one split will be, known before the first image is read."""
    return Spec(
        encoder_hash=first_stage.encoder_hash,
        images=dict(source.recipe),
        data_fingerprint=source.fingerprint(),
        split=split,
        latent_shape=first_stage.config.latent_shape,
        num_examples=len(source),
        num_classes=source.num_classes,
        class_names=source.class_names,
        has_captions=source.has_captions,
        posterior=first_stage.config.posterior,
        dtype=options.dtype,
        mirrored=options.mirrored,
        pack=options.pack,
        shard_examples=options.shard_examples,
        fields=tuple(field for field in source.fields if field not in (LABEL, CAPTION)),
    )


def _encoded(
    encode: Encode, source: images.ImageSplit, shard: Shard, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    bar = tqdm(
        desc=shard.name,
        total=shard.num_examples,
        unit="image",
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
        disable=jax.process_index() != 0,
    )
    stop = shard.start + shard.num_examples
    with bar:
        for start in range(shard.start, stop, batch_size):
            indices = np.arange(start, min(start + batch_size, stop), dtype=np.int64)
            batch = source.read(indices, indices)
            moments = encode(batch.pop("image"))
            bar.update(len(indices))
            yield {**batch, **moments, "index": indices}
