"""Fit the cost model to what was measured: ``python -m tests.benchmarks.fit``.

Prints the constants that belong into `ecomoe.machines.FITTED`, and how near the model comes. After
new measurements first this, then `tests.benchmarks.page`, which says how near the constants come
that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from ecomoe import cost_model
from ecomoe.cost_model import LayerShape
from ecomoe.machines import Fitted, Host, Machine
from tests.benchmarks.contenders import DTYPES
from tests.benchmarks.results import RESULTS
from tests.benchmarks.shapes import Shape

Record = dict[str, Any]
Machines = dict[str, Machine]

WITHIN = 0.25  # how near the model is to come
START = Fitted(launch=4.0, forward=1e-3, training=4e-3, score=2e-8)
# Shapes are left out in so many parts: every one alone would take minutes.
PARTS = 11


def machines_of(results: dict[str, Any]) -> Machines:
    """Return the machine's constants by dtype, as `tests.benchmarks.layer` measured them.

    Those measured beside each shape, in the median over shapes; where there are none, those
    measured by themselves.
    """
    kind = Machine if "gpu" in results["machine"] else Host
    found: Machines = {}
    for dtype, alone in results["constants"].items():
        beside = [
            record["constants"]
            for record in results["layers"].values()
            if record["shape"]["dtype"] == dtype and "constants" in record
        ] or [alone]
        found[dtype] = kind(
            **{name: statistics.median(each[name] for each in beside) for name in alone}
        )
    return found


def constants_of(machine: Machine) -> dict[str, float]:
    """Return what `machines_of` reads: the measured constants without the fitted ones."""
    return {name: value for name, value in asdict(machine).items() if name != "fitted"}


def layer_shape(shape: Shape) -> LayerShape:
    """Return the shape as the cost model takes it."""
    return LayerShape(
        shape.d_model,
        shape.d_hidden,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        gated=shape.gated,
        itemsize=DTYPES[shape.dtype].itemsize,
        router_hidden=0,
    )


def predicted(shape: Shape, machine: Machine, *, training: bool = True) -> float:
    """Return the cost model's time over the dense twin's."""
    return cost_model.over_dense(
        layer_shape(shape), tokens=shape.tokens, machine=machine, training=training
    )


def error(record: Record, machines: Machines, *, training: bool = True) -> float:
    """Return how far the cost model is off the measured ratio, relative to it."""
    shape = Shape(**record["shape"])
    kind = "both" if training else "forward"
    measured = record["contenders"]["ecomoe"][kind]["over_dense"][1]
    return predicted(shape, machines[shape.dtype], training=training) / float(measured) - 1.0


def balanced(records: dict[str, Record]) -> list[Record]:
    """Return the records of evenly spread tokens: the model spreads them so."""
    return [each for each in records.values() if each["shape"]["load"] == "balanced"]


@dataclass(frozen=True)
class _Times:
    """Seconds of one contender at one shape: measured, and the model's, linear in what is fitted.

    Attributes:
        measured: Seconds.
        known: Seconds that hang on nothing fitted.
        per: Seconds for each unit of each fitted constant.
    """

    measured: float
    known: float
    per: tuple[float, ...]


def _times(record: Record, machines: Machines) -> list[_Times]:
    shape = Shape(**record["shape"])
    layer, host = layer_shape(shape), machines[shape.dtype]
    assert isinstance(host, Host)
    none = Fitted(**{field.name: 0.0 for field in fields(Fitted)})
    found = []
    for training in (False, True):
        kind = "both" if training else "forward"
        works = {
            "dense": cost_model.dense_work(layer, tokens=shape.tokens, training=training),
            "ecomoe": cost_model.layer_work(layer, tokens=shape.tokens, training=training),
        }
        for name, work in works.items():
            known = work.seconds(replace(host, fitted=none))
            per = tuple(
                work.seconds(replace(host, fitted=replace(none, **{field.name: 1.0}))) - known
                for field in fields(Fitted)
            )
            measured = record["contenders"][name][kind]["seconds"][1]
            found.append(_Times(measured, known, per))
    return found


def fit(records: Sequence[Record], machines: Machines) -> Fitted:
    """Return the constants with which the model's seconds are nearest to the measured ones.

    Least squares of the logarithms of predicted over measured seconds, of the layer and of its
    dense twin, forward and with backward: every shape counts alike, however long it takes. What is
    farther off than the model may be counts linearly: one token's gradients wait for pages that the
    system is at times slow to supply, by a factor of ten.
    """
    times = [each for record in records for each in _times(record, machines)]
    measured = np.array([each.measured for each in times])
    known = np.array([each.known for each in times])
    per = np.array([each.per for each in times])
    scale = np.array([getattr(START, field.name) for field in fields(Fitted)])

    def off(units: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.log((known + per @ (units * scale)) / measured)
        return found

    ones = np.ones_like(scale)
    found = least_squares(off, ones, bounds=(1e-6 * ones, np.inf), loss="soft_l1", f_scale=WITHIN)
    return Fitted(*(float(value) for value in found.x * scale))


def with_fitted(machines: Machines, fitted: Fitted) -> Machines:
    """Return the machines with other fitted constants."""
    found: Machines = {}
    for name, machine in machines.items():
        assert isinstance(machine, Host)
        found[name] = replace(machine, fitted=fitted)
    return found


def left_out(
    records: Sequence[Record], machines: Machines, *, parts: int = PARTS
) -> list[tuple[Fitted, float]]:
    """Leave out each part of the records in turn, fit to the others; return the errors there.

    Neighbours in the list are much alike, so a part takes every so many: none has its neighbours.
    For each record in order: the constants without its part, and the error of the training ratio.
    """
    found: dict[int, tuple[Fitted, float]] = {}
    for part in range(min(parts, len(records))):
        others = [each for place, each in enumerate(records) if place % parts != part]
        fitted = fit(others, machines)
        tried = with_fitted(machines, fitted)
        for place in range(part, len(records), parts):
            found[place] = fitted, error(records[place], tried)
    return [found[place] for place in range(len(records))]


def main(arguments: list[str] | None = None) -> None:
    """Print the constants, and how near the model comes with them."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.fit", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "cpu.json")
    given = parser.parse_args(arguments)
    results = json.loads(given.results.read_text())
    records, machines = balanced(results["layers"]), machines_of(results)
    fitted = fit(records, machines)
    values = ", ".join(f"{name}={value:.3g}" for name, value in asdict(fitted).items())
    print(f"FITTED = Fitted({values})")
    print("goes into ecomoe/machines.py in place of the line that begins so; how near it comes:")
    tried = with_fitted(machines, fitted)
    for training in (True, False):
        offs = [error(each, tried, training=training) for each in records]
        kind = "forward + backward" if training else "forward"
        print(f"{kind}: {within(offs)} of {len(offs)} shapes within {WITHIN:.0%}")
    offs = [off for _, off in left_out(records, machines)]
    print(f"forward + backward, shapes left out: {within(offs)} of {len(offs)}")


def within(errors: Sequence[float]) -> int:
    """Return how many errors are small enough."""
    return sum(abs(off) <= WITHIN for off in errors)


def rms_factor(errors: Sequence[float]) -> float:
    """Return the typical factor of predicted over measured, or of measured over predicted."""
    return math.exp(math.sqrt(sum(math.log1p(off) ** 2 for off in errors) / len(errors)))


if __name__ == "__main__":
    main()
