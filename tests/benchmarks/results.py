"""The JSON file that benchmark results are kept in, with the machine they come from.

All results of a file come from one machine and one set of versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Container, Iterable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
TIME_IS_OVER = "time is over: run the same command again to go on"
DAY = "date"  # of what `machine` returns, what results of one file may differ in


class Results:
    """A results file, read at the start and written whole after each addition.

    Args:
        path: The file; made with the first result.
        device: "cpu" or "cuda".

    Raises:
        ValueError: The file's results come from another machine, or from other versions.
    """

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        self.path = path
        self.content: dict[str, Any] = {}
        if path.exists():
            self.content = json.loads(path.read_text())
        self.machine = machine(device)
        was = self.content.get("machine", {})
        # A package that is absent measured nothing, and is no other version.
        here = {name: value for name, value in self.machine.items() if value is not None}
        changed = [
            f"{name} {was[name]}, here {value}"
            for name, value in here.items()
            if name != DAY and was.get(name) not in (None, value)
        ]
        if was and ("gpu" in was) != ("gpu" in here):
            changed.append("gpu" if "gpu" in was else "no gpu")
        if changed:
            raise ValueError(
                f"{path} holds results from elsewhere ({'; '.join(changed)}), and what is measured "
                "here does not compare with them; keep it apart with --out runs/bench.json"
            )
        self.machine = {**was, **here}

    def add(self, part: str, name: str, record: Any) -> None:
        """Keep a record of a part: "layers", "models" and the like."""
        self.content.setdefault(part, {})[name] = record
        self.write()

    def write(self) -> None:
        """Write the file, with the machine of all its results."""
        self.content["machine"] = self.machine
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".part")
        aside.write_text(json.dumps(self.content, indent=1) + "\n")
        aside.replace(self.path)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what says where to measure, for how long, and where the results are kept."""
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    parser.add_argument(
        "--stop-after",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="begin nothing after so long; the same command goes on from there (endless)",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where (cpu)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="one a core by default")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON of the results, of one machine (tests/benchmarks/results/DEVICE.json)",
    )


def open_results(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Results:
    """Return the results that the options name; end with their remedy where they do not fit."""
    try:
        return Results(given.out or RESULTS / f"{given.device}.json", device=given.device)
    except ValueError as error:
        parser.error(str(error))


def to_measure(asked: Iterable[str], known: Container[str], results: Results) -> list[str]:
    """Return the names that are not known yet; say so where none is left."""
    names = list(asked)
    left = [name for name in names if name not in known]
    if not left:
        print(
            f"nothing to measure: all {len(names)} are in {results.path}; --again measures them "
            "anew"
        )
    return left


def machine(device: str) -> dict[str, Any]:
    """Return what the numbers depend on: processor, threads, versions, day."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    for package in ("transformers", "st-moe-pytorch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if (info.exists())
        else []
    )
    name = names[0].split(":", 1)[1].strip() if names else platform.processor()
    flags = info.read_text() if info.exists() else ""
    extra = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(extra)})" if extra else name
