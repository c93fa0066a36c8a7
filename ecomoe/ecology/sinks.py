"""Where records go: a JSONL file and the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class JsonlSink:
    """Appends one record a line; a killed run keeps all lines but the one that it was writing.

    A torn last line, left by an earlier kill, is cut off first. The file is open only while a
    record is written, so a run that ends in an exception leaves nothing open.

    Args:
        path: The file; folders are made as needed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        content = self.path.read_bytes()
        kept = content.rfind(b"\n") + 1
        if kept < len(content):
            os.truncate(self.path, kept)

    def write(self, record: Record) -> None:
        """Append a record."""
        line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())

    def rewind(self, num_records: int) -> None:
        """Drop all but the first records: a run that resumes writes the later ones again."""
        kept = 0
        with self.path.open("rb") as lines:
            for _, line in zip(range(num_records), lines, strict=False):
                kept += len(line)
        os.truncate(self.path, kept)


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Yield the records of a JSONL file; a torn last line is left out.

    Raises:
        ValueError: A line before the last is not JSON.
    """
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return  # still being written, or torn by a kill
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"line {number} of {os.fspath(path)} is not JSON; it must be written by "
                    "ecomoe.Monitor(log=...): remove the line, or give another file"
                ) from error
            yield record
