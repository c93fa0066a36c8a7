"""Command line of the experiments."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.experiments.data import Library
from examples.experiments.records import SCALES, SMOKE, SMOKE_SAID
from examples.experiments.registry import EXPERIMENTS
from examples.experiments.runner import interruptible, run_experiment

OUT = Path("runs/experiments")
COMMITTED = Path(__file__).parent / "results"


def list_experiments(console: Console) -> None:
    """Print every entry."""
    for of_paper, title in ((True, "The paper's experiments"), (False, "Questions to the paper")):
        table = Table(title=title, caption="runs: conditions x the paper's seeds")
        for heading in ("name", "what, and the paper's claim", "section", "runs"):
            table.add_column(heading, no_wrap=heading == "name")
        for entry in EXPERIMENTS.values():
            if entry.paper == of_paper:
                table.add_row(
                    entry.name,
                    f"{entry.title}: [i]{entry.claim}[/i]",
                    entry.section,
                    f"{len(entry.settings)} x {entry.seeds}",
                )
        console.print(table)


@interruptible()
def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show every experiment")
    run = commands.add_parser("run", help="run an experiment, or go on with it")
    run.add_argument("name", choices=[*EXPERIMENTS, "all"], metavar="NAME")
    run.add_argument("--scale", choices=SCALES, default="small", help="how large; %(default)s")
    run.add_argument("--seeds", type=int, help="runs of each condition; the paper's by default")
    run.add_argument("--conditions", type=int, help="only the first so many conditions")
    run.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SOURCE",
        help="parquet images, a text file, or a hub data set; may be given twice. At paper scale "
        "the named sets come from the hub",
    )
    run.add_argument("--out", type=Path, default=OUT, help="folder of checkpoints and logs")
    run.add_argument("--results", type=Path, help="folder of the JSON results; OUT/results")
    report = commands.add_parser("report", help="tables, and one HTML file of plots")
    report.add_argument(
        "--results", type=Path, help="folder of JSON results; your own, else those that came along"
    )
    report.add_argument("--html", type=Path, default=OUT / "report.html")
    report.add_argument(
        "--light", action="store_true", help="plots load plotly.js from the network"
    )
    evidence = commands.add_parser("evidence", help="write docs/evidence.md from results")
    evidence.add_argument(
        "--results",
        type=Path,
        default=COMMITTED,
        help="folder of JSON results; those that came along",
    )
    evidence.add_argument(
        "--to", type=Path, default=Path("docs/evidence.md"), help="the page; %(default)s"
    )
    options = parser.parse_args(arguments)
    console = Console()

    if options.command == "list":
        list_experiments(console)
    elif options.command == "run":
        for name in ("seeds", "conditions"):
            value = getattr(options, name)
            if value is not None and value < 1:
                parser.error(f"--{name} {value} must be at least 1")
        scale = SCALES[options.scale]
        library = Library(options.data, scale)
        names = list(EXPERIMENTS) if options.name == "all" else [options.name]
        for name in names:
            try:
                path = run_experiment(
                    EXPERIMENTS[name],
                    scale,
                    library,
                    seeds=options.seeds or EXPERIMENTS[name].seeds,
                    out=options.out,
                    results=options.results or options.out / "results",
                    conditions=options.conditions,
                    console=console,
                )
            except ValueError as error:
                parser.error(str(error))
            console.print(f"{name}: {path}")
        if options.scale == SMOKE:
            console.print(SMOKE_SAID)
    elif options.command == "report":
        from examples.experiments.report import read_results, report_tables, write_html

        own = OUT / "results"
        folder = options.results or (own if any(own.glob("*.json")) else COMMITTED)
        try:
            results = read_results(folder)
        except ValueError as error:
            parser.error(str(error))
        if not results:
            parser.error(f"{folder} holds no results; run an experiment first")
        for table in report_tables(results):
            console.print(table)
        console.print(f"plots: {write_html(results, options.html, light=options.light)}")
    else:
        from examples.experiments.evidence import write_evidence

        if not options.results.is_dir():
            parser.error(f"{options.results} is no folder; name one with JSON results")
        try:
            console.print(f"written: {write_evidence(options.results, options.to)}")
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
