"""Seconds of the Fréchet step at the width of Inception's features, and its error, on this machine.

    python benchmarks/frechet_time.py --out benchmarks/results/frechet_2048.json

Random features of a heavy-tailed spectrum, full covariances of a reference and of samples. Every
second is that of the clock on the wall; other work on the machine only adds to it, so the least of
the repetitions is the nearest to the truth. Nothing is downloaded.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np

from ldm_jax.eval import frechet


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    first, second = (features(options.images, options.width, seed) for seed in (1, 2))
    load = os.getloadavg()[0]
    for _ in range(options.repetitions):
        reference = timed(seconds, "moments", frechet.Moments.of, first)
        samples = timed(seconds, "moments", frechet.Moments.of, second)
        pair = (reference.mean, reference.covariance, samples.mean, samples.covariance)
        whole = timed(seconds, "frechet_distance", frechet.frechet_distance, *pair)
        root = frechet.Gaussian.fitted(reference)  # what a reference file may keep
        step = lambda: frechet.Gaussian.fitted(samples).distance(root)  # noqa: B023, E731
        cached = timed(seconds, "with the reference's root made before", step)
        same = root.distance(root)
    record = {
        "width": options.width,
        "images": options.images,
        "seconds": seconds,
        "distance": whole,
        "difference_of_the_two_ways": abs(whole - cached),
        "distance_of_the_reference_to_itself": same,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "numpy": np.__version__,
        "load_average_before_and_after": [round(load, 2), round(os.getloadavg()[0], 2)],
        "note": "shared machine: other processes ran on the same cores",
    }
    print(json.dumps(record, indent=1))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
