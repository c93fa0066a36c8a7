"""Time the layer beside its peers: ``python -m tests.benchmarks.layer``.

Every shape is measured in one process, all contenders in turn on the same fresh batch, medians and
quartiles of paired ratios. Results are kept shape by shape in a JSON file; a run that was cut off
goes on where it stopped. `tests.benchmarks.page` makes the page of them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ecomoe.calibration import measure_machine
from tests.benchmarks.contenders import DTYPES, Beforehand, Forced, builders
from tests.benchmarks.fit import constants_of
from tests.benchmarks.results import TIME_IS_OVER, add_options, open_results, to_measure
from tests.benchmarks.shapes import Shape, grid, quick
from tests.benchmarks.timing import Contender, paired, quartiles, race

KINDS = ("forward", "both")
LEGEND = (
    "times the dense FFN's time, forward + backward: median [quartiles] of paired calls; `routed` "
    "is ecomoe with its routing decided beforehand and without losses, `products` the experts' "
    "matrix products alone, evenly loaded, `recomputed` ecomoe under activation checkpointing"
)


def prepare(
    shape: Shape,
    *,
    device: torch.device,
    compiled: bool,
    only: list[str] | None,
    recompute: bool = False,
) -> tuple[list[Contender], dict[str, str], Callable[[], tuple[Tensor, Tensor]]]:
    """Return the contenders, dense and ours first, why others are left out, and what draws."""
    torch.manual_seed(0)
    forced, generator = Forced(), torch.Generator().manual_seed(0)
    dtype = DTYPES[shape.dtype]
    contenders, left_out = [], {}
    built = builders(shape, forced, compiled=compiled, recompute=recompute)
    for name, build in built.items():
        if only is not None and name not in ("dense", "ecomoe", "products", *only):
            continue
        try:
            module = build if isinstance(build, str) else build().to(device, dtype)
        except ImportError as error:
            module = f"not installed ({error})"
        if isinstance(module, str):
            left_out[name] = module
        else:
            contenders.append(Contender(name, module))

    def draw() -> tuple[Tensor, Tensor]:
        forced.draw(shape, generator, device)
        x_ND, grad_ND = torch.randn(2, shape.tokens, shape.d_model, generator=generator)
        return x_ND.to(device, dtype), grad_ND.to(device, dtype)

    return contenders, left_out, draw


def memory(
    contenders: list[Contender], draw: Callable[[], tuple[Tensor, Tensor]]
) -> dict[str, dict[str, int | None]]:
    """Return what each contender keeps for backward, and its peak in a first call."""
    x_ND, grad_ND = draw()
    small = nn.Linear(16, 16).to(x_ND.device, x_ND.dtype)  # the libraries allocate for themselves
    Contender("small", small).call("both", x_ND.new_ones(16, 16), x_ND.new_ones(16, 16))
    return {
        each.name: {
            "peak_bytes": each.peak_bytes(x_ND, grad_ND),
            "saved_bytes": each.saved_bytes(x_ND),
        }
        for each in contenders
    }


def measure(
    shape: Shape,
    *,
    device: torch.device,
    seconds: float,
    fewest: int,
    most: int,
    compiled: bool,
    only: list[str] | None,
    recompute: bool = False,
) -> dict[str, Any]:
    """Measure one shape; return its record."""
    if compiled:
        # The compiler counts the graphs of all shapes, and past its limit compiles no more.
        torch.compiler.reset()
    contenders, left_out, draw = prepare(
        shape, device=device, compiled=compiled, only=only, recompute=recompute
    )
    dense, ours = contenders[:2]
    held = memory(contenders, draw)
    # The same layer with its routing decided beforehand, to tell the router's and losses' share.
    # A copy: the layer itself would leave it its weights in the cache.
    routed = copy.deepcopy(ours.module)
    contenders.insert(2, Contender("routed", routed, around=decided_beforehand(routed)))
    race(contenders, KINDS, draw, seconds=seconds, fewest=fewest, most=most)
    record: dict[str, Any] = {
        "shape": vars(shape),
        "left_out": left_out,
        "schedule_seconds": schedule_seconds(ours.module),
        "contenders": {},
    }
    for each in contenders:
        found: dict[str, Any] = {}
        for kind in KINDS:
            found[kind] = {
                "rounds": len(each.seconds[kind]),
                "seconds": quartiles(list(each.seconds[kind].values())),
                "over_dense": paired(each, dense, kind),
                "over_ecomoe": paired(each, ours, kind),
            }
        record["contenders"][each.name] = {**found, **held.get(each.name, {})}
    return record


def schedule_seconds(layer: nn.Module) -> float:
    """Return the median time to set a layer to a share of training done, once a step."""
    spent = []
    for index in range(101):
        began = time.perf_counter()
        layer.set_progress(index / 100)  # type: ignore[operator]
        spent.append(time.perf_counter() - began)
    layer.set_progress(0.0)  # type: ignore[operator]
    return quartiles(spent)[1]


def decided_beforehand(layer: nn.Module) -> Any:
    """Return a context that puts a decided routing in the router's place, without losses."""
    beforehand = Beforehand(layer.router)

    @contextmanager
    def around(x_ND: Tensor) -> Iterator[None]:
        router, strength = layer.router, layer.strength
        beforehand.decide(x_ND, layer.temperature)
        layer.router, layer.strength = beforehand, 0.0
        try:
            yield
        finally:
            layer.router, layer.strength = router, strength

    return around


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for and not measured yet."""
    parser = options("python -m tests.benchmarks.layer")
    run(parser, parser.parse_args(arguments))


def options(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command that measures shapes."""
    parser = argparse.ArgumentParser(prog=command, description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--quick", action="store_true", help="the shapes the aims are stated for (the default)"
    )
    which.add_argument("--full", action="store_true", help="the whole grid: hours")
    parser.add_argument(
        "--shape", action="append", help="part of shapes' names, see --list; may be repeated"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the names, with --full of all shapes, and end"
    )
    add_options(parser)
    parser.add_argument("--compiled", action="store_true", help="compiled forms too (slow)")
    parser.add_argument("--only", nargs="+", help="peers to measure, e.g. grouped_mm (all)")
    parser.add_argument(
        "--recompute",
        action="store_true",
        help="measure the layer under activation checkpointing beside itself and dense; kept apart "
        "from what else is measured",
    )
    parser.add_argument("--per-shape", type=float, default=10.0, help="seconds a shape (10)")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of a shape at least (8)")
    parser.add_argument("--most", type=int, default=100, help="rounds of a shape at most (100)")
    return parser


