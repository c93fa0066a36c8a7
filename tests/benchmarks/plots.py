"""Plots as SVG files, which a page on any host shows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import Any

from tests.benchmarks.shapes import Shape

COLOURS = {
    "ecomoe": "#1f6feb",
    "grouped_mm": "#d9822b",
    "eager": "#8a6d3b",
    "batched_mm": "#a371f7",
    "st_moe": "#57a773",
    "dense": "#6e7781",
}
FONT = 'font-family="sans-serif" font-size="11"'
MOST = 16.0  # over dense; what is slower stands at the edge


def ratios(layers: dict[str, Any]) -> str:
    """Return a plot of each shape's times over dense, forward + backward, with quartiles."""
    left, right, top, row = 330, 40, 40, 18
    width = 900
    height = top + row * len(layers) + 50

    def across(ratio: float) -> float:
        share = math.log(min(max(ratio, 0.5), MOST) / 0.5) / math.log(MOST / 0.5)
        return left + share * (width - left - right)

    out = [_legend([name for name in COLOURS if name != "dense"], left)]
    for tick in (0.5, 1, 1.5, 2, 3, 5, 8, 16):
        x, stroke = across(tick), "#6e7781" if tick == 1 else "#d0d7de"
        out.append(_line(x, top - 6, x, height - 40, stroke))
        out.append(_text(x, height - 25, f"{tick:g}", anchor="middle"))
    caption = "time over the dense FFN of equal active FLOPs, forward + backward"
    out.append(_text((left + width - right) / 2, height - 8, caption, anchor="middle"))
    for index, record in enumerate(layers.values()):
        y = top + row * index + row / 2
        out.append(_text(left - 8, y + 4, _short(Shape(**record["shape"])), anchor="end"))
        for name, colour in COLOURS.items():
            if name == "dense" or name not in record["contenders"]:
                continue
            low, median, high = record["contenders"][name]["both"]["over_dense"]
            out.append(_line(across(low), y, across(high), y, colour, width=2))
            out.append(f'<circle cx="{across(median):.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
    return _svg(width, height, out)


def curves(race: dict[str, Any]) -> str:
    """Return a plot of validation loss against seconds, one pair of curves a seed."""
    runs = list(race["runs"].values())
    points = [
        (seconds, loss)
        for run in runs
        for name in ("dense", "ecomoe")
        for seconds, loss in _curve(run, name)
    ]
    # The first losses are of untrained models and would flatten the rest.
    losses = sorted(loss for _, loss in points)
    lowest, highest = losses[0], losses[int(0.85 * (len(losses) - 1))]
    last = max(seconds for seconds, _ in points)
    left, right, top, bottom, width, height = 60, 20, 40, 45, 760, 380

    def place(seconds: float, loss: float) -> str:
        x = left + seconds / last * (width - left - right)
        share = (min(loss, highest) - lowest) / max(highest - lowest, 1e-9)
        return f"{x:.1f},{height - bottom - share * (height - top - bottom):.1f}"

    out = [_legend(["dense", "ecomoe"], left)]
    for step in range(6):
        loss = lowest + (highest - lowest) * step / 5
        y = float(place(0, loss).split(",")[1])
        out.append(_line(left, y, width - right, y, "#d0d7de"))
        out.append(_text(left - 6, y + 4, f"{loss:.3f}", anchor="end"))
        x = left + (width - left - right) * step / 5
        out.append(_text(x, height - bottom + 16, f"{last * step / 5:.0f}", anchor="middle"))
    caption = f"{race['title']}: validation loss against seconds of training, {len(runs)} seeds"
    out.append(_text((left + width - right) / 2, height - 8, caption, anchor="middle"))
    for run in runs:
        for name in ("dense", "ecomoe"):
            path = " ".join(place(*point) for point in _curve(run, name) if point[1] <= highest)
            out.append(
                f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" '
                'stroke-width="1.6" stroke-opacity="0.85"/>'
            )
    return _svg(width, height, out)


def _curve(run: dict[str, Any], name: str) -> list[tuple[float, float]]:
    return [(point["seconds"], point["loss"]) for point in run[name]]


def _short(shape: Shape) -> str:
    return shape.name.removesuffix("-balanced").replace("-", " ")


def _legend(names: Iterable[str], left: float) -> str:
    parts = []
    for index, name in enumerate(names):
        x = left + 110 * index
        parts.append(f'<circle cx="{x}" cy="14" r="5" fill="{COLOURS[name]}"/>')
        parts.append(_text(x + 10, 18, name))
    return "\n".join(parts)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, *, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width:g}"/>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" {FONT} fill="#57606a" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}">\n<rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head, *parts, "</svg>", ""])
