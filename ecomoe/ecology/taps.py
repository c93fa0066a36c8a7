"""Hooks that read a model's routing without changing anything.

A tap adds what a router decided to a vector of sums on the router's device. Nothing waits for the
device, nothing is returned, no random number is drawn, and no per-token tensor outlives a forward
pass, with one exception: in evaluation the first choices of the last pass stay until its labels
are known.

Axes: N tokens, E experts, K experts chosen for a token, V sums of a layer, M predictions or probes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ecomoe.control import Control
from ecomoe.ecology import lockdown, statistics
from ecomoe.ecology.statistics import Layout, Outcomes
from ecomoe.hooks import ForwardHook

Phase: TypeAlias = Literal["train", "eval", "generate"]
MAX_CLASSES = 256
PHASES: tuple[Phase, Phase, Phase] = ("train", "eval", "generate")


class Decision(NamedTuple):
    """What a router decided for N tokens, whatever router it is.

    Attributes:
        expert_ids_NK: Chosen experts, best first.
        weights_NK: Gates of the chosen experts, or ``None``.
        logits_NE: Scores that the choice was made by, or ``None``.
        probs_NE: Distribution over experts, or ``None``.
        temperature: T of the scores.
        kept_NK: False for the choices that were dropped for lack of capacity, or ``None``.
    """

    expert_ids_NK: Tensor
    weights_NK: Tensor | None = None
    logits_NE: Tensor | None = None
    probs_NE: Tensor | None = None
    temperature: Tensor | float = 1.0
    kept_NK: Tensor | None = None


class Traffic:
    """What is known of the forward pass in progress, told by hooks on the whole model.

    Attributes:
        inside: Whether a forward pass of the whole model is in progress.
        phase: Its kind of traffic.
        evaluated: Whether evaluation passes were seen; the monitor resets it.
        outputs_shape: Of what the last evaluation pass gave, where that was a tensor or has logits.
    """

    def __init__(self) -> None:
        self.inside = False
        self.phase: Phase = "train"
        self.evaluated = False
        self.outputs_shape: torch.Size | None = None
        self.masks: dict[str, Tensor] = {}

    def begin(self, training: bool, inputs: dict[str, Any]) -> None:
        """Note the phase and the padding of a pass."""
        self.inside = True
        # generate() says whether to use a cache, or for which positions it wants logits.
        signs = ("past_key_values", "use_cache", "logits_to_keep")
        generating = any(inputs.get(sign) is not None for sign in signs)
        self.phase = "train" if training else "generate" if generating else "eval"
        self.masks = {}
        for side in ("", "decoder_"):
            mask = inputs.get(f"{side}attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 2:
                ids = inputs.get(f"{side}input_ids")
                if isinstance(ids, Tensor) and ids.dim() == 2:
                    mask = mask[:, -ids.shape[1] :]  # with a cache, only the last tokens come in
                self.masks[side] = mask.reshape(-1) != 0

    def end(self) -> None:
        """Forget the pass."""
        self.inside = False
        self.masks = {}

    def may_predict(self, num_predictions: int, *, num_classes: int) -> bool:
        """Whether so many predictions may be all that follow from the last evaluation pass.

        There is one a sample, one for each of several places in it, or, where classes are not the
        last axis, as many as there are outputs for all classes. If nothing is known, any may.
        """
        shape = self.outputs_shape
        if shape is None or len(shape) < 2:
            return True
        leading = [math.prod(shape[:axes]) for axes in range(1, len(shape))]
        return num_predictions in (*leading, math.prod(shape) / num_classes)

    def phase_of(self, module: nn.Module) -> Phase:
        """Return in which traffic a module runs; outside a pass its own mode tells."""
        if self.inside:
            return self.phase
        return "train" if module.training else "eval"

    def valid(self, num_tokens: int, *, side: str = "") -> Tensor | None:
        """Return which of a layer's tokens are not padding, ``(N,)``, or ``None`` if unknown."""
        for mask_N in (self.masks.get(side), *self.masks.values()):
            if mask_N is not None and mask_N.shape[0] == num_tokens:
                return mask_N
        return None


class Seen(NamedTuple):
    """First choices of one evaluation call, kept until its labels are known."""

    first_N: Tensor
    predicted_N: Tensor | None
    valid_N: Tensor | None


