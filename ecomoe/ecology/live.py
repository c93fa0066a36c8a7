"""A view that stays in place on the terminal while a run trains.

Imported when it is asked for: nothing else needs rich.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ecomoe.ecology.console import (
    event_lines,
    layer_table,
    prediction_lines,
    trajectory_lines,
)
from ecomoe.ecology.report import summary_line

Record = Mapping[str, Any]

NUM_EVENTS = 3
# Heading, prediction, trajectory and events; what the terminal has beyond goes to layers.
FIXED_LINES = 12


class LiveView:
    """Redraws the last record in place; where there is no terminal, prints a line a record.

    It draws only when a record comes, from no thread of its own, so it costs nothing in between.

    Args:
        console: Where to draw; by default the process's standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live: Live | None = None

    def update(
        self, record: Record, *, trajectory: Sequence[Record], events: Sequence[Record]
    ) -> None:
        """Show a record."""
        if not self._console.is_terminal:
            self._console.print(
                summary_line(dict(record)), markup=False, highlight=False, soft_wrap=True
            )
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        self._live.update(self._drawing(record, trajectory, events), refresh=True)

    def _drawing(
        self, record: Record, trajectory: Sequence[Record], events: Sequence[Record]
    ) -> RenderableType:
        layers = record["layers"]
        room = max(3, self._console.height - FIXED_LINES)
        shown = layers
        if len(layers) > room:
            worst = sorted(layers, key=lambda layer: -sum(layer["dead"].values()))[: room - 1]
            shown = [layer for layer in layers if layer in worst]
        parts: list[RenderableType] = [Text(summary_line(dict(record)), style="bold")]
        parts += [*prediction_lines(record), *trajectory_lines(record, trajectory, events)]
        parts.append(layer_table(shown))
        if len(shown) < len(layers):
            parts.append(Text(f"... and {len(layers) - len(shown)} layers with fewer DEAD"))
        parts += event_lines(events, num=NUM_EVENTS)
        return Group(*parts)

    def close(self) -> None:
        """Leave the last drawing on the terminal and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None
