"""A report: what is known of a model's ecology at one step, as plain data and as pictures."""

from __future__ import annotations

import copy
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ecomoe.control import Control
from ecomoe.ecology import statistics, taxonomy, tiers
from ecomoe.ecology.events import Event
from ecomoe.ecology.statistics import BASES, Basis, Layout
from ecomoe.ecology.taxonomy import Thresholds

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

NUM_PAIRS = 5
NUM_STABLE = 5
PREFERENCE = ("eval", "train", "generate")
TRAJECTORY_KEYS = ("step", "phase", "dead")

Record = dict[str, Any]


class Report:
    """The ecology at one step: a rich renderable (``rich.print(report)``) and plain data.

    Args:
        record: Plain data of the step, as `to_dict` returns it.
        trajectory: For each report of the run, its step, phase and number of DEAD experts.
        events: All events of the run so far, as plain data.
        records: The records of the run so far, for `to_html`; by default this one alone.
    """

    def __init__(
        self,
        record: Record,
        *,
        trajectory: Sequence[Record] = (),
        events: Sequence[Record] = (),
        records: Sequence[Record] | None = None,
    ) -> None:
        self._record = record
        self._trajectory = list(trajectory)
        self._events = list(events)
        self._records = [record] if records is None else list(records)

    @classmethod
    def from_records(cls, records: Sequence[Record], *, phase: str | None = None) -> Report:
        """Return the report of a run from its records, as `ecomoe.ecology.sinks` reads them.

        Args:
            records: In the order they were written.
            phase: Which to show; by default evaluation where there was any, else training.

        Raises:
            ValueError: There is no record of that phase.
        """
        for candidate in (phase,) if phase is not None else PREFERENCE:
            mine = [record for record in records if record["phase"] == candidate]
            if mine:
                return cls(
                    mine[-1],
                    trajectory=[{key: r[key] for key in TRAJECTORY_KEYS} for r in records],
                    events=[event for record in records for event in record["events"]],
                    records=records,
                )
        raise ValueError(
            f"phase={phase!r}: no token was seen yet; run the model while the monitor is attached"
        )

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained HTML file with plots of the run.

        Args:
            path: The file; an existing one is replaced.
        """
        from ecomoe.ecology.html import write_html

        write_html(path, self._records)

    def to_dict(self) -> Record:
        """Return the record, with the run's ``trajectory``, ``all_events`` and ``stability``."""
        extra = {
            "trajectory": self._trajectory,
            "all_events": self._events,
            "stability": stability(self._records, phase=self._record["phase"]),
        }
        return copy.deepcopy({**self._record, **extra})

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render for a terminal from 80 columns on."""
        from ecomoe.ecology.console import render_report

        yield from render_report(self._record, self._trajectory, self._events)

    def __str__(self) -> str:
        """Render as plain text of 80 columns."""
        try:
            from rich.console import Console
        except ImportError:
            return summary_line(self._record)
        console = Console(width=80, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def layer_record(
    name: str,
    sums_V: Tensor,
    *,
    layout: Layout,
    layer_tiers: Sequence[int],
    top_k: int,
    thresholds: Thresholds,
    control: Control | None = None,
    extras: Mapping[str, float] | None = None,
    classes_EC: Tensor | None = None,
    num_classes: int | None = None,
) -> Record:
    """Return the plain data of one layer.

    Args:
        name: The layer's name.
        sums_V: Its sums, on the host.
        layout: Where each stands.
        layer_tiers: Experts of each tier.
        top_k: Experts per token.
        thresholds: Unscaled.
        control: The layer's settings, if it has any.
        extras: Scalars of its last call: ``temperature``, and its losses as ``aux.NAME``.
        classes_EC: Judged tokens by first-choice expert and true class.
        num_classes: Classes of the task, for E_eff.
    """
    sums = layout.unpack(sums_V)
    counts = {basis: _ints(sums[basis]) for basis in BASES}
    totals = {basis: sum(counts[basis]) for basis in BASES}
    judged = sums["judged"].tolist()
    known = any(judged)
    accuracy = statistics.ratios(sums["correct"].tolist(), judged) if known else None
    category = {
        basis: taxonomy.categories_of(
            counts[basis], total=totals[basis], accuracies=accuracy, thresholds=thresholds
        )
        for basis in BASES
    }
    num_tokens = sums["num_tokens"].item()
    num_finite = num_tokens - sums["nonfinite"].item()
    extras = extras or {}
    return {
        "name": name,
        "num_experts": layout.num_experts,
        "tiers": [int(size) for size in layer_tiers],
        "top_k": top_k,
        "num_tokens": int(num_tokens),
        "padding": int(sums["padding"].item()),
        "nonfinite": int(sums["nonfinite"].item()),
        "counts": counts,
        "usage": {basis: _round(statistics.shares(counts[basis])) for basis in BASES},
        "gate": _round(statistics.shares(sums["gate"].tolist())),
        "accuracy": None if accuracy is None else _round(accuracy),
        "judged": _ints(sums["judged"]) if known else None,
        "category": category,
        "uncertain": {
            basis: taxonomy.uncertain_experts(
                counts[basis], total=totals[basis], thresholds=thresholds
            )
            for basis in BASES
        },
        "dead": {basis: category[basis].count("DEAD") for basis in BASES},
        "load_entropy": {basis: _round(statistics.load_entropy(counts[basis])) for basis in BASES},
        "token_entropy": _round(sums["entropy"].item() / num_finite) if num_finite else None,
        "cv": {
            basis: _round(statistics.coefficient_of_variation(counts[basis])) for basis in BASES
        },
        "max_violation": {
            basis: _round(statistics.max_violation(counts[basis])) for basis in BASES
        },
        "pairs": _top_pairs(sums["pairs"], sums["topk"]),
        "tier": _tier_record(sums, layer_tiers, category, thresholds),
        "lockdown": _lockdown_record(sums),
        "dropped": int(sums["dropped"].item()),
        # Whether the experts were seen to receive what the router decided; null: not looked at.
        "verified": bool(sums["executed"].any()) or None,
        "specialisation": _specialisation(classes_EC),
        "control": (
            None if control is None else control_record(control, extras["temperature"], num_classes)
        ),
        "auxiliary": {
            key.removeprefix("aux."): _round(value)
            for key, value in extras.items()
            if key.startswith("aux.")
        },
    }


def _tier_record(
    sums: Mapping[str, Tensor],
    layer_tiers: Sequence[int],
    category: Mapping[Basis, Sequence[str]],
    thresholds: Thresholds,
) -> Record:
    by_tier = {
        key: tiers.tier_sums(sums[key].tolist(), layer_tiers)
        for key in ("top1", "topk", "judged", "correct", "easy", "hard")
    }
    flow_TT = sums["flow"].tolist()
    total = sum(map(sum, flow_TT))
    lift_TT = tiers.flow_lift(flow_TT)
    hard = statistics.ratios(by_tier["hard"], by_tier["judged"])
    alive = {basis: [float(c != "DEAD") for c in category[basis]] for basis in BASES}
    return {
        "usage": {basis: _round(statistics.shares(by_tier[basis])) for basis in BASES},
        "active": {
            basis: [int(n) for n in tiers.tier_sums(alive[basis], layer_tiers)] for basis in BASES
        },
        "accuracy": _round(statistics.ratios(by_tier["correct"], by_tier["judged"])),
        "easy": _round(statistics.ratios(by_tier["easy"], by_tier["judged"])),
        "hard": _round(hard),
        "hard_gradient": _round(tiers.hard_gradient(hard)),
        "flow": [_round([cell / total for cell in row]) for row in flow_TT] if total else None,
        "self_loop_lift": _round([row[i] for i, row in enumerate(lift_TT)]) if total else None,
        "effective_depth": {
            key: _round(value)
            for key, value in tiers.effective_depth(
                by_tier["top1"], deep_share=thresholds.deep_share
            ).items()
        },
    }


def _lockdown_record(sums: Mapping[str, Tensor]) -> Record:
    probes = sums["probes"].item()
    return {
        "probes": int(probes),
        "flips": int(sums["flips"].item()),
        "flip_rate": _round(sums["flips"].item() / probes) if probes else None,
        "margin": _round(sums["margin"].item() / probes) if probes else None,
    }


def _top_pairs(pairs_EE: Tensor, topk_E: Tensor) -> list[Record] | None:
    total = pairs_EE.sum().item()
    if not total:
        return None
    both_EE = (pairs_EE + pairs_EE.T).triu(1)
    lift_EE = statistics.coactivation_lift(pairs_EE, topk_E)
    num_experts = both_EE.shape[0]
    best = both_EE.reshape(-1).topk(min(NUM_PAIRS, num_experts * (num_experts - 1) // 2))
    return [
        {
            "experts": [index // num_experts, index % num_experts],
            "share": _round(count / total),
            "lift": _round(lift_EE.view(-1)[index].item()),
        }
        for count, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if count
    ]


def _specialisation(classes_EC: Tensor | None) -> float | None:
    if classes_EC is None:
        return None
    found = statistics.normalised_mutual_information(classes_EC)
    return None if found is None else float(_round(found))


def control_record(control: Control, temperature: float, num_classes: int | None = None) -> Record:
    """Return E, E at the current temperature, the predicted phase and the four settings.

    ``e_eff`` takes the task's complexity into account, where its number of classes is known.
    """
    opposition = float(control.oracle_weight + control.balance_weight)
    exploration = temperature * float(control.entropy_weight)
    e_now = exploration / opposition if opposition else math.inf
    return {
        "e": _finite(control.e),
        "e_now": _finite(e_now),
        "e_eff": _finite(control.effective_e(num_classes)) if num_classes else None,
        "predicted_phase": control.phase,
        "temperature": _round(temperature),
        "entropy_weight": float(control.entropy_weight),
        "oracle_weight": float(control.oracle_weight),
        "balance_weight": float(control.balance_weight),
    }


def build_record(
    *, step: int, phase: str, progress: float | None, layers: list[Record], metrics: Record
) -> Record:
    """Return the record of a report from those of its layers; events are added later.

    Args:
        step: Optimizer steps taken.
        phase: Kind of traffic.
        progress: Share of the training that is done, if known.
        layers: Records of layers that saw tokens, at least one.
        metrics: Outcome over all predictions, such as ``{"accuracy": 0.9, "judged": 100}``.
    """
    dead = {basis: sum(layer["dead"][basis] for layer in layers) for basis in BASES}
    control = next((layer["control"] for layer in layers if layer["control"]), None)
    return {
        "step": step,
        "phase": phase,
        "progress": None if progress is None else _round(progress),
        "control": control,
        "prediction": prediction_record(layers, dead),
        "metrics": metrics,
        "layers": layers,
        "dead": dead,
        "num_experts": sum(layer["num_experts"] for layer in layers),
        "events": [],
    }


def prediction_record(layers: Sequence[Record], dead: Mapping[Basis, int]) -> Record | None:
    """Set the phase that E predicts beside the dead experts that are observed."""
    controls = [layer["control"] for layer in layers if layer["control"]]
    if not controls:
        return None
    phase = controls[0]["predicted_phase"]
    if any(control["predicted_phase"] != phase for control in controls):
        return {"phase": "mixed", "agrees": None, "text": "layers have different control settings"}
    observed = f"{dead['top1']} DEAD on top1, {dead['topk']} on topk"
    agrees = {basis: (dead[basis] == 0) == (phase == "healthy") for basis in BASES}
    expected = "no dead expert" if phase == "healthy" else "dead experts"
    verdict = {
        (True, True): "as predicted",
        (False, False): "the prediction does NOT hold here",
        (False, True): "the prediction holds on topk only, NOT on top1",
        (True, False): "the prediction holds on top1 only, NOT on topk",
    }[agrees["top1"], agrees["topk"]]
    return {
        "phase": phase,
        "agrees": agrees,
        "text": f"{phase}: {expected} predicted, {observed} observed: {verdict}",
    }


def stability(
    records: Sequence[Record], *, phase: str, num_records: int = NUM_STABLE
) -> Record | None:
    """Return how much the ecology moved over the last reports of a phase (section 4.15).

    Returns:
        The number of ``reports``, the largest range of a tier's top1 usage ``tier_usage``, shares
        of 1, and the range of the number of ``dead`` experts on top1; ``None`` for one report.
    """
    last = [record for record in records if record["phase"] == phase][-num_records:]
    if len(last) < 2:
        return None
    usage: dict[tuple[str, int], list[float]] = {}
    for record in last:
        for layer in record["layers"]:
            for tier, share in enumerate(layer["tier"]["usage"]["top1"]):
                usage.setdefault((layer["name"], tier), []).append(share)
    dead = [record["dead"]["top1"] for record in last]
    return {
        "reports": len(last),
        "tier_usage": _round(max(max(values) - min(values) for values in usage.values())),
        "dead": max(dead) - min(dead),
    }


def summary_line(record: Record) -> str:
    """Return a record in one line of text."""
    control = record["control"]
    e_now = f", E(t) {_show(control['e_now'])}" if control else ""
    accuracy = record["metrics"].get("accuracy")
    quality = f", accuracy {accuracy:.1%}" if accuracy is not None else ""
    return (
        f"step {record['step']} {record['phase']}: DEAD {record['dead']['top1']} top1, "
        f"{record['dead']['topk']} topk of {record['num_experts']} experts in "
        f"{len(record['layers'])} layers{e_now}{quality}"
    )


def record_lines(record: Record, *, width: int = 80) -> list[str]:
    """Return a record as lines of text: itself, and its events below it, wrapped."""
    lines = [summary_line(record)]
    for event in record["events"]:
        lines += textwrap.wrap(
            str(Event(**event)), width, initial_indent="  ", subsequent_indent="    "
        )
    return lines


def scalars(record: Record, *, num_deaths: int, num_revivals: int, peak: int) -> dict[str, float]:
    """Return about ten numbers that stand for a record, however many experts there are.

    Args:
        record: The record.
        num_deaths: Death events so far on top1.
        num_revivals: Revival events so far on top1.
        peak: Highest DEAD count so far on top1.
    """
    layers = record["layers"]
    values: dict[str, float | None] = {
        "dead_top1": record["dead"]["top1"],
        "dead_topk": record["dead"]["topk"],
        "dead_peak": peak,
        "deaths": num_deaths,
        "revivals": num_revivals,
        "load_evenness": _mean(
            layer["load_entropy"]["topk"] / math.log(layer["num_experts"])
            for layer in layers
            if layer["num_experts"] > 1
        ),
        "token_entropy": _mean(layer["token_entropy"] for layer in layers),
        "max_violation": max(layer["max_violation"]["topk"] for layer in layers),
        "flip_rate": _mean(layer["lockdown"]["flip_rate"] for layer in layers),
        "e_now": record["control"]["e_now"] if record["control"] else None,
    }
    return {f"ecology/{k}": float(v) for k, v in values.items() if v is not None}


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _ints(counts: Tensor) -> list[int]:
    return [int(count) for count in counts.round().to(torch.int64).tolist()]


def _finite(value: float) -> float | None:
    """Return the value, or ``None`` for infinity, which JSON does not know."""
    found: float | None = _round(float(value))
    return found


def _show(e: float | None) -> str:
    return "inf" if e is None else f"{e:.3g}"


def _round(value: Any) -> Any:
    """Cut noise digits off, so that records stay small; JSON and every picture show the same."""
    if isinstance(value, list):
        return [_round(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
