"""The command line: ``ecomoe report``, ``watch`` and ``compare`` on JSONL records; ``ecomoe cost``.

A file may hold several runs. ``FILE`` stands for the last one, ``FILE#1`` for the first.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ecomoe import costing
from ecomoe.ecology.compare import compare
from ecomoe.ecology.report import Report, record_lines
from ecomoe.ecology.seeds import compare_conditions, values_of
from ecomoe.ecology.sinks import Follower, Record, read_runs

POLL_SECONDS = 1.0


def main(argv: Sequence[str] | None = None, *, sleep: Callable[[float], None] = time.sleep) -> int:
    """Run a command; return its exit status.

    Args:
        argv: The arguments, by default those of the process.
        sleep: Waits between two looks at a growing file.
    """
    parser = argparse.ArgumentParser(
        prog="ecomoe", description="Read the ecology of experts, and what they cost."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="show the report of a run")
    which = "the file that Monitor(log=...) wrote; of several runs in it, FILE#1 is the first"
    report.add_argument("run", metavar="FILE[#N]", help=which)
    report.add_argument(
        "--phase",
        choices=["train", "eval", "generate"],
        help="which traffic; by default eval where there was any, else train",
    )
    report.add_argument("--html", type=Path, help="write one HTML file with plots as well (none)")
    report.add_argument("--json", action="store_true", help="print the report as JSON")
    watch = commands.add_parser("watch", help="follow a run while it trains")
    watch.add_argument("run", metavar="FILE", help="the file that Monitor(log=...) writes")
    watch.add_argument("--once", action="store_true", help="print what is there, and end")
    against = commands.add_parser("compare", help="set runs side by side")
    against.add_argument("runs", metavar="FILE[#N]", nargs="+", help="two runs or more")
    against.add_argument(
        "--seeds",
        action="store_true",
        help="runs are CONDITION=FILE[#N]; those of one condition are its seeds, and conditions "
        "are compared",
    )
    against.add_argument(
        "--metric", choices=["accuracy", "loss"], default="accuracy", help="with --seeds (accuracy)"
    )
    against.add_argument(
        "--margin",
        type=float,
        default=0.01,
        help="the difference that matters, in the metric's unit: a share for accuracy, nats for "
        "loss (0.01)",
    )
    against.add_argument("--alpha", type=float, default=0.05, help="error rate of the test (0.05)")
    against.add_argument("--json", action="store_true", help="print the comparison as JSON")
    costing.add_arguments(
        commands.add_parser("cost", help="say what a layer costs here and on many devices")
    )
    given = parser.parse_args(argv)
    commanded = {"report": _report, "watch": _watch, "compare": _compare, "cost": _cost}
    command = commanded[given.command]
    try:
        command(given, sleep)
    except FileNotFoundError as error:
        print(
            f"ecomoe: {error.filename!r} does not exist; give a file that Monitor(log=...) wrote",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"ecomoe: {error.filename!r}: {error.strerror}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"ecomoe: {error}", file=sys.stderr)
        return 1
    except KeyError as error:
        print(
            f"ecomoe: a record lacks {error}; it was written by another version: read it with that",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _cost(given: argparse.Namespace, sleep: Callable[[float], None]) -> None:
    costing.run(given)


def _report(given: argparse.Namespace, sleep: Callable[[float], None]) -> None:
    report = Report.from_records(_records(given.run), phase=given.phase)
    if given.html is not None:
        report.to_html(given.html)
        print(f"wrote {given.html}", file=sys.stderr)
    if given.json:
        print(json.dumps(report.to_dict()))
    else:
        _print(report)


def _records(name: str) -> list[Record]:
    """Return the records of the run that ``FILE`` or ``FILE#N`` names.

    Raises:
        ValueError: The file has no such run.
    """
    numbered = None if Path(name).exists() else re.fullmatch(r"(.+)#(\d+)", name)
    file = name if numbered is None else numbered[1]
    runs = read_runs(file)
    if not runs:
        raise ValueError(
            f"{file!r} has no record; the first is written when the monitor reports, see every="
        )
    number = len(runs) if numbered is None else int(numbered[2])
    if not 1 <= number <= len(runs):
        raise ValueError(f"{name!r} must name one of the {len(runs)} runs, #1 to #{len(runs)}")
    if numbered is None and len(runs) > 1:
        print(
            f"{file} holds {len(runs)} runs; this is the last. {file}#1 is the first.",
            file=sys.stderr,
        )
    return runs[number - 1].records


def _watch(given: argparse.Namespace, sleep: Callable[[float], None]) -> None:
    follower = Follower(given.run)
    while True:
        for entry in follower.read():
            if "run" in entry:
                begun = f", begun {entry['started']}" if "started" in entry else " goes on"
                print(f"run {entry['run']}{begun}", flush=True)
                continue
            print("\n".join(record_lines(entry)), flush=True)
        if given.once:
            return
        sleep(POLL_SECONDS)


def _compare(given: argparse.Namespace, sleep: Callable[[float], None]) -> None:
    if len(set(given.runs)) < len(given.runs):
        raise ValueError("a run is named twice; name each once")
    if given.seeds:
        _compare_conditions(given)
        return
    runs = {name: _records(name) for name in given.runs}
    found = compare(runs, margin=given.margin, alpha=given.alpha)
    if given.json:
        print(json.dumps(found))
    else:
        _print(_comparison(found))


def _compare_conditions(given: argparse.Namespace) -> None:
    runs: dict[str, list[Any]] = {}
    for run in given.runs:
        condition, equals, name = run.partition("=")
        if not equals:
            raise ValueError(f"{run!r} must be CONDITION=FILE with --seeds; name its condition")
        runs.setdefault(condition, []).append(_records(name))
    values = values_of(runs, given.metric)
    found = compare_conditions(values, margin=given.margin, alpha=given.alpha)
    if given.json:
        print(json.dumps(found))
        return
    for condition, mean in found["means"].items():
        print(f"{condition}: {given.metric} {mean:.4g}, mean of {found['seeds'][condition]} seeds")
    for pair in found["pairs"]:
        low, high = pair["interval"]
        word = "equivalent" if pair["equivalent"] else "undecided"
        word = "different" if pair["different"] else word
        print(
            f"{' and '.join(pair['conditions'])}: {word} ({pair['difference']:+.4g} "
            f"[{low:+.4g}, {high:+.4g}], p {pair['p']:.2g}, power {pair['power']:.0%})"
        )
    print(f"Equivalent means within {found['margin']:g} (TOST, alpha {found['alpha']:g}).")


def _comparison(found: dict[str, Any]) -> Any:
    try:
        from rich.console import Group
        from rich.table import Table
    except ImportError:
        return json.dumps(found, indent=2)
    runs = Table(box=None, padding=(0, 1), pad_edge=False)
    for head in ("run", "step", "accuracy", "DEAD", "peak", "revivals", "tiers, mean of layers"):
        runs.add_column(head, justify="left" if head == "run" else "right")
    short = _told_apart(list(found["runs"]))
    for name, run in found["runs"].items():
        usages = list(run["tiers"].values())
        same = len({len(usage) for usage in usages}) == 1
        mean = [sum(column) / len(usages) for column in zip(*usages, strict=True)] if same else []
        accuracy = run["accuracy"]
        runs.add_row(
            short[name],
            str(run["step"]),
            "-" if accuracy is None else f"{accuracy:.2%}",
            f"{run['dead']['top1']}/{run['dead']['topk']}",
            str(run["dead_peak"]),
            str(run["revivals"]),
            " / ".join(f"{share:.0%}" for share in mean),
        )
    lines = []
    for pair in found["pairs"]:
        tested, apart = pair["accuracy"], pair["distance"]
        numbers = []
        if tested is not None:
            low, high = tested["interval"]
            numbers.append(f"accuracy {tested['difference']:+.2%} [{low:+.2%}, {high:+.2%}]")
        if apart is not None:
            numbers.append(f"tiers {apart:.0%} apart")
        tail = f" ({', '.join(numbers)})" if numbers else ""
        lines.append(
            f"{' and '.join(short[name] for name in pair['runs'])}: {pair['verdict']}{tail}"
        )
        lines += [f"  unlike {difference}" for difference in pair["unlike"]]
    note = f"Equal means within {found['margin']:.2%} (TOST, alpha {found['alpha']:g})."
    return Group(runs, *lines, note)


def _told_apart(names: list[str]) -> dict[str, str]:
    """Return the part of each path that differs: a table has no room for what all have in common.

    >>> _told_apart(["out/one/run.jsonl", "out/two/run.jsonl"])
    {'out/one/run.jsonl': 'one', 'out/two/run.jsonl': 'two'}
    """
    parts = [Path(name).parts for name in names]
    fewest = min(map(len, parts)) - 1
    first = next((at for at in range(fewest) if len({each[at] for each in parts}) > 1), fewest)
    last = next(
        (at for at in range(fewest - first) if len({each[-1 - at] for each in parts}) > 1),
        fewest - first,
    )
    return {
        name: str(Path(*each[first : len(each) - last]))
        for name, each in zip(names, parts, strict=True)
    }


def _print(what: Any) -> None:
    try:
        from rich.console import Console
    except ImportError:
        print(what)
    else:
        console = Console()
        # In a pipe rich takes 80 columns; markup off, for paths and names hold brackets.
        console.print(what, markup=False, highlight=False)