class LayerTap:
    """The sums of one layer, by phase.

    Args:
        name: The layer's name in the model.
        traffic: Shared by all taps of a model.
        tiers: Experts of each tier, where known before the first call; else one tier.
        device: Where the layer computes, where known before the first call.
        side: ``"decoder_"`` where an encoder-decoder model has masks of its own for the layer.

    Attributes:
        top_k: Experts per token, as last seen.
        refused: Why the layer cannot be read, if so; it is then left out of reports.
        control: The layer's control settings, if it has any.
        classes_EC: Judged tokens by first-choice expert and true class, where there are few enough
            classes (C of them).
    """

    control: Control | None = None

    def __init__(
        self,
        name: str,
        *,
        traffic: Traffic,
        tiers: tuple[int, ...] = (),
        device: torch.device | None = None,
        side: str = "",
    ) -> None:
        self.name = name
        self.traffic = traffic
        self.side = side
        self.tiers = tiers
        self.top_k = 0
        self.refused: str | None = None
        self.seen: list[Seen] = []
        self.sums: dict[Phase, Tensor] = {}
        self.classes_EC: Tensor | None = None
        if tiers and device is not None:
            self._allocate(device)

    def hooks(self) -> Iterator[tuple[nn.Module, str, Callable[..., None]]]:
        """Yield the modules to hook, ``"before"`` or ``"after"``, and the calls that read them."""
        raise NotImplementedError

    def _allocate(self, device: torch.device) -> None:
        self.layout = Layout(sum(self.tiers), len(self.tiers))
        # An inference tensor could not be added to outside inference mode.
        with torch.inference_mode(False):
            wide = statistics.wide_dtype(device)
            zeros_V = torch.zeros(self.layout.size, dtype=wide, device=device)
            self.sums = {
                phase: self.sums[phase].to(zeros_V) if phase in self.sums else zeros_V.clone()
                for phase in PHASES
            }
            tier_of = [tier for tier, size in enumerate(self.tiers) for _ in range(size)]
            self.tier_of_E = torch.tensor(tier_of, device=device)
            self.gumbel_ME = lockdown.gumbel_noise(self.layout.num_experts).to(device)

    def check(self, tiers: tuple[int, ...], sums: Mapping[str, Sequence[float]]) -> None:
        """Check saved sums.

        Raises:
            ValueError: They belong to a layer of other tiers.
        """
        if self.sums and tiers != self.tiers:
            raise ValueError(
                f"the state has tiers {tiers} for layer {self.name!r} of tiers {self.tiers}; load "
                "it into a monitor of the same model"
            )
        size = Layout(sum(tiers), len(tiers)).size
        if any(len(sums[phase]) != size for phase in PHASES):
            raise ValueError(
                f"the state of layer {self.name!r} must have {size} sums in each phase; pass what "
                "Monitor.state_dict() returned"
            )

    def load(self, tiers: tuple[int, ...], sums: Mapping[str, Sequence[float]]) -> None:
        """Set the sums to saved ones that pass `check`."""
        if not self.sums:
            self.tiers = tiers
            self._allocate(torch.device("cpu"))  # moves with the first call
        for phase, sums_V in self.sums.items():
            sums_V.copy_(torch.tensor(sums[phase], dtype=sums_V.dtype))

    def observe(self, decision: Decision, *, module: nn.Module) -> None:
        """Add one call's decisions to the sums, unless a backward pass is recomputing it."""
        ids_NK = decision.expert_ids_NK.detach()
        if recomputing() or ids_NK.shape[0] == 0:
            return
        if not self.sums:
            assert decision.logits_NE is not None
            self.tiers = (decision.logits_NE.shape[-1],)
            self._allocate(ids_NK.device)
        elif ids_NK.device != self.tier_of_E.device:
            self._allocate(ids_NK.device)
        self.top_k = ids_NK.shape[1]
        phase = self.traffic.phase_of(module)
        valid_N = self.traffic.valid(ids_NK.shape[0], side=self.side)
        with torch.no_grad(), torch.autocast(ids_NK.device.type, enabled=False):
            parts = statistics.routing_counts(
                ids_NK,
                layout=self.layout,
                weights_NK=decision.weights_NK,
                tier_of_E=self.tier_of_E,
                valid_N=valid_N,
                kept_NK=decision.kept_NK,
            )
            if decision.probs_NE is not None:
                parts |= statistics.distribution_counts(decision.probs_NE, valid_N=valid_N)
            if decision.logits_NE is not None:
                rows_M = lockdown.probe_rows(ids_NK.shape[0], device=ids_NK.device)
                parts |= lockdown.probe_counts(
                    decision.logits_NE.detach()[rows_M],
                    top_k=ids_NK.shape[1],
                    temperature=decision.temperature,
                    gumbel_ME=self.gumbel_ME,
                    valid_M=None if valid_N is None else valid_N[rows_M],
                )
            sums_V = self.sums[phase]
            sums_V.add_(self.layout.pack(parts, like=sums_V))
            if phase == "eval":
                self.traffic.evaluated = True
                if not self.traffic.inside:
                    self.seen.clear()
                judged_N = valid_N
                if decision.kept_NK is not None:
                    kept_N = decision.kept_NK[:, 0]
                    judged_N = kept_N if valid_N is None else kept_N & valid_N
                self.seen.append(Seen(ids_NK[:, 0].clone(), None, judged_N))

    def observe_executed(self, ids_NK: Tensor, *, module: nn.Module) -> None:
        """Add the slots as the experts received them, to compare with the router's decisions."""
        if recomputing() or ids_NK.shape[0] == 0 or not self.sums:
            return
        valid_N = self.traffic.valid(ids_NK.shape[0], side=self.side)
        sums_V = self.sums[self.traffic.phase_of(module)]
        with torch.no_grad():
            ones_NK = torch.ones_like(ids_NK, dtype=sums_V.dtype)
            slots_NK = ones_NK if valid_N is None else ones_NK * valid_N[:, None]
            inside_NK = (ids_NK >= 0) & (ids_NK < self.layout.num_experts)
            executed_E = statistics.sum_by(
                torch.where(inside_NK, ids_NK, 0),
                slots_NK * inside_NK,
                size=self.layout.num_experts,
            )
            sums_V.add_(self.layout.pack({"executed": executed_E}, like=sums_V))

    def extras(self) -> dict[str, Tensor]:
        """Return scalars of the layer's last call to report beside the sums."""
        return {}

    def observe_predictions(self, predicted_N: Tensor) -> None:
        """Note each token's class as its first-choice expert alone predicts it."""
        if self.seen and self.seen[-1].predicted_N is None and not recomputing():
            self.seen[-1] = self.seen[-1]._replace(predicted_N=predicted_N)

    def judge(
        self, outcomes: Outcomes, *, num_classes: int, easy_above: float, hard_below: float
    ) -> bool:
        """Count the outcomes of the last evaluation pass by expert.

        Returns:
            Whether the tokens could be matched with the predictions: one each, or a fixed number
            of tokens (patches) to a sample.
        """
        num_outcomes = outcomes.correct_M.shape[0]
        seen, self.seen = self.seen, []
        fits = [entry for entry in seen if num_outcomes and not len(entry.first_N) % num_outcomes]
        for first_N, predicted_N, valid_N in fits:
            repeats = first_N.shape[0] // num_outcomes
            targets_N, correct_N, confidence_N, known_N = (
                values_M.to(first_N.device).repeat_interleave(repeats) for values_M in outcomes[:4]
            )
            if predicted_N is not None:
                correct_N = predicted_N == targets_N
            if valid_N is not None:
                known_N = known_N & valid_N
            if num_classes <= MAX_CLASSES:
                self._count_classes(first_N, targets_N, known_N, num_classes=num_classes)
            parts = statistics.outcome_counts(
                first_N,
                layout=self.layout,
                correct_N=correct_N,
                confidence_N=confidence_N,
                valid_N=known_N,
                easy_above=easy_above,
                hard_below=hard_below,
            )
            sums_V = self.sums["eval"]
            sums_V.add_(self.layout.pack(parts, like=sums_V))
        return len(fits) == len(seen)

    def _count_classes(
        self, first_N: Tensor, targets_N: Tensor, known_N: Tensor, *, num_classes: int
    ) -> None:
        shape = (self.layout.num_experts, num_classes)
        if self.classes_EC is None or self.classes_EC.shape != shape:
            with torch.inference_mode(False):
                self.classes_EC = torch.zeros(
                    shape, dtype=self.sums["eval"].dtype, device=first_N.device
                )
        cells_N = first_N * num_classes + torch.where(known_N, targets_N, 0)
        counts = statistics.sum_by(
            cells_N, known_N.to(self.classes_EC.dtype), size=self.classes_EC.numel()
        )
        self.classes_EC.add_(counts.view(shape))


