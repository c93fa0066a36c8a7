"""Results as JSON files that a kill cannot leave half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Return the content of a results file.

    Raises:
        ValueError: It is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is no whole JSON file ({error}); remove it, and what it held is run anew"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write a results file in one piece, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, separators=(",", ":")) + "\n")
    unfinished.replace(path)
