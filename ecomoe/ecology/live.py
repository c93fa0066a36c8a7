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
    measure_lines,
    prediction_lines,
    trajectory_lines,
)
from ecomoe.ecology.report import record_lines, summary_line
from ecomoe.ecology.sinks import progress_bars_aside
from ecomoe.ecology.statistics import BASES

Record = Mapping[str, Any]

NUM_EVENTS = 3
# The layer table's heading, the line on layers left out, and the one that the cursor stands on.
TABLE_LINES = 4
MIN_LAYERS = 3


class LiveView:
    """Redraws the last record in place; where there is no terminal, prints lines.

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
            with progress_bars_aside():
                print("\n".join(record_lines(dict(record))), file=self._console.file, flush=True)
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        self._live.update(self._drawing(record, trajectory, events), refresh=True)

    def _drawing(
        self, record: Record, trajectory: Sequence[Record], events: Sequence[Record]
    ) -> RenderableType:
        above: list[RenderableType] = [Text(summary_line(dict(record)), style="bold")]
        above += [*prediction_lines(record), *trajectory_lines(record, trajectory, events)]
        below = [*measure_lines(record["layers"]), *event_lines(events, num=NUM_EVENTS)]
        taken = len(self._console.render_lines(Group(*above, *below)))
        shown, rest = self._fitting(record["layers"], self._console.height - taken - TABLE_LINES)
        return Group(*above, layer_table(shown), *([Text(rest)] if rest else []), *below)

    @staticmethod
    def _fitting(layers: Sequence[Record], room: int) -> tuple[list[Record], str]:
        """Return the layers to show, the most DEAD first to stay, and a line on the others."""
        room = max(MIN_LAYERS, room)
        if len(layers) <= room:
            return list(layers), ""
        worst = sorted(layers, key=lambda layer: -sum(layer["dead"].values()))[:room]
        names = {layer["name"] for layer in worst}
        rest = [layer for layer in layers if layer["name"] not in names]
        most = "/".join(str(max(layer["dead"][basis] for layer in rest)) for basis in BASES)
        return (
            [layer for layer in layers if layer["name"] in names],
            f"... and {len(rest)} layers with at most {most} DEAD (top1/topk)",
        )

    def close(self) -> None:
        """Leave the last drawing on the terminal and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None
