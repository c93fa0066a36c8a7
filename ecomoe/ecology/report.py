"""A report: what is known of a model's ecology at one step, as plain data and as pictures."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ecomoe.ecology.events import Event, advice_lines, copied
from ecomoe.ecology.records import Record, rounded

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

NUM_STABLE = 5
PREFERENCE = ("eval", "train", "generate")
TRAJECTORY_KEYS = ("step", "phase", "dead")


class Report:
    """The ecology at one step: a rich renderable (``rich.print(report)``) and plain data.

    Args:
        record: Plain data of the step, as `to_dict` returns it.
        trajectory: For each report of the run, its step, phase and number of DEAD experts.
        events: All events of the run so far, as plain data.
        records: The records of the run so far, for `to_html`; by default this one alone.
    """

    def __init__(
        self,
        record: Record,
        *,
        trajectory: Sequence[Record] = (),
        events: Sequence[Record] = (),
        records: Sequence[Record] | None = None,
    ) -> None:
        self._record = record
        self._trajectory = list(trajectory)
        self._events = list(events)
        self._records = [record] if records is None else list(records)

    @classmethod
    def from_records(cls, records: Sequence[Record], *, phase: str | None = None) -> Report:
        """Return the report of a run from its records, as `ecomoe.ecology.sinks` reads them.

        Args:
            records: In the order they were written.
            phase: Which to show; by default evaluation where there was any, else training.

        Raises:
            ValueError: There is no record of that phase.
        """
        for candidate in (phase,) if phase is not None else PREFERENCE:
            mine = [record for record in records if record["phase"] == candidate]
            if mine:
                return cls(
                    mine[-1],
                    trajectory=[{key: r[key] for key in TRAJECTORY_KEYS} for r in records],
                    events=[event for record in records for event in record["events"]],
                    records=records,
                )
        raise ValueError(
            f"{f'phase={phase!r}: ' if phase else ''}no token was seen yet; run the model while "
            "the monitor is attached"
        )

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained HTML file with plots of the run.

        Args:
            path: The file; an existing one is replaced, folders are made as needed.
        """
        from ecomoe.ecology.html import write_html

        write_html(path, self._records)

    def to_dict(self) -> Record:
        """Return the record, with the run's ``trajectory``, ``all_events`` and ``stability``."""
        extra = {
            "trajectory": self._trajectory,
            "all_events": self._events,
            "stability": stability(self._records, phase=self._record["phase"]),
        }
        found: Record = copied({**self._record, **extra})
        return found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render for a terminal from 80 columns on."""
        from ecomoe.ecology.console import render_report

        yield from render_report(self._record, self._trajectory, self._events)

    def __str__(self) -> str:
        """Render as plain text of 80 columns."""
        try:
            from rich.console import Console
        except ImportError:
            return summary_line(self._record)
        console = Console(width=80, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def stability(
    records: Sequence[Record], *, phase: str, num_records: int = NUM_STABLE
) -> Record | None:
    """Return how much the ecology moved over the last reports of a phase (section 4.15).

    Returns:
        The number of ``reports``, the largest range of a tier's top1 usage ``tier_usage``, shares
        of 1, and the range of the number of ``dead`` experts on top1; ``None`` for one report.
    """
    last = [record for record in records if record["phase"] == phase][-num_records:]
    if len(last) < 2:
        return None
    usage: dict[tuple[str, int], list[float]] = {}
    for record in last:
        for layer in record["layers"]:
            for tier, share in enumerate(layer["tier"]["usage"]["top1"]):
                usage.setdefault((layer["name"], tier), []).append(share)
    dead = [record["dead"]["top1"] for record in last]
    return {
        "reports": len(last),
        "tier_usage": rounded(max(max(values) - min(values) for values in usage.values())),
        "dead": max(dead) - min(dead),
    }


def summary_line(record: Record) -> str:
    """Return a record in one line of text."""
    control = record["control"]
    e_now = f", E(t) {_show(control['e_now'])}" if control else ""
    accuracy = record["metrics"].get("accuracy")
    quality = f", accuracy {accuracy:.1%}" if accuracy is not None else ""
    return (
        f"step {record['step']} {record['phase']}: DEAD {record['dead']['top1']} top1, "
        f"{record['dead']['topk']} topk of {record['num_experts']} experts in "
        f"{len(record['layers'])} layers{e_now}{quality}"
    )


def record_lines(record: Record, *, width: int = 80) -> list[str]:
    """Return a record as lines of text: itself, its events and what to do about them, wrapped."""
    below = [str(Event(**event)) for event in record["events"]]
    below += [f"-> {advice}" for advice in advice_lines(record["events"])]
    lines = [summary_line(record)]
    for text in below:
        lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")
    return lines


def scalars(record: Record, *, num_deaths: int, num_revivals: int, peak: int) -> dict[str, float]:
    """Return about ten numbers that stand for a record, however many experts there are.

    Args:
        record: The record.
        num_deaths: Death events so far on top1.
        num_revivals: Revival events so far on top1.
        peak: Highest DEAD count so far on top1.
    """
    layers = record["layers"]
    values: dict[str, float | None] = {
        "dead_top1": record["dead"]["top1"],
        "dead_topk": record["dead"]["topk"],
        "dead_peak": peak,
        "deaths": num_deaths,
        "revivals": num_revivals,
        "load_evenness": _mean(
            layer["load_entropy"]["topk"] / math.log(layer["num_experts"])
            for layer in layers
            if layer["num_experts"] > 1
        ),
        "token_entropy": _mean(layer["token_entropy"] for layer in layers),
        "max_violation": max(layer["max_violation"]["topk"] for layer in layers),
        "flip_rate": _mean(layer["lockdown"]["flip_rate"] for layer in layers),
        "e_now": record["control"]["e_now"] if record["control"] else None,
    }
    return {f"ecology/{k}": float(v) for k, v in values.items() if v is not None}


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _show(e: float | None) -> str:
    return "inf" if e is None else f"{e:.3g}"
