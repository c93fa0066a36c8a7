"""Records: what the sums of a report say, as plain data.

Every number but the loss is rounded to six digits here, once, so that the log, the terminal and the
plots show the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ecomoe.control import Control
from ecomoe.ecology import statistics, taxonomy, tiers
from ecomoe.ecology.statistics import BASES, LABEL_KINDS, Basis, LabelKind, Layout
from ecomoe.ecology.taxonomy import Thresholds

NUM_PAIRS = 5

Record = dict[str, Any]


def note_saturation(record: Record, overlaps: Mapping[str, list[dict[str, float]]]) -> None:
    """Enter into a record how far choices are those of earlier evaluations of the same tokens.

    Args:
        record: An evaluation's record.
        overlaps: By layer, with each earlier ``step`` the ``overlap``, shares of 1, oldest first.
    """
    for layer in record["layers"]:
        found = [{**o, "overlap": rounded(o["overlap"])} for o in overlaps.get(layer["name"], [])]
        layer["lockdown"]["overlaps"] = found
        layer["lockdown"]["saturation"] = found[-1]["overlap"] if found else None


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
    labels: Mapping[LabelKind, Tensor] | None = None,
    nearest: Sequence[tuple[int, float]] | None = None,
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
        labels: Evaluated tokens by first-choice expert and label, by the kind of label.
        nearest: For each expert the one most like it, with their mean cosine.
        num_classes: Classes of the task, for E_eff.
    """
    sums = _all_sums(sums_V, layout)
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
    z = thresholds.interval_z
    specialisation = _specialisation(labels or {})
    return {
        "name": name,
        "num_experts": layout.num_experts,
        "tiers": [int(size) for size in layer_tiers],
        "top_k": top_k,
        "num_tokens": int(num_tokens),
        "padding": int(sums["padding"].item()),
        "nonfinite": int(sums["nonfinite"].item()),
        "counts": counts,
        "usage": {basis: rounded(statistics.shares(counts[basis])) for basis in BASES},
        "gate": rounded(statistics.shares(sums["gate"].tolist())),
        "accuracy": None if accuracy is None else rounded(accuracy),
        "judged": _ints(sums["judged"]) if known else None,
        "interval": {
            **{b: statistics.wilson_intervals(counts[b], totals[b], z=z) for b in BASES},
            "accuracy": statistics.wilson_intervals(_ints(sums["correct"]), judged, z=z)
            if known
            else None,
        },
        "category": category,
        "uncertain": {
            basis: taxonomy.uncertain_experts(
                counts[basis], total=totals[basis], thresholds=thresholds
            )
            for basis in BASES
        },
        "dead": {basis: category[basis].count("DEAD") for basis in BASES},
        "load_entropy": {basis: rounded(statistics.load_entropy(counts[basis])) for basis in BASES},
        "token_entropy": rounded(sums["entropy"].item() / num_finite) if num_finite else None,
        "cv": {
            basis: rounded(statistics.coefficient_of_variation(counts[basis])) for basis in BASES
        },
        "max_violation": {
            basis: rounded(statistics.max_violation(counts[basis])) for basis in BASES
        },
        "pairs": _top_pairs(sums.get("pairs"), sums["topk"]),
        "tier": _tier_record(sums, layer_tiers, category, thresholds),
        "lockdown": _lockdown_record(sums, z=z),
        "redundancy": _redundancy_record(sums, nearest),
        "dropped": int(sums["dropped"].item()),
        # Whether the experts were seen to receive what the router decided; null: not looked at.
        "verified": bool(sums["executed"].any()) or None,
        "specialisation": specialisation["class"],
        "specialisation_by": specialisation,
        "control": (
            None if control is None else control_record(control, extras["temperature"], num_classes)
        ),
        "auxiliary": {
            key.removeprefix("aux."): rounded(value)
            for key, value in extras.items()
            if key.startswith("aux.")
        },
    }


