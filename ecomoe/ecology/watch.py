"""Hooks on one model, from attaching to closing, and the protection of the run from them.

Axes: M predictions.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from ecomoe.ecology import statistics, taps, transfer
from ecomoe.ecology.layer_state import (
    check_layer_state,
    layer_state,
    load_layer_state,
    was_compared,
)
from ecomoe.ecology.outcomes import Outcomes, outcomes_of
from ecomoe.ecology.readers import Reader, find_taps
from ecomoe.ecology.recorder import check_keys
from ecomoe.ecology.records import layer_record, metrics_record
from ecomoe.ecology.saturation import Choices
from ecomoe.ecology.taxonomy import Thresholds
from ecomoe.ecology.traffic import PHASES, Phase, RootTap, Traffic

Record = dict[str, Any]


class Taken(NamedTuple):
    """What was counted of one kind of traffic.

    Attributes:
        layers: Records of the layers that saw tokens.
        metrics: The outcome over all predictions.
        choices: By layer those for probed tokens.
    """

    layers: list[Record]
    metrics: Record
    choices: dict[str, Choices]


class Watch:
    """Counts what the routers of a model decide and, in evaluation, how that went.

    Args:
        model: What to watch.
        thresholds: Unscaled.
        readers: How to read modules of other packages, by their class.
        token_buckets: Groups of token ids whose experts are counted; 0 for none.
        coactivation: ``"eval"``, or ``"always"``: in which traffic pairs of experts are counted.

    Attributes:
        handles: Of all hooks; whoever adds one has it removed with the others.
        taps: One for each layer that is watched.
        num_classes: Classes of the task, once known.
        failed: Whether the watching has ended with an error.

    Raises:
        ValueError: The model has no layer to watch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        thresholds: Thresholds,
        readers: Mapping[type[nn.Module], Reader] | None = None,
        token_buckets: int = 0,
        coactivation: str = "eval",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={type(model).__name__} must be an nn.Module; pass the model")
        self.thresholds = thresholds
        self.handles: list[RemovableHandle] = []
        self.num_classes: int | None = None
        self.failed = False
        self._all_know = False
        self._traffic = Traffic(token_buckets=token_buckets, coactivation=coactivation)
        self._outcomes_3: Tensor | None = None
        self._judged = False
        self._shift = predicts_next_token(model)
        self._warned: set[str] = set()
        self.taps = find_taps(model, traffic=self._traffic, readers=readers or {})
        if not self.taps:
            raise ValueError(
                f"model={type(model).__name__} has no mixture-of-experts layer to watch; convert "
                "it first with ecomoe.convert(model, ...), or name its class to register_tap"
            )
        self._model = model
        self._readers = readers or {}
        self._known = weakref.WeakSet(model.modules())
        root = RootTap(
            model,
            traffic=self._traffic,
            on_begin=self._begin_pass,
            on_outputs=self._judge_outputs,
        )
        self.handles = taps.attach_taps(self.taps, root, model, self._guard)

    def watches(self, model: nn.Module) -> bool:
        """Say whether this is the model, a part of it or a wrapper around it."""
        return any(module in self._known for module in model.modules())

    def close(self) -> None:
        """Remove all hooks."""
        taps.remove(self.handles)

    @property
    def evaluated(self) -> bool:
        """Whether there was evaluation traffic since it was last taken."""
        return self._traffic.evaluated

    def take(self, phases: Sequence[Phase]) -> dict[Phase, Taken]:
        """Take the counts of some phases, in one transfer a device; they start anew at zero.

        Where several processes train together, all of them must call this together. If the
        watching has failed in one of them, it ends in all.

        Returns:
            What was counted, by phase that saw tokens.
        """
        phases = tuple(phases)
        extents = self._meet() if is_distributed() else None
        if self.failed:
            return {}
        self._look_for_new_layers()
        taken, outcomes_3 = transfer.take_sums(
            self.taps,
            phases,
            extents=extents,
            outcomes_3=self._outcomes_3 if "eval" in phases else None,
        )
        for tap in self.taps:
            if tap.refused is not None:
                self._tell_refusal(tap)
        found: dict[Phase, Taken] = {}
        for phase in phases:
            read = [
                tap
                for tap in self.taps
                if tap.name in taken and self._readable(tap, taken[tap.name], phase)
            ]
            layers = [self._layer_record(tap, taken[tap.name], phase) for tap in read]
            if layers and phase == "eval":
                choices = {tap.name: taken[tap.name].choices for tap in read}
                known = {name: of_layer for name, of_layer in choices.items() if of_layer}
                found[phase] = Taken(layers, metrics_record(outcomes_3.tolist()), known)
            elif layers:
                found[phase] = Taken(layers, {}, {})
        if "eval" in phases:
            self._traffic.evaluated = False
            self._traffic.data = None
            self._outcomes_3 = None
        return found

    def tell_silence(self, steps: int) -> None:
        """Warn that no layer was called although the model takes steps."""
        if not self.failed and not any(tap.refused for tap in self.taps):
            self._warn(
                "silence",
                f"in {steps} steps no layer that the monitor watches was called; a model that ran "
                "compiled before the monitor was attached does not see its hooks: attach first, or "
                "call torch.compiler.reset() after attaching",
            )

    def _look_for_new_layers(self) -> None:
        """Warn of layers that have come into the model since it is watched."""
        if all(module in self._known for module in self._model.modules()):
            return
        self._known.update(self._model.modules())
        hooked = {id(module) for tap in self.taps for module, _, _ in tap.hooks()}
        found = find_taps(self._model, traffic=Traffic(), readers=self._readers)
        names = [t.name for t in found if not any(id(m) in hooked for m, _, _ in t.hooks())]
        if names:
            self._warn(
                "new",
                f"layers {', '.join(names)} came into the model after the monitor was attached, so "
                "they are not watched; call close() and attach(model, ...) again after converting",
            )

    def _layer_record(self, tap: taps.LayerTap, taken: transfer.Taken, phase: Phase) -> Record:
        return layer_record(
            tap.name,
            taken.sums[phase],
            layout=tap.layouts[phase],
            layer_tiers=tap.tiers,
            top_k=tap.top_k,
            thresholds=self.thresholds,
            control=tap.control,
            extras=taken.extras,
            labels=taken.labels if phase == "eval" else {},
            nearest=taken.nearest if phase == "eval" else None,
            num_classes=self.num_classes,
        )

    def _meet(self) -> list[transfer.Extent] | None:
        """Hear how the other processes stand; return what there is of all, if that fits."""
        if self._all_know:
            return None
        self._all_know = True  # should this exchange itself fail, it is not tried again
        failed, num_classes, extents = transfer.agree(
            self.taps, failed=self.failed, num_classes=self.num_classes or 0
        )
        self.num_classes = num_classes or None
        self._all_know = failed
        if failed and not self.failed:
            self._stop("an error in another process, which tells it")
        if extents is None:
            self._warn(
                "reduce",
                "processes have layers of different sizes, or labels of different numbers of "
                "classes: counts are of this one alone",
            )
        return extents

    def _readable(self, tap: taps.LayerTap, taken: transfer.Taken, phase: Phase) -> bool:
        """Whether a layer saw tokens, and its experts received what its router decided."""
        sums = tap.layouts[phase].unpack(taken.sums[phase])
        executed_E = sums["executed"]
        if tap.refused is None and executed_E.any() and not executed_E.equal(sums["topk"]):
            tap.refused = (
                f"its router decided {sums['topk'].long().tolist()} slots by expert, but its "
                f"experts received {executed_E.long().tolist()}"
            )
            self._tell_refusal(tap)
        if tap.refused is not None:
            return False
        return bool(sums["num_tokens"] > 0)

    def _tell_refusal(self, tap: taps.LayerTap) -> None:
        self._warn(tap.name, f"layer {tap.name!r} is left out of the report: {tap.refused}")

    def evaluate(
        self,
        outcomes: Outcomes,
        *,
        num_classes: int,
        per_sample: bool,
        domains_M: Tensor | None = None,
    ) -> None:
        """Count the outcomes of the evaluation pass just done; the first call for a pass counts.

        Args:
            outcomes: Of all predictions.
            num_classes: Classes that the predictions are of.
            per_sample: Whether there is one prediction a sample: then classes make the task's
                complexity, which a vocabulary does not.
            domains_M: Domain of each prediction.
        """
        if self._judged or self.failed:
            return
        self._judged = True
        self.num_classes = num_classes if per_sample and num_classes > 1 else None
        num_outcomes = outcomes.correct_M.shape[0]
        fits = self._traffic.may_predict(num_outcomes, num_classes=num_classes)
        for tap in self.taps if fits else ():
            fits &= tap.judge(
                outcomes,
                num_classes=num_classes,
                easy_above=self.thresholds.easy_confidence,
                hard_below=self.thresholds.hard_confidence,
                domains_M=domains_M,
            )
        wide = statistics.wide_dtype(outcomes.valid_M.device)
        sums = (outcomes.correct_M & outcomes.valid_M, outcomes.valid_M, outcomes.losses_M)
        sums_3 = torch.stack([values_M.to(wide).sum() for values_M in sums])
        self._outcomes_3 = (
            sums_3 if self._outcomes_3 is None else self._outcomes_3.to(sums_3) + sums_3
        )
        if not fits:
            self._warn(
                "match",
                f"{num_outcomes} predictions do not fit the tokens of the last evaluation pass, so "
                "they count in the overall accuracy but not by expert; call evaluate after each "
                "batch, with all outputs of that batch, one a token (shift=True where position t "
                "predicts t + 1, in place of cutting one off)",
            )

    def _begin_pass(self) -> None:
        self._judged = False
        self._traffic.outputs_shape = None
        for tap in self.taps:
            tap.seen.clear()

    def _judge_outputs(self, outputs: Any, inputs: Mapping[str, Any]) -> None:
        labels = inputs.get("labels")
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if not isinstance(labels, Tensor) or not isinstance(logits, Tensor):
            return
        if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
            return  # a regression, or a task whose accuracy is not one class per position
        self.evaluate(
            outcomes_of(logits, labels, shift=self._shift),
            num_classes=logits.shape[-1],
            per_sample=logits.dim() == 2,
        )

    def state_dict(self, *, together: bool = False) -> Record:
        """Return what was not taken yet, and what later records need, as plain data.

        Args:
            together: Where several processes train, whether all of them call this at once; then
                the state of the first one holds what all have counted.
        """
        layers: Record = {}
        outcomes = [0.0] * 3
        extents = self._meet() if together and is_distributed() else None
        if not self.failed:
            taken, outcomes_3 = transfer.take_sums(
                self.taps, PHASES, restart=False, extents=extents, outcomes_3=self._outcomes_3
            )
            called = [tap for tap in self.taps if tap.name in taken]
            layers = {tap.name: layer_state(tap, taken[tap.name]) for tap in called}
            outcomes = outcomes_3.tolist()
        return {
            "rank": _rank(),
            "sums": layers,
            "outcomes": outcomes,
            "num_classes": self.num_classes,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Check a state before anything is changed.

        Raises:
            ValueError: It belongs to a model with other layers, or did not come from `state_dict`.
        """
        optional = (int, type(None))
        kinds = {"rank": int, "sums": dict, "outcomes": list}
        check_keys(state, {**kinds, "num_classes": optional}, name="state['watch']")
        outcomes = state["outcomes"]
        if len(outcomes) != 3 or not all(isinstance(value, int | float) for value in outcomes):
            raise ValueError(
                f"state['watch']['outcomes']={outcomes!r} must be three numbers; pass what "
                "Monitor.state_dict() returned"
            )
        by_name = {tap.name: tap for tap in self.taps}
        if not set(state["sums"]) <= set(by_name):
            raise ValueError(
                f"the state has layers {sorted(state['sums'])}, the model {sorted(by_name)}; load "
                "it into a monitor of the same model"
            )
        for name, of_layer in state["sums"].items():
            check_layer_state(by_name[name], of_layer)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that passes `check_state`.

        What one process has counted is loaded by none but itself, or it would count twice.
        """
        self.num_classes = state["num_classes"]
        by_name = {tap.name: tap for tap in self.taps}
        if state["rank"] != _rank():
            for tap in self.taps:
                if tap.sums:
                    tap.restart(PHASES)
            for name, of_layer in state["sums"].items():
                by_name[name].compared = was_compared(of_layer)  # once an evaluation is enough
            return
        for name, of_layer in state["sums"].items():
            load_layer_state(by_name[name], of_layer)
        self._traffic.evaluated = any("eval" in tap.sums for tap in self.taps)
        if any(state["outcomes"]):
            device = self.taps[0].device if self.taps[0].sums else torch.device("cpu")
            wide = statistics.wide_dtype(device)
            self._outcomes_3 = torch.tensor(state["outcomes"], dtype=wide, device=device)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep an error of the monitor's own out of the training: the one seam that may."""
        try:
            yield
        except Exception as error:
            self._stop(f"an error of its own; the training goes on: {_told(error)}")

    def _guard(self, call: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: Any) -> None:
            try:
                call(*args)
            except Exception as error:
                self._stop(f"an error of its own; the training goes on: {_told(error)}")

        return guarded

    def _stop(self, why: str) -> None:
        self.failed = True
        self.close()
        self._warn("stopped", f"ecomoe.Monitor stopped watching after {why}")

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, stacklevel=3)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def is_distributed() -> bool:
    """Whether several processes train together."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def is_first_process() -> bool:
    """Whether this process writes what all have counted."""
    return _rank() == 0


def _rank() -> int:
    return distributed.get_rank() if is_distributed() else 0


def predicts_next_token(model: nn.Module) -> bool:
    """Whether a model of transformers compares position t with the label of t + 1."""
    loss_type = getattr(model, "loss_type", None)
    if loss_type is not None:
        return bool(loss_type == "ForCausalLM")
    names = [cls.__name__ for cls in type(model).__mro__]
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
