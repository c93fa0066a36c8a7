"""The command ``ecomoe cost``: the cost model's tables for a user's layer or model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ecomoe import cost_model as cost
from ecomoe.cost_model import LayerShape, Work
from ecomoe.device_cost import held_whole, on_devices
from ecomoe.machines import BLOCK_PASSES, H100, Cluster, Host, Machine
from ecomoe.model_config import read_config

ITEMSIZES = {"fp32": 4, "bf16": 2}
# Of a layer on a device, what adds up over layers.
SUMMED = (
    *("parameters", "memory", "sent", "reduced"),
    *("compute", "optimizer", "communication", "dense_seconds"),
)
EXPERTS = (64, 512, 4096)
DEVICES = (8, 64, 1024)


@dataclass(frozen=True)
class Blocks:
    """The feed-forward blocks of a model.

    Attributes:
        layer: Those with experts.
        layers: How many of them.
        dense: Those without, as `LayerShape.block` gives them.
        dense_layers: How many of them.
    """

    layer: LayerShape
    layers: int = 1
    dense: LayerShape | None = None
    dense_layers: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--config",
        type=Path,
        help="config.json of a model, or its folder, for what follows and its dense layers",
    )
    parser.add_argument("--d-model", type=int, help="features of a token")
    parser.add_argument("--d-hidden", type=int, help="hidden features of an expert")
    parser.add_argument("--experts", type=int, help="experts (16)")
    parser.add_argument("--top-k", type=int, help="experts a token (2)")
    parser.add_argument(
        "--shared", type=int, help="hidden features of experts that every token takes besides (0)"
    )
    parser.add_argument(
        "--layers", type=int, help="such layers in the model (1); without dense ones if given"
    )
    parser.add_argument(
        "--gated",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="gated experts, of three matrices (as --config says, else not)",
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, help="tokens of a step, on a device (4,096)"
    )
    parser.add_argument(
        "--dtype", choices=list(ITEMSIZES), default="bf16", help="of weights and tokens (bf16)"
    )
    parser.add_argument(
        "--router",
        choices=["mlp", "linear"],
        default="mlp",
        help="EcoMoE's own of 128 hidden features, or a matrix (mlp)",
    )
    here = parser.add_argument_group("this machine (measured if not given)")
    here.add_argument("--gflops", type=float, help="GFLOP/s of its matrix products")
    here.add_argument("--gbytes", type=float, help="GB/s of its memory")
    here.add_argument("--fresh-gbytes", type=float, help="GB/s of memory that the system supplies")
    here.add_argument("--launch", type=float, help="microseconds of a launch in fp32")
    here.add_argument(
        "--product", type=float, help="microseconds of a small matrix product in the dtype"
    )
    spread = parser.add_argument_group("many devices (an H100's data sheet by default)")
    spread.add_argument(
        "--spread",
        type=_one_of("--spread 64 512"),
        nargs="+",
        metavar="EXPERTS",
        help="numbers of experts to spread over the devices (the layer's own, 64, 512, 4,096)",
    )
    spread.add_argument(
        "--devices",
        type=_one_of("--devices 1 1024"),
        nargs="+",
        default=DEVICES,
        help="numbers of devices (8 64 1024)",
    )
    spread.add_argument("--device-tflops", type=float, help="TFLOP/s that a device reaches")
    spread.add_argument("--device-gbytes", type=float, help="GB/s of its memory")
    spread.add_argument("--inside", type=float, help="GB/s a device sends within its node")
    spread.add_argument("--outside", type=float, help="GB/s a device sends to other nodes")
    spread.add_argument("--node", type=int, help="devices of a node")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def _one_of(example: str) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not int(text):
            raise argparse.ArgumentTypeError(
                f"{text!r} must be a whole number >= 1; put spaces between several: {example}"
            )
        return int(text)

    return number


def run(given: argparse.Namespace) -> None:
    """Print what the options ask for.

    Raises:
        ValueError: A size is missing or breaks its rule.
    """
    blocks = read_blocks(given)
    found = costs(
        blocks,
        tokens=given.tokens,
        machine=read_machine(given),
        cluster=read_cluster(given),
        experts=spread_of(given, blocks.layer),
        devices=given.devices,
    )
    print(json.dumps(found) if given.json else "\n".join(lines(found)))


def read_blocks(given: argparse.Namespace) -> Blocks:
    """Return the blocks that the options or the configuration describe.

    An option goes before what the configuration says.
    """
    said = read_config(given.config) if given.config is not None else None
    sizes: dict[str, Any] = {
        name: getattr(said, name, None) if getattr(given, name) is None else getattr(given, name)
        for name in ("d_model", "d_hidden", "layers", "experts", "top_k", "gated", "shared")
    }
    for name in ("d_model", "d_hidden"):
        if sizes[name] is None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is missing; give it, or a --config that names it")
    layer = LayerShape(
        sizes["d_model"],
        sizes["d_hidden"],
        num_experts=16 if sizes["experts"] is None else sizes["experts"],
        top_k=2 if sizes["top_k"] is None else sizes["top_k"],
        gated=bool(sizes["gated"]),
        itemsize=ITEMSIZES[given.dtype],
        router_hidden=128 if given.router == "mlp" else 0,
        shared_hidden=sizes["shared"] or 0,
    )
    layers = 1 if sizes["layers"] is None else sizes["layers"]
    cost.count("layers", layers)
    if said is None or not said.dense_layers or given.layers is not None:
        return Blocks(layer, layers)
    dense = layer.block(layer.d_hidden if said.dense_hidden is None else said.dense_hidden)
    return Blocks(layer, layers, dense, said.dense_layers)


def spread_of(given: argparse.Namespace, layer: LayerShape) -> list[int]:
    """Return the numbers of experts to spread over devices: the layer's own first."""
    return list(given.spread or dict.fromkeys((layer.num_experts, *EXPERTS)))


