"""Where records go: a JSONL file and the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class JsonlSink:
    """Appends one record a line and flushes it, so that a killed run keeps all but the last line.

    A torn last line, left by an earlier kill, is cut off before the first record is written.

    Args:
        path: The file; folders are made as needed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut_torn_line()
        self._file = self.path.open("a", encoding="utf-8")

    def _cut_torn_line(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        kept = content.rfind(b"\n") + 1
        if kept < len(content):
            os.truncate(self.path, kept)

    def write(self, record: Record) -> None:
        """Append a record."""
        self._file.write(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")
        self._file.flush()

    def rewind(self, num_records: int) -> None:
        """Drop all but the first records: a run that resumes writes the later ones again."""
        self._file.flush()
        kept = 0
        with self.path.open("rb") as lines:
            for _, line in zip(range(num_records), lines, strict=False):
                kept += len(line)
        os.truncate(self.path, kept)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
