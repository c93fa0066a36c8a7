"""The shapes at which an aim is missed: by how much, what must move, where the time goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ecomoe import cost_model
from ecomoe.machines import Host, Machine
from tests.benchmarks.aims import (
    LIMITS,
    OURS,
    ROUTER,
    SAVED,
    SLOWER,
    Records,
    best_peer,
    described,
    must_move,
    over_dense,
    router_share,
    saved_over_dense,
    saved_reason,
)
from tests.benchmarks.fit import layer_shape
from tests.benchmarks.shapes import Shape

KINDS = {"forward": "forward", "both": "forward + backward"}
NAMED = 0.1  # shares of the time from which on they are named


def missed_shapes(records: Records, machines: dict[str, Machine]) -> Iterator[tuple[str, str, str]]:
    """Yield each shape that misses an aim: the shape, by how much, and why."""
    for record in records.values():
        shape = Shape(**record["shape"])
        misses, kinds = _misses(shape, record)
        if not misses:
            continue
        why = [
            f"{KINDS[kind]}: {must_move(record, machines[shape.dtype], kind)}"
            f"{spent_on(shape, machines[shape.dtype], kind)}"
            for kind in kinds
        ]
        if saved_over_dense(record) > SAVED:
            why.append(f"saved: {saved_reason(record)}")
        yield described(shape), "; ".join(misses), "; ".join(why)


def _misses(shape: Shape, record: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return what a shape misses, and which passes the reasons are to be told of."""
    misses, kinds = [], []
    for aim in LIMITS:
        if aim.holds(shape) and over_dense(record) > aim.most:
            misses.append(f"{over_dense(record):.2f} of dense, at most {aim.most:g}")
            kinds.append("both")
    for kind, name in KINDS.items():
        best = best_peer(record, kind)
        if best is not None and best[1] > SLOWER:
            misses.append(f"{best[1]:.2f} of `{best[0]}` {name}, at most {SLOWER:g}")
            kinds.append(kind)
    if shape.d_model >= 512 and router_share(record) > ROUTER:
        spent = router_share(record) * record["contenders"][OURS]["both"]["seconds"][1]
        misses.append(
            f"router {router_share(record):.1%}, at most {ROUTER:.0%} ({1e3 * spent:.2f} ms)"
        )
        kinds.append("both")
    if saved_over_dense(record) > SAVED:
        misses.append(f"saves {saved_over_dense(record):.2f} of dense, at most {SAVED:g}")
    return misses, [kind for kind in KINDS if kind in kinds]


def spent_on(shape: Shape, machine: Machine, kind: str) -> str:
    """Say what most of the time is spent on by the cost model, of ours and of dense."""
    if not isinstance(machine, Host):
        return ""
    layer, training = layer_shape(shape), kind == "both"
    told = []
    for name, work in (
        ("", cost_model.layer_work(layer, tokens=shape.tokens, training=training)),
        ("dense ", cost_model.dense_work(layer, tokens=shape.tokens, training=training)),
    ):
        parts: dict[str, float] = {}
        for operation in work.operations:
            for part, seconds in machine.parts(operation).items():
                parts[part] = parts.get(part, 0.0) + seconds
        whole = sum(parts.values())
        most = sorted(parts.items(), key=lambda item: -item[1])
        listed = ", ".join(
            f"{part} {seconds / whole:.0%}" for part, seconds in most if seconds > NAMED * whole
        )
        told.append(f"{name}{1e3 * whole:,.3g} ms: {listed}")
    return f" (by the model {' ; '.join(told)})".replace(" ;", ";")
