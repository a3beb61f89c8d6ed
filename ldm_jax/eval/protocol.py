"""What a figure was measured with, and how that becomes part of the figure's name."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.errors import InputError, choose, within
from ldm_jax.files import append_json, digest
from ldm_jax.interop.names import flatten

LABELS = ("balanced", "random", "none")  # "none": no model was asked for classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """The conventions of one published evaluator."""

    extractor: str  # network, by its name in EXTRACTORS
    tap: str  # of the Fréchet distance and of KID
    resize: str  # to the network's input size, by its name in RESIZES
    frechet: str = "fid"  # what the Fréchet distance is called
    spatial_tap: str = ""  # of sFID; "" = the evaluator has none
    logits_tap: str = ""  # of the inception score; "" = the evaluator has none
    inception_shuffled: bool = True  # in 10 splits; False: as they come, 5000 in a split
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    kid_seed: int = 2020
    neighbours_extractor: str = ""  # network of precision and recall; "" = `extractor`
    neighbours_tap: str = ""  # "" = `tap`
    neighbours_k: int = 3
    neighbours_real: int = 0  # real images that span the manifold; 0 = as many as samples


# ADM: guided-diffusion@22e0df8 evaluations/evaluator.py. torch_fidelity: 0.4.0. clean: clean-fid
# @e88c4d6, whose KID draws from NumPy's global generator: here from a seed. edm2: edm2@4bf8162, its
# FD-DINOv2; its FID is that of `adm`. What an evaluator does not define has torch_fidelity's way.
PRESETS = {
    "adm": Preset(
        extractor="inception",
        tap="2048",
        resize="tf1_bilinear",
        spatial_tap="spatial2023",
        logits_tap="logits_unbiased",
        inception_shuffled=False,
        neighbours_real=10_000,
    ),
    "torch_fidelity": Preset(
        extractor="inception",
        tap="2048",
        resize="tf1_bilinear",
        logits_tap="logits_unbiased",
        neighbours_extractor="vgg16",
        neighbours_tap="fc2_relu",
    ),
    "clean": Preset(
        extractor="inception",
        tap="2048",
        resize="pil_bicubic",
        logits_tap="logits_unbiased",
    ),
    "edm2": Preset(
        extractor="dinov2-vitl14",
        tap="cls",
        resize="torch_bicubic_aa",
        frechet="fd_dinov2",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """All that a figure depends on besides the weights that are judged."""

    preset: str  # a name in PRESETS, or "custom" for any extractor and resize
    extractor: str
    extractor_digest: str  # sha256 hex of its weights
    extractor_published: bool  # whether that is the digest of the published weights
    tap: str
    resize: str
    quantiser: str  # how floats became uint8
    num: int  # samples
    labels: str  # of LABELS
    # Plain values: guidance, sampler, steps, seed, average, digest of the reference …
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        choose("preset", self.preset, (*PRESETS, "custom"))
        choose("labels", self.labels, LABELS)
        within("num", self.num, "[1, inf)")
        if not re.fullmatch("[0-9a-f]{64}", self.extractor_digest):
            raise InputError(
                f"extractor_digest {self.extractor_digest!r} must be a sha256, 64 hex digits"
            )
        for name in ("extractor", "tap", "resize") if self.preset in PRESETS else ():
            have, rule = getattr(self, name), getattr(PRESETS[self.preset], name)
            if have != rule:
                raise InputError(
                    f"{name} {have!r}: preset {self.preset!r} is {name} {rule!r}; take that, or "
                    "preset 'custom'"
                )
        object.__setattr__(self, "sampling", _plain(self.sampling, "sampling"))

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def hash(self) -> str:
        """sha256 hex over every field, in canonical JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return digest(text)

    @property
    def is_custom(self) -> bool:
        """Whether the figures are not those of a published network with its published weights."""
        return self.preset == "custom" or not self.extractor_published

    def metric_name(self, metric: str) -> str:
        """As "fid50k-adm-1a2b3c4d": metric, number of samples, preset, start of the hash."""
        return self.name_to_hash(metric) + self.hash()[:8]

    def name_to_hash(self, metric: str) -> str:
        """The start of `metric_name`, as "fid50k-adm-", which is the same whatever the sampling.

        The Fréchet distance has the name that belongs to its network: of a custom extractor, no
        figure is ever called FID.
        """
        if not re.fullmatch("[a-z][a-z0-9_]*", metric):
            raise InputError(f"metric {metric!r} must be of a-z, 0-9 and _, a letter first")
        custom = self.is_custom
        frechet = "frechet" if custom else PRESETS[self.preset].frechet
        metric = metric.replace("fid", frechet)
        count = f"{self.num // 1000}k" if self.num % 1000 == 0 else str(self.num)
        gap = "-" if metric[-1].isdigit() else ""
        return f"{metric}{gap}{count}-{'custom' if custom else self.preset}-"


def difference(have: Any, want: Protocol) -> str:
    """The first field where a protocol's JSON differs from `want`, in words; "" where none does."""
    if not isinstance(have, dict):
        return "it names no protocol"
    have, wanted = flatten(have, "."), flatten(want.to_json(), ".")
    for name in sorted({*have, *wanted}):
        if have.get(name) != wanted.get(name):
            return f"{name} is {have.get(name)!r} there but {wanted.get(name)!r} here"
    return ""


def append(
    path: str | os.PathLike, protocol: Protocol, figures: Mapping[str, float], **record: Any
) -> None:
    """Adds one line {**record, "protocol", "figures"} to a file of JSON lines.

    Raises InputError, and leaves the file alone, where it has a figure of the same name that was
    measured by another protocol: the two would read as one curve.
    """
    path = Path(path)
    for number, line in enumerate(_lines(path), 1):
        shared = sorted({*figures} & {*line.get("figures", {})})
        reason = difference(line.get("protocol"), protocol) if shared else ""
        if reason:
            raise InputError(
                f"{path} line {number} has {shared[0]} by another protocol ({reason}); write to "
                "another file, or evaluate as it did"
            )
    append_json(path, {**record, "protocol": protocol.to_json(), "figures": dict(figures)})


def _lines(path: Path) -> list[dict[str, Any]]:
    out = []
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            out.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path} line {number} is no JSON object ({error}); remove the line"
            ) from error
    return out


def _plain(value: Any, name: str) -> Any:
    """JSON's own types, equal values as one: 1.0 is 1, a tuple is a list."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{name}.{k}") for k, v in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [_plain(v, name) for v in value]
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else value
    if isinstance(value, str | bool | int):
        return value
    raise InputError(f"{name} {value!r} must be text, a finite number, a truth value or a list")
