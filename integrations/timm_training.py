"""The auxiliary losses and the schedule of a model that timm's tasks or its script train.

A `timm.task.TrainingTask`, or a criterion outside the model, returns the final loss. There the
`LossRelay` is attached: dividing by accumulation steps, scaling and averaging over ranks come
after it and are inherited.

As a program it runs timm's own training script, as it is, on a converted model:

``python -m ecomoe.integrations.timm_training --target-e 0.545 --tiers 8,4,4 train.py --model ...``

Options before the script are `ecomoe.convert`'s and the Monitor's; all after it are the script's.
With several processes: ``torchrun --nproc-per-node 2 -m ecomoe.integrations.timm_training ...``.
Nothing is installed or left behind: while the script runs, five names in timm's modules lead here.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import runpy
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ecomoe.convert import convert
from ecomoe.ecology.monitor import Monitor
from ecomoe.ecology.watch import is_distributed
from ecomoe.hooks import ForwardHook
from ecomoe.relay import LossRelay
from ecomoe.schedule import Schedule, unwrap_optimizer
from ecomoe.terms import TermMeans

_REMEDY = (
    "before each backward(), call the task (or criterion) that was given here, and no copy of it"
)


class TaskSession:
    """One training run in which a timm task, or a criterion, returns the final loss.

    It delivers the auxiliary losses, drives the schedule with the optimizer's steps and, with a
    monitor, counts the experts' usage. It may be used in a ``with`` block, which closes it. Keep
    it as long as training goes on: one that nobody holds any more closes by itself.

    Args:
        task: A `timm.task.TrainingTask`, or any module whose forward returns the final loss: as a
            tensor, under ``"loss"`` in a dict, or first in a tuple. A criterion needs ``model``.
        optimizer: Takes the steps.
        total_steps: Optimizer steps in the whole run, those before resuming included.
        model: What holds the layers and is called in each step; by default the task's own.
        monitor: A monitor that watches nothing yet; the session attaches and closes it.

    Attributes:
        schedule: Keep its ``state_dict()`` in a checkpoint, to resume exactly.

    Raises:
        ValueError: An argument breaks its rule, the model holds no EcoMoE layer, or its losses are
            delivered already.

    Example:
        ``task = timm.task.ClassificationTask(ecomoe.convert(model), criterion)`` and then
        ``with TaskSession(task, optimizer=optimizer, total_steps=1000): ...`` around the loop.
    """

    schedule: Schedule

    def __init__(
        self,
        task: nn.Module,
        *,
        optimizer: Optimizer,
        total_steps: int,
        model: nn.Module | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        if not isinstance(task, nn.Module):
            raise ValueError(
                f"task={task!r} must be an nn.Module that returns the final loss; wrap a function "
                "in a module, or add ecomoe.aux_loss(model) to the loss"
            )
        root = task if model is None else model
        if model is None:
            model = getattr(task, "get_trainable_module", lambda: task)()
        inner = unwrap_optimizer(optimizer)
        # No hook holds the session itself, so that one that is dropped can close.
        relay, means = LossRelay(model), TermMeans(model)
        self._means = means
        self._undo: list[Callable[[], None]] = [relay.close]
        try:
            if monitor is None:
                self.schedule = Schedule(model, total_steps=total_steps, optimizer=optimizer)
                self._undo.append(self.schedule.close)
            else:
                self._undo.append(monitor.close)
                monitor.attach(model, optimizer=optimizer, total_steps=total_steps)
                schedule = monitor.schedule
                assert schedule is not None  # LossRelay has found the layers that it drives
                self.schedule = schedule
            relay.watch(root)
            hooks = (
                task.register_forward_hook(ForwardHook(partial(_take_loss, relay, means))),
                inner.register_step_post_hook(lambda *_: relay.check(_REMEDY)),
            )
            self._undo += [hook.remove for hook in hooks]
        except BaseException:
            self.close()
            raise
        weakref.finalize(self, _abandon, self._undo, monitor).atexit = False

    def auxiliary_logs(self) -> dict[str, float]:
        """Return the means of the auxiliary losses by name since the last call.

        They are named as in `ecomoe.integrations.trainer.TrainerSession.auxiliary_logs`, and it
        waits for the device once.
        """
        return {f"aux_{name}": mean for name, mean in self._means.compute().items()}

    def close(self) -> None:
        """Take back every hook; calling it again, or after an exception in training, is fine."""
        _run_all(self._undo)

    def __enter__(self) -> TaskSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _take_loss(relay: LossRelay, means: TermMeans, task: nn.Module, args: Any, output: Any) -> None:
    loss = final_loss(output)
    if loss.requires_grad:
        relay.attach(loss)
        count = means.take()
        loss.register_hook(lambda _: count())  # a batch that is skipped does not count


def _run_all(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


def _abandon(undo: list[Callable[[], None]], monitor: Monitor | None) -> None:
    if monitor is not None and undo:
        # Processes drop their sessions at different times, too late to report together.
        monitor._detach(last_report=not is_distributed())
    _run_all(undo)


def final_loss(output: Any) -> Tensor:
    """Return the final loss in what a task or a criterion returned.

    Raises:
        ValueError: There is no tensor in it where a loss is expected.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the task returned {type(output).__name__} without a loss; it must return a tensor, a "
            "dict with 'loss' or a tuple that starts with the loss"
        )
    return found


