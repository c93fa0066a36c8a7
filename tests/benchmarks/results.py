"""The JSON file that benchmark results are kept in, with the machine they come from."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


class Results:
    """A results file, read at the start and written whole after each addition.

    Args:
        path: The file; made with the first result.
        device: "cpu" or "cuda".
    """

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        self.path = path
        self.content: dict[str, Any] = {}
        if path.exists():
            self.content = json.loads(path.read_text())
        self.device = device

    @property
    def layers(self) -> dict[str, Any]:
        """The records of `tests.benchmarks.layer` by shape."""
        return self.content.setdefault("layers", {})  # type: ignore[no-any-return]

    def add_layer(self, name: str, record: dict[str, Any]) -> None:
        """Keep a shape's record."""
        self.layers[name] = record
        self.write()

    def add(self, part: str, name: str, record: Any) -> None:
        """Keep a record of another part."""
        self.content.setdefault(part, {})[name] = record
        self.write()

    def write(self) -> None:
        """Write the file, with the machine of the last result."""
        self.content["machine"] = machine(self.device)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".part")
        aside.write_text(json.dumps(self.content, indent=1) + "\n")
        aside.replace(self.path)


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
