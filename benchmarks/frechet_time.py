"""Seconds of the Fréchet step at the width of Inception's features, and its error, on this machine.

    python -m benchmarks.frechet_time

Random features of a heavy-tailed spectrum, full covariances of a reference and of samples. Every
second is that of the clock on the wall; other work on the machine only adds to it, so the least of
the repetitions is the nearest to the truth. Nothing is downloaded.
"""

import time

import numpy as np

from benchmarks.record import keep
from ldm_jax.eval import frechet

WIDTH, IMAGES, REPEATS = 2048, 10_000, 3


def features(count: int, width: int, seed: int) -> np.ndarray:
    """f32 [count,width] whose standard deviations fall as 1 / sqrt(index), mixed by a rotation."""
    spread = np.arange(1, width + 1) ** -0.5
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0]
    draws = np.random.default_rng(seed).normal(size=(count, width)) * spread
    return (draws @ rotation).astype(np.float32)


def timed(seconds: dict[str, list[float]], name: str, function, *arguments):
    """What the function returns; its seconds are added to the list of that name."""
    start = time.perf_counter()
    result = function(*arguments)
    seconds.setdefault(name, []).append(round(time.perf_counter() - start, 2))
    print(f"{name}: {seconds[name][-1]} s", flush=True)
    return result


def main():
    seconds: dict[str, list[float]] = {}
    first, second = (features(IMAGES, WIDTH, seed) for seed in (1, 2))
    for _ in range(REPEATS):
        reference = timed(seconds, "moments", frechet.Moments.of, first)
        samples = timed(seconds, "moments", frechet.Moments.of, second)
        pair = (reference.mean, reference.covariance, samples.mean, samples.covariance)
        whole = timed(seconds, "frechet_distance", frechet.frechet_distance, *pair)
        root = frechet.Gaussian.fitted(reference)  # what a reference file may keep

        def step():
            return frechet.Gaussian.fitted(samples).distance(root)  # noqa: B023

        cached = timed(seconds, "with the reference's root made before", step)
        same = root.distance(root)
    results = {
        "seconds": seconds,
        "distance": whole,
        "difference_of_the_two_ways": abs(whole - cached),
        "distance_of_the_reference_to_itself": same,
    }
    plan = {"width": WIDTH, "images": IMAGES, "repeats": REPEATS}
    print(keep("frechet_time", results, plan))


if __name__ == "__main__":
    main()
