"""A run's report as one HTML file with plots, which needs no network to open.

Imported when a file is written: nothing else needs plotly.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ecomoe.ecology.report import summary_line
from ecomoe.ecology.statistics import BASES
from ecomoe.ecology.taxonomy import CATEGORIES

Record = Mapping[str, Any]

MAX_DETAILED_LAYERS = 4
# Cool for the used, warm for the starved; told apart by lightness too.
CATEGORY_COLOURS = {
    "PURE_CORE": "#1b5e20",
    "BROAD_CORE": "#4caf50",
    "WEAK_CORE": "#a5d6a7",
    "CORE": "#388e3c",
    "EDGE": "#64b5f6",
    "NOISE": "#ba68c8",
    "FRINGE": "#90caf9",
    "DEAD": "#b71c1c",
}


def _specialisation(kind: str) -> Callable[[Record], float | None]:
    return lambda layer: layer.get("specialisation_by", {}).get(kind)


# What a layer's evaluation tells beyond usage, each from 0 to 1 (redundancy from -1).
MEASURES: tuple[tuple[str, Callable[[Record], float | None]], ...] = (
    ("redundancy (cosine)", lambda layer: (layer.get("redundancy") or {}).get("cosine")),
    ("redundancy (CKA)", lambda layer: (layer.get("redundancy") or {}).get("cka")),
    ("saturation", lambda layer: layer["lockdown"].get("saturation")),
    ("NMI with class", lambda layer: layer.get("specialisation")),
    ("NMI with token", _specialisation("token")),
    ("NMI with domain", _specialisation("domain")),
)
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}.warn{color:#b71c1c}.muted{color:#666}
.wide{overflow-x:auto}
"""


def write_html(path: str | os.PathLike[str], records: Sequence[Record]) -> None:
    """Write the report of a run.

    Args:
        path: The file; an existing one is replaced, folders are made as needed.
        records: All records of the run, at least one. Evaluation is shown where there was any,
            else training; losses of both.

    Raises:
        ValueError: There are no records.
    """
    if not records:
        raise ValueError("there are no records to show; let the monitor report first")
    phase = "eval" if any(record["phase"] == "eval" for record in records) else "train"
    shown = [record for record in records if record["phase"] == phase]
    last = shown[-1]
    figures = [_dead_figure(records), _loss_figure(records)]
    for layer in _worst_layers(last):
        name = layer["name"]
        figures += [
            _usage_figure(shown, name, basis="top1"),
            _usage_figure(shown, name, basis="topk"),
            _category_figure(shown, name),
            _flow_figure(layer),
            _measures_figure(shown, name),
            _saturation_figure(layer),
        ]
    plots = "\n".join(
        figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"plot{number}")
        for number, figure in enumerate(figure for figure in figures if figure is not None)
    )
    title = html.escape(summary_line(dict(last)))
    # "</" would end the script element.
    data = json.dumps(list(records), allow_nan=False).replace("</", "<\\/")
    page = (
        "<!DOCTYPE html><html lang=en><head><meta charset=utf-8><title>Expert ecology</title>"
        '<link rel=icon href="data:,">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>"
        f"<h1>Expert ecology</h1><p>{title}</p>{_prediction(last)}{_layer_table(last)}"
        f"{_measure_table(last)}<h2>Plots</h2>{plots}{_event_table(records)}"
        f'<script type="application/json" id="records">{data}</script></body></html>\n'
    )
    if not Path(path).parent.exists():
        Path(path).parent.mkdir(parents=True)
    Path(path).write_text(page, encoding="utf-8")


def _worst_layers(record: Record) -> list[Record]:
    ranked = sorted(
        record["layers"],
        key=lambda layer: (-layer["dead"]["top1"], -layer["dead"]["topk"], -layer["cv"]["top1"]),
    )
    return ranked[:MAX_DETAILED_LAYERS]


