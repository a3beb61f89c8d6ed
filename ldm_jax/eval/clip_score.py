"""How well images fit their texts, by the angle between their CLIP embeddings, one figure a pair.

A figure belongs to its network, its prompt prefix and its convention: name all three with it.
"""

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.eval.feature_sets import checked_pair

WEIGHT = 2.5


def clip_score(images: np.ndarray, texts: np.ndarray, *, weight: float = WEIGHT) -> np.ndarray:
    """weight * max(cos, 0), f64 [N], of image and text embeddings [N,D] in the same order.

    Hessel et al., EMNLP 2021, eq. 1: ViT-B/32, each caption after "A photo depicts ". Their figure
    for a set is the mean.
    """
    return weight * np.maximum(_cosine(images, texts), 0.0)


def clip_cosine(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 cos, f64 [N], of image and text embeddings [N,D], as most papers on text to image report.

    Negative where the angle is obtuse; usually of the caption without a prefix.
    """
    return 100.0 * _cosine(images, texts)


def _cosine(images, texts):
    images, texts = checked_pair(images, texts, names=("image", "text"))
    if len(images) != len(texts):
        raise InputError(
            f"{len(images)} images and {len(texts)} texts: the rule is one text per image"
        )
    images, texts = images.astype(np.float64), texts.astype(np.float64)
    norms = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    if not norms.all():
        raise InputError("an embedding is all 0 and has no direction; look at the network it is of")
    return np.einsum("nd,nd->n", images, texts) / norms
