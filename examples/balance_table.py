"""What the balance benchmark reports of its runs."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from examples.experiments.analysis import equivalence, spread
from examples.experiments.measure import Record

MARGIN = 0.01


def summary(history: list[Record]) -> Record:
    """Return the figures of the table from a run's records; ``None`` where there are no experts."""
    last, layers = history[-1], history[-1]["layers"]
    found: Record = {"loss": last["loss"], "top1": last["top1"]}
    if not layers:
        return found
    count = len(layers)
    living = [layer["num_experts"] - layer["dead"]["topk"] for layer in layers]
    overlaps = [layer["redundancy"] for layer in layers if layer["redundancy"] is not None]
    return found | {
        "dead": last["dead"],
        "dead_by_layer": [layer["dead"] for layer in layers],
        "worst": {
            basis: max(record["dead"][basis] for record in history) for basis in ("top1", "topk")
        },
        "max_violation": max(layer["max_violation"]["topk"] for layer in layers),
        "specialisation": sum(layer["specialisation"] for layer in layers) / count,
        "information_per_living": sum(
            layer["information"] / alive for layer, alive in zip(layers, living, strict=True)
        )
        / count,
        "redundancy": sum(overlaps) / len(overlaps) if overlaps else None,
    }


def table(runs: list[Record]) -> Table:
    """Return the comparison; each figure is a mean over seeds, plus or minus the sample sd."""
    shown = Table(
        title="Mean over seeds ± sd; DEAD is summed over layers, worst of ten evaluations"
    )
    for heading in (
        "task", "policy", "seeds", "loss", "top-1", "not worse", "DEAD top1", "DEAD topk",
        "worst top1", "worst topk", "max-vio", "NMI", "nats/living", "redundancy", "seconds",
    ):  # fmt: skip
        shown.add_column(heading)
    tasks = dict.fromkeys(run["task"] for run in runs)
    for task in tasks:
        cells: dict[str, list[Record]] = {}
        for entry in runs:
            if entry["task"] == task:
                cells.setdefault(entry["policy"], []).append(entry)
        for name, group in cells.items():
            shown.add_row(
                task,
                name,
                str(len(group)),
                _mean(group, "loss", "{:.4f}"),
                _mean(group, "top1", "{:.1%}"),
                _not_worse(name, cells),
                _mean(group, "dead.top1", "{:.1f}"),
                _mean(group, "dead.topk", "{:.1f}"),
                _mean(group, "worst.top1", "{:.1f}"),
                _mean(group, "worst.topk", "{:.1f}"),
                _mean(group, "max_violation", "{:.2f}"),
                _mean(group, "specialisation", "{:.3f}"),
                _mean(group, "information_per_living", "{:.4f}"),
                _mean(group, "redundancy", "{:.2f}"),
                _mean(group, "seconds", "{:.0f}"),
            )
        shown.add_section()
    return shown


def _mean(group: list[Record], key: str, form: str) -> str:
    values = []
    for entry in group:
        value: Any = entry
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            values.append(value)
    if not values:
        return ""
    found = spread(values)
    return form.format(found.mean) + (f" ± {form.format(found.sd)}" if found.count > 1 else "")


def _not_worse(name: str, cells: dict[str, list[Record]]) -> str:
    """Test a policy's loss against the best other one's, with a margin of 1 % of its value."""
    others = {
        other: [entry["loss"] for entry in group] for other, group in cells.items() if other != name
    }
    if not others:
        return ""
    best = min(others, key=lambda other: spread(others[other]).mean)
    margin = MARGIN * spread(others[best]).mean
    own = [entry["loss"] for entry in cells[name]]
    p = equivalence(own, others[best], margin=margin, one_sided=True)
    gap = (spread(own).mean / spread(others[best]).mean - 1) * 100
    return f"{gap:+.1f} % vs {best}" + ("" if p is None else f", p={p:.2g}")
