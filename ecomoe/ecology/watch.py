"""Hooks on one model, from attaching to closing, and the protection of the run from them.

Axes: M predictions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from ecomoe.ecology import statistics, taps, transfer
from ecomoe.ecology.readers import Reader, find_taps
from ecomoe.ecology.recorder import check_keys
from ecomoe.ecology.report import layer_record
from ecomoe.ecology.statistics import Outcomes
from ecomoe.ecology.taps import Phase, RootTap, Traffic
from ecomoe.ecology.taxonomy import Thresholds

Record = dict[str, Any]


class Watch:
    """Counts what the routers of a model decide and, in evaluation, how that went.

    Args:
        model: What to watch.
        thresholds: Unscaled.
        readers: How to read modules of other packages, by their class.

    Attributes:
        handles: Of all hooks; whoever adds one has it removed with the others.
        taps: One for each layer that is watched; none after an error.

    Raises:
        ValueError: The model has no layer to watch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        thresholds: Thresholds,
        readers: Mapping[type[nn.Module], Reader] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={type(model).__name__} must be an nn.Module; pass the model")
        self.thresholds = thresholds
        self.handles: list[RemovableHandle] = []
        self._traffic = Traffic()
        self._outcomes: list[Tensor] = []
        self._judged = False
        self._num_classes: int | None = None
        self._shift = predicts_next_token(model)
        self._warned: set[str] = set()
        self.taps = find_taps(model, traffic=self._traffic, readers=readers or {})
        if not self.taps:
            raise ValueError(
                f"model={type(model).__name__} has no mixture-of-experts layer to watch; convert "
                "it first with ecomoe.convert(model, ...), or name its class to register_tap"
            )
        root = RootTap(
            model,
            traffic=self._traffic,
            on_begin=self._begin_pass,
            on_outputs=self._judge_outputs,
        )
        self.handles = taps.attach_taps(self.taps, root, model, self._guard)

    def close(self) -> None:
        """Remove all hooks."""
        taps.remove(self.handles)
        self.taps = []

    @property
    def evaluated(self) -> bool:
        """Whether there was evaluation traffic since it was last taken."""
        return self._traffic.evaluated

    def take(self, phases: Sequence[Phase]) -> dict[Phase, tuple[list[Record], Record]]:
        """Take the counts of some phases, in one transfer a device; they start anew at zero.

        Returns:
            By phase that saw tokens: the records of the layers, and the outcome over all
            predictions.
        """
        taken = transfer.take_sums(self.taps, tuple(phases), reduce=self._reduce())
        for tap in self.taps:
            if tap.refused is not None:
                self._tell_refusal(tap)
        metrics = self._metrics() if "eval" in phases else {}
        found: dict[Phase, tuple[list[Record], Record]] = {}
        for phase in phases:
            layers = [
                layer_record(
                    tap.name,
                    taken[tap.name].sums[phase],
                    layout=tap.layout,
                    layer_tiers=tap.tiers,
                    top_k=tap.top_k,
                    thresholds=self.thresholds,
                    control=tap.control,
                    extras=taken[tap.name].extras,
                    classes_EC=taken[tap.name].classes_EC if phase == "eval" else None,
                    num_classes=self._num_classes,
                )
                for tap in self.taps
                if tap.name in taken and self._readable(tap, taken[tap.name].sums[phase])
            ]
            if layers:
                found[phase] = layers, metrics if phase == "eval" else {}
            if phase == "eval":
                self._traffic.evaluated = False
        return found

    def _readable(self, tap: taps.LayerTap, sums_V: Tensor) -> bool:
        """Whether a layer saw tokens, and its experts received what its router decided."""
        sums = tap.layout.unpack(sums_V)
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

    def _metrics(self) -> Record:
        if not self._outcomes and not is_distributed():
            return {}
        device = self.taps[0].sums["eval"].device if self.taps[0].sums else torch.device("cpu")
        nothing_3 = torch.zeros(3, dtype=statistics.wide_dtype(device), device=device)
        sums_3 = torch.stack([nothing_3, *(s.to(device) for s in self._outcomes)]).sum(0)
        self._outcomes.clear()
        if is_distributed():
            distributed.all_reduce(sums_3)
        correct, judged, losses = sums_3.tolist()
        if not judged:
            return {}
        loss = losses / judged if math.isfinite(losses) else None  # JSON knows no NaN
        return {"accuracy": correct / judged, "loss": loss, "judged": int(judged)}

    def _reduce(self) -> transfer.Reduce | None:
        if not is_distributed():
            return None

        def reduce(sums_V: Tensor) -> None:
            # Layers are found at their first call: where a process has not called one, sums differ
            # in length, and adding them up would mix layers.
            sizes_2 = torch.tensor([sums_V.shape[0], -sums_V.shape[0]], device=sums_V.device)
            distributed.all_reduce(sizes_2, op=distributed.ReduceOp.MAX)
            if (sizes_2.sum() == 0).item():
                distributed.all_reduce(sums_V)
            else:
                self._warn(
                    "reduce", "processes have called different layers: counts are of this one alone"
                )

        return reduce

    def evaluate(self, outcomes: Outcomes, *, num_classes: int, per_sample: bool) -> None:
        """Count the outcomes of the evaluation pass just done; the first call for a pass counts.

        Args:
            outcomes: Of all predictions.
            num_classes: Classes that the predictions are of.
            per_sample: Whether there is one prediction a sample: then classes make the task's
                complexity, which a vocabulary does not.
        """
        if self._judged:
            return
        self._judged = True
        self._num_classes = num_classes if per_sample and num_classes > 1 else None
        num_outcomes = outcomes.correct_M.shape[0]
        fits = self._traffic.may_predict(num_outcomes, num_classes=num_classes)
        for tap in self.taps if fits else ():
            fits &= tap.judge(
                outcomes,
                num_classes=num_classes,
                easy_above=self.thresholds.easy_confidence,
                hard_below=self.thresholds.hard_confidence,
            )
        wide = statistics.wide_dtype(outcomes.valid_M.device)
        sums = (outcomes.correct_M & outcomes.valid_M, outcomes.valid_M, outcomes.losses_M)
        self._outcomes.append(torch.stack([values_M.to(wide).sum() for values_M in sums]))
        if not fits:
            self._warn(
                "match",
                f"{num_outcomes} predictions do not fit the tokens of the last evaluation pass, so "
                "they count in the overall accuracy but not by expert; call evaluate after each "
                "batch, with all outputs of that batch",
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
            statistics.outcomes_of(logits, labels, shift=self._shift),
            num_classes=logits.shape[-1],
            per_sample=logits.dim() == 2,
        )

    def sums(self) -> dict[str, Record]:
        """Return the counts that were not taken yet, by layer, as plain data."""
        taken = transfer.take_sums(self.taps, taps.PHASES, restart=False)
        return {
            tap.name: {
                "tiers": list(tap.tiers),
                "sums": {phase: v.tolist() for phase, v in taken[tap.name].sums.items()},
            }
            for tap in self.taps
            if tap.name in taken
        }

    def check_sums(self, state: Mapping[str, Any]) -> None:
        """Check counts that `sums` gave before anything is changed.

        Raises:
            ValueError: They belong to a model with other layers, or are no such counts.
        """
        by_name = {tap.name: tap for tap in self.taps}
        if not set(state) <= set(by_name):
            raise ValueError(
                f"the state has layers {sorted(state)}, the model {sorted(by_name)}; load it into "
                "a monitor of the same model"
            )
        for name, of_layer in state.items():
            part = f"state['sums'][{name!r}]"
            check_keys(of_layer, {"tiers": list, "sums": dict}, name=part)
            check_keys(of_layer["sums"], dict.fromkeys(taps.PHASES, list), name=part)
            by_name[name].check(tuple(of_layer["tiers"]), of_layer["sums"])

    def load_sums(self, state: Mapping[str, Record]) -> None:
        """Go on from counts that pass `check_sums`."""
        by_name = {tap.name: tap for tap in self.taps}
        for name, of_layer in state.items():
            by_name[name].load(tuple(of_layer["tiers"]), of_layer["sums"])

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep an error of the monitor's own out of the training: the one seam that may."""
        try:
            yield
        except Exception as error:
            self._stop(error)

    def _guard(self, call: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: Any) -> None:
            try:
                call(*args)
            except Exception as error:
                self._stop(error)

        return guarded

    def _stop(self, error: Exception) -> None:
        self.close()
        self._warn(
            "stopped",
            "ecomoe.Monitor stopped watching after an error of its own; the training goes on: "
            f"{type(error).__name__}: {error}",
        )

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, stacklevel=3)


def is_distributed() -> bool:
    """Whether several processes train together."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def is_first_process() -> bool:
    """Whether this process writes what all have counted."""
    return not is_distributed() or distributed.get_rank() == 0


def predicts_next_token(model: nn.Module) -> bool:
    """Whether a model of transformers compares position t with the label of t + 1."""
    loss_type = getattr(model, "loss_type", None)
    if loss_type is not None:
        return bool(loss_type == "ForCausalLM")
    names = [cls.__name__ for cls in type(model).__mro__]
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
