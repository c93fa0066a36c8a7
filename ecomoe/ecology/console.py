"""A report on the terminal, in 80 columns and up.

Imported when a report is shown: nothing else needs rich.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ecomoe.ecology.events import Event, advice_lines
from ecomoe.ecology.report import summary_line
from ecomoe.ecology.statistics import BASES

Record = Mapping[str, Any]

MAX_DETAILED_LAYERS = 3
MAX_DETAILED_EXPERTS = 16
MAX_EVENTS = 6
BAR_WIDTH = 8
SPARKS = "▁▂▃▄▅▆▇█"

STYLES = {
    "PURE_CORE": "bold green",
    "BROAD_CORE": "green",
    "WEAK_CORE": "yellow",
    "CORE": "green",
    "EDGE": "cyan",
    "NOISE": "magenta",
    "FRINGE": "cyan",
    "DEAD": "bold red",
}


def render_report(
    record: Record, trajectory: Sequence[Record], events: Sequence[Record]
) -> Iterator[RenderableType]:
    """Yield what a report shows: heading, prediction, trajectory, layers, worst layers, events."""
    yield Text(summary_line(dict(record)), style="bold")
    yield from prediction_lines(record)
    yield from trajectory_lines(record, trajectory, events)
    yield layer_table(record["layers"])
    yield from measure_lines(record["layers"])
    for layer in worst_layers(record["layers"]):
        yield expert_table(layer)
    yield from event_lines(events)


def worst_layers(layers: Sequence[Record]) -> list[Record]:
    """Return the few layers to show in detail: most DEAD first, then the most uneven."""
    ranked = sorted(
        layers,
        key=lambda layer: (-layer["dead"]["top1"], -layer["dead"]["topk"], -layer["cv"]["top1"]),
    )
    return ranked[:MAX_DETAILED_LAYERS]


def prediction_lines(record: Record) -> Iterator[RenderableType]:
    """Yield E, E(t) and the predicted phase beside what is observed."""
    control, prediction = record["control"], record["prediction"]
    if control is None or prediction is None:
        return
    e, e_now = ("inf" if v is None else f"{v:.3f}" for v in (control["e"], control["e_now"]))
    yield Text(
        f"E {e} nominal, E(t) {e_now} at T {control['temperature']:.3g} "
        f"(H {control['entropy_weight']:.3g}, O {control['oracle_weight']:.3g}, "
        f"B {control['balance_weight']:.3g})"
    )
    agrees = prediction["agrees"]
    good = agrees is not None and all(agrees.values())
    yield Text(f"Phase {prediction['text']}.", style="green" if good else "bold yellow")


def trajectory_lines(
    record: Record, trajectory: Sequence[Record], events: Sequence[Record]
) -> Iterator[RenderableType]:
    """Yield the revival trajectory: DEAD experts over the reports, their peak and revivals."""
    points = [point for point in trajectory if point["phase"] == record["phase"]]
    if not points:
        return
    for basis in BASES:
        dead = [point["dead"][basis] for point in points]
        peak = max(dead)
        first_peak = points[dead.index(peak)]["step"]
        revived = sum(
            event["kind"] == "revival"
            and event["basis"] == basis
            and event["phase"] == record["phase"]
            for event in events
        )
        yield Text(
            f"DEAD {basis:4} {sparkline(dead)} {dead[0]} -> {dead[-1]}, peak {peak} at step "
            f"{first_peak}, {revived} revivals",
            no_wrap=True,
            overflow="ellipsis",
        )


def sparkline(values: Sequence[float], *, width: int = 24) -> str:
    """Return the values as small bars; of more than ``width``, the highest of each stretch.

    >>> sparkline([0, 4, 12, 8])
    '▁▃█▆'
    """
    if len(values) > width:
        bounds = [i * len(values) // width for i in range(width + 1)]
        values = [max(values[a:b]) for a, b in pairwise(bounds)]
    top = max(values) or 1
    return "".join(SPARKS[round(value / top * (len(SPARKS) - 1))] for value in values)


def layer_table(layers: Sequence[Record]) -> Table:
    """Return one row a layer."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, expand=False)
    table.add_column("layer", overflow="ellipsis", no_wrap=True, max_width=20)
    table.add_column("DEAD of E\ntop1/topk", justify="right", no_wrap=True)
    table.add_column("tiers in use %\ntop1", no_wrap=True, overflow="ellipsis", max_width=14)
    table.add_column("\ntopk", no_wrap=True, overflow="ellipsis", max_width=14)
    table.add_column("max\nvio", justify="right", no_wrap=True)
    table.add_column("flip\n%", justify="right", no_wrap=True)
    table.add_column("acc\n%", justify="right", no_wrap=True)
    for layer in layers:
        dead = layer["dead"]
        flip_rate = layer["lockdown"]["flip_rate"]
        table.add_row(
            _tail(layer["name"], 20),
            Text(
                f"{dead['top1']}/{dead['topk']} of {layer['num_experts']}",
                style="bold red" if any(dead.values()) else "green",
            ),
            *("/".join(_percent(u) for u in layer["tier"]["usage"][basis]) for basis in BASES),
            f"{layer['max_violation']['topk']:.2f}",
            _percent(flip_rate),
            _percent(_accuracy(layer)),
        )
    return table


