"""The judge of small labelled images: a classifier trained on the real ones, and its features."""

import dataclasses
import functools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax.errors import InputError
from ldm_jax.eval.frechet import Moments, distance
from ldm_jax.eval.images_out import check_images
from ldm_jax.files import digest_arrays, read_npz, write_npz
from ldm_jax.interop.names import flatten, nest
from ldm_jax.keys import key_for
from ldm_jax.models import classifier
from ldm_jax.models.autoencoder import to_unit

BATCH = 256  # rows of one compiled inference call; the last batch is padded up to it


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier: the configuration and the parameters that belong together."""

    config: classifier.ClassifierConfig
    params: Any


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    seed: int,
    *,
    num_steps: int = 400,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    max_shift: int = 2,
    config: classifier.ClassifierConfig | None = None,
) -> Classifier:
    """Trains on uint8 images [N,H,W,3] and integer labels [N]; a function of its arguments alone.

    AdamW with a cosine schedule on cross-entropy; images move by up to `max_shift` pixels. Raises
    InputError for images or labels that do not fit the configuration.
    """
    images, labels = _pairs(images, labels)
    if config is None:
        config = classifier.ClassifierConfig(images.shape[1], num_classes=int(labels.max()) + 1)
    _check_classes(labels, config.num_classes)
    data = to_unit(jnp.asarray(images))
    pad = ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0))
    data = jnp.pad(data, pad, mode="edge")
    targets = jnp.asarray(labels, jnp.int32)
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, learning_rate, num_steps // 10, num_steps),
        weight_decay=1e-2,
    )

    shape = (config.resolution, config.resolution, config.image_channels)
    limits = jnp.array([len(labels), 2 * max_shift + 1, 2 * max_shift + 1])

    @jax.jit
    def step(params, opt_state, data, targets, seed, n):
        key = key_for(seed, "classifier/batch", n)
        row, down, right = jax.random.randint(key, (batch_size, 3), 0, limits.reshape(1, 3)).T
        move = jax.vmap(lambda image, y, x: jax.lax.dynamic_slice(image, (y, x, 0), shape))
        x = move(data[row], down, right)

        def loss(p):
            logits, _ = classifier.apply(config, p, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets[row]).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = jax.jit(functools.partial(classifier.init, config))(key_for(seed, "classifier/init"))
    opt_state = optimizer.init(params)
    for n in range(num_steps):
        params, opt_state = step(params, opt_state, data, targets, seed, n)
    return Classifier(config, jax.device_get(params))


def features(judge: Classifier, images: np.ndarray) -> np.ndarray:
    """f32 [N,F] of uint8 images [N,H,W,3]."""
    return _outputs(judge, images)[1]


def predict(judge: Classifier, images: np.ndarray) -> np.ndarray:
    """The most likely class, int64 [N], of uint8 images [N,H,W,3]."""
    return _outputs(judge, images)[0].argmax(-1)


def evaluate(judge: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of uint8 images [N,H,W,3] that are classified as their label."""
    images, labels = _pairs(images, labels)
    _check_classes(labels, judge.config.num_classes)
    return float((predict(judge, images) == labels).mean())


@dataclasses.dataclass(frozen=True)
class HalfDistance:
    """Fréchet distance between random halves of one set: what a perfect sampler would score."""

    mean: float
    spread: float  # standard deviation over the splits
    splits: int


def half_distance(
    features: np.ndarray, labels: np.ndarray, seed: int, *, splits: int = 10
) -> HalfDistance:
    """Over `splits` random class-balanced halves of features [N,F] with labels [N]."""
    labels = np.asarray(labels)
    if len(features) != len(labels) or len(labels) < 4:
        raise InputError(
            f"{len(features)} features, {len(labels)} labels: halves need 4 or more of both"
        )
    figures = []
    for split in range(splits):
        order = np.asarray(jax.random.permutation(key_for(seed, "halves", split), len(labels)))
        # By class, then every second one: each half gets half of each class, odd classes in turn.
        order = order[np.argsort(labels[order], kind="stable")]
        first, second = Moments.of(features[order[::2]]), Moments.of(features[order[1::2]])
        figures.append(distance(first, second))
    return HalfDistance(float(np.mean(figures)), float(np.std(figures)), splits)


def save(judge: Classifier, path: str | os.PathLike) -> str:
    """Writes configuration and parameters as one `.npz`; returns their digest."""
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(judge.params).items()}
    header = json.dumps(dataclasses.asdict(judge.config), sort_keys=True)
    digest = digest_arrays(arrays, header)
    write_npz(path, {"config": np.array(header), "digest": np.array(digest), **arrays})
    return digest


def load(path: str | os.PathLike) -> Classifier:
    """Reads what `save` wrote; raises InputError for another file or one that changed since."""
    arrays = read_npz(path)
    header, digest = str(arrays.pop("config", "")), str(arrays.pop("digest", ""))
    if not header or digest_arrays(arrays, header) != digest:
        raise InputError(
            f"{path} is not a classifier as it was saved: its content has not the digest it names; "
            "delete it and evaluate again to train another"
        )
    try:
        config = classifier.ClassifierConfig(**json.loads(header))
    except TypeError as error:
        raise InputError(
            f"{path} was saved by another version ({error}); delete it and evaluate again"
        ) from error
    return Classifier(config, nest(arrays))


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, images):
    return classifier.apply(config, params, to_unit(images))


def _outputs(judge, images):
    images = check_images(images)
    logits, features = [], []
    for start in range(0, len(images), BATCH):
        rows = images[start : start + BATCH]
        padded = np.pad(rows, ((0, BATCH - len(rows)), (0, 0), (0, 0), (0, 0)))
        out = jax.device_get(_forward(judge.config, judge.params, padded))
        logits.append(out[0][: len(rows)])
        features.append(out[1][: len(rows)])
    if not logits:
        raise InputError("no images to classify; give at least one")
    return np.concatenate(logits), np.concatenate(features)


def _pairs(images, labels):
    images, labels = check_images(images), np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),) or not len(labels):
        raise InputError(
            f"labels {labels.dtype} {labels.shape} for {len(images)} images: the rule is one "
            "integer per image, and at least one image"
        )
    return images, labels


def _check_classes(labels, num_classes):
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"labels from {labels.min()} to {labels.max()}: the classes are 0 to {num_classes - 1}"
        )