def _all_sums(sums_V: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return the sums by name, with zeros for the outcomes where there is no room for them."""
    shapes = replace(layout, outcomes=True).shapes
    zeros = {name: sums_V.new_zeros(shape) for name, shape in shapes.items()}
    return zeros | layout.unpack(sums_V)


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
    intervals = partial(statistics.wilson_intervals, z=thresholds.interval_z)
    alive = {basis: [float(c != "DEAD") for c in category[basis]] for basis in BASES}
    return {
        "usage": {basis: rounded(statistics.shares(by_tier[basis])) for basis in BASES},
        "active": {
            basis: [int(n) for n in tiers.tier_sums(alive[basis], layer_tiers)] for basis in BASES
        },
        "accuracy": rounded(statistics.ratios(by_tier["correct"], by_tier["judged"])),
        "interval": {
            **{b: intervals(by_tier[b], sum(by_tier[b])) for b in BASES},
            "accuracy": intervals(by_tier["correct"], by_tier["judged"]),
            "easy": intervals(by_tier["easy"], by_tier["judged"]),
            "hard": intervals(by_tier["hard"], by_tier["judged"]),
        },
        "easy": rounded(statistics.ratios(by_tier["easy"], by_tier["judged"])),
        "hard": rounded(hard),
        "hard_gradient": rounded(tiers.hard_gradient(hard)),
        "flow": [rounded([cell / total for cell in row]) for row in flow_TT] if total else None,
        "self_loop_lift": rounded([row[i] for i, row in enumerate(lift_TT)]) if total else None,
        "effective_depth": {
            key: rounded(value)
            for key, value in tiers.effective_depth(
                by_tier["top1"], deep_share=thresholds.deep_share
            ).items()
        },
    }


def _lockdown_record(sums: Mapping[str, Tensor], *, z: float) -> Record:
    probes, flips = sums["probes"].item(), sums["flips"].item()
    return {
        "probes": int(probes),
        "flips": int(flips),
        "flip_rate": rounded(flips / probes) if probes else None,
        "interval": statistics.wilson_intervals([flips], probes, z=z)[0],
        "margin": rounded(sums["margin"].item() / probes) if probes else None,
        # Known once the evaluation is set beside earlier ones.
        "saturation": None,
        "overlaps": [],
    }


def _top_pairs(pairs_P: Tensor | None, topk_E: Tensor) -> list[Record] | None:
    total = 0.0 if pairs_P is None else pairs_P.sum().item()
    if pairs_P is None or not total:
        return None
    num_experts = topk_E.shape[0]
    both_EE = statistics.pair_table(pairs_P, num_experts)
    lift_EE = statistics.coactivation_lift(both_EE, topk_E)
    best = both_EE.triu(1).reshape(-1).topk(min(NUM_PAIRS, pairs_P.shape[0]))
    return [
        {
            "experts": [index // num_experts, index % num_experts],
            "share": rounded(count / total),
            "lift": rounded(lift_EE.view(-1)[index].item()),
        }
        for count, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if count
    ]


def _redundancy_record(
    sums: Mapping[str, Tensor], nearest: Sequence[tuple[int, float]] | None
) -> Record | None:
    compared, aligned = sums["compared"].item(), sums["aligned"].item()
    if not compared:
        return None
    return {
        "probes": int(compared),
        "cosine": rounded(sums["cosine"].item() / compared),
        "cka": rounded(sums["cka"].item() / aligned) if aligned else None,
        # For each expert the one most like it, and their mean cosine.
        "nearest": None if nearest is None else [expert for expert, _ in nearest],
        "nearest_cosine": None if nearest is None else [rounded(cosine) for _, cosine in nearest],
    }


def _specialisation(labels: Mapping[LabelKind, Tensor]) -> dict[LabelKind, float | None]:
    return {
        kind: rounded(statistics.normalised_mutual_information(labels[kind]))
        if kind in labels
        else None
        for kind in LABEL_KINDS
    }


def metrics_record(outcomes: Sequence[float]) -> Record:
    """Return the outcome over all predictions.

    Args:
        outcomes: Sums of the correct ones, of all with a target, and of their losses, nats.
    """
    correct, judged, losses = outcomes
    if not judged:
        return {}
    return {
        "accuracy": correct / judged,
        "loss": _all_digits(losses / judged),
        "judged": int(judged),
    }


def with_loss(metrics: Record, loss: float) -> Record:
    """Return the metrics with the loss, nats, as the training loop computes it."""
    return {**metrics, "loss": _all_digits(loss)}


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
        "temperature": rounded(temperature),
        "entropy_weight": float(control.entropy_weight),
        "oracle_weight": float(control.oracle_weight),
        "balance_weight": float(control.balance_weight),
    }


def build_record(
    *,
    step: int,
    phase: str,
    progress: float | None,
    layers: list[Record],
    metrics: Record,
    z: float = 1.96,
) -> Record:
    """Return the record of a report from those of its layers; events are added later.

    Args:
        step: Optimizer steps taken.
        phase: Kind of traffic.
        progress: Share of the training that is done, if known.
        layers: Records of layers that saw tokens, at least one.
        metrics: Outcome over all predictions, such as ``{"accuracy": 0.9, "judged": 100}``.
        z: Half width of intervals, standard deviations.
    """
    dead = {basis: sum(layer["dead"][basis] for layer in layers) for basis in BASES}
    control = next((layer["control"] for layer in layers if layer["control"]), None)
    return {
        "step": step,
        "phase": phase,
        "progress": None if progress is None else rounded(progress),
        "control": control,
        "prediction": prediction_record(layers, dead),
        "metrics": metrics,
        "interval": {"accuracy": _accuracy_interval(metrics, z=z)},
        "layers": layers,
        "dead": dead,
        "num_experts": sum(layer["num_experts"] for layer in layers),
        "events": [],
    }


def _accuracy_interval(metrics: Record, *, z: float) -> list[float] | None:
    judged = metrics.get("judged", 0)
    if not judged or metrics.get("accuracy") is None:
        return None
    return statistics.wilson_intervals([metrics["accuracy"] * judged], judged, z=z)[0]


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


def _ints(counts: Tensor) -> list[int]:
    return [int(count) for count in counts.round().to(torch.int64).tolist()]


def _finite(value: float) -> float | None:
    """Return the value, or ``None`` for infinity, which JSON does not know."""
    found: float | None = rounded(float(value))
    return found


def _all_digits(value: float) -> float | None:
    """Return all digits, for a figure that is held against the training loop's own."""
    return value if math.isfinite(value) else None


def rounded(value: Any) -> Any:
    """Cut noise digits off, so that records stay small; JSON and every picture show the same."""
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
