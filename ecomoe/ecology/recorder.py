"""Keeps the history of a run: records, their events, the DEAD trajectory, and their state."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ecomoe.ecology import saturation
from ecomoe.ecology.events import Event, Memory, detect
from ecomoe.ecology.records import note_saturation
from ecomoe.ecology.report import PREFERENCE, TRAJECTORY_KEYS, Report, record_lines, scalars
from ecomoe.ecology.saturation import Choices
from ecomoe.ecology.sinks import JsonlSink, progress_bars_aside
from ecomoe.ecology.taxonomy import Thresholds

Record = dict[str, Any]

MAX_RECORDS = 512
MIN_RECORDS = 16
# An expert's part of a record takes about 0.7 KB.
MAX_EXPERTS = 1 << 16


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
        self.sink: JsonlSink | None = None
        self._told = False
        self._memory: Memory = {}
        self._snapshots: saturation.Memory = {}

    def add(self, record: Record, choices: Mapping[str, Choices] | None = None) -> list[Event]:
        """Take a record, complete it with its events, write it, and return the events.

        Args:
            record: A new record.
            choices: By layer those for probed tokens, of an evaluation.
        """
        if choices:
            step = record["step"]
            overlaps, self._snapshots = saturation.compare(self._snapshots, choices, step=step)
            note_saturation(record, overlaps)
        events, self._memory = detect(self._memory, record, thresholds=self.thresholds)
        record["events"] = [event.to_dict() for event in events]
        self.events += events
        self.trajectory.append({key: record[key] for key in TRAJECTORY_KEYS})
        self._keep(record)
        self.latest[record["phase"]] = record
        self._write(record)
        if self.view == "lines":
            with progress_bars_aside():
                print("\n".join(record_lines(record)), flush=True)
        elif self.view == "live":
            self._draw(record)
        return events

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        most = min(MAX_RECORDS, max(MIN_RECORDS, MAX_EXPERTS // max(1, record["num_experts"])))
        if len(self.records) > most:
            # Thin the older half: the shape of a long history stays, its memory does not grow.
            half = most // 2
            self.records = self.records[:half:2] + self.records[half:]

    def _write(self, record: Record) -> None:
        if self.sink is None:
            return
        try:
            self.sink.write(record)
        except (OSError, ValueError) as error:
            if self._told:
                return
            self._told = True
            warnings.warn(
                f"log={os.fspath(self.sink.path)!r} cannot be written now; its records wait for "
                f"the next report, and watching goes on: {type(error).__name__}: {error}",
                stacklevel=2,
            )

    def end_log(self) -> None:
        """Write no more records from here on."""
        sink, self.sink = self.sink, None
        if sink is not None:
            sink.close()

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
                f"{f'phase={phase!r}: ' if phase else ''}no token was seen yet; run the model "
                "while the monitor is attached"
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
            "events": [event.to_dict() for event in self.events],
            "trajectory": list(self.trajectory),
            "latest": dict(self.latest),
            "memory": self._memory,
            "snapshots": self._snapshots,
            "log": None if self.sink is None else self.sink.state_dict(),
        }

    @staticmethod
    def check_state(state: object) -> None:
        """Check a state before anything is changed.

        Raises:
            ValueError: It did not come from `state_dict`.
        """
        kinds = {"events": list, "trajectory": list, "latest": dict}
        kinds |= {"memory": dict, "snapshots": dict}
        checked = check_keys(state, {**kinds, "log": (dict, type(None))}, name="state['history']")
        places = ("start", "end", "check")
        if checked["log"] is not None:
            log = {"run": "", **checked["log"]}
            check_keys(
                log, {"run": str, **dict.fromkeys(places, int)}, name="state['history']['log']"
            )
        point = {"step": int, "phase": str, "dead": dict}
        for entry in (*checked["trajectory"], *checked["latest"].values()):
            check_keys(entry, point, name="a record of the state")
        known = {field.name for field in fields(Event)}
        for event in checked["events"]:
            check_keys(
                event, {"kind": str, "step": int, "phase": str}, name="an event of the state"
            )
            if not set(event) <= known:
                raise ValueError(
                    f"an event of the state has {', '.join(sorted(set(event) - known))}, which "
                    "this version does not know; load it with the version that saved it"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that passes `check_state`; the log drops what was written after it."""
        self.events = [Event(**event) for event in state["events"]]
        self.trajectory = list(state["trajectory"])
        self.latest = dict(state["latest"])
        self.records = list(self.latest.values())
        self._memory = state["memory"]
        self._snapshots = state["snapshots"]
        if self.sink is None or state["log"] is None:
            return
        if self.sink.rewind(state["log"]):
            self.records = []
            for record in self.sink.records():
                self._keep(record)
        else:
            warnings.warn(
                f"log={os.fspath(self.sink.path)!r} does not hold the records that the state was "
                "saved after, so none is dropped; pass the log of the run that goes on",
                stacklevel=2,
            )


def check_keys(
    state: object, kinds: Mapping[str, type | tuple[type, ...]], *, name: str
) -> Mapping[str, Any]:
    """Return a part of a saved state, if it has its keys and the values are of the right kinds.

    Raises:
        ValueError: It did not come from ``state_dict``.
    """
    remedy = "pass what Monitor.state_dict() returned"
    if not isinstance(state, Mapping):
        raise ValueError(f"{name} is a {type(state).__name__}; it must be a mapping: {remedy}")
    wrong = [key for key, kind in kinds.items() if not isinstance(state.get(key, ...), kind)]
    if wrong:
        raise ValueError(f"{name} must have {', '.join(kinds)}, lacks {', '.join(wrong)}; {remedy}")
    return state
