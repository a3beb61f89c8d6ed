"""What features' sums and files cost beside the bare forward of the network that makes them.

    python -m benchmarks.extraction_overhead

Both get the same uint8 images: `accumulate` over `compile_features`, each time with the start, the
save and the end that 50k images have once, and the bare jitted network. The Inception (random
weights: its speed is that of the published ones) takes turns with itself call by call. A network
so cheap that the sums show, at the Inception's widths, takes turns run by run: else its bare calls
would pay for the sums of the thread beside them. Then the parts of the accumulation alone, from
which 50k images are projected: two cores take hours for those. The Fréchet step: frechet_time.
"""

import dataclasses
import inspect
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import keep
from benchmarks.timing import by_turns, ratios, seconds
from ldm_jax.eval import accumulate, protocol, random_conv
from ldm_jax.eval.extractors import EXTRACTORS
from ldm_jax.eval.frechet import Moments
from ldm_jax.eval.judge import BLOCK
from ldm_jax.eval.statistics import compile_features
from ldm_jax.models.frozen import inception
from ldm_jax.sharding import make_mesh

MOMENTS = {tap: inception.TAPS[tap] for tap in ("2048", "spatial2023")}
KEPT = {"2048": inception.TAPS["2048"]}
PROJECTED, LIMIT = 50_000, 1.10
SAVE_SECONDS = inspect.signature(accumulate.accumulate).parameters["save_seconds"].default
CHEAP = "random-conv, its features repeated"
CASES = {"inception": (160, 256, 5), CHEAP: (2048, 64, 8)}  # images of a run, pixels, repeats
FED = 4 * accumulate.BLOCK  # images of features that the accumulation alone is fed
PROTOCOL = protocol.make(
    "adm",
    extractor_digest="0" * 64,
    extractor_published=False,
    quantiser="round",
    num=FED,
    labels="none",
)


def he_normal(shapes):
    """Kernels of variance 2 / fan-in, no biases."""
    rng = np.random.default_rng(0)

    def draw(s):
        return rng.standard_normal(s, np.float32) * np.float32((2 / math.prod(s[:-1])) ** 0.5)

    return jax.tree.map(lambda s: draw(s.shape) if len(s.shape) > 1 else np.zeros(s.shape), shapes)


def judge(params, x):
    features = EXTRACTORS["inception"].apply(params, x, "tf1_bilinear")
    return {tap: features[tap] for tap in MOMENTS}


def cheap(params, x):
    features = EXTRACTORS["random-conv"].apply(params, x)["quarters"]
    return {tap: jnp.tile(features, (1, 8))[:, :width] for tap, width in MOMENTS.items()}


class Ways:
    """A network's features of `images` with their sums, and its bare forward."""

    def __init__(self, network, params, images, folder):
        self.measure, self.rows = compile_features(network, make_mesh(), BLOCK)
        self.bare, self.params = jax.jit(network), jax.device_put(params)
        self.images, self.folder = images, folder

    def extraction(self, measure=None):
        shutil.rmtree(self.folder, ignore_errors=True)
        how = dataclasses.replace(PROTOCOL, num=len(self.images))
        call = measure or (lambda indices: self.measure(self.params, self.images[indices]))
        accumulate.accumulate(self.folder, how, call, self.rows, moments=MOMENTS, kept=KEPT)

    def forward(self, start=0, stop=None):
        with jax.default_matmul_precision("highest"):
            for i in range(start, stop or len(self.images), self.rows):
                out = self.bare(self.params, self.images[i : i + self.rows])
        jax.block_until_ready(out)

    def run_by_run(self, repeats):
        """[(extraction, bare forward)] of all images."""
        return by_turns(self.extraction, self.forward, repeats)

    def call_by_call(self, repeats):
        """As run_by_run, the bare forward of each call's images before it or after it."""
        pairs = []
        self.forward(0, self.rows), self.measure(self.params, self.images[: self.rows])
        for _ in range(repeats):
            bare = []

            def call(indices, bare=bare):
                def forward():
                    return self.forward(indices[0], indices[-1] + 1)

                late = len(bare) % 2
                if not late:
                    bare.append(seconds(forward))
                features = self.measure(self.params, self.images[indices])
                if late:
                    bare.append(seconds(forward))
                return features

            whole = seconds(lambda call=call: self.extraction(call))
            alone = tuple(map(sum, zip(*bare, strict=True)))
            pairs.append((tuple(w - a for w, a in zip(whole, alone, strict=True)), alone))
        return pairs


