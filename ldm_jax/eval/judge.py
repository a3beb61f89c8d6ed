"""The networks that judge images, by preset."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ldm_jax.errors import InputError, choose, within
from ldm_jax.eval.extractors import EXTRACTORS
from ldm_jax.eval.metrics import METRICS, SECOND
from ldm_jax.eval.protocol import PRESETS, Preset, Protocol
from ldm_jax.eval.statistics import Features, compile_features
from ldm_jax.files import digest_of
from ldm_jax.interop import pretrained
from ldm_jax.options import Group, option

BLOCK = 16  # images that a network sees at once, whole on one device
NETWORKS = Group(
    "frozen networks",
    "Without any of these flags, first stages are measured by PSNR, SSIM and LPIPS, samples of the "
    "digits by a classifier, all others by preset adm against their training images.",
)


@dataclasses.dataclass(frozen=True)
class JudgeOptions:
    """How images are judged."""

    preset: str = option(  # or "custom": `extractor` by its usual resize
        "adm",
        "conventions of: adm, torch_fidelity, clean, edm2",
        metavar="NAME",
        group=NETWORKS,
    )
    extractor: str = option(  # of preset "custom"
        "",
        "a network by its own resize: random-conv (needs no file), inception, vgg16, ...",
        metavar="NAME",
        group=NETWORKS,
    )
    extractor_file: str = option(
        "",
        "its weights, of a preset of two the first one's (default: as `ldm weights` puts them)",
        metavar="FILE",
        group=NETWORKS,
    )
    metrics: tuple[str, ...] = option(
        (),
        "fid, sfid, inception_score, kid, cmmd, precision_recall, density_coverage, memorisation, "
        "fid_infinity (default: what preset and reference allow)",
        metavar="NAME,...",
        group=NETWORKS,
    )
    reference: str = option(
        "",
        "statistics (.npz of ADM, torch-fidelity, EDM, ours; EDM2's .pkl), images in an .npz or a "
        "folder (default: the run's own images)",
        metavar="FILE_OR_DIR",
        group=NETWORKS,
    )
    kid_subset_size: int = option(  # of preset "custom"; 0 = 1000
        0,
        "images in a subset of KID, of preset custom (default: 1000)",
        metavar="N",
        group=NETWORKS,
    )
    allow_few: bool = option(
        False, "Frechet distances from no more images than features", group=NETWORKS
    )

    def __post_init__(self):
        choose("preset", self.preset, (*PRESETS, "custom"))
        if (self.preset == "custom") != bool(self.extractor):
            raise InputError(
                f"extractor {self.extractor!r} with preset {self.preset!r}: an extractor belongs "
                "to preset 'custom', and that one needs it"
            )
        if self.extractor:
            choose("extractor", self.extractor, EXTRACTORS)
        if self.extractor_file and self.extractor and EXTRACTORS[self.extractor].init:
            raise InputError(
                f"extractor {self.extractor!r} takes no weights; leave extractor-file "
                f"{self.extractor_file!r} out"
            )
        if self.kid_subset_size and self.preset != "custom":
            raise InputError(
                f"kid_subset_size {self.kid_subset_size} with preset {self.preset!r}, which has "
                "its own; leave it out, or take preset 'custom'"
            )
        if self.kid_subset_size:
            within("kid_subset_size", self.kid_subset_size, "[2, inf)", "0 = 1000")
        for name in self.metrics:
            choose("metric", name, METRICS)


@dataclasses.dataclass(frozen=True)
class Judge:
    """The networks of a preset, compiled for a mesh."""

    name: str  # of the preset
    preset: Preset
    weights: Mapping[str, pretrained.NetworkWeights]  # by extractor
    taps: Mapping[str, int]  # width of each, the second network's after SECOND
    measure: Callable[[np.ndarray], Features]  # uint8 [n <= rows,H,W,3] of this process
    rows: int

    def measure_many(self, pictures: np.ndarray, rows: int) -> Features:
        """Of at most `rows` images; calls the networks equally often on every process."""
        parts = [
            self.measure(pictures[start : start + self.rows]) for start in range(0, rows, self.rows)
        ]
        return {tap: np.concatenate([part[tap] for part in parts]) for tap in self.taps}

    def protocol(self, num: int, labels: str, sampling: Mapping[str, Any]) -> Protocol:
        """What `num` images measured by this judge are named after."""
        first, *others = self.weights
        more: dict[str, Any] = {name: self.weights[name].digest for name in others}
        if self.name == "custom" and self.preset.kid_subset_size != Preset.kid_subset_size:
            more["kid_subset_size"] = self.preset.kid_subset_size
        return Protocol(
            preset=self.name,
            extractor=first,
            extractor_digest=self.weights[first].digest,
            extractor_published=all(weights.published for weights in self.weights.values()),
            tap=self.preset.tap,
            resize=self.preset.resize,
            quantiser="round",
            num=num,
            labels=labels,
            sampling={**sampling, **more},
        )


def open_judge(options: JudgeOptions, mesh: Mesh, taps: Mapping[str, None]) -> Judge:
    """Loads and compiles the networks; InputError for weights that are missing or others'."""
    preset = find_preset(options)
    names = [preset.extractor]
    if any(tap.startswith(SECOND) for tap in taps):
        names.append(preset.neighbours_extractor)
    files = (options.extractor_file, "")
    weights = {name: read_weights(name, file) for name, file in zip(names, files, strict=False)}
    every = NamedSharding(mesh, P())
    params = jax.device_put({name: w.params for name, w in weights.items()}, every)

    def network(params, x):
        first = EXTRACTORS[names[0]].apply(params[names[0]], x, preset.resize)
        for name in names[1:]:
            second = EXTRACTORS[name].apply(params[name], x)
            first |= {SECOND + tap: f for tap, f in second.items()}
        return {tap: first[tap] for tap in taps}

    measure, rows = compile_features(network, mesh, BLOCK)
    widths = dict(EXTRACTORS[names[0]].taps)
    for name in names[1:]:
        widths |= {SECOND + tap: width for tap, width in EXTRACTORS[name].taps.items()}
    return Judge(
        options.preset,
        preset,
        weights,
        {tap: widths[tap] for tap in taps},
        functools.partial(measure, params),
        rows,
    )


def find_preset(options: JudgeOptions) -> Preset:
    """The preset's conventions; of "custom", the extractor's first tap and its own resize."""
    if options.preset != "custom":
        return PRESETS[options.preset]
    extractor = EXTRACTORS[options.extractor]
    tap = "2048" if "2048" in extractor.taps else next(iter(extractor.taps))
    size = options.kid_subset_size or Preset.kid_subset_size
    return Preset(extractor=extractor.name, tap=tap, resize=extractor.resize, kid_subset_size=size)


def read_weights(name: str, file: str) -> pretrained.NetworkWeights:
    """A network's parameters, from its file or, for one that needs none, from its seed."""
    init = EXTRACTORS[name].init
    if init is None:
        return pretrained.read(name, file)
    params = jax.device_get(init())
    digest = digest_of(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(params))
    return pretrained.NetworkWeights(params, digest, False)
