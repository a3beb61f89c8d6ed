"""The page of an experiment: its tables, contrasts, curves, spectra, samples and times."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.eval.comparison import Row, picture_name, way_name
from ldm_jax.eval.report import COLORS, Curve, Table, write_report
from ldm_jax.eval.spectrum import Spectrum
from ldm_jax.runs.plan import Arm, families
from ldm_jax.train.log import read_metrics

GAP = 2  # pixels between the rows of samples
# Title -> the figure of a line, the first that it has: of a sum of losses the denoising one.
LOSSES = {
    "Training loss": ("loss_diffusion", "loss"),
    "Latent perceptual loss, without its weight": ("loss_lpl",),
    "Held-out loss": ("eval/loss",),
}


def write(
    workdir: Path,
    plan: Mapping[str, Any],
    arms: Mapping[str, Arm],
    rows: Sequence[Row],
    *,
    command: str,
    tables: Sequence[Table],
    times: Mapping[str, float],
    reals: Spectrum | None,
) -> None:
    """Writes WORKDIR/report.html of the runs that `rows` are of.

    `times` are seconds by name of a run or of what runs share; `reals` is the real images'
    spectrum. Curves and pictures are of the first seed.
    """
    runs = {(row["arm"], row["seed"]) for row in rows}
    first = {arm: workdir / f"{arm}-seed{plan['seeds'][0]}" for arm in arms}
    trained = {arm: folder for arm, folder in first.items() if (folder / "metrics.jsonl").exists()}
    write_report(
        workdir / "report.html",
        title=f"ldm experiment: {', '.join(arms)}" if len(arms) < 5 else "ldm experiment",
        summary=f"{len(runs)} of {len(arms) * len(plan['seeds'])} runs are finished: {len(arms)} "
        f"arms, seeds {', '.join(map(str, plan['seeds']))}. Figures are means over seeds ± their "
        "standard error; intervals and verdicts are of each contrast alone.",
        tables=tables,
        images=_pictures(first, rows),
        curves=[*_losses(trained, families(arms, COLORS)), *_spectra(arms, rows, reals)],
        timings=_by_arm(times, arms),
        commands=[command, "", *json.dumps(plan, indent=2).splitlines()],
    )


def _losses(folders: Mapping[str, Path], groups: Iterable[Sequence[str]]) -> list[Curve]:
    """A diagram for each loss that is logged and each group of arms."""
    lines, curves = {arm: read_metrics(folder) for arm, folder in folders.items()}, []
    for group in groups:
        for title, names in LOSSES.items():
            series = {}
            for arm in group:
                found = [
                    (line["step"], next(line[name] for name in names if name in line))
                    for line in lines.get(arm, [])
                    if any(name in line for name in names)
                ]
                if found:
                    series[arm] = tuple(zip(*found, strict=True))
            if series:
                curves.append(Curve(title, series, log=True))
    return curves


def _spectra(arms: Mapping[str, Arm], rows: Sequence[Row], reals: Spectrum | None) -> list[Curve]:
    """The reals' and each arm's, the mean over seeds, as it was sampled in its first way."""
    if reals is None:
        return []
    curves = []
    for group in families(arms, COLORS - 1):
        series = {"real images": (reals.frequency, reals.power)}
        for arm in group:
            of_arm = [row for row in rows if row["arm"] == arm and "spectrum" in row]
            of_arm = [row for row in of_arm if way_name(row) == way_name(of_arm[0])]
            if of_arm:
                power = np.mean([row["spectrum"] for row in of_arm], 0)
                series[arm] = (of_arm[0]["frequency"], power)
        if len(series) > 1:
            labels = {"x_label": "cycles per pixel", "y_label": "squared grey values"}
            curves.append(Curve("Power spectrum of samples", series, log=True, **labels))
    return curves


def _pictures(folders: Mapping[str, Path], rows: Sequence[Row]) -> list[tuple[str, np.ndarray]]:
    """The first samples of every arm, one arm under the other: a column is of one noise."""
    strips, names = [], []
    for arm, folder in folders.items():
        row = next((r for r in rows if r["arm"] == arm and (folder / picture_name(r)).exists()), {})
        if row:
            strips.append(np.asarray(Image.open(folder / picture_name(row)).convert("RGB")))
            names.append(f"{arm} ({way_name(row)})")
    if not strips:
        return []
    width = max(strip.shape[1] for strip in strips)
    padded = [
        np.pad(
            strip,
            ((0, GAP), (0, width - strip.shape[1]), (0, 0)),
            constant_values=255,
        )
        for strip in strips
    ]
    caption = f"Samples from the same noise, a column each; from the top: {', '.join(names)}"
    return [(caption, np.concatenate(padded)[:-GAP])]


def _by_arm(times: Mapping[str, float], arms: Iterable[str]) -> dict[str, float]:
    """Seconds of each arm over its seeds; what is no arm's is first stages."""
    shares: dict[str, float] = {}
    for name, seconds in times.items():
        arm = name.rpartition("-seed")[0]
        key = arm if arm in arms else name
        shares[key] = shares.get(key, 0.0) + seconds
    return shares
