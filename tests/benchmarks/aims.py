"""The aims of the layer's speed, each checked against the measured records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ecomoe import cost_model
from ecomoe.machines import Machine
from tests.benchmarks.fit import layer_shape, predicted
from tests.benchmarks.shapes import FEW, LARGE, LONG, MANY, NARROW, Shape

Records = dict[str, dict[str, Any]]

# No token is dropped by these; the best of them is the peer to beat.
LOSSLESS = ("grouped_mm", "eager", "batched_mm")
OURS = "ecomoe"


@dataclass(frozen=True)
class Verdict:
    """What became of one aim: what was asked, what was measured, and why it was missed."""

    aim: str
    measured: str
    met: bool | None
    reason: str = ""


def over_dense(record: dict[str, Any], name: str = OURS, kind: str = "both") -> float:
    """Return the median of a contender's time over the dense twin's."""
    return float(record["contenders"][name][kind]["over_dense"][1])


def best_peer(record: dict[str, Any], kind: str) -> tuple[str, float] | None:
    """Return the fastest lossless peer and our time over its; None where none was measured."""
    peers = {
        name: 1.0 / record["contenders"][name][kind]["over_ecomoe"][1]
        for name in LOSSLESS
        if name in record["contenders"]
    }
    return max(peers.items(), key=lambda item: item[1]) if peers else None


def router_share(record: dict[str, Any]) -> float:
    """Return the share of forward and backward that routing beforehand, without losses, saves."""
    return 1.0 - float(record["contenders"]["routed"]["both"]["over_ecomoe"][1])


def verdicts(records: Records, machines: dict[str, Machine]) -> list[Verdict]:
    """Return the verdict of each aim that a record speaks of.

    Args:
        records: Those of `tests.benchmarks.layer` by shape.
        machines: The machine's constants by dtype.
    """
    found: list[Verdict] = []
    for shape, limit in _limits():
        if shape.name in records:
            value = over_dense(records[shape.name])
            found.append(
                Verdict(
                    f"forward + backward over dense at most {limit:g}: {described(shape)}",
                    f"{value:.2f}",
                    value <= limit,
                    _reason(shape, records[shape.name], machines[shape.dtype]),
                )
            )
    found += _flat_in_experts(records, machines)
    found += _against_peers(records)
    found += _memory(records)
    found += _router(records)
    return [verdict if not verdict.met else replace(verdict, reason="") for verdict in found]


def race_verdicts(races: dict[str, Any]) -> list[Verdict]:
    """Return whether each race was won: the dense twin's last loss in no more than its time."""
    found = []
    for race in races.values():
        results = [run["result"] for run in race["runs"].values()]
        reached = [result["reached"] for result in results]
        steps = statistics.median(result["step_over_dense"] for result in results)
        behind = [
            f"{result['ecomoe']['loss'] - result['dense']['loss']:+.3f} nats at its end"
            for result in results
            if result["reached"] is None
        ]
        found.append(
            Verdict(
                f"{race['title']}, {len(results)} seeds: the dense twin's last loss in at most "
                "its time",
                ", ".join("not reached" if at is None else f"{at:.2f}" for at in reached),
                len(results) >= 3 and all(at is not None and at <= 1.0 for at in reached),
                f"a step takes {steps:.2f} of the twin's" + "".join(f"; {text}" for text in behind),
            )
        )
    return [verdict if not verdict.met else replace(verdict, reason="") for verdict in found]


def _limits() -> Iterable[tuple[Shape, float]]:
    for dtype in ("fp32", "bf16"):
        for gated in (False, True):
            yield replace(LARGE, dtype=dtype, gated=gated), 1.10
    for gated in (False, True):
        yield replace(FEW, gated=gated), 1.6
    for gated in (False, True):
        yield replace(NARROW, gated=gated), 1.25
        yield replace(NARROW, gated=gated, dtype="bf16"), 1.5
    yield LONG, 1.10


def _flat_in_experts(records: Records, machines: dict[str, Machine]) -> list[Verdict]:
    if LONG.name not in records or MANY.name not in records:
        return []
    ratio = over_dense(records[MANY.name]) / over_dense(records[LONG.name])
    return [
        Verdict(
            f"256 experts over 16, equal active FLOPs, {LONG.tokens:,} tokens: at most 1.5",
            f"{ratio:.2f}",
            ratio <= 1.5,
            _reason(MANY, records[MANY.name], machines["fp32"]),
        )
    ]