def read_machine(given: argparse.Namespace) -> Machine:
    """Return the constants given for this machine, and measure those that are not."""
    named = {
        "flops_per_second": (given.gflops, 1e9),
        "bytes_per_second": (given.gbytes, 1e9),
        "fresh_bytes_per_second": (given.fresh_gbytes, 1e9),
        "seconds_per_launch": (given.launch, 1e-6),
        "seconds_per_product": (given.product, 1e-6),
    }
    known = {name: value * unit for name, (value, unit) in named.items() if value is not None}
    if len(known) == len(named):
        return Host(**known, block_passes=BLOCK_PASSES[ITEMSIZES[given.dtype]])
    import torch

    from ecomoe.calibration import measure_machine

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[given.dtype]
    return replace(measure_machine(dtype=dtype), **known)


def read_cluster(given: argparse.Namespace) -> Cluster:
    """Return the H100 cluster with what the options change in it."""
    changed: dict[str, Any] = {}
    default = H100.machine
    if given.device_tflops is not None or given.device_gbytes is not None:
        tflops, gbytes = given.device_tflops, given.device_gbytes
        changed["machine"] = Machine(
            default.flops_per_second if tflops is None else tflops * 1e12,
            default.bytes_per_second if gbytes is None else gbytes * 1e9,
        )
    for name in ("inside", "outside"):
        if getattr(given, name) is not None:
            changed[name] = getattr(given, name) * 1e9
    if given.node is not None:
        changed["node"] = given.node
    if changed:
        changed["name"] = f"as given, else {H100.name}"
    return replace(H100, **changed)


def costs(
    blocks: Blocks,
    *,
    tokens: int,
    machine: Machine,
    cluster: Cluster,
    experts: Sequence[int],
    devices: Sequence[int],
) -> dict[str, Any]:
    """Return the numbers of both tables; those of many devices are of all blocks together."""
    layer, dense = blocks.layer, blocks.dense
    works = {
        "router and losses": cost.router_work(layer, tokens=tokens),
        "dispatch and combine": cost.dispatch_work(layer, tokens=tokens),
        "experts": cost.experts_work(layer, tokens=tokens),
        "shared experts": cost.shared_work(layer, tokens=tokens),
        "recomputation, gates": cost.recomputation_work(layer, tokens=tokens),
        "each call besides": cost.call_work(),
        "whole layer": cost.layer_work(layer, tokens=tokens),
        "dense block": cost.dense_work(layer, tokens=tokens),
    }
    if layer.shared is None:
        del works["shared experts"]
    if dense is not None:
        works["a dense layer"] = cost.dense_work(dense, tokens=tokens)
    parameters = layer.parameters
    return {
        "layer": asdict(layer),
        "layers": blocks.layers,
        "dense_layers": blocks.dense_layers,
        "dense_hidden": dense.d_hidden if dense is not None else None,
        "tokens": tokens,
        "machine": asdict(machine),
        "parameters": parameters,
        "dense_parameters": layer.dense.expert_parameters,
        "training_bytes": cost.training_bytes(parameters, itemsize=layer.itemsize),
        "optimizer_bytes": cost.optimizer_bytes(parameters, itemsize=layer.itemsize),
        "work": {name: _described(work, machine) for name, work in works.items()},
        "over_dense": {
            "forward": cost.over_dense(layer, tokens=tokens, machine=machine, training=False),
            "training": cost.over_dense(layer, tokens=tokens, machine=machine),
        },
        "cluster": cluster.name,
        "device_memory": cluster.memory,
        "spread": list(_spread(blocks, tokens, cluster, experts, devices)),
        "uneven": [
            [num_experts, count]
            for num_experts in experts
            for count in devices
            if not _is_even(num_experts, count)
        ],
    }


