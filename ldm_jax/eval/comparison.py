"""Arms over seeds: tables of means with their errors, contrasts with intervals and verdicts.

A row is of one arm and seed and, for a denoiser, of one way of sampling.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from ldm_jax.eval.report import Table

Row = dict[str, Any]  # arm, seed, of samples WAY, and figures

# What a row says of how its samples were drawn.
WAY = ("sampler", "steps", "guidance", "spacing", "weights", "decode")
# Figures that a table shows; beside them those of frozen networks, which end in their protocol.
SHOWN = (
    "psnr_db",
    "ssim",
    "sharpness",
    "lpips",
    "sample_accuracy",
    "frechet_samples",
    "high_frequency_ratio",
    "spectrum_distance",
)
SHARE = 0.95  # of the intervals


def way_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values of WAY, None for those that a row lacks."""
    return tuple(row.get(name) for name in WAY)


def way_name(row: Mapping[str, Any]) -> str:
    """A way of sampling in words: sampler, steps and what is not the usual."""
    usual = {"guidance": 1.0, "spacing": "auto", "weights": "auto", "decode": "mean"}
    parts = [str(row[name]) for name in ("sampler", "steps") if name in row]
    parts += [f"{name}={row[name]}" for name in usual if row.get(name, usual[name]) != usual[name]]
    return " ".join(parts)


def picture_name(row: Mapping[str, Any]) -> str:
    """Of the file with the first samples of a way."""
    return f"samples-{re.sub(r'[^0-9A-Za-z_.=-]', '-', way_name(row))}.png"


def figures_of(row: Mapping[str, Any]) -> dict[str, float]:
    """What of a row is compared, without the hashes of protocols."""
    return {
        name.rsplit("-", 1)[0]: value for name, value in row.items() if name in SHOWN or "-" in name
    }


def table(rows: Sequence[Row]) -> Table:
    """Of each arm and way of sampling the figures' mean ± standard error over seeds.

    Rows of one way stand together; sampler and steps are columns, and what else ways differ in.
    """
    found = [name for name in WAY if any(name in row for row in rows)]
    differ = [name for name in found if len({row.get(name) for row in rows}) > 1]
    keys = [*(name for name in found if name in ("sampler", "steps", *differ)), "arm"]
    groups: dict[tuple[Any, ...], list[dict[str, float]]] = {}
    for row in rows:
        key = tuple(row.get(name, "") for name in keys)
        groups.setdefault(key, []).append(figures_of(row))
    ways = list(dict.fromkeys(key[:-1] for key in groups))
    columns = list(dict.fromkeys(name for runs in groups.values() for f in runs for name in f))
    lines = []
    for key, runs in sorted(groups.items(), key=lambda item: ways.index(item[0][:-1])):
        cells = [_cell([f[name] for f in runs if name in f]) for name in columns]
        lines.append([*map(str, key), str(len(runs)), *cells])
    return Table("Mean ± standard error over seeds", [*keys, "seeds", *columns], lines)


def contrasts(rows: Sequence[Row], wanted: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Of each contrast, {arm: coefficient}, way and figure: the mean of the sum over seeds.

    The sum of coefficient x figure is taken seed by seed, over those that every arm has; `low` and
    `high` are Student's interval for its mean, of SHARE, where there are two seeds or more. Beside
    an arm that is decoded otherwise, one that is not stands as it is decoded by its mean.
    """
    values: dict[tuple[Any, ...], dict[tuple[str, int], float]] = {}
    for row in rows:
        for figure, value in figures_of(row).items():
            of_runs = values.setdefault((*way_of(row), figure), {})
            of_runs[row["arm"], row["seed"]] = value
    seeds, found = list(dict.fromkeys(row["seed"] for row in rows)), []
    for (name, coefficients), (key, of_runs) in itertools.product(wanted.items(), values.items()):
        by_mean = values.get(_decoded_by_mean(key), {})
        known = {arm for arm, _ in of_runs}
        if not known & coefficients.keys():
            continue
        found_of = {arm: of_runs if arm in known else by_mean for arm in coefficients}
        sums = [
            sum(c * found_of[arm][arm, seed] for arm, c in coefficients.items())
            for seed in seeds
            if all((arm, seed) in found_of[arm] for arm in coefficients)
        ]
        if sums:
            way = {n: value for n, value in zip(WAY, key[:-1], strict=True) if value is not None}
            found.append({"contrast": name, **way, "figure": key[-1], **summary(sums)})
    return found


def _decoded_by_mean(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """The key of the same figure and way, but for how latents are decoded."""
    place = WAY.index("decode")
    return (*key[:place], key[place] and "mean", *key[place + 1 :])


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean of [n], of two or more its interval, and a verdict in words."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"seeds": len(values), "mean": mean, "verdict": "one seed: no interval"}
    if not math.isfinite(mean):
        return {"seeds": len(values), "mean": mean, "verdict": "not finite"}
    low, high = interval(values)
    return {
        "seeds": len(values), "mean": mean, "low": low, "high": high, "verdict": verdict(low, high),
    }  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's interval, of SHARE, for the mean of [n >= 2], with n - 1 degrees of freedom."""
    mean, n = float(np.mean(values)), len(values)
    half = float(stdtrit(n - 1, (1 + SHARE) / 2) * np.std(values, ddof=1) / math.sqrt(n))
    return mean - half, mean + half


def verdict(low: float, high: float) -> str:
    """What an interval says of a difference."""
    if low > 0:
        return "higher"
    if high < 0:
        return "lower"
    return f"no difference larger than {max(abs(low), high):.3g}"


def contrast_table(found: Sequence[Row]) -> Table:
    """The contrasts, a figure a line; sampler and steps are columns, and what ways differ in."""
    differ = [
        name
        for name in WAY
        if any(name in row for row in found)
        and (name in ("sampler", "steps") or len({row.get(name) for row in found}) > 1)
    ]
    lines = [
        [
            row["contrast"],
            *(str(row.get(name, "")) for name in differ),
            row["figure"],
            str(row["seeds"]),
            f"{row['mean']:.3g}",
            f"{row['low']:.3g} .. {row['high']:.3g}" if "low" in row else "",
            row["verdict"],
        ]
        for row in found
    ]
    title = f"Contrasts, with {100 * SHARE:.0f} % intervals of each alone, paired by seed"
    return Table(title, ["contrast", *differ, "figure", "seeds", "mean", "interval", ""], lines)


def markdown(tables: Iterable[Table]) -> str:
    """Each table under its title."""
    out = []
    for title, head, rows in tables:
        lines = [head, ["---"] * len(head), *rows]
        out.append(f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(out)


def _cell(values: Sequence[float]) -> str:
    """Mean ± standard error to three decimals, of small figures to three digits; empty of none."""
    if not values:
        return ""
    mean, n = float(np.mean(values)), len(values)
    decimals = max(3, 2 - math.floor(math.log10(abs(mean)))) if mean and math.isfinite(mean) else 3
    several = f" ± {np.std(values, ddof=1) / math.sqrt(n):.{decimals}f}" if n > 1 else ""
    return f"{mean:.{decimals}f}{several}"
