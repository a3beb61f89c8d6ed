"""The report of a run: one self-contained HTML file of figures, images, curves and commands."""

import base64
import os
from collections.abc import Mapping, Sequence
from html import escape
from numbers import Integral, Real
from pathlib import Path

import numpy as np

import ldm_jax
from ldm_jax.eval.images_out import png_bytes, write_atomically
from ldm_jax.eval.report_curves import COLORS, Curve, curve_svg

STYLE = Path(__file__).with_name("report.css")


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    figures: Sequence[tuple[str, object, str]],
    commands: Sequence[str] = (),
    timings: Mapping[str, float] | None = None,
    images: Sequence[tuple[str, np.ndarray]] = (),
    curves: Sequence[Curve | tuple] = (),
    summary: str = "",
) -> None:
    """Writes the report to `path`, whole or not at all; every text is escaped.

    `figures` are (name, value, rule or comment), `timings` phase -> seconds, `images` (caption,
    uint8 [H,W,3]), `curves` the fields of `Curve`. Empty parts are left out. Raises InputError for
    an image that is not uint8 [H,W,3].
    """
    parts = [
        _section("Figures", _figures(figures)) if figures else "",
        _section("Images", _images(images)) if images else "",
        _section("Curves", _curves(curves)) if curves else "",
        _section("Time", _timings(timings)) if timings else "",
        _section("Commands", _commands(commands)) if commands else "",
    ]
    lead = f'<p class="lead">{escape(summary)}</p>' if summary else ""
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text('utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n<header><h1>{escape(title)}</h1>{lead}</header>\n"
        f"{''.join(parts)}<footer>ldm_jax {ldm_jax.__version__}</footer>\n</main>\n</body>\n"
        "</html>\n"
    )
    write_atomically(path, lambda file: file.write(page.encode()))


def _section(title, body):
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>\n"


def _figures(figures):
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="value">{_value(value)}</td>'
        f"<td>{escape(comment)}</td></tr>"
        for name, value, comment in figures
    )
    return (
        '<table>\n<thead><tr><th scope="col">Figure</th><th scope="col" class="value">Value</th>'
        f'<th scope="col">Rule or comment</th></tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>'
    )


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
    return (
        f'<div class="bar" aria-hidden="true">{bar}</div>\n<table class="narrow">\n<thead><tr>'
        '<th scope="col">Phase</th><th scope="col" class="value">Time</th>'
        f'<th scope="col" class="value">Share</th></tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
        f'<tfoot><tr><th scope="row">Total</th><td class="value">{_duration(total)}</td>'
        '<td class="value"></td></tr></tfoot>\n</table>'
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
