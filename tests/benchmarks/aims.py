"""The aims of the layer's speed, each checked against the measured records."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ecomoe import cost_model
from ecomoe.machines import Machine
from tests.benchmarks.fit import WITHIN, balanced, error, layer_shape, predicted, rms_factor, within
from tests.benchmarks.shapes import FEW, LONG, MANY, NARROW, Shape, grid

Records = dict[str, dict[str, Any]]

# No token is dropped by these; the best of them is the peer to beat.
LOSSLESS = ("grouped_mm", "eager", "batched_mm")
OURS = "ecomoe"
SAVED = 1.1  # bytes saved for backward over the dense FFN's, at most
ROUTER = 0.05  # share of router, losses and schedule, at most
SLOWER = 1.05  # time over the best lossless peer's, at most
MONITOR = 1.0  # per cent of a training step, at most


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
    """Return the share of forward and backward that routing beforehand, without losses, saves.

    The schedule's share comes on top, where it was timed.
    """
    saved = 1.0 - float(record["contenders"]["routed"]["both"]["over_ecomoe"][1])
    both = float(record["contenders"][OURS]["both"]["seconds"][1])
    return saved + record.get("schedule_seconds", 0.0) / both


def verdicts(records: Records, machines: dict[str, Machine]) -> list[Verdict]:
    """Return the verdict of each aim that a record speaks of.

    Args:
        records: Those of `tests.benchmarks.layer` by shape.
        machines: The machine's constants by dtype.
    """
    found: list[Verdict] = []
    for aim in LIMITS:
        found += _within_limit(aim, records, machines)
    found += _flat_in_experts(records, machines)
    found += _against_peers(records)
    found += _memory(records)
    found += _router(records)
    found += _cost_model(records, machines)
    return [replace(verdict, reason="") if verdict.met else verdict for verdict in found]


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


@dataclass(frozen=True)
class Limit:
    """An aim of forward + backward over dense.

    Attributes:
        most: The limit.
        which: Of which shapes, in words.
        holds: Whether it is a shape's.
    """

    most: float
    which: str
    holds: Callable[[Shape], bool]


def _is_hard(shape: Shape, like: Shape) -> bool:
    sizes = ("tokens", "d_model", "num_experts", "top_k")
    return all(getattr(shape, name) == getattr(like, name) for name in sizes)


LIMITS = (
    Limit(
        1.10,
        "4,096 tokens and more, D >= 512, 16 experts, top-2",
        lambda shape: (
            shape.tokens >= 4096
            and shape.d_model >= 512
            and (shape.num_experts, shape.top_k) == (16, 2)
        ),
    ),
    Limit(1.6, "256 tokens, D=512, 16 experts", lambda shape: _is_hard(shape, FEW)),
    Limit(
        1.25,
        "4,096 tokens, D=192, 64 experts, fp32",
        lambda shape: _is_hard(shape, NARROW) and shape.dtype == "fp32",
    ),
    Limit(
        1.5,
        "4,096 tokens, D=192, 64 experts, bf16",
        lambda shape: _is_hard(shape, NARROW) and shape.dtype == "bf16",
    ),
)


def _within_limit(aim: Limit, records: Records, machines: dict[str, Machine]) -> Iterable[Verdict]:
    """Return a verdict for each measured shape of an aim, and one for those not measured."""
    shapes = [shape for shape in grid() if aim.holds(shape)]
    text = f"forward + backward over dense at most {aim.most:g}"
    for shape in shapes:
        if shape.name in records:
            record = records[shape.name]
            value = over_dense(record)
            reason = _reason(shape, record, machines[shape.dtype])
            yield Verdict(
                f"{text}: {described(shape)}",
                f"{value:.2f}{_beside(record)}",
                value <= aim.most,
                reason,
            )
    missing = [shape for shape in shapes if shape.name not in records]
    if missing and len(missing) < len(shapes):
        yield Verdict(
            f"{text}: the other shapes of {aim.which}",
            f"{len(shapes) - len(missing)} of {len(shapes)} measured",
            None,
            f"{len(missing)} to measure: `{_to_measure(missing)}`",
        )


def _beside(record: dict[str, Any]) -> str:
    """Say what transformers' `grouped_mm` takes of dense in the same rounds."""
    if "grouped_mm" not in record["contenders"]:
        return ""
    return f" (`grouped_mm` {over_dense(record, 'grouped_mm'):.2f})"


