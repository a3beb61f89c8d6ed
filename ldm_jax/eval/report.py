"""The report of a run: one self-contained HTML file of figures, tables, images and curves.

`report.html` is the page and its style sheet; curves are inline SVG.
"""

import base64
import math
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from numbers import Integral, Real
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np

import ldm_jax
from ldm_jax.eval.images_out import png_bytes
from ldm_jax.files import write_text

PAGE = Path(__file__).with_name("report.html")
COLORS = 6  # report.html names them --s0 to --s5
WIDTH, HEIGHT = 460, 260  # of the drawing, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 44  # margins around the axes
POINTS = 300  # most points a line is drawn through
_VALUE = ' class="value"'  # of a cell that stands to the right


class Curve(NamedTuple):
    """One diagram; each of `series` is name -> (xs, ys), two equally long sequences of numbers."""

    title: str
    series: Mapping[str, tuple[Any, Any]]
    log: bool = False  # logarithmic y axis; values that are not positive are left out
    x_label: str = "step"
    y_label: str = ""  # with its unit


class Table(NamedTuple):
    """A section of its own: each of `rows` is as long as `head`, and its first cell names it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    figures: Sequence[tuple[str, object, str]] = (),
    tables: Sequence[Table | tuple] = (),
    commands: Sequence[str] = (),
    timings: Mapping[str, float] | None = None,
    images: Sequence[tuple[str, np.ndarray]] = (),
    curves: Sequence[Curve | tuple] = (),
    summary: str = "",
) -> None:
    """Writes the report to `path`, whole or not at all; every text is escaped.

    `figures` are (name, value, rule or comment), `timings` phase -> seconds, `images` (caption,
    uint8 [H,W,3]), `tables` and `curves` the fields of `Table` and `Curve`. Empty parts are left
    out. Raises InputError for an image that is not uint8 [H,W,3].
    """
    sections = [
        ("Figures", _figures(figures) if figures else ""),
        *((table.title, _rows(table)) for table in map(Table._make, tables)),
        ("Images", _images(images) if images else ""),
        ("Curves", _curves(curves) if curves else ""),
        ("Time", _timings(timings) if timings else ""),
        ("Commands", _commands(commands) if commands else ""),
    ]
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        lead=f'<p class="lead">{escape(summary)}</p>' if summary else "",
        sections="".join(
            f"<section>\n<h2>{escape(name)}</h2>\n{content}\n</section>\n"
            for name, content in sections
            if content
        ),
        version=ldm_jax.__version__,
    )
    write_text(path, page)


def _figures(figures):
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="value">{_value(value)}</td>'
        f"<td>{escape(comment)}</td></tr>"
        for name, value, comment in figures
    )
    return _table(("Figure", "Value", "Rule or comment"), numbers=(1,), rows=rows)


def _rows(table):
    """Columns in which every cell begins like a number, or is empty, stand to the right."""
    width = len(table.head)
    assert all(len(row) == width for row in table.rows), f"{table.title}: {width} cells a row"
    numbers = [
        i for i in range(1, width) if all(re.match(r"[-+]?\d|$", row[i]) for row in table.rows)
    ]

    def cell(i, text):
        return f"<td{_VALUE * (i in numbers)}>{escape(text)}</td>"

    rows = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        f"{''.join(cell(i, text) for i, text in enumerate(rest, 1))}</tr>"
        for first, *rest in table.rows
    )
    return _table(table.head, numbers=numbers, rows=rows)


def _value(value):
    """Whole numbers in full, other numbers to four digits; everything else as it prints."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Real) and not isinstance(value, bool):
        return f"{value:.4g}"
    return escape(str(value))


def _images(images):
    return '<div class="images">\n' + "\n".join(map(_image, images)) + "\n</div>"


