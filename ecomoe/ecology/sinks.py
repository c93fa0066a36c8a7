"""Where records go: a JSONL file and the terminal."""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

Record = dict[str, Any]

BLOCK_BYTES = 1 << 16


class JsonlSink:
    """Appends one record a line; a killed run keeps all lines but the one that it was writing.

    A torn last line, left by an earlier kill, is cut off first. The file is open only while a
    record is written, so a run that ends in an exception leaves nothing open.

    Args:
        path: The file; folders are made as needed. Records of earlier runs in it stay.

    Attributes:
        start: The byte at which this run's records begin.

    Raises:
        ValueError: The file cannot be written, or something else than a monitor has written it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_log(path)
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                self.start = self._end = _end_of_records(file)
                file.truncate(self.start)
                self._check = zlib.crc32(_line_before(file, self.start))
        except OSError as error:
            raise _unwritable(path, error) from error

    def write(self, record: Record) -> None:
        """Append a record."""
        line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            self._end, self._check = file.tell(), zlib.crc32(line.encode())

    def state_dict(self) -> Record:
        """Return where this run's records begin and, up to now, end."""
        return {"start": self.start, "end": self._end, "check": self._check}

    def rewind(self, state: Mapping[str, int]) -> bool:
        """Drop what was written after `state_dict`: a run that resumes writes it again.

        Returns:
            Whether the file has at that place what it had then. If not, it is another file, and
            nothing is dropped.
        """
        start, end, check = state["start"], state["end"], state["check"]
        with self.path.open("rb+") as file:
            if not 0 < end <= file.seek(0, os.SEEK_END):
                return False
            if zlib.crc32(_line_before(file, end)) != check:
                return False
            file.truncate(end)
        self.start, self._end, self._check = start, end, check
        return True

    def records(self) -> Iterator[Record]:
        """Yield the records of this run."""
        yield from read_records(self.path, start=self.start)


def check_log(path: object) -> None:
    """Check, without touching anything, that records can be appended to a file.

    Raises:
        ValueError: It is no path, no regular file, or not of a monitor's records.
    """
    try:
        name = os.fspath(path)  # type: ignore[call-overload]
    except TypeError:
        name = None
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(
            f"log={path!r} must be the path of a file; pass a str or a pathlib.Path, such as "
            "'run.jsonl'"
        )
    try:
        existing = next(p for p in (Path(name), *Path(name).absolute().parents) if p.exists())
        if existing != Path(name):
            if not existing.is_dir():
                raise ValueError(
                    f"log={name!r} must lie in a folder, but {os.fspath(existing)!r} is a file; "
                    "pass another path"
                )
            return
        if not stat.S_ISREG(existing.stat().st_mode):
            raise ValueError(f"log={name!r} must be a regular file; pass another path")
        with existing.open("rb") as file:
            _end_of_records(file)
    except OSError as error:
        raise _unwritable(name, error) from error


def _unwritable(path: object, error: OSError) -> ValueError:
    return ValueError(
        f"log={path!r} must be a file that can be written ({error.strerror}); pass another path"
    )


def _end_of_records(file: BinaryIO) -> int:
    """Return where the last whole line ends, having looked at the first and the last line alone.

    Raises:
        ValueError: They do not begin as a record does.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.readline(BLOCK_BYTES)
    tail = _line_before(file, size)
    if not _begins_record(head) or not _begins_record(tail):
        raise ValueError(
            f"log={file.name!r} must hold records of ecomoe.Monitor alone, but has a line "
            f"{tail[:40] if _begins_record(head) else head[:40]!r}; pass another path"
        )
    return size if tail.endswith(b"\n") else size - len(tail)


def _line_before(file: BinaryIO, end: int) -> bytes:
    """Return the line that ends, or was torn off, at a byte; empty at the file's start."""
    line = b""
    while end > 0:
        size = min(BLOCK_BYTES, end)
        end -= size
        file.seek(end)
        line = file.read(size) + line
        if (cut := line.rfind(b"\n", 0, -1)) >= 0:
            return line[cut + 1 :]
    return line


def _begins_record(line: bytes) -> bool:
    """Whether a line is the beginning of a record, however short."""
    found = re.match(rb'\{"step":\d+', line)
    if found is None:
        return b'{"step":'.startswith(line)
    rest = line[found.end() :]
    return rest.startswith(b',"phase":"') or b',"phase":"'.startswith(rest)


def read_records(path: str | os.PathLike[str], *, start: int = 0) -> Iterator[Record]:
    """Yield the records of a JSONL file; a torn last line is left out.

    Args:
        path: The file.
        start: The byte to begin at.

    Raises:
        ValueError: A line before the last is not JSON.
    """
    with Path(path).open("rb") as lines:
        lines.seek(start)
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