def _prediction(record: Record) -> str:
    if record["prediction"] is None:
        return ""
    agrees = record["prediction"]["agrees"]
    warn = "" if agrees is not None and all(agrees.values()) else ' class="warn"'
    return f"<p{warn}>Phase {html.escape(record['prediction']['text'])}.</p>"


def _layer_table(record: Record) -> str:
    heads = ["layer", "tiers", "DEAD top1", "DEAD topk", "tier usage top1", "tier usage topk"]
    heads += ["max violation", "flip rate", "tokens"]
    rows = []
    for layer in record["layers"]:
        usage = [
            " / ".join(f"{share:.1%}" for share in layer["tier"]["usage"][basis]) for basis in BASES
        ]
        flip_rate = layer["lockdown"]["flip_rate"]
        rows.append(
            [
                layer["name"],
                ":".join(map(str, layer["tiers"])),
                f"{layer['dead']['top1']} of {layer['num_experts']}",
                f"{layer['dead']['topk']} of {layer['num_experts']}",
                *usage,
                f"{layer['max_violation']['topk']:.2f}",
                "" if flip_rate is None else f"{flip_rate:.1%}",
                f"{layer['num_tokens']:,}",
            ]
        )
    return f"<h2>Layers at step {record['step']}</h2>{_table(heads, rows)}"


def _measure_table(record: Record) -> str:
    # Records of earlier versions lack some measures, as do layers whose experts cannot be asked.
    columns = {label: [read(layer) for layer in record["layers"]] for label, read in MEASURES}
    columns = {label: c for label, c in columns.items() if any(v is not None for v in c)}
    if not columns:
        return ""
    rows = [
        [layer["name"], *(_number(column[number]) for column in columns.values())]
        for number, layer in enumerate(record["layers"])
    ]
    return f"<h2>Redundancy, saturation, specialisation</h2>{_table(['layer', *columns], rows)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _event_table(records: Sequence[Record]) -> str:
    events = [event for record in records for event in record["events"]]
    if not events:
        return "<h2>Events</h2><p class=muted>None.</p>"
    heads = ["event", "step", "phase", "layer", "expert", "tier", "basis", "what to do"]
    keys = ["kind", "step", "phase", "layer", "expert", "tier", "basis", "advice"]
    rows = [["" if event[key] is None else str(event[key]) for key in keys] for event in events]
    return f"<h2>Events</h2>{_table(heads, rows)}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _figure(title: str, *, x: str, y: str, height: int = 360) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        title=title, xaxis_title=x, yaxis_title=y, height=height, template="plotly_white"
    )
    return figure


def _dead_figure(records: Sequence[Record]) -> go.Figure:
    figure = _figure("DEAD experts", x="step", y="experts in all layers")
    figure.update_yaxes(rangemode="tozero")
    for phase in dict.fromkeys(record["phase"] for record in records):
        mine = [record for record in records if record["phase"] == phase]
        for basis in BASES:
            figure.add_scatter(
                x=[record["step"] for record in mine],
                y=[record["dead"][basis] for record in mine],
                mode="lines+markers",
                name=f"{phase} {basis}",
            )
    return figure


def _loss_figure(records: Sequence[Record]) -> go.Figure | None:
    points = [r for r in records if r["metrics"].get("loss") is not None]
    if not points:
        return None
    figure = _figure("Loss and events", x="step", y="loss, nats")
    for phase in dict.fromkeys(record["phase"] for record in points):
        mine = [record for record in points if record["phase"] == phase]
        figure.add_scatter(
            x=[record["step"] for record in mine],
            y=[record["metrics"]["loss"] for record in mine],
            mode="lines+markers",
            name=f"{phase} loss",
        )
    steps = {record["step"]: record["metrics"]["loss"] for record in points}
    by_kind: dict[str, list[Record]] = {}
    for record in records:
        for event in record["events"]:
            by_kind.setdefault(event["kind"], []).append(event)
    for kind, events in by_kind.items():
        figure.add_scatter(
            x=[event["step"] for event in events],
            # On the curve, at the nearest step that has a loss.
            y=[steps[min(steps, key=lambda s: abs(s - event["step"]))] for event in events],
            mode="markers",
            marker={"size": 10, "symbol": "diamond"},
            name=kind,
            text=[f"{event['layer'] or 'run'} {_who(event)}" for event in events],
        )
    return figure