class ScriptRun:
    """Follows timm's training script from its first model to its last step.

    Args:
        convert_model: Converts the script's model, in place.
        monitor: Watches it.
    """

    def __init__(self, *, convert_model: Callable[[nn.Module], nn.Module], monitor: Monitor):
        self.convert_model = convert_model
        self.monitor = monitor
        self.session: TaskSession | None = None
        self._model: nn.Module | None = None
        self._task: Any = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Lead the names by which a script uses timm here, for a while."""
        # The tasks come first: by then a distillation's teacher has its own way to a model.
        tasks = import_module("timm.task")
        timm, models, schedulers, utils = (
            import_module(name) for name in ("timm", "timm.models", "timm.scheduler", "timm.utils")
        )
        places: list[tuple[Any, str, Callable[..., None]]] = [
            (timm, "create_model", self._on_model),
            (models, "create_model", self._on_model),
            (tasks.TrainingTask, "__init__", self._on_task),
            (schedulers, "create_scheduler_v2", self._on_scheduler),
            (utils, "accuracy", self._on_accuracy),
        ]
        before = [getattr(place, name) for place, name, _ in places]
        try:
            for (place, name, then), theirs in zip(places, before, strict=True):
                setattr(place, name, _around(theirs, then))
            yield
        finally:
            for (place, name, _), theirs in zip(places, before, strict=True):
                setattr(place, name, theirs)
            if self.session is not None:
                self.session.close()

    def _on_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if self._model is None:
            self._model = self.convert_model(model)

    def _on_task(self, result: None, task: Any, *args: Any, **kwargs: Any) -> None:
        self._task = task
        if hasattr(task, "create_evaluator"):
            task.create_evaluator = _around(task.create_evaluator, self._on_evaluator)

    def _on_evaluator(self, evaluator: Any, *args: Any, **kwargs: Any) -> None:
        evaluator.update = _around(evaluator.update, self._on_accuracy)

    def _on_accuracy(self, result: Any, output: Any, target: Any, *args: Any, **kw: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 2 and target.dim() == 1:
            self.monitor.evaluate(outputs=output, targets=target)

    def _on_scheduler(
        self, result: tuple[Any, int], optimizer: Optimizer, *args: Any, **kwargs: Any
    ) -> None:
        scheduler, num_epochs = result
        updates = kwargs.get("updates_per_epoch", 0)
        if self._task is None or not updates:
            missing = "updates_per_epoch" if self._task else "a timm.task.TrainingTask"
            raise ValueError(
                f"the script made its scheduler without {missing}, so it is no training script of "
                "timm >= 1.0.26; in another script use "
                "ecomoe.integrations.timm_training.TaskSession"
            )
        self.session = TaskSession(
            self._task,
            optimizer=optimizer,
            total_steps=num_epochs * updates,
            monitor=self.monitor,
        )
        if scheduler is not None:
            # The script's own count of updates, which a resumed run takes up. Counting the
            # optimizer's steps alone would start at 0 there.
            advance = self.session.schedule.advance
            scheduler.step = _around(
                scheduler.step, lambda _, epoch, *a, **k: advance(epoch * updates)
            )
            scheduler.step_update = _around(
                scheduler.step_update, lambda _, num_updates, *a, **k: advance(num_updates)
            )


def _around(function: Callable[..., Any], then: Callable[..., None]) -> Callable[..., Any]:
    """Return ``function``, followed by ``then`` on its result and arguments."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then(result, *args, **kwargs)
        return result

    return wrapped


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a training script of timm on a converted model; see the module's head."""
    parser = argparse.ArgumentParser(
        prog="python -m ecomoe.integrations.timm_training",
        description="Run timm's training script, unmodified, on a model with EcoMoE layers.",
        allow_abbrev=False,
    )
    parser.add_argument("--target-e", type=float, help="the E to aim at")
    parser.add_argument("--tiers", help="experts in each tier, such as 8,4,4")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="any other argument of ecomoe.convert, such as --set strength=0.01; repeatable",
    )
    parser.add_argument("--log", metavar="FILE", help="a JSONL file for the monitor's records")
    parser.add_argument("--every", type=int, default=100, help="steps between two records")
    parser.add_argument("script", help="the training script, such as train.py")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="the script's own arguments")
    options = parser.parse_args(arguments)
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        settings = convert_settings(options.settings)
        if options.target_e is not None:
            settings["target_e"] = options.target_e
        if options.tiers is not None:
            settings["tiers"] = _sizes(options.tiers)
        monitor = Monitor(log=options.log if first else None, every=options.every, view="off")
    except ValueError as error:
        parser.error(str(error))
    run = ScriptRun(
        convert_model=lambda model: convert(model, verbose=first, **settings), monitor=monitor
    )
    argv, path = sys.argv, list(sys.path)
    try:
        sys.argv = [options.script, *options.rest]
        sys.path.insert(0, os.path.dirname(os.path.abspath(options.script)))
        with run.installed():
            runpy.run_path(options.script, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path
    if first and run.session is not None:
        _show(monitor)


def convert_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Return arguments of `ecomoe.convert` from texts such as ``"strength=0.01"``.

    Raises:
        ValueError: A text is not of this form, or names no argument.

    Example:
        >>> convert_settings(["top_k=1", "layers=every other"])
        {'top_k': 1, 'layers': 'every other'}
    """
    names = [name for name in inspect.signature(convert).parameters if name != "model"]
    settings = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in names:
            raise ValueError(
                f"--set {pair} must be NAME=VALUE with an argument of ecomoe.convert: "
                f"{', '.join(names)}"
            )
        try:
            settings[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[name] = text
    return settings


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise ValueError(f"--tiers {text} must be ints with commas, such as 8,4,4") from None


def _show(monitor: Monitor) -> None:
    try:
        from rich.console import Console
    except ImportError:
        print(monitor.report())
    else:
        Console().print(monitor.report())


if __name__ == "__main__":
    main()
