"""Inception score from a classifier's logits, f64, in the two conventions of published figures."""

from collections.abc import Iterable

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.eval.feature_sets import BLOCK, blocks, checked


def inception_score(
    logits: np.ndarray, *, splits: int = 10, seed: int = 2020
) -> tuple[float, float]:
    """exp(E KL(p(y|x) || p(y))) of logits [N,C]: (mean, standard deviation) over splits.

    The logits are those of the network *without its bias*. The images are shuffled once, by the
    permutation that torch-fidelity draws from this seed, so that samples sorted by class score the
    same; split i holds rows floor(iN/splits) to floor((i+1)N/splits). Salimans et al., NeurIPS
    2016. Raises InputError for fewer images than splits.
    """
    logits = checked(logits, name="logits")
    if not 1 <= splits <= len(logits):
        raise InputError(
            f"{splits} splits of {len(logits)} images: the rule is 1 split or more, none of them "
            "empty; take more images or fewer splits"
        )
    n = len(logits)
    order = np.random.RandomState(seed).permutation(n)
    return _over(logits, (order[i * n // splits : (i + 1) * n // splits] for i in range(splits)))


def inception_score_adm(logits: np.ndarray, *, split_size: int = 5000) -> tuple[float, float]:
    """The same as ADM's evaluator computes it: consecutive splits in the order of the samples.

    For samples in random order only: sorted by class, splits lack classes and the score collapses.
    A remainder is a split of its own, as there. Dhariwal and Nichol's guided-diffusion,
    evaluations/evaluator.py.
    """
    logits = checked(logits, name="logits")
    return _over(logits, (np.arange(s.start, s.stop) for s in blocks(len(logits), split_size)))


def _over(logits: np.ndarray, splits: Iterable[np.ndarray]) -> tuple[float, float]:
    scores = [_score(logits, rows) for rows in splits]
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits, rows) -> float:
    """Of one split: E KL is the entropy of the mean prediction less the mean of the entropies."""
    total, negative_entropy = np.zeros(logits.shape[1]), 0.0
    for part in blocks(len(rows), BLOCK):
        x = logits[rows[part]].astype(np.float64)
        x -= x.max(1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
        p = np.exp(log_p)
        total += p.sum(0)
        negative_entropy += (p * log_p).sum()
    mean = total / len(rows)
    seen = mean[mean > 0]  # 0 log 0 = 0, of classes whose every probability underflows
    return float(np.exp(negative_entropy / len(rows) - (seen * np.log(seen)).sum()))
