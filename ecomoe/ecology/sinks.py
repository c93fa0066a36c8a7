"""Where records go: a JSONL file, and how to read it again.

A file holds runs, one behind the other. Each begins with a line that gives it an id, and so does
each part of one where several write at once; all other lines are records.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
import uuid
import warnings
import weakref
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

if sys.platform != "win32":
    import fcntl

Record = dict[str, Any]

BLOCK_BYTES = 1 << 16
MAX_WAITING_BYTES = 1 << 26

_RUN = b'{"run":"'


class JsonlSink:
    """Appends one record a line; a killed run keeps all lines but the one that it was writing.

    A torn last line, left by an earlier kill, is cut off first. What cannot be written, on a full
    disk, say, waits and is written before the next record. While the process lives, it holds a lock
    on the first byte of its run, where the system has such locks.

    Args:
        path: The file; folders are made as needed. Earlier runs in it stay.

    Attributes:
        run: The id of this run; a run that goes on, by `rewind`, keeps its own.
        start: The byte at which this run begins.

    Raises:
        ValueError: The file cannot be written, or something else than a monitor has written it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_log(path)
        self.path = Path(path)
        self.run = uuid.uuid4().hex[:8]
        self._lock: weakref.finalize[[int], JsonlSink] | None = None
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                self.start = self._end = _end_of_records(file)
                file.truncate(self.start)
                self._check = zlib.crc32(_line_before(file, self.start))
        except OSError as error:
            raise _unwritable(path, error) from error

    def write(self, record: Record) -> None:
        """Append a record, after those that wait.

        Raises:
            OSError: The file cannot be written now; the record waits for the next call.
            ValueError: The record holds NaN, which JSON does not know; it is left out.
        """
        self._waiting.append(_line(record))
        while sum(map(len, self._waiting)) > MAX_WAITING_BYTES and len(self._waiting) > 1:
            self._waiting.popleft()
            self._lost += 1
        self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        lines = list(self._waiting)
        with self.path.open("ab+", buffering=0) as file:
            size = begin = file.seek(0, os.SEEK_END)
            if size != self._end and not (tail := _line_before(file, size)).endswith(b"\n"):
                begin -= len(tail)  # of another run, torn off by a kill
                file.truncate(begin)
            if self._end == self.start or begin < self._end:  # it is new, or was removed
                self.start = begin
                lines.insert(0, _begun(self.run))
            elif begin > self._end:  # another run has written in between
                lines.insert(0, _line({"run": self.run, "continued": True}))
            rest = memoryview(b"".join(lines))
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(begin)
                raise
            self._end, self._check = file.tell(), zlib.crc32(lines[-1])
        self._hold(self.start)  # closing any handle of a file drops the process's locks on it
        self._waiting.clear()

    def _hold(self, start: int) -> bool:
        """Lock the first byte of a run; return whether no other process has done so."""
        if sys.platform == "win32":
            return True
        try:
            if self._lock is None:
                self._lock = weakref.finalize(self, os.close, os.open(self.path, os.O_RDWR))
            (handle,) = self._lock.peek()[2]  # type: ignore[index]
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, start)
        except OSError as error:  # some file systems know no locks
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def close(self) -> None:
        """Write what waits, if that is possible now; else warn of what is lost."""
        try:
            self._flush()
        except OSError as error:
            self._lost += len(self._waiting)
            reason = f": {type(error).__name__}: {error}"
        else:
            reason = ""
        if self._lock is not None:
            self._lock()
            self._lock = None
        if self._lost:
            warnings.warn(
                f"log={os.fspath(self.path)!r} lacks {self._lost} records of this run, which could "
                f"not be written{reason}",
                stacklevel=2,
            )

    def state_dict(self) -> Record:
        """Return which run this is, and where its records begin and, up to now, end."""
        return {"run": self.run, "start": self.start, "end": self._end, "check": self._check}

    def rewind(self, state: Mapping[str, Any]) -> bool:
        """Drop what was written after `state_dict`: a run that resumes writes it again.

        Where other runs follow in the file, nothing is dropped: the run is copied behind them, and
        counts from there alone. Where another process is still writing the run, it is left to
        that, and the copy is a run of its own.

        Returns:
            Whether the file has at that place what it had then. If not, it is another file, and
            nothing is changed.
        """
        start, end, check = state["start"], state["end"], state["check"]
        own = _RUN + state.get("run", self.run).encode() + b'"'
        with self.path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            if not 0 <= end <= size or zlib.crc32(_line_before(file, end)) != check:
                return False
            file.seek(end)
            following = [line for line in file if line.startswith(_RUN)]
            if end == 0 and size and not (following and following[0].startswith(own)):
                return False
            alone = self._hold(start)
            if alone and all(line.startswith(own) for line in following):
                file.truncate(end)
            else:
                file.seek(start)
                lines = list(_lines_of(own, file.read(end - start)))
                if not alone:
                    lines = [line for line in lines if not line.startswith(_RUN)]
                    lines = [_begun(self.run), *lines] if lines else []
                file.seek(size)
                file.write(b"".join(lines))
                start, end = size, file.tell()
                check = zlib.crc32(_line_before(file, end))
        if alone:
            self.run = state.get("run", self.run)
        else:
            warnings.warn(
                f"log={os.fspath(self.path)!r}: another process is still writing run "
                f"{state.get('run')}, so this one goes on as run {self.run} behind it; end the "
                "other one, or pass another log",
                stacklevel=2,
            )
        self.start, self._end, self._check = start, end, check
        self._hold(start)
        return True

    def records(self) -> Iterator[Record]:
        """Yield the records of this run."""
        mine = True
        for entry in _entries(self.path, start=self.start):
            if "run" in entry:
                mine = entry["run"] == self.run
            elif mine:
                yield entry


