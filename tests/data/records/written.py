"""A small cache of made-up moments, labels and captions, and its writing."""

import numpy as np

from ldm_jax.data.records.manifest import Spec
from ldm_jax.data.records.writer import begin, finish, write_shard

N, PACK, SHARD, SHAPE = 53, 4, 16, (2, 3, 5)
_rng = np.random.default_rng(0)
MOMENTS = _rng.normal(0.3, 2.0, (N, 2, 3, 10)).astype(np.float32)
MIRRORED = MOMENTS[:, :, ::-1] + 1
LABELS = np.arange(N) % 7
CAPTIONS = np.array([f"Bild {i} " + "é" * (i % 5) for i in range(N)])


def spec(**changes):
    values = {
        "encoder_hash": "ab" * 32,
        "images": {"resolution": 16, "crop": "center"},
        "data_fingerprint": "cd" * 32,
        "split": "train",
        "latent_shape": SHAPE,
        "num_examples": N,
        "num_classes": 7,
        "class_names": tuple("abcdefg"),
        "has_captions": True,
        "pack": PACK,
        "shard_examples": SHARD,
    }
    return Spec(**{**values, **changes})


def encoded(shard, size=5):
    """The shard's examples, in batches that fit neither records nor shards."""
    for start in range(shard.start, shard.start + shard.num_examples, size):
        rows = np.arange(start, min(start + size, shard.start + shard.num_examples))
        yield {
            "moments": MOMENTS[rows],
            "moments_mirrored": MIRRORED[rows],
            "label": LABELS[rows],
            "index": rows,
            "caption": CAPTIONS[rows],
        }


def write(directory, size=5, arrays=None, **changes):
    """`arrays` [N, ...] by name are written beside the others; `changes` are the spec's."""
    for shard in begin(directory, spec(**changes)):
        batches = (
            {**batch, **{name: array[batch["index"]] for name, array in (arrays or {}).items()}}
            for batch in encoded(shard, size)
        )
        write_shard(directory, spec(**changes), shard, batches)
    return finish(directory, spec(**changes))
