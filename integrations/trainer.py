"""The auxiliary losses and the schedule of a model that transformers' `Trainer` trains.

A trainer computes its final loss in many ways: the model does it, a label smoother, a
``compute_loss_func``, a subclass; normalised over the accumulation window or not. All of them end
in one call, ``accelerator.backward(loss)``. So that call is where the `LossRelay` is attached:
what is done to the loss up to there concerns the task alone, and what is done to its gradient from
there on (loss scaling, averaging over ranks) is done to the auxiliary losses too. What remains is
to average over the micro-batches of the window.

Trainer hands its callbacks everything but itself, and nothing that leads to its accelerator. It is
found as the caller of the callback, by its identity: the frame whose ``self`` owns the very
``args`` and ``state`` that the callback was given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ecomoe.relay import LossRelay
from ecomoe.schedule import Schedule, unwrap_optimizer
from ecomoe.terms import TermMeans

_REMEDY = (
    "in an overridden training_step, call self.accelerator.backward(loss) instead of "
    "loss.backward()"
)
# All that a trainer does after on_train_begin, but for callbacks between epochs.
_STAGES = ("_run_epoch", "_evaluate", "_finalize_training")


class TrainerSession:
    """One run of ``trainer.train()``, from ``on_train_begin`` to ``on_train_end`` or an exception.

    It delivers the auxiliary losses, averages them for the log, and drives the schedule. The
    trainer's own loss stays the task loss. Everything that it changes on the accelerator, the
    optimizer and the model is taken back by `close`.

    Each optimizer step sees the mean over micro-batches and ranks of ``ecomoe.aux_loss``: for any
    accumulation (partial windows too), loss scaling, label smoothing, a ``compute_loss_func``, an
    overridden ``compute_loss``, both kinds of checkpointing, compiled models and
    DistributedDataParallel. What that mean is worth beside one big batch, `LossRelay` says.

    Args:
        model: The model being trained, as the callback gets it.
        args: The trainer's `TrainingArguments`, as the callback gets them.
        state: The trainer's `TrainerState`, as the callback gets it.
        optimizer: The optimizer, as the callback gets it, where there is one.
        trainer: The trainer; by default found as the caller.
        on_failure: Called when an exception ends training, after which no callback is.

    Attributes:
        schedule: The share of training done, from ``state.global_step / state.max_steps``. A
            trainer counts the steps that its loss scaler skips, so they count here too.

    Raises:
        ValueError: There is no trainer among the callers, it runs `torch.nn.DataParallel`, the
            model holds no EcoMoE layer, or another session delivers its losses already.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        args: Any,
        state: Any,
        optimizer: Optimizer | None = None,
        trainer: Any = None,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        trainer = calling_trainer(args, state) if trainer is None else trainer
        if trainer is None:
            raise ValueError(
                "no transformers.Trainer among the callers owns these args and state; in another "
                "loop use ecomoe.Monitor(model, optimizer=..., total_steps=...), or pass trainer="
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"args.n_gpu={args.n_gpu} makes Trainer use DataParallel, whose replicas share no "
                "auxiliary losses; it must be 1: launch with `torchrun --nproc-per-node "
                f"{args.n_gpu}`, or show one device in CUDA_VISIBLE_DEVICES"
            )
        self.schedule = Schedule(model, total_steps=state.max_steps)
        self._relay = LossRelay(model)
        self._means = TermMeans(model)
        self._undo: list[Callable[[], None]] = [self._relay.close]
        self._counts_steps = False
        self._on_failure = on_failure
        try:
            self._enter(trainer, args, state, optimizer)
        except BaseException:
            self.close()
            raise

    def _enter(self, trainer: Any, args: Any, state: Any, optimizer: Optimizer | None) -> None:
        self.schedule.advance(state.global_step)
        roots = {trainer.model, trainer.model_wrapped}
        compiled = any(_is_compiled(module) for module in trainer.model_wrapped.modules())
        for root in {trainer.model_wrapped} if compiled else roots:
            if root._compiled_call_impl is None:
                self._relay.watch(root)

        def backward(original: Callable[..., Any], loss: Any, **kwargs: Any) -> Any:
            # Trainer sets it at the start of each window, since the last one may be shorter.
            steps = getattr(
                trainer, "current_gradient_accumulation_steps", args.gradient_accumulation_steps
            )
            self._relay.attach(loss, weight=1.0 / steps)
            result = original(loss, **kwargs)
            self._means.add()  # now: reentrant checkpointing computes them only in backward
            self._relay.begin_forward()
            return result

        self._wrap(trainer.accelerator, "backward", backward)
        for name in _STAGES:
            if hasattr(trainer, name):
                self._wrap(trainer, name, self._run_stage)
        if optimizer is not None:
            try:
                inner = unwrap_optimizer(optimizer)
            except ValueError:
                return  # no torch optimizer: `advance` does the check
            hook = inner.register_step_post_hook(lambda *_: self._relay.check(_REMEDY))
            self._undo.append(hook.remove)
            self._counts_steps = True

    def _run_stage(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except BaseException:
            self.close()
            if self._on_failure is not None:
                self._on_failure()
            raise

    def advance(self, state: Any) -> None:
        """Follow the trainer; call it after each optimizer step, in ``on_step_end``."""
        if not self._counts_steps:
            self._relay.check(_REMEDY)
        self.schedule.advance(state.global_step)

    def auxiliary_logs(self) -> dict[str, float]:
        """Return the means of the auxiliary losses by name since the last call.

        They are named ``aux_<name>``, before their weights and averaged over layers and
        micro-batches of this rank; ``aux_total`` is weighted and summed over layers, as it joins
        the task loss. Empty if nothing was computed. It waits for the device once.
        """
        return {f"aux_{name}": mean for name, mean in self._means.compute().items()}

    def close(self) -> None:
        """Take back every change; calling it again, or after an exception in training, is fine."""
        while self._undo:
            self._undo.pop()()
        self.schedule.close()

    def _wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Put ``wrapper(original, ...)`` in the place of a method, on this one object."""
        own = vars(owner).get(name)
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            # Somebody may wrap ours in turn and keep calling it after we are gone.
            return wrapper(original, *args, **kwargs) if self._undo else original(*args, **kwargs)

        def undo() -> None:
            if vars(owner).get(name) is not wrapped:
                return
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)

        setattr(owner, name, wrapped)
        self._undo.append(undo)


def calling_trainer(args: Any, state: Any) -> Any:
    """Return the trainer among the callers that owns ``args`` and ``state``, or ``None``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        own = getattr(owner, "__dict__", {})  # past any property that could run code
        if own.get("args") is args and own.get("state") is state and "accelerator" in own:
            return owner
        frame = frame.f_back
    return None


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
