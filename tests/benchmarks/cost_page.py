"""What the benchmarks' page says of the cost model: its constants, its errors, many devices."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ecomoe import costing
from ecomoe.machines import Fitted, Host, Machine
from tests.benchmarks.aims import described
from tests.benchmarks.fit import (
    WITHIN,
    Machines,
    Record,
    balanced,
    error,
    left_out,
    rms_factor,
    within,
)
from tests.benchmarks.shapes import Shape

# A layer of the size of Mixtral 8x7B's, its experts cut in four.
EXAMPLE = (
    "--d-model 4096 --d-hidden 3584 --gated --top-k 8 --layers 32 --tokens 8192 --dtype bf16 "
    "--router linear --experts 64"
)
# Only what is said of many devices is shown, and that does not hang on this machine.
HERE = "--gflops 1 --gbytes 1 --fresh-gbytes 1 --launch 1 --product 1"

UNITS = {
    "launch": (1.0, "times a launch measured by itself"),
    "forward": (1e6, "microseconds a forward pass"),
    "training": (1e6, "microseconds a forward and backward pass"),
    "score": (1e9, "nanoseconds for each pass over a router score"),
}


def setting(machines: Machines) -> str:
    """Say what the machine reaches."""
    reached = "; ".join(f"{name} {_reached(each)}" for name, each in machines.items())
    return f"It reaches {reached}."


def _reached(machine: Machine) -> str:
    text = (
        f"{machine.flops_per_second / 1e9:,.0f} GFLOP/s, {machine.bytes_per_second / 1e9:.1f} GB/s"
    )
    if isinstance(machine, Host):
        text += (
            f", {machine.fresh_bytes_per_second / 1e9:.1f} GB/s of memory that the system "
            f"supplies, {1e6 * machine.seconds_per_product:.1f} microseconds for a small product"
        )
    return text


def cost_model(records: dict[str, Record], machines: Machines) -> str:
    """Return the section on the cost model."""
    return "\n\n".join([_physics(machines), *_errors(balanced(records), machines), _devices()])


def _physics(machines: Machines) -> str:
    text = (
        "`ecomoe cost` prints it (`ecomoe/cost_model.py`, `ecomoe/machines.py`). On a GPU an "
        "operation takes its FLOPs or its bytes, whichever is longer. On a CPU it takes its FLOPs, "
        "its bytes, the bytes of memory that the system has to supply, and its launches, one after "
        "the other, at the rates above. Weights count "
    )
    hosts = {name: each for name, each in machines.items() if isinstance(each, Host)}
    passes = ", ".join(f"{each.block_passes:g} times in {name}" for name, each in hosts.items())
    text += f"{passes or 'once'} where a product of several rows copies them into blocks."
    for host in list(hosts.values())[:1]:
        values = ", ".join(
            f"{field.name} {getattr(host.fitted, field.name) * unit:,.4g} {meaning}"
            for field in fields(Fitted)
            for unit, meaning in [UNITS[field.name]]
        )
        text += (
            " Four constants are not measured by themselves but fitted, to the seconds of all "
            "shapes, of the layer and of its dense twin, forward and with backward, by `python -m "
            f"tests.benchmarks.fit`: {values}."
        )
    return text


def _errors(records: Sequence[Record], machines: Machines) -> list[str]:
    """Say how near the model comes: with all shapes known, and at shapes that it never saw."""
    if not records:
        return []
    names = [described(Shape(**each["shape"])) for each in records]
    offs = [error(each, machines) for each in records]
    forward = [error(each, machines, training=False) for each in records]
    text = (
        f"Over the dense FFN it is within {WITHIN:.0%} of what is measured at {within(offs)} of "
        f"{len(offs)} shapes forward + backward (typically off by a factor of "
        f"{rms_factor(offs):.2f}), and at {within(forward)} forward."
    )
    if len(records) > 1 and all(isinstance(each, Host) for each in machines.values()):
        found = left_out(records, machines)
        unseen = [off for _, off in found]
        spans = []
        for field in fields(Fitted):
            unit, _ = UNITS[field.name]
            values = [unit * getattr(fitted, field.name) for fitted, _ in found]
            spans.append(f"{field.name} {min(values):,.4g} to {max(values):,.4g}")
        text += (
            f" Fitted without a tenth of the shapes in turn ({'; '.join(spans)}), the model "
            f"is within {WITHIN:.0%} at {within(unseen)} of {len(unseen)} shapes that it did not "
            f"see (typically off by {rms_factor(unseen):.2f})."
        )
    outside = sorted(
        (pair for pair in zip(offs, names, strict=True) if abs(pair[0]) > WITHIN),
        key=lambda pair: -abs(pair[0]),
    )
    if not outside:
        return [text]
    lines = [f"- {name}: {off:+.0%}" for off, name in outside]
    why = (
        "A step of one token writes gradients of two experts into pages that the system has to "
        "supply, at a rate that differs tenfold from one minute to the next: the quartiles of such "
        "a shape lie as far apart."
    )
    return [text, "\n".join(["Farther off, forward + backward:", "", *lines]), why]


def _devices() -> str:
    parser = argparse.ArgumentParser()
    costing.add_arguments(parser)
    given = parser.parse_args([*EXAMPLE.split(), *HERE.split()])
    blocks = costing.read_blocks(given)
    cluster = costing.read_cluster(given)
    found: dict[str, Any] = costing.costs(
        blocks,
        tokens=given.tokens,
        machine=costing.read_machine(given),
        cluster=cluster,
        experts=costing.spread_of(given, blocks.layer),
        devices=given.devices,
    )
    table = "\n".join(costing.device_lines(found))
    return (
        "### Many devices\n\nOn paper only: no such machine was at hand. Each device holds its "
        "share of the experts, and tokens spread evenly. In the four all-to-alls of a layer (slots "
        "out and back, and their gradients) a device sends all of its slots but the share that "
        "stays; experts with several holders and the router average their gradients besides. "
        "Nothing is hidden behind computing, activations are not in *memory*, and the *dense* "
        "block of equal active FLOPs stands whole on each device.\n\n"
        f"`ecomoe cost {EXAMPLE}`:\n\n```text\n{table}\n```"
    )