def _image(item):
    caption, image = item
    data = base64.b64encode(png_bytes(image)).decode()
    height, width = image.shape[:2]
    # Small grids are enlarged by whole factors only, so that every pixel stays a square.
    scale = max(1, min(4, 680 // width))
    return (
        f'<figure style="max-width:{width * scale}px">\n<img alt="{escape(caption)}" '
        f'width="{width * scale}" height="{height * scale}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def _curves(curves):
    drawn = "\n".join(
        f'<figure>\n<figcaption class="above">{escape(curve.title)}</figcaption>\n'
        f"{_legend(curve)}{curve_svg(curve)}\n</figure>"
        for curve in (Curve(*c) for c in curves)
    )
    return f'<div class="curves">\n{drawn}\n</div>'


def _legend(curve):
    items = "".join(
        f'<li><i style="background:var(--s{i % COLORS})"></i>{escape(name)}</li>'
        for i, name in enumerate(curve.series)
    )
    return f'<ul class="legend">{items}</ul>\n'


def _timings(timings):
    total = sum(timings.values())
    shares = {name: seconds / total if total > 0 else 0.0 for name, seconds in timings.items()}
    bar = "".join(
        f'<i style="width:{100 * share:.2f}%;background:var(--s{i % COLORS})"></i>'
        for i, share in enumerate(shares.values())
    )
    rows = "\n".join(
        f'<tr><th scope="row"><i class="key" style="background:var(--s{i % COLORS})"></i>'
        f'{escape(name)}</th><td class="value">{_duration(seconds)}</td>'
        f'<td class="value">{100 * shares[name]:.1f} %</td></tr>'
        for i, (name, seconds) in enumerate(timings.items())
    )
    foot = (
        f'\n<tfoot><tr><th scope="row">Total</th><td class="value">{_duration(total)}</td>'
        '<td class="value"></td></tr></tfoot>'
    )
    names, style = ("Phase", "Time", "Share"), ' class="narrow"'
    table = _table(names, numbers=(1, 2), rows=rows, foot=foot, style=style)
    return f'<div class="bar" aria-hidden="true">{bar}</div>\n{table}'


def _table(names, *, numbers, rows, foot="", style=""):
    """`numbers` are the columns of numbers, which stand to the right."""
    head = "".join(
        f'<th scope="col"{_VALUE * (i in numbers)}>{escape(name)}</th>'
        for i, name in enumerate(names)
    )
    return (
        f"<table{style}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>{foot}\n</table>"
    )


def _duration(seconds):
    """Under a minute in seconds; then h, min and s."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest:02d} s"


def _commands(commands):
    return "<pre><code>" + "\n".join(map(escape, commands)) + "</code></pre>"


def curve_svg(curve: Curve) -> str:
    """The diagram as an `<svg>` element; values that are not finite are left out.

    A series of more than 300 points is drawn as the means of equal runs of points over a pale band
    from the smallest to the largest value of each run.
    """
    lines = [_reduce(*_clean(xs, ys, curve.log)) for xs, ys in curve.series.values()]
    drawn = [line for line in lines if len(line[0])]
    if not drawn:
        return '<p class="none">no data</p>'
    left, right = min(x.min() for x, *_ in drawn), max(x.max() for x, *_ in drawn)
    low, high = min(least.min() for *_, least, _ in drawn), max(most.max() for *_, most in drawn)
    x_ticks = _ticks(left, right, 5, widen=False)
    y_ticks = _log_ticks(low, high) if curve.log else _ticks(low, high, 5, widen=True)
    to_x = _scale(*_nonzero(left, right), LEFT, WIDTH - RIGHT)
    to_y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP, log=curve.log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(curve.title)}">']
    for tick in y_ticks:
        y = to_y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        place = f'x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end"'
        parts.append(f"<text {place}>{_number(tick)}</text>")
    floor = HEIGHT - BOTTOM
    for tick in x_ticks:
        x = to_x(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {floor}v5"/>')
        place = f'x="{x:.1f}" y="{floor + 18}" text-anchor="middle"'
        parts.append(f"<text {place}>{_number(tick)}</text>")
    parts.append(f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
    middle = f'x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle"'
    parts.append(f"<text {middle}>{escape(curve.x_label)}</text>")
    if curve.y_label:
        turned = f'transform="translate(12 {(TOP + floor) / 2}) rotate(-90)" text-anchor="middle"'
        parts.append(f"<text {turned}>{escape(curve.y_label)}</text>")
    for i, (x, y, least, most) in enumerate(lines):
        if not len(x):
            continue
        color = f"var(--s{i % COLORS})"
        if not np.array_equal(least, most):
            edge = np.concatenate([x, x[::-1]]), np.concatenate([most, least[::-1]])
            parts.append(
                f'<path class="band" style="fill:{color}" d="{_path(*edge, to_x, to_y)}Z"/>'
            )
        parts.append(f'<path class="line" style="stroke:{color}" d="{_path(x, y, to_x, to_y)}"/>')
    return "".join([*parts, "</svg>"])


def _clean(xs, ys, log):
    x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    keep = np.isfinite(x) & np.isfinite(y)
    if log:
        keep &= y > 0
    return x[keep], y[keep]


def _reduce(x, y):
    """(x, mean, least, most) over at most POINTS equal runs."""
    runs = np.array_split(np.arange(len(x)), min(len(x), POINTS)) if len(x) else []
    return (
        np.array([x[r].mean() for r in runs]),
        np.array([y[r].mean() for r in runs]),
        np.array([y[r].min() for r in runs]),
        np.array([y[r].max() for r in runs]),
    )


def _ticks(low, high, count, *, widen):
    """Multiples of 1, 2 or 5 times a power of ten, about `count` of them.

    With `widen` the first and last enclose the range; without it they lie inside.
    """
    low, high = _nonzero(low, high)
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    if widen:
        first, last = math.floor(low / step), math.ceil(high / step)
    else:
        first, last = math.ceil(low / step), math.floor(high / step)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low, high):
    """Powers of ten that enclose the range; 1-2-5 steps where it spans at most two of them."""
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high)) + 1
    if last - first > 2:
        stride = -(-(last - first) // 6)
        return [10.0**e for e in range(first, last + stride, stride)]
    ticks = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
    start = max(i for i, tick in enumerate(ticks) if tick <= low)
    stop = min(i for i, tick in enumerate(ticks) if tick > high)
    return ticks[start : stop + 1]


def _nonzero(low, high):
    """The range itself, or one around it when it is a single value."""
    if high > low:
        return low, high
    margin = abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def _scale(low, high, start, stop, log=False):
    f = math.log10 if log else float
    a, b = f(low), f(high)
    return lambda v: start + (f(v) - a) / (b - a) * (stop - start)


def _path(x, y, to_x, to_y):
    return "M" + "L".join(f"{to_x(a):.1f} {to_y(b):.1f}" for a, b in zip(x, y, strict=True))


def _number(value):
    """A tick: thousands as k, tiny and huge values with an exponent."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value / 1000:.6g}k" if size >= 10_000 else f"{value:.6g}"
