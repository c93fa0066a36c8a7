"""Tables on the terminal and plots in one HTML file, from the JSON results."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from examples.experiments.analysis import spread
from examples.experiments.figures import (
    SPECIAL,
    by_condition,
    general,
    predictions,
    scores,
)
from examples.experiments.measure import Record
from examples.experiments.records import SMOKE, SMOKE_SAID
from examples.experiments.storage import read_json

MOST_SIDE_BY_SIDE = 6


def read_results(folder: Path) -> list[Record]:
    """Return the experiments' results of a folder, in order of their names."""
    found = [read_json(path) for path in sorted(folder.glob("*.json"))]
    return [content for content in found if "experiment" in content]


def plus_minus(values: list[float]) -> str:
    """Return mean and sample standard deviation in a few digits; infinite values are counted."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < len(values):
        never = f"never in {len(values) - len(finite)}"
        return f"{plus_minus(finite)}, {never}" if finite else never
    if not values:
        return ""
    found = spread(values)
    return f"{found.mean:.4g}" + (f" ± {found.sd:.2g}" if found.count > 1 else "")


def report_tables(results: list[Record]) -> Iterator[Table]:
    """Yield a table an experiment."""
    for result in results:
        title = f"{result['experiment']}: {result['title']} ({result['scale']})"
        if result["experiment"] == "predicts-collapse":
            yield _prediction_table(result, title)
            continue
        special = SPECIAL.get(result["experiment"], lambda run: {})
        rows = {
            name: [general(run) | special(run) for run in group]
            for name, group in by_condition(result).items()
        }
        columns = list(dict.fromkeys(key for row in rows.values() for f in row for key in f))
        cells = {
            name: [plus_minus([f[key] for f in group if key in f]) for key in columns]
            for name, group in rows.items()
        }
        said = "The paper" if result["paper"] else "Asked"
        caption = SMOKE_SAID if result["scale"] == SMOKE else f"{said}: {result['claim']}"
        table = Table(title=title, caption=caption)
        if len(rows) <= MOST_SIDE_BY_SIDE:
            for heading in ("", *rows):
                table.add_column(heading)
            table.add_row("seeds", *(str(len(group)) for group in rows.values()))
            for index, key in enumerate(columns):
                table.add_row(key, *(cells[name][index] for name in rows))
        else:
            for heading in ("condition", "seeds", *columns):
                table.add_column(heading)
            for name, group in rows.items():
                table.add_row(name, str(len(group)), *cells[name])
        yield table


def _prediction_table(result: Record, title: str) -> Table:
    runs = result["runs"]
    caption = SMOKE_SAID if result["scale"] == SMOKE else f"Asked: {result['claim']}"
    table = Table(title=title, caption=caption)
    for heading in ("predictor", "AUC of DEAD top1 = 0", "95 %", "AUC of DEAD topk = 0", "95 %"):
        table.add_column(heading)
    pairs = zip(predictions(result), predictions(result, basis="topk"), strict=True)
    for top1, topk in pairs:
        table.add_row(top1["name"], *_auc_cells(top1), *_auc_cells(topk))
    for basis in ("top1", "topk"):
        count = sum(run["final"]["dead"][basis] == 0 for run in runs)
        table.add_section()
        table.add_row(f"DEAD {basis} = 0", f"{count} of {len(runs)} runs")
    return table


def _auc_cells(row: Record) -> tuple[str, str]:
    if row["auc"] is None:
        return "one outcome only", ""
    low, high = row["interval"]
    return f"{row['auc']:.2f}", f"{low:.2f} to {high:.2f}"


def plots(results: list[Record]) -> Iterator[tuple[str, Any]]:
    """Yield titles and plotly figures: trajectories of every experiment, tiers, temperatures."""
    import plotly.graph_objects as go

    for result in results:
        title = f"{result['experiment']} ({result['scale']}): {result['title']}"
        if result["experiment"] == "predicts-collapse":
            figure = go.Figure()
            for basis in ("top1", "topk"):
                figure.add_scatter(
                    x=[scores(run)["E"] for run in result["runs"]],
                    y=[run["final"]["dead"][basis] for run in result["runs"]],
                    mode="markers",
                    name=f"DEAD {basis}",
                )
            figure.add_vline(x=0.5, line_dash="dot")
            figure.update_layout(xaxis={"type": "log", "title": "E"}, yaxis_title="dead experts")
            yield title, figure
            continue
        groups = by_condition(result)
        for key, label in (("dead", "dead experts (top1)"), ("top1", "top-1 share")):
            figure = go.Figure()
            for name, runs in groups.items():
                for run in runs:
                    figure.add_scatter(
                        x=[record["percent"] for record in run["history"]],
                        y=[
                            record["dead"]["top1"] if key == "dead" else record["top1"]
                            for record in run["history"]
                        ],
                        name=f"{name}, seed {run['seed']}",
                        legendgroup=name,
                    )
            figure.update_layout(xaxis_title="training, %", yaxis_title=label)
            yield f"{title}: {label}", figure
        tiers = _tier_plot(groups)
        if tiers is not None:
            yield f"{title}: usage by tier at the end", tiers


def _tier_plot(groups: dict[str, list[Record]]) -> Any:
    import plotly.graph_objects as go

    runs = [(name, run) for name, group in groups.items() for run in group]
    depth = max(len(run["final"]["layers"][0]["tiers"]) for _, run in runs)
    if depth < 2:
        return None
    figure = go.Figure()
    labels = [f"{name}, seed {run['seed']}" for name, run in runs]
    for tier in range(depth):
        heights = []
        for _, run in runs:
            usages = [layer["tier_usage"] for layer in run["final"]["layers"]]
            own = [usage[tier] if tier < len(usage) else 0.0 for usage in usages]
            heights.append(100 * sum(own) / len(own))
        figure.add_bar(x=labels, y=heights, name=f"T{tier}")
    figure.update_layout(barmode="stack", yaxis_title="share of tokens, %")
    return figure


def write_html(results: list[Record], path: Path, *, light: bool = False) -> Path:
    """Write all plots into one HTML file.

    Args:
        results: Of the experiments.
        path: The file.
        light: Leave the plotting library out (5 MB); the file then needs a network to be read.
    """
    return write_page("Experiments", plots(results), path, light=light)


def write_page(title: str, figures: Iterable[tuple[str, Any]], path: Path, *, light: bool) -> Path:
    """Write titled plotly figures into one HTML file, as `write_html` does."""
    library = "cdn" if light else True
    parts = [f"<!doctype html><meta charset='utf-8'><title>{title}</title><h1>{title}</h1>"]
    for index, (heading, figure) in enumerate(figures):
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        script = library if index == 0 else False
        parts.append(figure.to_html(full_html=False, include_plotlyjs=script))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts))
    return path