def run(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Measure the shapes that the options ask for."""
    shapes = {each.name: each for each in (grid() if given.full or given.shape else quick())}
    for part in given.shape or ():
        if not any(part in name for name in shapes):
            parser.error(
                f"--shape {part} must be part of the name of one of the {len(shapes)} shapes of "
                "the grid; --full --list prints them"
            )
    if given.shape:
        shapes = {
            name: each for name, each in shapes.items() if any(part in name for part in given.shape)
        }
    if given.list:
        print("\n".join(shapes))
        return
    torch.set_num_threads(given.threads)
    results = open_results(parser, given)
    part = "recomputed" if given.recompute else "layers"
    known = () if given.again else results.content.get(part, {})
    names = to_measure(shapes, known, results)
    if not names:
        return
    for dtype in DTYPES:
        again = given.again and not given.recompute
        if dtype not in results.content.get("constants", {}) or again:
            results.add("constants", dtype, constants(dtype, given.device))
    print(LEGEND, flush=True)
    began = time.perf_counter()
    for name in names:
        if time.perf_counter() - began > given.stop_after:
            print(TIME_IS_OVER)
            return
        shape = shapes[name]
        # Its own: the machine's speed drifts from shape to shape.
        measured = constants(shape.dtype, given.device)
        record = measure(
            shape,
            device=torch.device(given.device),
            seconds=given.per_shape,
            fewest=given.rounds,
            most=given.most,
            compiled=given.compiled,
            only=["recomputed"] if given.recompute else given.only,
            recompute=given.recompute,
        )
        results.add(part, name, {**record, "constants": measured})
        print(line(shape, record), flush=True)
        gc.collect()
    print(f"wrote {len(names)} shapes to {results.path}")


def constants(dtype: str, device: str) -> dict[str, float]:
    """Return the machine's constants as the results keep them."""
    return constants_of(measure_machine(dtype=DTYPES[dtype], device=device))


def line(shape: Shape, record: dict[str, Any]) -> str:
    """Say a shape's results in one line: times over dense, forward and backward."""
    dense = 1e3 * record["contenders"]["dense"]["both"]["seconds"][1]
    parts = []
    for name, found in record["contenders"].items():
        low, median, high = found["both"]["over_dense"]
        parts.append(f"{name} {median:.2f} [{low:.2f}, {high:.2f}]")
    return f"{shape.name}: dense {dense:,.3g} ms; times that: " + ", ".join(parts[1:])


if __name__ == "__main__":
    main()