def _to_measure(missing: list[Shape]) -> str:
    """Return the command that measures the shapes; those measured already are left as they are."""
    parts = dict.fromkeys(
        f"n{each.tokens}-d{each.d_model}-e{each.num_experts}-k{each.top_k}-" for each in missing
    )
    return "python -m tests.benchmarks.layer" + "".join(f" --shape {part}" for part in parts)


def _flat_in_experts(records: Records, machines: dict[str, Machine]) -> list[Verdict]:
    if LONG.name not in records or MANY.name not in records:
        return []
    many, few = records[MANY.name], records[LONG.name]
    paired = over_dense(many) / over_dense(few)
    alone = _milliseconds(many) / _milliseconds(few)
    return [
        Verdict(
            f"256 experts over 16, equal active FLOPs, {LONG.tokens:,} tokens: at most 1.5",
            f"{paired:.2f} by the ratios over dense, which a drift of the machine leaves alone; "
            f"{alone:.2f} by seconds, which the dense twins' noise leaves alone, measured minutes "
            f"apart: the greater one, {max(paired, alone):.2f}, decides",
            max(paired, alone) <= 1.5,
            _reason(MANY, many, machines["fp32"]),
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
    slower = {key: ratio for key, ratio in ratios.items() if ratio > SLOWER}
    worst = sorted(slower.items(), key=lambda item: -item[1])[:3]
    measured = f"{len(records)} of the {len(grid())} shapes of the grid"
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
            f"{top:.2f} at the worst, {len(ratios) - len(slower)} of {len(ratios)} within, at "
            f"{measured}",
            not slower,
            f"slower: {listed}; all of them [below](#missed-shapes)",
        ),
        Verdict(
            "speed over the best lossless peer's, geometric mean: at least 1.3",
            f"{mean:.2f} over {measured}",
            mean >= 1.3,
            _gap(ratios),
        ),
    ]


def _gap(ratios: dict[tuple[str, str], float]) -> str:
    """Say at which shapes least is gained over the best peer."""
    least = sorted(ratios.items(), key=lambda item: -item[1])[:5]
    listed = ", ".join(f"{1 / ratio:.2f} at {name} ({kind})" for (name, kind), ratio in least)
    return f"least gained: {listed}"


def saved_over_dense(record: dict[str, Any]) -> float:
    """Return the bytes that the layer keeps for backward over the dense twin's."""
    contenders = record["contenders"]
    return float(contenders[OURS]["saved_bytes"] / contenders["dense"]["saved_bytes"])


def _memory(records: Records) -> list[Verdict]:
    """Return the verdict over all shapes, and over those of many tokens."""
    found = []
    for fewest, which in ((1, "every shape"), (4096, "4,096 tokens and more")):
        ratios = {
            name: saved_over_dense(record)
            for name, record in records.items()
            if record["shape"]["tokens"] >= fewest
        }
        if ratios:
            worst = max(ratios, key=lambda name: ratios[name])
            over = sum(ratio > SAVED for ratio in ratios.values())
            found.append(
                Verdict(
                    f"bytes saved for backward over dense at most {SAVED:g}: {which}",
                    f"{min(ratios.values()):.2f} to {ratios[worst]:.2f}, "
                    f"{len(ratios) - over} of {len(ratios)} within",
                    not over,
                    f"most at {worst}: {saved_reason(records[worst])}",
                )
            )
    return found


def saved_reason(record: dict[str, Any]) -> str:
    """Say what the bytes saved for backward are."""
    kept, dense = (record["contenders"][name]["saved_bytes"] for name in (OURS, "dense"))
    shape = Shape(**record["shape"])
    layer = layer_shape(shape)
    hidden = layer.top_k * (layer.matrices - 1) * layer.d_hidden
    of_experts = shape.tokens * (layer.d_model + hidden) * layer.itemsize
    scores = shape.tokens * layer.num_experts * cost_model.ROUTER_BYTES
    return (
        f"{kept / 1e3:,.0f} kB against {dense / 1e3:,.0f}: tokens and their slots' pre-activations "
        f"take {of_experts / 1e3:,.0f} kB, each of the router's matrices of scores "
        f"{scores / 1e3:,.0f}"
    )