def measure_lines(layers: Sequence[Record]) -> Iterator[RenderableType]:
    """Yield how alike experts are and how settled choices are: mean, and the extreme layer."""
    for name, values in (
        ("Redundancy, cosine of experts' outputs", [_cosine(layer) for layer in layers]),
        (
            "Saturation, choices kept since the last evaluation",
            [layer["lockdown"].get("saturation") for layer in layers],
        ),
    ):
        known = [
            (v, layer["name"]) for v, layer in zip(values, layers, strict=True) if v is not None
        ]
        if not known:
            continue
        mean = sum(value for value, _ in known) / len(known)
        most, where = max(known)
        of_most = f", most {most:.2f} in {_tail(where, 20)}" if len(known) > 1 else ""
        yield Text(f"{name}: {mean:.2f}{of_most}", no_wrap=True, overflow="ellipsis")


def _cosine(layer: Record) -> float | None:
    found: float | None = (layer.get("redundancy") or {}).get("cosine")
    return found


def expert_table(layer: Record) -> Table:
    """Return one row an expert: usage on both bases, accuracy and categories."""
    experts = list(range(layer["num_experts"]))
    rest = len(experts) - MAX_DETAILED_EXPERTS
    title = f"{_tail(layer['name'], 24)}: tiers {':'.join(map(str, layer['tiers']))}"
    if rest > 0:
        # The ends are what matters: the most starved and the most loaded.
        ranked = sorted(experts, key=lambda e: layer["usage"]["top1"][e])
        half = MAX_DETAILED_EXPERTS // 2
        experts = sorted(ranked[:half] + ranked[-half:])
        title += f" ({rest} between the {half} least and the {half} most used left out)"
    table = Table(box=None, padding=(0, 1), pad_edge=False, title=title, title_justify="left")
    table.add_column("tier", no_wrap=True)
    table.add_column("e", justify="right", no_wrap=True)
    for basis in BASES:
        table.add_column(basis, no_wrap=True, min_width=BAR_WIDTH)
        table.add_column("%", justify="right", no_wrap=True)
    table.add_column("acc", justify="right", no_wrap=True, min_width=3)
    for basis in BASES:
        table.add_column(f"on {basis}", no_wrap=True, min_width=12)
    tier_of = [tier for tier, size in enumerate(layer["tiers"]) for _ in range(size)]
    accuracy = layer["accuracy"] or [None] * layer["num_experts"]
    top = {basis: max(layer["usage"][basis]) or 1.0 for basis in BASES}
    for row, expert in enumerate(experts):
        first = row == 0 or tier_of[expert] != tier_of[experts[row - 1]]
        cells: list[RenderableType] = [f"T{tier_of[expert]}" if first else "", str(expert)]
        for basis in BASES:
            usage = layer["usage"][basis][expert]
            style = STYLES[layer["category"][basis][expert]]
            cells.append(Text(_bar(usage / top[basis]), style=style))
            cells.append(f"{usage * 100:.1f}")
        cells.append(_percent(accuracy[expert]))
        for basis in BASES:
            category = layer["category"][basis][expert]
            unsure = " ?" if expert in layer["uncertain"][basis] else ""
            cells.append(Text(category + unsure, style=STYLES[category]))
        table.add_row(*cells)
    return table


def event_lines(events: Sequence[Record], *, num: int = MAX_EVENTS) -> Iterator[RenderableType]:
    """Yield the last events and what to do about them; what does not fit goes on below."""
    if not events:
        return
    more = f" (the last {num} of {len(events)})" if len(events) > num else ""
    yield Text(f"Events{more}", style="bold")
    lines = Table.grid(padding=(0, 1))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for event in events[-num:]:
        lines.add_row(" -", Text(str(Event(**event))))
    for advice in advice_lines(events[-num:]):
        lines.add_row("->", Text(advice, style="italic"))
    yield lines


def _accuracy(layer: Record) -> float | None:
    if layer["accuracy"] is None or not sum(layer["judged"]):
        return None
    pairs = zip(layer["accuracy"], layer["judged"], strict=True)
    return float(sum(a * n for a, n in pairs if a is not None) / sum(layer["judged"]))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.0f}"


def _bar(share: float) -> str:
    eighths = round(share * BAR_WIDTH * 8)
    full, part = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")


def _tail(name: str, width: int) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]
