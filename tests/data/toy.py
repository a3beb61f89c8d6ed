"""A made-up source that has a semantic map, tokens and an embedding beside its pictures."""

import numpy as np
from PIL import Image

from ldm_jax.data.fields import LABEL, Field
from ldm_jax.data.sources import Source
from ldm_jax.files import digest_json

RESOLUTION, WIDE, HIGH, COUNT = 8, 21, 8, 24  # the pictures' short side is not resized
SEMANTIC = Field("semantic", (RESOLUTION, RESOLUTION), "int32", "flip")
TOKENS = Field("tokens", (5,), "int32")
EMBEDDING = Field("embedding", (5, 3), "float32")
CLIP = Field("clip", (4,), "float32", "stored")
NOTE = Field("note", (), "str", "stored")
FIELDS = (LABEL, SEMANTIC, TOKENS, EMBEDDING)


def example(i: int, wide: int = WIDE) -> dict:
    """A picture whose red says the column and whose blue says the class of each pixel."""
    rng = np.random.default_rng(i)
    semantic = rng.integers(0, 256, (HIGH, wide)).astype(np.int32)
    rows, columns = np.indices((HIGH, wide))
    return {
        "image": Image.fromarray(np.stack([columns, rows, semantic], -1).astype(np.uint8)),
        "label": i % 3,
        "semantic": semantic + 1000,
        "tokens": rng.integers(0, 50000, 5).astype(np.int32),
        "embedding": rng.normal(size=(5, 3)).astype(np.float32),
        "clip": np.full(4, i, np.float32),
        "clip_mirrored": np.full(4, -i - 1, np.float32),
        "note": "left" * (i % 3),
        "note_mirrored": "right" * (i % 3 + 1),
    }


def source(*fields: Field, **changes) -> Source:
    """`changes` replace entries of every example; None removes one."""

    def load(indices):
        examples = [{**example(int(i)), **changes} for i in indices]
        return [{k: v for k, v in e.items() if v is not None} for e in examples]

    return Source(COUNT, ("a", "b", "c"), fields or FIELDS, digest_json("toy"), load)