def _router(records: Records) -> list[Verdict]:
    """Return the verdict over all widths that the aim names, and over many tokens of them."""
    found = []
    for fewest, which in ((1, ""), (256, ", 256 tokens and more")):
        shares = {
            name: router_share(record)
            for name, record in records.items()
            if record["shape"]["d_model"] >= 512 and record["shape"]["tokens"] >= fewest
        }
        if shares:
            worst = max(shares, key=lambda name: shares[name])
            over = {name: share for name, share in shares.items() if share > ROUTER}
            timed = sum("schedule_seconds" in records[name] for name in shares)
            found.append(
                Verdict(
                    f"router, losses and schedule at most {ROUTER:.0%} of forward + backward "
                    f"(D >= 512{which})",
                    f"{min(shares.values()):.1%} to {shares[worst]:.1%}, "
                    f"{len(shares) - len(over)} of {len(shares)} within"
                    + (
                        " (a share below 0 is noise of the two timings)"
                        * (min(shares.values()) < 0)
                    )
                    + (
                        ""
                        if timed == len(shares)
                        else f"; {len(shares) - timed} were measured before the schedule was timed "
                        "and hold router and losses alone"
                    ),
                    not over,
                    f"{shares[worst] * _milliseconds(records[worst]):.1f} ms of "
                    f"{_milliseconds(records[worst]):.1f} ms at {worst}; all {len(over)} "
                    "[below](#missed-shapes)",
                )
            )
    return found


def _cost_model(records: Records, machines: dict[str, Machine]) -> list[Verdict]:
    """Return whether the cost model comes near at every shape of evenly spread tokens."""
    offs = {
        (described(Shape(**record["shape"])), kind): error(
            record, machines, training=kind == "forward + backward"
        )
        for record in balanced(records)
        for kind in ("forward", "forward + backward")
    }
    if not offs:
        return []
    near = within(list(offs.values()))
    worst = sorted(offs, key=lambda key: -abs(math.log1p(offs[key])))[:3]
    listed = "; ".join(f"{offs[key]:+.0%} at {key[0]} ({key[1]})" for key in worst)
    return [
        Verdict(
            f"cost model within {WITHIN:.0%} of the measured ratio over dense, at every shape",
            f"{near} of {len(offs)} within, forward and forward + backward; typically off by a "
            f"factor of {rms_factor(list(offs.values())):.2f}",
            near == len(offs),
            f"farthest off: {listed}; all, and why, [below](#the-cost-model)",
        )
    ]


def _milliseconds(record: dict[str, Any]) -> float:
    return 1e3 * float(record["contenders"][OURS]["both"]["seconds"][1])


def _reason(shape: Shape, record: dict[str, Any], machine: Machine) -> str:
    """Say what the products alone take, what must move, and which part the router has."""
    products = ""
    if "products" in record["contenders"]:
        alone = over_dense(record, "products")
        if alone < over_dense(record):
            products = f"the experts' products alone, evenly loaded, take {alone:.2f} of dense; "
    return (
        f"{products}{must_move(record, machine, 'both')}, "
        f"{predicted(shape, machine):.2f} of dense by the cost model; router and losses are "
        f"{router_share(record):.0%} of the time"
    )


def must_move(record: dict[str, Any], machine: Machine, kind: str) -> str:
    """Say how many bytes must move, and which part of the time that takes at the least."""
    shape = Shape(**record["shape"])
    layer, training = layer_shape(shape), kind == "both"
    dense = cost_model.dense_work(layer, tokens=shape.tokens, training=training)
    sparse = cost_model.layer_work(layer, tokens=shape.tokens, training=training)
    least = sparse.bytes / machine.bytes_per_second
    measured = float(record["contenders"][OURS][kind]["seconds"][1])
    return (
        f"{sparse.bytes / 1e6:,.1f} MB must move against {dense.bytes / 1e6:,.1f}, which takes "
        f"{1e3 * least:,.3g} of {1e3 * measured:,.3g} ms"
    )


def monitor_verdict(text: str) -> Verdict:
    """Return the verdict of what `tests.benchmarks.monitor` measured, from its part of the page."""
    aim = f"monitor at most {MONITOR:g} % of a training step"
    found = re.search(r"inside the monitor's hooks, of a step \| \*\*([\d.]+) %", text)
    if found is None:
        return Verdict(aim, "not measured", None)
    share = float(found[1])
    return Verdict(aim, f"{share:g} %, see [Monitor](#monitor)", share <= MONITOR)


def described(shape: Shape) -> str:
    """Describe a shape in a line of the table."""
    return (
        f"{shape.tokens:,} tokens, D={shape.d_model}, {shape.num_experts} experts of "
        f"{shape.d_hidden}, top-{shape.top_k}, {'gated' if shape.gated else 'plain'}, {shape.dtype}"
        + ("" if shape.load == "balanced" else f", {shape.load} load")
    )