def _who(event: Record) -> str:
    who = [f"{k} {event[k]}" for k in ("expert", "tier") if event[k] is not None]
    return " ".join([*who, event["basis"] or ""]).strip()


def _history(records: Sequence[Record], name: str) -> list[tuple[int, Record]]:
    return [
        (record["step"], layer)
        for record in records
        for layer in record["layers"]
        if layer["name"] == name
    ]


def _usage_figure(records: Sequence[Record], name: str, *, basis: str) -> go.Figure:
    history = _history(records, name)
    figure = _figure(
        f"{html.escape(name)}: {basis} usage over time", x="report", y="expert", height=420
    )
    usage_TE = [layer["usage"][basis] for _, layer in history]
    figure.add_heatmap(
        x=[f"step {step}" for step, _ in history],
        z=[list(row) for row in zip(*usage_TE, strict=True)],
        colorscale="Viridis",
        zmin=0,
        colorbar={"title": "share"},
    )
    start = 0
    for size in history[-1][1]["tiers"][:-1]:
        start += size
        figure.add_hline(y=start - 0.5, line={"color": "white", "width": 2})
    return figure


def _category_figure(records: Sequence[Record], name: str) -> go.Figure:
    history = _history(records, name)
    figure = _figure(f"{html.escape(name)}: categories (top1)", x="report", y="experts")
    for category in CATEGORIES:
        numbers = [layer["category"]["top1"].count(category) for _, layer in history]
        if any(numbers):
            figure.add_bar(
                x=[f"step {step}" for step, _ in history],
                y=numbers,
                name=category,
                marker_color=CATEGORY_COLOURS[category],
            )
    figure.update_layout(barmode="stack", bargap=0.05)
    return figure


def _flow_figure(layer: Record) -> go.Figure | None:
    flow = layer["tier"]["flow"]
    if flow is None or len(flow) < 2:
        return None
    names = [f"T{tier}" for tier in range(len(flow))]
    figure = _figure(
        f"{html.escape(layer['name'])}: share of tokens by tier of first and second choice",
        x="second choice",
        y="first choice",
        height=380,
    )
    figure.add_heatmap(
        x=names,
        y=names,
        z=flow,
        text=[[f"{share:.1%}" for share in row] for row in flow],
        texttemplate="%{text}",
        colorscale="Blues",
        zmin=0,
    )
    figure.update_yaxes(autorange="reversed")
    return figure


def _measures_figure(records: Sequence[Record], name: str) -> go.Figure | None:
    history = _history(records, name)
    figure = _figure(
        f"{html.escape(name)}: redundancy, saturation, specialisation", x="step", y="share of 1"
    )
    for label, read in MEASURES:
        points = [(step, read(layer)) for step, layer in history]
        if any(value is not None for _, value in points):
            figure.add_scatter(
                x=[step for step, _ in points],
                y=[value for _, value in points],
                mode="lines+markers",
                name=label,
            )
    return figure if figure.data else None


def _saturation_figure(layer: Record) -> go.Figure | None:
    overlaps = layer["lockdown"].get("overlaps")
    if not overlaps:
        return None
    figure = _figure(
        f"{html.escape(layer['name'])}: share of choices that are already the last ones",
        x="step",
        y="overlap with the last evaluation",
    )
    figure.add_scatter(
        x=[point["step"] for point in overlaps],
        y=[point["overlap"] for point in overlaps],
        mode="lines+markers",
    )
    chance = layer["top_k"] / layer["num_experts"]
    figure.add_hline(y=chance, line={"dash": "dot"}, annotation_text="by chance")
    figure.update_yaxes(range=[0, 1.02])
    return figure