def _against_peers(records: Records) -> list[Verdict]:
    kinds = ("forward", "both")
    ratios = {
        (name, kind): best[1]
        for name, record in records.items()
        for kind in kinds
        if (best := best_peer(record, kind)) is not None
    }
    if not ratios:
        return []
    slower = {key: ratio for key, ratio in ratios.items() if ratio > 1.05}
    worst = sorted(slower.items(), key=lambda item: -item[1])
    listed = "; ".join(
        f"{ratio:.2f} at {name} ({'forward + backward' if kind == 'both' else kind}, "
        f"{best_peer(records[name], kind)[0]})"  # type: ignore[index]
        for (name, kind), ratio in worst
    )
    mean = math.exp(sum(-math.log(ratio) for ratio in ratios.values()) / len(ratios))
    top = max(ratios.values())
    return [
        Verdict(
            "time over the best lossless peer's at most 1.05 at every shape",
            f"{top:.2f} at the worst, {len(ratios) - len(slower)} of {len(ratios)} within",
            not slower,
            f"slower: {listed}",
        ),
        Verdict(
            "speed over the best lossless peer's, geometric mean: at least 1.3",
            f"{mean:.2f}",
            mean >= 1.3,
            _gap(ratios),
        ),
    ]


def _gap(ratios: dict[tuple[str, str], float]) -> str:
    """Say at which shapes least is gained over the best peer."""
    least = sorted(ratios.items(), key=lambda item: -item[1])[:5]
    listed = ", ".join(f"{1 / ratio:.2f} at {name} ({kind})" for (name, kind), ratio in least)
    return f"least gained: {listed}"


def _memory(records: Records) -> list[Verdict]:
    ratios = {
        name: record["contenders"][OURS]["saved_bytes"]
        / record["contenders"]["dense"]["saved_bytes"]
        for name, record in records.items()
        if record["shape"]["tokens"] >= 4096
    }
    if not ratios:
        return []
    worst = max(ratios, key=lambda name: ratios[name])
    return [
        Verdict(
            "bytes saved for backward over dense at most 1.1 (4,096 tokens and more)",
            f"{min(ratios.values()):.2f} to {ratios[worst]:.2f}",
            ratios[worst] <= 1.1,
            f"most at {worst}: what is kept of the hidden layer has room for the most rows that a "
            f"routing may need, and {_scores_share(records[worst]):.0%} are the router's scores",
        )
    ]


def _scores_share(record: dict[str, Any]) -> float:
    """Return the share of one matrix of scores, fp32, in the bytes that the layer saves."""
    shape = record["shape"]
    scores = 4 * shape["tokens"] * shape["num_experts"]
    return float(scores / record["contenders"][OURS]["saved_bytes"])


def _router(records: Records) -> list[Verdict]:
    shares = {
        name: router_share(record)
        for name, record in records.items()
        if record["shape"]["d_model"] >= 512 and record["shape"]["tokens"] >= 256
    }
    if not shares:
        return []
    worst = max(shares, key=lambda name: shares[name])
    return [
        Verdict(
            "router and losses at most 5 % of forward + backward (D >= 512, 256 tokens and more)",
            f"{min(shares.values()):.1%} to {shares[worst]:.1%}",
            shares[worst] <= 0.05,
            f"{shares[worst] * _milliseconds(records[worst]):.1f} ms of "
            f"{_milliseconds(records[worst]):.1f} ms at {worst}; above 5 %: "
            + ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share > 0.05),
        )
    ]


def _milliseconds(record: dict[str, Any]) -> float:
    return 1e3 * float(record["contenders"][OURS]["both"]["seconds"][1])


def _reason(shape: Shape, record: dict[str, Any], machine: Machine) -> str:
    """Say what the products alone take, what must move, and which part the router has."""
    layer = layer_shape(shape)
    dense = cost_model.dense_work(layer, tokens=shape.tokens)
    sparse = cost_model.layer_work(layer, tokens=shape.tokens)
    products = ""
    if "products" in record["contenders"]:
        alone = over_dense(record, "products")
        if alone < over_dense(record):
            products = f"the experts' products alone, evenly loaded, take {alone:.2f} of dense; "
    return (
        f"{products}{sparse.bytes / 1e6:,.0f} MB must move against {dense.bytes / 1e6:,.0f}, "
        f"{predicted(shape, machine):.2f} of dense by the cost model; router and losses are "
        f"{router_share(record):.0%} of the time"
    )


def described(shape: Shape) -> str:
    """Describe a shape in a line of the table."""
    return (
        f"{shape.tokens:,} tokens, D={shape.d_model}, {shape.num_experts} experts of "
        f"{shape.d_hidden}, top-{shape.top_k}, {'gated' if shape.gated else 'plain'}, {shape.dtype}"
        + ("" if shape.load == "balanced" else f", {shape.load} load")
    )
