"""The table of metrics: each is had from the fewest images that it names, and not from fewer."""

import dataclasses

import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval.frechet import Moments
from ldm_jax.eval.metrics import METRICS, Measured, Target, choose_metrics
from ldm_jax.eval.protocol import PRESETS
from ldm_jax.eval.references import MeanCovariance

PRESET = dataclasses.replace(PRESETS["torch_fidelity"], kid_subset_size=7, spatial_tap="spatial")


def figures(name, num):
    rng = np.random.default_rng(0)
    images, real = rng.normal(size=(2, num, 4)).astype(np.float32)

    def gaussian(tap, width):
        return MeanCovariance(np.zeros(width), np.eye(width))

    metric = METRICS[name]
    tap = metric.tap(PRESET)
    measured = Measured({tap: Moments.of(images)}, {tap: images}.__getitem__)
    target = Target("", gaussian, {tap: real}.__getitem__)
    found = metric.figures(PRESET, tap, measured, target)
    assert tuple(found) == (metric.names or (name,))
    return found


BOUND = [name for name in METRICS if name not in ("cmmd", "fid_infinity")]


@pytest.mark.parametrize("name", BOUND)
def test_a_metric_takes_the_fewest_images_that_it_names_and_no_fewer(name):
    least = METRICS[name].least(PRESET)
    assert all(np.isfinite(value) for value in figures(name, least).values())
    with pytest.raises(InputError):
        figures(name, least - 1)
    assert choose_metrics([name], PRESET, lambda part, tap: True, {"set": least}) == (name,)
    with pytest.raises(InputError, match=f"it takes {least} images or more, and set is of"):
        choose_metrics([name], PRESET, lambda part, tap: True, {"set": least - 1})
