"""The monitor: taps to statistics, statistics to events, records to sinks."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ecomoe.ecology.callback import TrainerEvents, has_eco_layers
from ecomoe.ecology.events import Event
from ecomoe.ecology.outcomes import domains_of, outcomes_of
from ecomoe.ecology.readers import Reader
from ecomoe.ecology.recorder import Recorder, check_keys
from ecomoe.ecology.records import build_record, with_loss
from ecomoe.ecology.report import Report
from ecomoe.ecology.sinks import JsonlSink, check_log
from ecomoe.ecology.taxonomy import Thresholds
from ecomoe.ecology.traffic import PHASES, Phase
from ecomoe.ecology.watch import Watch, is_distributed, is_first_process
from ecomoe.schedule import Schedule, check_total_steps, unwrap_optimizer

Record = dict[str, Any]
EventHandler = Callable[[Event], None]

MAX_BUCKETS = 256
VIEWS = ("report", "live", "lines", "off")
COACTIVATION = ("eval", "always")
_WATCHING: weakref.WeakSet[Monitor] = weakref.WeakSet()


class Monitor(TrainerEvents):
    """Watches the experts of a model while it trains, without changing what it learns.

    In transformers' Trainer it is a callback, ``Trainer(..., callbacks=[ecomoe.Monitor()])``: it
    finds model and optimizer by itself, brings the auxiliary losses into the loss, drives the
    schedule, and adds about ten numbers to the logs.

    In a loop of your own it is a context manager. It drives the schedule with the optimizer's
    steps; the auxiliary losses are yours to add:

    ``with Monitor(model, optimizer=optimizer, total_steps=1000) as monitor: ...`` and
    ``loss = task_loss + ecomoe.aux_loss(model)``.

    Training, evaluation and generation are counted apart; padding is left out where the model is
    given a 2-D ``attention_mask``; what gradient checkpointing computes again is counted once.
    Counts stay on the device and are moved to the host once per report. Of single tokens nothing
    is kept, except that after an evaluation pass each layer's first choices stay until
    `evaluate`, or the next pass.

    A Trainer tells its callbacks nothing of an exception, such as Ctrl-C, that ends its run. Then
    `close` takes the hooks off; so does training again, or leaving a ``with Monitor() as monitor:``
    block around it.

    An error inside the monitor is reported once, as a warning; the monitor then stops watching and
    the training goes on, schedule included.

    Args:
        model: What to watch. Leave it out for the Trainer.
        optimizer: Counts the steps. Without it call `step`, or let the Trainer do so.
        total_steps: Optimizer steps of the whole run; drives the schedule of `EcoMoE` layers.
            Leave it out to drive the schedule yourself.
        log: A JSONL file that gets every record, after those of earlier runs. While it cannot be
            written, records wait and watching goes on.
        every: Optimizer steps between two reports of the training traffic. In the Trainer its own
            ``logging_steps`` hold instead.
        thresholds: ``"paper"``, ``"relative"`` (to 16 experts) or a `Thresholds`.
        on_event: Called with each `Event`; what it raises reaches the loop, to stop a run,
            once all events of the report were handed over.
        view: What to show on the terminal: ``"report"``, the report at the end of a Trainer's run;
            ``"live"``, a view in place while training as well; ``"lines"``, a line for each record
            as well; or ``"off"``.
        token_buckets: Groups, at most 256, into which the ids of a language model's tokens are
            hashed, to tell in evaluation how far experts specialise in tokens; 0 for none. Takes
            4 bytes an expert and bucket, until reported.
        coactivation: In which traffic to count all pairs of experts that share a token:
            ``"eval"``, or ``"always"``, in training and generation as well, which takes 4 E² bytes
            a layer.

    Raises:
        ValueError: An argument breaks its rule, or the model has no layer to watch.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        optimizer: Optimizer | None = None,
        total_steps: int | None = None,
        log: str | os.PathLike[str] | None = None,
        every: int = 100,
        thresholds: str | Thresholds = "paper",
        on_event: EventHandler | None = None,
        view: str = "report",
        token_buckets: int = 0,
        coactivation: str = "eval",
    ) -> None:
        if type(every) is not int or every < 1:
            raise ValueError(f"every={every!r} must be an int >= 1; pass steps between reports")
        if view not in VIEWS:
            raise ValueError(f"view={view!r} must be one of {', '.join(VIEWS)}; pick one of these")
        if type(token_buckets) is not int or not 0 <= token_buckets <= MAX_BUCKETS:
            raise ValueError(
                f"token_buckets={token_buckets!r} must be an int from 0 to {MAX_BUCKETS}; pass 64"
            )
        if coactivation not in COACTIVATION:
            raise ValueError(
                f"coactivation={coactivation!r} must be one of {', '.join(COACTIVATION)}; pick one"
            )
        if on_event is not None and not callable(on_event):
            raise ValueError(f"on_event={on_event!r} must be callable; pass a function of an Event")
        if total_steps is not None:
            check_total_steps(total_steps)
        if model is None and (optimizer is not None or total_steps is not None):
            raise ValueError(
                "optimizer and total_steps have no effect without a model; pass the model first, "
                "or leave them out in a Trainer"
            )
        if log is not None:
            check_log(log)
        self.thresholds = Thresholds.named(thresholds)
        self.every = every
        self.on_event = on_event
        self.view = view
        self.token_buckets = token_buckets
        self.coactivation = coactivation
        self.log = log
        self.step_count = 0
        self._recorder = Recorder(thresholds=self.thresholds, view=view)
        self._readers: dict[type[nn.Module], Reader] = {}
        self._watch: Watch | None = None
        self._step_hook: RemovableHandle | None = None
        self._schedule: Schedule | None = None
        self._session: Any = None
        if model is not None:
            self.attach(model, optimizer=optimizer, total_steps=total_steps)

    @property
    def events(self) -> list[Event]:
        """All events so far."""
        return list(self._recorder.events)

    @property
    def schedule(self) -> Schedule | None:
        """The schedule that is driven, if any: by this monitor, or for the Trainer."""
        return self._schedule or getattr(self._session, "schedule", None)

    # -- attaching ---------------------------------------------------------------------------

    def attach(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | None = None,
        total_steps: int | None = None,
    ) -> None:
        """Start to watch a model; the constructor does so if it is given one.

        Attach before the model is first run under `torch.compile`: a compiled graph does not see
        hooks that come later.

        Raises:
            ValueError: The model has no layer to watch, this monitor watches one already, or an
                argument breaks its rule. Nothing has been changed then.
        """
        if self._watch is not None:
            raise ValueError("the monitor already watches a model; call close() first")
        self._watch = Watch(
            model,
            thresholds=self.thresholds,
            readers=self._readers,
            token_buckets=self.token_buckets,
            coactivation=self.coactivation,
        )
        _WATCHING.add(self)
        try:
            if self.log is not None and is_first_process():
                self._recorder.sink = JsonlSink(self.log)
            if total_steps is not None and has_eco_layers(model):
                self._schedule = Schedule(model, total_steps=total_steps, optimizer=optimizer)
            if optimizer is not None:
                inner = unwrap_optimizer(optimizer)
                self._step_hook = inner.register_step_post_hook(self._on_optimizer_step)
        except BaseException:
            self.close()
            raise

    def register_tap(self, module_class: type[nn.Module], read: Reader) -> None:
        """Teach the monitor to read a layer of another package; call it before `attach`.

        Args:
            module_class: A class whose forward makes the routing known, such as a router.
            read: From the module, its positional arguments and its output to a
                `ecomoe.ecology.taps.Decision`, which needs ``expert_ids_NK``, best first, and
                ``logits_NE``. Tensors only: it runs in every forward pass, compiled or not.

        Raises:
            ValueError: An argument breaks its rule, or a model is watched already.

        Example:
            >>> import torch
            >>> from ecomoe.ecology.taps import Decision
            >>> class Router(torch.nn.Linear):
            ...     def forward(self, x):
            ...         logits = super().forward(x)
            ...         return logits.topk(2).indices, logits
            >>> def read(module, args, output):
            ...     ids, logits = output
            ...     return Decision(ids, logits_NE=logits, probs_NE=logits.softmax(-1))
            >>> monitor = Monitor(view="off")
            >>> monitor.register_tap(Router, read)
            >>> model = torch.nn.Sequential(Router(4, 3))
            >>> monitor.attach(model)
            >>> _ = model(torch.ones(5, 4))
            >>> monitor.report().to_dict()["layers"][0]["num_tokens"]
            5
            >>> monitor.close()
        """
        if self._watch is not None:
            raise ValueError("a model is watched already; call register_tap before attach")
        if not isinstance(module_class, type) or not issubclass(module_class, nn.Module):
            raise ValueError(
                f"module_class={module_class!r} must be a class of nn.Module; pass the router's"
            )
        if not callable(read):
            raise ValueError(f"read={read!r} must be callable; pass a function to a Decision")
        self._readers[module_class] = read

    def close(self) -> None:
        """Report what was counted since the last report, and detach; nothing is left behind.

        Where several processes train together, all of them must close, and all report together.
        """
        self._detach(last_report=True)

    def _detach(self, *, last_report: bool) -> None:
        try:
            if last_report:
                self._cut(PHASES)
        finally:
            if self._step_hook is not None:
                self._step_hook.remove()
            for part in (self._recorder, self._watch, self._schedule, self._session):
                if part is not None:
                    part.close()
            self._step_hook = self._watch = self._schedule = self._session = None
            _WATCHING.discard(self)
            self._recorder.end_log()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # After an error the other processes may never come to report together.
        self._detach(last_report=kind is None or not is_distributed())

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy watches nothing: neither the model nor the files and the handler of this run.
        names = ("thresholds", "every", "view", "token_buckets", "coactivation")
        return partial(Monitor, **{name: getattr(self, name) for name in names}), ()

    # -- counting ----------------------------------------------------------------------------

    def step(self) -> None:
        """Count one optimizer step; only where no optimizer was given.

        Raises:
            ValueError: The optimizer, or a Trainer, counts the steps already.
        """
        if self._step_hook is not None or self._session is not None:
            raise ValueError(
                "step() must not be called where the optimizer or a Trainer counts the steps, or "
                "each would count twice; leave the call out"
            )
        try:
            self._advance(self.step_count + 1)
        finally:
            if self._schedule is not None:
                self._schedule.advance(self.step_count)

    def _on_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # The schedule knows which steps a gradient scaler has skipped.
        self._advance(self._schedule.step if self._schedule else self.step_count + 1)

    def _advance(self, step: int) -> None:
        # Processes report together: only the step is sure to be the same for all of them.
        together = is_distributed()
        try:
            if self._watch is not None and self._watch.evaluated and not together:
                self._cut(("eval",))
        finally:
            self.step_count = step  # what an event's handler raises must not cost a step
        if self._session is None and step % self.every == 0:
            self._cut(PHASES if together else ("train", "generate"))
            self._tell_silence()

    def _tell_silence(self) -> None:
        if self._watch is not None and not self._recorder.trajectory:
            self._watch.tell_silence(self.step_count)

    def evaluate(
        self,
        *,
        outputs: Tensor,
        targets: Tensor,
        shift: bool = False,
        domains: Tensor | None = None,
    ) -> None:
        """Count, for each expert, whether the evaluation pass just done was right.

        Call it after each batch, with all outputs of it. No second pass is needed: the routing of
        the last one is still at hand. A model of transformers that is given ``labels`` is judged
        without this call.

        Args:
            outputs: The model's class logits, ``(..., C)``.
            targets: True classes, ``(...)``; what is no class, such as -100, stands for none.
            shift: Whether position t predicts the target of t + 1 (causal language models).
            domains: Where the samples are from, whole numbers from 0 to 63, one a sample or one a
                prediction: tells how far experts specialise in domains.

        Raises:
            ValueError: The kinds or the shapes do not fit.
        """
        outcomes = outcomes_of(outputs, targets, shift=shift)
        domains_M = None if domains is None else domains_of(domains, outputs.shape[:-1])
        if self._watch is not None:
            with self._watch.guarded():
                self._watch.evaluate(
                    outcomes,
                    num_classes=outputs.shape[-1],
                    per_sample=outputs.dim() == 2,
                    domains_M=domains_M,
                )

    # -- reporting ---------------------------------------------------------------------------

    def report(self, phase: Phase | None = None) -> Report:
        """Return a report of what was counted up to now.

        Where several processes train together, it is of the last common report instead, so that
        one process alone may ask for it.

        Args:
            phase: ``"train"``, ``"eval"`` or ``"generate"``; by default evaluation where there
                was any, else training.

        Raises:
            ValueError: No token of that kind was seen.
        """
        if not is_distributed():
            self._cut(PHASES)
        return self._recorder.report(phase)

    def _cut(self, phases: Sequence[Phase], *, loss: float | None = None) -> Record | None:
        """Make a record of each phase that saw tokens; return the last one made.

        Args:
            phases: Kinds of traffic.
            loss: Of the evaluation, where the loop has a say in that.
        """
        if self._watch is None:
            return None
        raised: list[Event] = []
        record = None
        with self._watch.guarded():
            for phase, taken in self._watch.take(phases).items():
                record = build_record(
                    step=self.step_count,
                    phase=phase,
                    progress=self._progress(),
                    layers=taken.layers,
                    metrics=taken.metrics if loss is None else with_loss(taken.metrics, loss),
                    z=self.thresholds.interval_z,
                )
                raised += self._recorder.add(record, taken.choices)
        if self.on_event is not None:
            self._hand_over(raised, self.on_event)
        return record

    def _hand_over(self, events: Sequence[Event], handler: EventHandler) -> None:
        """Call the handler for every event, even where it raises; the first error is raised."""
        for position, event in enumerate(events, start=1):
            try:
                handler(event)
            except BaseException:
                with suppress(Exception):
                    self._hand_over(events[position:], handler)
                raise

    def _progress(self) -> float | None:
        # The schedule may be a step ahead of what is reported: an evaluation before that step.
        schedule = self.schedule
        return None if schedule is None else min(self.step_count / schedule.total_steps, 1.0)

    # -- state -------------------------------------------------------------------------------

    def state_dict(self) -> Record:
        """Return what a checkpoint needs to go on where this monitor stands, as plain data.

        Where several processes train, this is what one of them has counted since the last report;
        it counts for none but the process of the same rank that loads it.
        """
        return self._state(together=False)

    def _state(self, *, together: bool) -> Record:
        if self._watch is not None and self._watch.evaluated and not is_distributed():
            self._cut(("eval",))  # the evaluation is over: what saturation saw is not in the state
        return {
            "step": self.step_count,
            "history": self._recorder.state_dict(),
            "watch": None if self._watch is None else self._watch.state_dict(together=together),
            "schedule": None if self.schedule is None else dict(self.schedule.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the monitor that gave ``state`` stood; records after it are dropped.

        Raises:
            ValueError: It is no state of a monitor, or one of a model with other layers or of
                another ``total_steps``. Nothing has been changed then.
        """
        optional = (dict, type(None))
        check_keys(
            state,
            {"step": int, "history": dict, "watch": optional, "schedule": optional},
            name="state",
        )
        self._recorder.check_state(state["history"])
        if self._watch is not None and state["watch"] is not None:
            self._watch.check_state(state["watch"])
        if self._schedule is not None and state["schedule"] is not None:
            self._schedule.load_state_dict(state["schedule"])
        if self._watch is not None and state["watch"] is not None:
            self._watch.load_state_dict(state["watch"])
        self.step_count = state["step"]
        self._recorder.load_state_dict(state["history"])


def monitors_of(model: nn.Module) -> list[Monitor]:
    """Return the monitors that watch a model, or one that it is a part or a wrapper of."""
    return [each for each in _WATCHING if each._watch and each._watch.watches(model)]
