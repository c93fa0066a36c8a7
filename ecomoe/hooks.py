"""Hooks on modules that copies of the modules leave behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ForwardHook:
    """A hook on a module that stays behind when the module is copied or pickled.

    Copies of a model (an average of its weights, a checkpoint) are not part of the run; and what a
    hook holds on to (a trainer, tensors with a graph) can often be neither copied nor pickled.

    Args:
        action: Called with what torch hands to the hook; ``None`` does nothing.
    """

    def __init__(self, action: Callable[..., Any] | None = None) -> None:
        self.action = action

    def __call__(self, *args: Any) -> Any:
        """Run the action."""
        return None if self.action is None else self.action(*args)

    def __reduce__(self) -> tuple[type[ForwardHook], tuple[()]]:
        return ForwardHook, ()
