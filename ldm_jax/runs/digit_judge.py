"""Figures of samples of the digits, by a classifier trained on the real ones."""

import dataclasses
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from ldm_jax.data import images
from ldm_jax.errors import InputError
from ldm_jax.eval import digits, frechet
from ldm_jax.runs.first_stage import FirstStage
from ldm_jax.runs.reconstruction import reconstruct


@dataclasses.dataclass(frozen=True)
class DigitJudge:
    """What samples are held against, and what the yardsticks of their distance are."""

    classifier: digits.Classifier
    real: frechet.Moments  # of the classifier's features of all real digits
    held_out_accuracy: float  # of the classifier
    halves: digits.HalfDistance  # between halves of the real digits
    autoencoder_alone: float  # distance of the first stage's reconstructions to the real digits


def open_judge(first_stage: FirstStage, mesh: Mesh, path: Path) -> DigitJudge:
    """The judge for denoisers of a first stage; its classifier is kept at `path`.

    Raises InputError for a first stage of other images: they take a pretrained network.
    """
    config = first_stage.run.images
    if config.source != "digits":
        raise InputError(
            f"this denoiser was trained on {config.source!r}, and the classifier knows the digits "
            "only; give `ldm evaluate` a --preset or an --extractor"
        )
    train_images, train_labels = all_images(images.open_images(config, "train", augment=False))
    held_out, held_out_labels = all_images(images.open_images(config, "held_out", augment=False))
    if path.exists():
        classifier = digits.load(path)
    else:
        classifier = digits.train_classifier(train_images, train_labels, seed=0)
        digits.save(classifier, path)
    real = np.concatenate([train_images, held_out])
    features = digits.features(classifier, real)
    moments = frechet.Moments.of(features)
    rebuilt = digits.features(classifier, reconstruct(first_stage, real, mesh))
    labels = np.concatenate([train_labels, held_out_labels])
    return DigitJudge(
        classifier,
        moments,
        digits.evaluate(classifier, held_out, held_out_labels),
        digits.half_distance(features, labels, seed=0),
        frechet.distance(frechet.Moments.of(rebuilt), moments),
    )


def sample_figures(judge: DigitJudge, pictures: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and Fréchet distance of samples uint8 [N,H,W,3] that were asked for as labels [N].

    Beside the distance stand its two yardsticks: that between halves of the real digits and that of
    their reconstructions by the first stage alone.
    """
    features = frechet.Moments.of(digits.features(judge.classifier, pictures))
    return {
        "classifier_held_out_accuracy": judge.held_out_accuracy,
        "sample_accuracy": digits.evaluate(judge.classifier, pictures, labels),
        "frechet_samples": frechet.distance(features, judge.real),
        "frechet_autoencoder_alone": judge.autoencoder_alone,
        "frechet_halves_of_real": judge.halves.mean,
        "frechet_halves_of_real_std": judge.halves.spread,
        "num_samples": float(len(pictures)),
    }


def all_images(source: images.ImageSplit) -> tuple[np.ndarray, np.ndarray]:
    """A whole split: uint8 [N,H,W,3] and labels [N]. For small data sets."""
    indices = np.arange(len(source), dtype=np.int64)
    batch = source.read(indices, indices)
    return batch["image"], batch["label"]
