"""A monitor as a callback of a Trainer: its events, its place, a terminal to report to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ecomoe.ecology.recorder import Recorder
from ecomoe.ecology.report import Report
from ecomoe.ecology.sinks import progress_bars_aside
from ecomoe.ecology.traffic import Phase
from ecomoe.ecology.watch import Watch, is_distributed, is_first_process
from ecomoe.moe import EcoMoE

Record = dict[str, Any]

STATE_KEY = "ecomoe_monitor"


class TrainerEvents(ABC):
    """What a monitor does at the events of a Trainer."""

    step_count: int
    view: str
    _recorder: Recorder
    _watch: Watch | None
    _session: Any

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Start to watch a model."""

    @abstractmethod
    def close(self) -> None:
        """Report what is left, and detach."""

    @abstractmethod
    def report(self) -> Report:
        """Return a report of what was counted up to now."""

    @abstractmethod
    def _state(self, *, together: bool) -> Record: ...

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""

    @abstractmethod
    def _detach(self, *, last_report: bool) -> None: ...

    @abstractmethod
    def _advance(self, step: int) -> None: ...

    @abstractmethod
    def _tell_silence(self) -> None: ...

    @abstractmethod
    def _cut(self, phases: Sequence[Phase], *, loss: float | None = None) -> Record | None: ...

    def _nothing(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: B027
        """Do nothing."""

    on_init_end = on_epoch_begin = on_step_begin = _nothing
    on_pre_optimizer_step = on_optimizer_step = on_substep_end = on_predict = _nothing
    on_save = on_prediction_step = on_push_begin = _nothing

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the model and arm its auxiliary losses and schedule."""
        self._begin_training(
            kwargs["model"], args=args, state=state, optimizer=kwargs.get("optimizer")
        )
        move_up(self, callbacks_of(args, state))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the schedule; keep the state ready for a checkpoint."""
        if self._session is not None:
            self._session.advance(state)
        self._advance(state.global_step)
        self._store(state, saving=control.should_save)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the state ready for a checkpoint."""
        self._store(state, saving=control.should_save)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the evaluation, and keep the state ready for a checkpoint that may follow."""
        self._cut(("eval",))
        self._store(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add about ten numbers to what the Trainer logs."""
        if logs is None or "train_runtime" in logs:
            return
        self._add_to_logs(logs, state)
        self._store(state, saving=control.should_save)  # the Trainer saves after it logs

    def _add_to_logs(self, logs: dict[str, float], state: Any) -> None:
        evaluation = any(key.startswith("eval_") for key in logs)
        record = self._cut(("eval",) if evaluation else ("train",), loss=_loss_of(logs))
        added: dict[str, float] = {}
        if not evaluation:
            self._tell_silence()
        if not evaluation and self._session is not None:
            added |= self._session.auxiliary_logs()
        if record is not None:
            prefix = "eval_" if evaluation else ""
            added |= {
                f"{prefix}{key}": value for key, value in self._recorder.scalars(record).items()
            }
        logs.update(added)
        # The Trainer has copied `logs` into its history before callbacks see them.
        if state.log_history:
            state.log_history[-1].update(added)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report what is left, show the report and detach."""
        self.close()
        if self.view != "off" and self._recorder.latest and is_first_process():
            show(self.report())

    def _store(self, state: Any, *, saving: bool = True) -> None:
        if self._watch is None or not saving:
            return
        with self._watch.guarded():
            # A Trainer calls its callbacks in all processes; the first one saves for all.
            state.stateful_callbacks[STATE_KEY] = self._state(together=True)

    def _begin_training(
        self, model: nn.Module, *, args: Any, state: Any, optimizer: Optimizer | None
    ) -> None:
        self.close()
        try:
            self.attach(model)
            self.step_count = state.global_step
            saved = state.stateful_callbacks.get(STATE_KEY)
            if saved is not None and state.global_step:
                assert self._watch is not None
                with self._watch.guarded():
                    self.load_state_dict(saved)
            if has_eco_layers(model):
                from ecomoe.integrations.trainer import TrainerSession

                self._session = TrainerSession(
                    model,
                    args=args,
                    state=state,
                    optimizer=optimizer,
                    on_failure=lambda: self._detach(last_report=not is_distributed()),
                )
        except BaseException:
            # The run does not begin, and the Trainer tells nobody: others have attached already.
            for callback in (self, *callbacks_of(args, state)):
                if isinstance(callback, TrainerEvents):
                    callback._detach(last_report=False)
            raise


def _loss_of(logs: Mapping[str, Any]) -> float | None:
    """Return the loss of the evaluation that a Trainer logs.

    It weighs batches and tokens in its own way; the report is to say what its log says.
    """
    names = [key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")]
    losses = [logs.get(f"{name}_loss") for name in names]
    return float(losses[0]) if losses and isinstance(losses[0], int | float) else None


def has_eco_layers(model: nn.Module) -> bool:
    """Whether a model holds layers of this package."""
    return any(isinstance(module, EcoMoE) for module in model.modules())


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
