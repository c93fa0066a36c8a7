"""What a monitor needs as a callback: its place among the others, and a terminal to report to."""

from __future__ import annotations

from typing import Any

from ecomoe.ecology.report import Report
from ecomoe.ecology.sinks import progress_bars_aside


def callbacks_of(args: Any, state: Any) -> list[Any]:
    """Return the list of callbacks of the Trainer that is calling one of them; else an empty one.

    Args:
        args: What the callback was given.
        state: What the callback was given.
    """
    from ecomoe.integrations.trainer import calling_trainer

    trainer = calling_trainer(args, state)
    found: list[Any] = [] if trainer is None else trainer.callback_handler.callbacks
    return found


def move_up(callback: object, callbacks: list[Any]) -> None:
    """Move a callback up in its Trainer's list, right behind the one that decides the flow.

    The Trainer runs TensorBoard and its like before the callbacks of the user, so that what those
    add to the logs would come too late.
    """
    if callback not in callbacks:
        return
    flow = [type(other).__name__ == "DefaultFlowCallback" for other in callbacks]
    # What stands before it has had this event already, so nothing is called twice.
    position = callbacks.index(callback)
    target = min(flow.index(True) + 1 if True in flow else 0, position)
    callbacks.insert(target, callbacks.pop(position))


def show(report: Report) -> None:
    """Print a report."""
    try:
        from rich.console import Console
    except ImportError:
        with progress_bars_aside():
            print(report)
    else:
        with progress_bars_aside():
            Console().print(report)