def _is_even(num_experts: int, devices: int) -> bool:
    return not (num_experts % devices and devices % num_experts)


def _described(work: Work, machine: Machine) -> dict[str, float]:
    return {"flops": work.flops, "bytes": work.bytes, "seconds": work.seconds(machine)}


def _spread(
    blocks: Blocks,
    tokens: int,
    cluster: Cluster,
    experts: Sequence[int],
    devices: Sequence[int],
) -> Iterator[dict[str, Any]]:
    for num_experts in experts:
        wide = replace(blocks.layer, num_experts=num_experts)
        for count in devices:
            if not _is_even(num_experts, count):
                continue
            sizes: dict[str, Any] = {"tokens": tokens, "devices": count, "cluster": cluster}
            sparse = on_devices(wide, **sizes)
            of_all = {name: blocks.layers * getattr(sparse, name) for name in SUMMED}
            if blocks.dense is not None:
                dense = held_whole(blocks.dense, **sizes)
                for name in SUMMED:
                    of_all[name] += blocks.dense_layers * getattr(dense, name)
            spent = of_all["compute"] + of_all["optimizer"] + of_all["communication"]
            yield {
                "experts": num_experts,
                **asdict(sparse),
                **of_all,
                "over_dense": spent / of_all["dense_seconds"],
            }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the tables as text."""
    layer, machine = found["layer"], found["machine"]
    shared, besides = "", []
    if layer["shared_hidden"]:
        shared = f", beside shared experts of {layer['shared_hidden']}"
    if found["dense_layers"]:
        sizes = f"{layer['d_model']} -> {found['dense_hidden']} -> {layer['d_model']}"
        besides.append(f"{found['dense_layers']} x dense layer besides, {sizes}")
    out = [
        f"{found['layers']} x layer of {layer['num_experts']} experts, top-{layer['top_k']}, "
        f"{layer['d_model']} -> {layer['d_hidden']} -> {layer['d_model']}"
        f"{', gated' if layer['gated'] else ''}{shared}; {found['tokens']:,} tokens a step",
        *besides,
        f"weights of a layer {_count(found['parameters'])}, of the dense block of equal active "
        f"FLOPs {_count(found['dense_parameters'])}",
        f"weights, gradients and AdamW's state {_size(found['training_bytes'])} a layer; AdamW "
        f"moves {_size(found['optimizer_bytes'])} a step",
        "",
        f"{'forward and backward, one layer':<32}{'FLOPs':>10}{'moved':>12}{'time':>12}",
    ]
    for name, work in found["work"].items():
        out.append(
            f"{name:<32}{_count(work['flops']):>10}{_size(work['bytes']):>12}"
            f"{_time(work['seconds']):>12}"
        )
    out += [
        f"over the dense block: {found['over_dense']['training']:.2f} in training, "
        f"{found['over_dense']['forward']:.2f} in a forward pass, at "
        f"{machine['flops_per_second'] / 1e9:,.0f} GFLOP/s, "
        f"{machine['bytes_per_second'] / 1e9:.1f} GB/s, {_time(machine['seconds_per_launch'])} a "
        f"launch and {_time(machine['seconds_per_product'])} a small product",
        "",
        *device_lines(found),
    ]
    return out


def device_lines(found: dict[str, Any]) -> list[str]:
    """Return the table of many devices as text."""
    out = [
        f"all layers, {found['tokens']:,} tokens a device, {found['cluster']}",
        f"{'experts':>8}{'devices':>9}{'weights':>10}{'memory':>12}{'sent':>12}{'compute':>11}"
        f"{'optimizer':>11}{'sending':>11}{'over dense':>12}",
    ]
    for row in found["spread"]:
        full = " !" if row["memory"] > found["device_memory"] else ""
        out.append(
            f"{row['experts']:>8,}{row['devices']:>9,}{_count(row['parameters']):>10}"
            f"{_size(row['memory']):>12}{_size(row['sent'] + row['reduced']):>12}"
            f"{_time(row['compute']):>11}{_time(row['optimizer']):>11}"
            f"{_time(row['communication']):>11}{row['over_dense']:>12.2f}{full}"
        )
    out += [
        f"{experts:,} experts do not spread evenly over {devices:,} devices; --devices takes "
        "divisors of them, or multiples"
        for experts, devices in found["uneven"]
    ]
    out.append("memory, sent and times are of one device in one step; ! is more than it has")
    return out


def _count(value: float) -> str:
    return _with_unit(value, ("", "k", "M", "G", "T", "P"))


def _size(value: float) -> str:
    return _with_unit(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def _time(seconds: float) -> str:
    return _with_unit(seconds * 1e9, ("ns", "us", "ms", "s"))


def _with_unit(value: float, units: Sequence[str]) -> str:
    """Return three digits and the unit, each a thousand times the one before."""
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
    return f"{digits} {units[power]}".strip()
