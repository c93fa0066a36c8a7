"""The schedule of a training run: which share of it is done, told to every layer.

The temperature's annealing and the random-routing warm-up are functions of one number, the share
of all optimizer steps already taken. So a resumed run needs that number alone to go on exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from torch import nn
from torch.optim import Optimizer

from ecomoe.moe import EcoMoE


class ScheduleState(TypedDict):
    """What a checkpoint keeps of a schedule: optimizer steps taken, and in all."""

    step: int
    total_steps: int


class Schedule:
    """Drives ``layer.set_progress(step / total_steps)`` on every EcoMoE layer of a model.

    With an optimizer it counts that optimizer's steps by itself, without a host synchronisation.
    Without one, call `advance`. It may be used in a ``with`` block, which closes it.

    A step that a `torch.amp.GradScaler` skips does not count, since the optimizer never takes it.
    The exception is an optimizer that decides inside its own kernel on an accelerator
    (``fused=True``): asking it would wait for the device, so there its skipped steps count.

    Args:
        model: Holds the layers.
        total_steps: Optimizer steps in the whole run, >= 1: steps taken before resuming included,
            micro-batches of gradient accumulation counted once.
        optimizer: The optimizer whose steps count, or a wrapper that holds it as ``.optimizer``.

    Attributes:
        total_steps: As given.

    Raises:
        ValueError: An argument breaks its rule, or `model` holds no EcoMoE layer.

    Example:
        >>> from ecomoe import EcoMoE
        >>> layer = EcoMoE(8, 16, tiers=(2,), temperature=3.0)
        >>> schedule = Schedule(layer, total_steps=100)
        >>> schedule.advance(30)
        >>> schedule.progress, round(layer.temperature.item(), 2)
        (0.3, 0.3)
    """

    def __init__(
        self, model: nn.Module, *, total_steps: int, optimizer: Optimizer | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={model!r} must be an nn.Module; pass the converted model")
        check_total_steps(total_steps)
        self._layers = [module for module in model.modules() if isinstance(module, EcoMoE)]
        if not self._layers:
            raise ValueError(
                f"model={type(model).__name__} holds no EcoMoE layer, so it has nothing to "
                "schedule; convert it first with ecomoe.convert(model, ...)"
            )
        self.total_steps = total_steps
        self._step = 0
        self._hook = None
        if optimizer is not None:
            self._hook = unwrap_optimizer(optimizer).register_step_post_hook(self._count)
        self._tell()

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self._step

    @property
    def progress(self) -> float:
        """Share of the optimizer steps taken, in [0, 1]; past the end of the run it stays 1."""
        return min(self._step / self.total_steps, 1.0)

    def advance(self, step: int) -> None:
        """Go to a step: the number of optimizer steps taken since the start of the run.

        Raises:
            ValueError: `step` is not an int >= 0.
        """
        if type(step) is not int or step < 0:
            raise ValueError(
                f"step={step!r} must be an int >= 0; pass the optimizer steps taken so far"
            )
        self._step = step
        self._tell()

    def state_dict(self) -> ScheduleState:
        """Return what a checkpoint needs; `load_state_dict` goes on from there exactly."""
        return {"step": self._step, "total_steps": self.total_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, which brings both the step and the number of steps in all.

        Raises:
            ValueError: `state` did not come from `state_dict`, or is of a run of another length.
        """
        if not isinstance(state, Mapping) or set(state) != set(ScheduleState.__annotations__):
            raise ValueError(
                f"state={state!r} does not come from a schedule; it must have step and "
                "total_steps: pass what state_dict() returned"
            )
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"state is of a run of total_steps={state['total_steps']!r}, this schedule has "
                f"{self.total_steps}; to go on exactly, build it with the former, and to stretch "
                "the run, call advance(step) instead"
            )
        self.advance(state["step"])

    def close(self) -> None:
        """Stop counting: remove the hook from the optimizer. Closing twice is fine."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __enter__(self) -> Schedule:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _count(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if not _skipped(optimizer):
            self._step += 1
            self._tell()

    def _tell(self) -> None:
        for layer in self._layers:
            layer.set_progress(self.progress)


def check_total_steps(total_steps: object) -> None:
    """Check the number of optimizer steps of a run.

    Raises:
        ValueError: It is no whole number from 1 on.
    """
    if type(total_steps) is not int or total_steps < 1:
        raise ValueError(
            f"total_steps={total_steps!r} must be an int >= 1; pass the number of optimizer "
            "steps in the whole run: epochs * batches per epoch / accumulation steps"
        )


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the torch optimizer that takes the steps, out of its wrappers.

    A wrapper such as Accelerate's subclasses `torch.optim.Optimizer` without being one: hooks
    registered on it never run.

    Raises:
        ValueError: There is none inside.
    """
    inner: object = optimizer
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer  # type: ignore[attr-defined]
    if not isinstance(inner, Optimizer) or not hasattr(inner, "_optimizer_step_post_hooks"):
        raise ValueError(
            f"optimizer={type(optimizer).__name__} must be a torch.optim.Optimizer, whose steps "
            "can be counted; leave it out and call advance(step) after each step"
        )
    return inner


def _skipped(optimizer: Optimizer) -> bool:
    """Whether the step just ended changed nothing, where the host can tell without waiting."""
    found_inf = getattr(optimizer, "found_inf", None)  # there only while a scaler steps
    return found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf.item())