class RootTap:
    """Reads the whole model's inputs and, in evaluation, its outputs and labels.

    Args:
        model: The whole model.
        traffic: Told of each pass.
        on_begin: Called at the start of each pass.
        on_outputs: Called at the end of an evaluation pass with the outputs and the inputs by name.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        traffic: Traffic,
        on_begin: Callable[[], None],
        on_outputs: Callable[[Any, dict[str, Any]], None],
    ) -> None:
        self.traffic = traffic
        self.on_begin = on_begin
        self.on_outputs = on_outputs
        while isinstance(
            inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module
        ):
            model = inner  # a compiled or a distributed wrapper takes *args
        parameters = inspect.signature(model.forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.names, args, strict=False)) | kwargs

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if not recomputing():
            self.traffic.begin(module.training, self._inputs(args, kwargs))
            self.on_begin()

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> None:
        """Forward hook, called even where the forward raised."""
        if recomputing():
            return
        phase = self.traffic.phase
        self.traffic.end()
        if phase == "eval" and outputs is not None:
            logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
            self.traffic.outputs_shape = logits.shape if isinstance(logits, Tensor) else None
            self.on_outputs(outputs, self._inputs(args, kwargs))


def recomputing() -> bool:
    """Whether a backward pass runs this forward again (gradient checkpointing)."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def attach_taps(
    taps: Sequence[LayerTap], root: RootTap, model: nn.Module, guard: Callable[..., Any]
) -> list[RemovableHandle]:
    """Register all hooks, each wrapped by ``guard``; on a failure none is left."""
    handles: list[RemovableHandle] = []
    try:
        before, after = ForwardHook(guard(root.before)), ForwardHook(guard(root.after))
        handles.append(model.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(model.register_forward_hook(after, with_kwargs=True, always_call=True))
        for tap in taps:
            for module, when, call in tap.hooks():
                hook = ForwardHook(guard(call))
                if when == "before":
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(hook))
    except BaseException:
        remove(handles)
        raise
    return handles


def remove(handles: list[RemovableHandle]) -> None:
    """Remove hooks and forget them."""
    for handle in handles:
        handle.remove()
    handles.clear()