def parts(folder):
    """Seconds of the accumulation's parts, without any network."""
    rng = np.random.default_rng(0)
    few = accumulate.BLOCK - BLOCK  # images: as many as no sum is due for
    features = {tap: rng.random((FED, width), np.float32) for tap, width in MOMENTS.items()}
    blocks = {tap: f[: accumulate.BLOCK] for tap, f in features.items()}
    sums = {tap: Moments.of(block) for tap, block in blocks.items()}

    def feed(state, num):
        for start in range(0, num, BLOCK):
            state.add({tap: f[start : start + BLOCK] for tap, f in features.items()}, BLOCK)

    def begin():
        shutil.rmtree(folder, ignore_errors=True)
        return accumulate.Accumulator(folder, PROTOCOL, moments=MOMENTS, kept=KEPT)

    taken = {"add": [], "sums": [], "both": [], "save": []}
    for _ in range(7):
        state = begin()
        taken["add"].append(seconds(lambda state=state: feed(state, few))[0] / few)
        each = [seconds(lambda t=t: sums[t].add(blocks[t]))[0] for t in MOMENTS]
        taken["sums"].append(sum(each) / accumulate.BLOCK)
        state = begin()

        def whole(state=state):
            return (feed(state, FED), state.finish())

        taken["both"].append(seconds(whole)[0] / FED)
        taken["save"].append(seconds(state.save)[0])
    return {name: summary(times) for name, times in taken.items()}


def summary(times):
    return {"median": float(f"{statistics.median(times):.3g}"), "least": float(f"{min(times):.3g}")}


def main():
    rng = np.random.default_rng(0)
    networks = {
        "inception": (judge, he_normal(inception.shapes())),
        CHEAP: (cheap, random_conv.init(0)),
    }
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "sums"
        for name, (count, side, repeats) in CASES.items():
            images = rng.integers(0, 256, (count, side, side, 3), np.uint8)
            start = time.perf_counter()
            ways = Ways(*networks[name], images, folder)
            pairs = (ways.run_by_run if name == CHEAP else ways.call_by_call)(repeats)
            clock, processors = ratios(pairs)
            results[name] = {
                "measured_images": count * repeats,
                "clock": clock,
                "processors": processors,
                "below_limit": clock["median_of_ratios"] < LIMIT,
                "seconds_of_runs": [[round(side[0], 2) for side in pair] for pair in pairs],
                "ratio_of_sums": round(
                    sum(e[0] for e, _ in pairs) / sum(b[0] for _, b in pairs), 4
                ),
                "bare_seconds_an_image": summary([bare[0] / count for _, bare in pairs]),
            }
            print(name, results[name], round(time.perf_counter() - start), "s", flush=True)
        alone = parts(folder)
    results["accumulation_alone"] = {
        "seconds_an_image": {
            "add: checks, kept features, before the next images": alone["add"],
            "sums: by the thread, while the network has the next images": alone["sums"],
            "both": alone["both"],
        },
        "images_a_second": round(1 / alone["both"]["median"]),
        "seconds_a_save": alone["save"],
    }
    results["projected"] = projected(results["inception"], alone)
    print(results["accumulation_alone"], results["projected"])
    plan = {
        "block": BLOCK,
        "moments": MOMENTS,
        "kept": KEPT,
        "cases": {
            name: dict(zip(("images_a_run", "pixels", "repeats"), case, strict=True))
            for name, case in CASES.items()
        },
        "limit": LIMIT,
    }
    print(keep("extraction_overhead", results, plan))


def projected(measured, alone):
    """From medians: 50k images here, and the fastest device that these processors keep up with."""
    add, sums, both, save = (alone[k]["median"] for k in ("add", "sums", "both", "save"))
    bare = PROJECTED * measured["bare_seconds_an_image"]["median"]
    saves = math.ceil(bare / SAVE_SECONDS)
    extra = PROJECTED * both + saves * save
    # The device waits for `add` and for saves; for sums only where they are slower than it is.
    fastest = min((LIMIT - 1 - save / SAVE_SECONDS) / add, LIMIT / sums)
    return {
        "images": PROJECTED,
        "bare_seconds": round(bare),
        "accumulation_seconds": round(extra, 1),
        "saves": saves,
        "ratio": round(1 + extra / bare, 4),
        "device_images_a_second_within_limit": round(fastest),
        "note": "nothing was measured on an accelerator; 50k images were not measured as a whole",
    }


if __name__ == "__main__":
    main()
