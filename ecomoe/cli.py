"""The command line: ``ecomoe report``, ``ecomoe watch`` and ``ecomoe compare`` on JSONL records."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ecomoe.ecology.compare import compare
from ecomoe.ecology.report import Report, summary_line
from ecomoe.ecology.sinks import read_records

POLL_SECONDS = 1.0


def main(argv: Sequence[str] | None = None, *, sleep: Callable[[float], None] = time.sleep) -> int:
    """Run a command; return its exit status.

    Args:
        argv: The arguments, by default those of the process.
        sleep: Waits between two looks at a growing file.
    """
    parser = argparse.ArgumentParser(prog="ecomoe", description="Read the ecology of experts.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="show the report of a run")
    report.add_argument("run", type=Path, help="the file that Monitor(log=...) wrote")
    report.add_argument("--phase", choices=["train", "eval", "generate"], help="which traffic")
    report.add_argument("--html", type=Path, help="write one HTML file with plots as well")
    report.add_argument("--json", action="store_true", help="print the report as JSON")
    watch = commands.add_parser("watch", help="follow a run while it trains")
    watch.add_argument("run", type=Path, help="the file that Monitor(log=...) writes")
    watch.add_argument("--once", action="store_true", help="print what is there, and end")
    against = commands.add_parser("compare", help="set runs side by side")
    against.add_argument("runs", type=Path, nargs="+", help="two files or more")
    against.add_argument("--margin", type=float, default=0.01, help="accuracy that matters")
    against.add_argument("--alpha", type=float, default=0.05, help="error rate of the test")
    against.add_argument("--json", action="store_true", help="print the comparison as JSON")
    given = parser.parse_args(argv)
    command = {"report": _report, "watch": _watch, "compare": _compare}[given.command]
    try:
        command(given, sleep)
    except (OSError, ValueError) as error:
        print(f"ecomoe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _report(given: argparse.Namespace, sleep: Callable[[float], None]) -> None:
    report = Report.from_records(list(read_records(given.run)), phase=given.phase)
    if given.html is not None:
        report.to_html(given.html)
        print(f"wrote {given.html}", file=sys.stderr)
    if given.json:
        print(json.dumps(report.to_dict()))
    else:
        _print(report)


def _watch(given: argparse.Namespace, sleep: Callable[[float], None]) -> None:
    shown = 0
    while True:
        records = list(read_records(given.run))
        if len(records) < shown:
            shown = 0  # the run was resumed at an earlier step
        for record in records[shown:]:
            print(summary_line(record), flush=True)
            for event in record["events"]:
                expert = "" if event["expert"] is None else f" expert {event['expert']}"
                print(f"  {event['kind']} {event['layer'] or ''}{expert}", flush=True)
        shown = len(records)
        if given.once:
            return
        sleep(POLL_SECONDS)


def _compare(given: argparse.Namespace, sleep: Callable[[float], None]) -> None:
    runs = {str(path): list(read_records(path)) for path in given.runs}
    if len(runs) < len(given.runs):
        raise ValueError("a run is named twice; name each once")
    found = compare(runs, margin=given.margin, alpha=given.alpha)
    if given.json:
        print(json.dumps(found))
    else:
        _print(_comparison(found))


def _comparison(found: dict[str, Any]) -> Any:
    try:
        from rich.console import Group
        from rich.table import Table
    except ImportError:
        return json.dumps(found, indent=2)
    runs = Table(box=None, padding=(0, 1), pad_edge=False)
    for head in ("run", "step", "accuracy", "DEAD", "peak", "revivals", "tiers, mean of layers"):
        runs.add_column(head, justify="left" if head == "run" else "right")
    for name, run in found["runs"].items():
        usages = list(run["tiers"].values())
        same = len({len(usage) for usage in usages}) == 1
        mean = [sum(column) / len(usages) for column in zip(*usages, strict=True)] if same else []
        accuracy = run["accuracy"]
        runs.add_row(
            name,
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
        lines.append(f"{' and '.join(pair['runs'])}: {pair['verdict']} ({', '.join(numbers)})")
    note = f"Equal means within {found['margin']:.2%} (TOST, alpha {found['alpha']:g})."
    return Group(runs, *lines, note)


def _print(what: Any) -> None:
    try:
        from rich.console import Console
    except ImportError:
        print(what)
    else:
        console = Console()
        # In a pipe rich takes 80 columns; markup off, for paths and names hold brackets.
        console.print(what, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
