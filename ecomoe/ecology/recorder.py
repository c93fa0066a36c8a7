"""Keeps the history of a run: records, their events, the DEAD trajectory, and their state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ecomoe.ecology.events import Event, Memory, detect
from ecomoe.ecology.report import PREFERENCE, TRAJECTORY_KEYS, Report, scalars, summary_line
from ecomoe.ecology.sinks import JsonlSink, read_records
from ecomoe.ecology.taxonomy import Thresholds

Record = dict[str, Any]

MAX_RECORDS = 512


class Recorder:
    """What a monitor remembers of a run, apart from the counts that are not reported yet.

    Args:
        thresholds: Unscaled.
        view: ``"lines"`` prints a line a record, ``"live"`` draws it in place.

    Attributes:
        events: All events so far.
        trajectory: Step, phase and number of DEAD experts of each record so far.
        records: The records so far; of many, the older ones are thinned out.
        latest: The last record of each phase.
        num_records: Records so far.
        sink: Where records are written, if anywhere.
    """

    def __init__(self, *, thresholds: Thresholds, view: str = "off") -> None:
        self.thresholds = thresholds
        self.view = view
        self._live: Any = None
        self.events: list[Event] = []
        self.trajectory: list[Record] = []
        self.records: list[Record] = []
        self.latest: dict[str, Record] = {}
        self.num_records = 0
        self.sink: JsonlSink | None = None
        self._memory: Memory = {}

    def add(self, record: Record) -> list[Event]:
        """Take a record, complete it with its events, write it, and return the events."""
        events, self._memory = detect(self._memory, record, thresholds=self.thresholds)
        record["events"] = [event.to_dict() for event in events]
        self.events += events
        self.trajectory.append({key: record[key] for key in TRAJECTORY_KEYS})
        self.records.append(record)
        if len(self.records) > MAX_RECORDS:
            # Thin the older half: the shape of a long history stays, its memory does not grow.
            half = MAX_RECORDS // 2
            self.records = self.records[:half:2] + self.records[half:]
        self.latest[record["phase"]] = record
        self.num_records += 1
        if self.sink is not None:
            self.sink.write(record)
        if self.view == "lines":
            print(summary_line(record), flush=True)
        elif self.view == "live":
            self._draw(record)
        return events

    def _draw(self, record: Record) -> None:
        if self._live is None:
            from ecomoe.ecology.live import LiveView

            self._live = LiveView()
        events = [event.to_dict() for event in self.events]
        self._live.update(record, trajectory=self.trajectory, events=events)

    def close(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.close()
            self._live = None

    def report(self, phase: str | None) -> Report:
        """Return a report of the last record of a phase; see `Monitor.report`."""
        found = [p for p in ([phase] if phase else PREFERENCE) if p in self.latest]
        if not found:
            raise ValueError(
                f"phase={phase!r}: no token was seen yet; run the model while the monitor is "
                "attached"
            )
        return Report(
            self.latest[found[0]],
            trajectory=self.trajectory,
            events=[event.to_dict() for event in self.events],
            records=self.records,
        )

    def scalars(self, record: Record) -> dict[str, float]:
        """Return about ten numbers for a logger, however many experts there are."""
        phase = record["phase"]
        mine = [e.kind for e in self.events if e.phase == phase and e.basis == "top1"]
        points = [point["dead"]["top1"] for point in self.trajectory if point["phase"] == phase]
        return scalars(
            record,
            num_deaths=mine.count("death"),
            num_revivals=mine.count("revival"),
            peak=max(points),
        )

    def state_dict(self) -> Record:
        """Return the history as plain data."""
        return {
            "num_records": self.num_records,
            "events": [event.to_dict() for event in self.events],
            "trajectory": list(self.trajectory),
            "latest": dict(self.latest),
            "memory": self._memory,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; records written after it are dropped from the file."""
        self.num_records = state["num_records"]
        self.events = [Event(**event) for event in state["events"]]
        self.trajectory = list(state["trajectory"])
        self.latest = dict(state["latest"])
        self.records = list(self.latest.values())
        self._memory = state["memory"]
        if self.sink is not None:
            self.sink.rewind(self.num_records)
            self.records = list(read_records(self.sink.path))[-MAX_RECORDS:] or self.records