def progress_bars_aside() -> AbstractContextManager[None]:
    """Return a context in which lines can be printed, each on a line of its own.

    The bars of tqdm, which a Trainer shows, are wiped before and drawn again after it.
    """
    tqdm = sys.modules.get("tqdm")
    return nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode()


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
    """Whether a line is the beginning of a record, or of a run, however short."""
    if line.startswith(_RUN) or _RUN.startswith(line):
        return True
    found = re.match(rb'\{"step":\d+', line)
    if found is None:
        return b'{"step":'.startswith(line)
    rest = line[found.end() :]
    return rest.startswith(b',"phase":"') or b',"phase":"'.startswith(rest)


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n").encode()


def _begun(run: str) -> bytes:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return _line({"run": run, "started": now})


def _lines_of(own: bytes, content: bytes) -> Iterator[bytes]:
    """Yield the lines of one run, given how the lines begin that name it."""
    mine = True
    for line in content.splitlines(keepends=True):
        mine = line.startswith(own) if line.startswith(_RUN) else mine
        if mine:
            yield line


class Run(NamedTuple):
    """One run of a file.

    Attributes:
        id: Its id; empty for records that lie before any line with an id.
        started: When its first record was written, in UTC, ISO 8601; empty if unknown.
        records: In the order they were written.
    """

    id: str
    started: str
    records: list[Record]


def read_runs(path: str | os.PathLike[str]) -> list[Run]:
    """Return the runs of a JSONL file that have records, the last one written at the end.

    Raises:
        ValueError: A line before the last is not JSON.
    """
    runs: dict[str, Run] = {}
    run = runs[""] = Run("", "", [])
    for entry in _entries(path):
        if entry.get("continued"):
            run = runs.setdefault(entry["run"], Run(entry["run"], "", []))
        elif "run" in entry:
            runs.pop(entry["run"], None)  # one that goes on behind others is copied as a whole
            run = runs[entry["run"]] = Run(entry["run"], entry.get("started", ""), [])
        else:
            run.records.append(entry)
    return [run for run in runs.values() if run.records]


def read_records(path: str | os.PathLike[str], *, start: int = 0) -> Iterator[Record]:
    """Yield the records of a JSONL file, of all its runs; a torn last line is left out.

    Args:
        path: The file.
        start: The byte to begin at.

    Raises:
        ValueError: A line before the last is not JSON.
    """
    return (entry for entry in _entries(path, start=start) if "run" not in entry)


def _entries(path: str | os.PathLike[str], *, start: int = 0) -> Iterator[Record]:
    with Path(path).open("rb") as lines:
        lines.seek(start)
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return  # still being written, or torn by a kill
            yield _parsed(line, f"line {number} of {os.fspath(path)}")


def _parsed(line: bytes, name: str) -> Record:
    try:
        entry: Record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name} is not JSON; it must be written by ecomoe.Monitor(log=...): remove the line, "
            "or give another file"
        ) from error
    run = isinstance(entry, dict) and isinstance(entry.get("run"), str)
    record = isinstance(entry, dict) and type(entry.get("step")) is int
    layers = entry.get("layers", []) if record else []
    whole = isinstance(layers, list) and all(isinstance(layer, dict) for layer in layers)
    if not (run or (record and whole and isinstance(entry.get("phase"), str))):
        raise ValueError(
            f"{name} is no record; it must be written by ecomoe.Monitor(log=...): give another file"
        )
    return entry


class Follower:
    """Reads a file that grows, each line once.

    A run that resumes drops its last lines and writes them again: those are read again.

    Args:
        path: The file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._ends: list[tuple[int, int]] = []

    def read(self) -> list[Record]:
        """Return the records, and the lines that begin a run, that are new since the last call.

        Raises:
            ValueError: A line is not JSON.
        """
        found = []
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            while self._ends:
                end, check = self._ends[-1]
                if end <= size and zlib.crc32(_line_before(file, end)) == check:
                    break
                self._ends.pop()
            end = self._ends[-1][0] if self._ends else 0
            file.seek(end)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                self._ends.append((end, zlib.crc32(line)))
                found.append(_parsed(line, f"a line of {os.fspath(self.path)}"))
        return found
