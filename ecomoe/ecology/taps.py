"""Hooks that read a model's routing without changing anything.

A tap adds what a router decided to a vector of sums on the router's device. Nothing waits for the
device, nothing is returned, no random number is drawn, and no per-token tensor outlives a forward
pass, with two exceptions: in evaluation the first choices of the last pass stay until its labels
are known, and the choices for 64 tokens of the first until the next report.

Axes: N tokens, E experts, K experts chosen for a token, V sums of a layer, M predictions, probes or
tokens of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ecomoe.control import Control
from ecomoe.ecology import lockdown, redundancy, statistics
from ecomoe.ecology.outcomes import Outcomes, Seen, seen_in_place
from ecomoe.ecology.statistics import LabelKind, Layout
from ecomoe.ecology.traffic import PHASES, Phase, RootTap, Traffic, known_of, recomputing
from ecomoe.hooks import ForwardHook
from ecomoe.routers import Part

MAX_CLASSES = 256
MAX_DOMAINS = 64


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


class Probe(NamedTuple):
    """The choices for a few tokens of an evaluation's first call, to compare with later ones.

    Attributes:
        data: Fingerprint of the model's inputs, a scalar.
        valid_M: False for padding, and for a token that is there already.
        ids_MK: Chosen experts, small integers.
    """

    data: Tensor
    valid_M: Tensor
    ids_MK: Tensor


class Nearest(NamedTuple):
    """For each expert the one whose outputs are most like its own, in an evaluation's first call.

    Attributes:
        compared: Tokens that it rests on, a scalar.
        ids_E: The other expert's id.
        cosine_E: Their cosine, summed over the tokens.
    """

    compared: Tensor
    ids_E: Tensor
    cosine_E: Tensor


class LayerTap:
    """The sums of one layer, by phase.

    There is room for training from the first call on; for evaluation and generation from their
    first token until they are reported.

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
        sums: By phase the vector of the sums, of the layout of that phase in ``layouts``.
        labels: Evaluated tokens by first-choice expert and label, ``(E, labels)``, by the kind of
            label: ``"class"``, where there are few enough, ``"token"`` and ``"domain"``; exact up
            to 2**31 tokens.
        probe: The choices for a few tokens since the evaluation began.
        nearest: Which experts' outputs were most alike in it.
        compared: Whether the experts' outputs were compared since then.
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
        self.layouts: dict[Phase, Layout] = {}
        self.sums: dict[Phase, Tensor] = {}
        self.labels: dict[LabelKind, Tensor] = {}
        self.probe: Probe | None = None
        self.nearest: Nearest | None = None
        self.compared = False
        if tiers and device is not None:
            self.allocate(device)

    def hooks(self) -> Iterator[tuple[nn.Module, str, Callable[..., None]]]:
        """Yield the modules to hook, ``"before"`` or ``"after"``, and the calls that read them."""
        raise NotImplementedError

    def allocate(self, device: torch.device) -> None:
        """Make room for the sums on a device; those that are there move along."""
        num_experts, num_tiers = self.num_experts, len(self.tiers)
        always = self.traffic.coactivation == "always"
        self.layouts = {
            phase: Layout(
                num_experts,
                num_tiers,
                outcomes=phase == "eval",
                paired=phase == "eval" or always,
            )
            for phase in PHASES
        }
        # An inference tensor could not be added to outside inference mode.
        with torch.inference_mode(False):
            wide = statistics.wide_dtype(device)
            self.sums = {phase: sums_V.to(device, wide) for phase, sums_V in self.sums.items()}
            if "train" not in self.sums:
                size = self.layouts["train"].size
                self.sums["train"] = torch.zeros(size, dtype=wide, device=device)
            constants = self.traffic.constants
            if (self.tiers, device) not in constants:
                tier_of = [tier for tier, size in enumerate(self.tiers) for _ in range(size)]
                gumbel_ME = lockdown.gumbel_noise(num_experts).to(device)
                constants[self.tiers, device] = torch.tensor(tier_of, device=device), gumbel_ME
            self.tier_of_E, self.gumbel_ME = constants[self.tiers, device]

    @property
    def num_experts(self) -> int:
        """E; 0 before the first call, where it is not known until then."""
        return sum(self.tiers)

    @property
    def device(self) -> torch.device:
        """Where the sums are; only after `allocate`."""
        return self.sums["train"].device

    @property
    def id_dtype(self) -> torch.dtype:
        """The smallest integers that ids of experts fit into."""
        if self.num_experts <= 2**8:
            return torch.uint8
        return torch.int16 if self.num_experts <= 2**15 else torch.int32

    def add(self, phase: Phase, parts: Mapping[str, Tensor]) -> None:
        """Add to the sums of a phase."""
        layout = self.layouts[phase]
        if phase not in self.sums:
            with torch.inference_mode(False):
                self.sums[phase] = self.sums["train"].new_zeros(layout.size)
        sums_V = self.sums[phase]
        sums_V.add_(layout.pack(parts, like=sums_V))

    def observe(self, decision: Decision, *, module: nn.Module) -> None:
        """Add one call's decisions to the sums, unless a backward pass is recomputing it."""
        ids_NK = decision.expert_ids_NK.detach()
        if recomputing() or ids_NK.shape[0] == 0:
            return
        if not self.sums:
            assert decision.logits_NE is not None
            self.tiers = (decision.logits_NE.shape[-1],)
            self.allocate(ids_NK.device)
        elif ids_NK.device != self.tier_of_E.device:
            self.allocate(ids_NK.device)
        self.top_k = ids_NK.shape[1]
        phase = self.traffic.phase_of(module)
        valid_N = self._known(self.traffic.masks, ids_NK)
        with torch.no_grad(), torch.autocast(ids_NK.device.type, enabled=False):
            parts = statistics.routing_counts(
                ids_NK,
                layout=self.layouts[phase],
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
            self.add(phase, parts)
            if phase == "eval":
                self.traffic.evaluated = True
                if not self.traffic.inside:
                    self.seen.clear()
                judged_N = valid_N
                if decision.kept_NK is not None:
                    kept_N = decision.kept_NK[:, 0]
                    judged_N = kept_N if valid_N is None else kept_N & valid_N
                first_N = ids_NK[:, 0]
                seen_N = first_N.to(self.id_dtype)
                self.seen.append(seen_in_place(seen_N, judged_N, self.part()))
                self._note_choices(ids_NK, valid_N)
                buckets_N = self._known(self.traffic.buckets, ids_NK)
                if buckets_N is not None:
                    self._count_labels(
                        "token", first_N, buckets_N, judged_N, num_labels=self.traffic.token_buckets
                    )

    def part(self) -> Part | None:
        """Return which of the model's tokens the call has, if not all."""
        return None

    def _known(self, by_side: dict[str, Tensor], tokens_ND: Tensor) -> Tensor | None:
        num_tokens, device = tokens_ND.shape[0], tokens_ND.device
        return known_of(by_side, num_tokens, device=device, side=self.side, part=self.part())

    def _note_choices(self, ids_NK: Tensor, valid_N: Tensor | None) -> None:
        if self.probe is not None or self.traffic.data is None or not self.traffic.inside:
            return
        rows_M = lockdown.probe_rows(ids_NK.shape[0], device=ids_NK.device)
        valid_M = _once_each(rows_M, valid_N)
        data = self.traffic.data.to(ids_NK.device)
        self.probe = Probe(data, valid_M, ids_NK[rows_M].to(self.id_dtype))

    def compare(
        self,
        x_ND: Tensor,
        outputs_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        *,
        experts: nn.Module,
        module: nn.Module,
    ) -> None:
        """Sum up how alike all experts' outputs are on a few tokens, once an evaluation.

        Args:
            x_ND: The layer's tokens.
            outputs_of: From a few of them ``(M, D)`` and their rows to every expert's output on
                each, ``(M, E, F)``, and whether these can be trusted, a scalar.
            experts: What is then run; where it draws random numbers, or its weights are not all
                here, nothing is compared.
            module: The module that is being called.
        """
        if self.compared or not self.sums or recomputing() or x_ND.shape[0] == 0:
            return
        if self.traffic.phase_of(module) != "eval" or not _can_be_probed(experts):
            return
        self.compared = True
        rows_M = lockdown.probe_rows(
            x_ND.shape[0], device=x_ND.device, num_probes=redundancy.NUM_PROBES
        )
        valid_M = _once_each(rows_M, self._known(self.traffic.masks, x_ND))
        with torch.no_grad():
            outputs_MEF, trusted = outputs_of(x_ND.detach()[rows_M], rows_M)
            with torch.autocast(x_ND.device.type, enabled=False):
                parts = redundancy.similarity_counts(outputs_MEF, valid_M=valid_M & trusted)
            if "nearest" in parts:
                ids_E = parts["nearest"].to(self.id_dtype)
                self.nearest = Nearest(parts["compared"], ids_E, parts["nearest_cosine"])
            self.add("eval", parts)

    def restart(self, phases: Sequence[Phase]) -> None:
        """Start to count anew at zero."""
        for phase in phases:
            if phase == "train":
                self.sums[phase].zero_()
            else:
                self.sums.pop(phase, None)
        if "eval" in phases:
            self.labels = {}
            self.probe = self.nearest = None
            self.compared = False

    def observe_executed(self, ids_NK: Tensor, *, module: nn.Module) -> None:
        """Add the slots as the experts received them, to compare with the router's decisions."""
        if recomputing() or ids_NK.shape[0] == 0 or not self.sums:
            return
        valid_N = self._known(self.traffic.masks, ids_NK)
        phase = self.traffic.phase_of(module)
        with torch.no_grad():
            ones_NK = torch.ones_like(ids_NK, dtype=self.sums["train"].dtype)
            slots_NK = ones_NK if valid_N is None else ones_NK * valid_N[:, None]
            inside_NK = (ids_NK >= 0) & (ids_NK < self.num_experts)
            executed_E = statistics.sum_by(
                torch.where(inside_NK, ids_NK, 0), slots_NK * inside_NK, size=self.num_experts
            )
            self.add(phase, {"executed": executed_E})

    def extras(self) -> dict[str, Tensor]:
        """Return scalars of the layer's last call to report beside the sums."""
        return {}

    def observe_predictions(self, predicted_N: Tensor) -> None:
        """Note each token's class as its first-choice expert alone predicts it."""
        if self.seen and self.seen[-1].predicted_N is None and not recomputing():
            self.seen[-1] = self.seen[-1]._replace(predicted_N=predicted_N)

    def judge(
        self,
        outcomes: Outcomes,
        *,
        num_classes: int,
        easy_above: float,
        hard_below: float,
        domains_M: Tensor | None = None,
    ) -> bool:
        """Count the outcomes of the last evaluation pass by expert.

        Returns:
            Whether the tokens could be matched with the predictions: one each, or a fixed number
            of tokens (patches) to a sample.
        """
        num_outcomes = outcomes.correct_M.shape[0]
        seen, self.seen = self.seen, []
        fits = [entry for entry in seen if num_outcomes and not len(entry.first_N) % num_outcomes]
        for small_N, predicted_N, valid_N in fits:
            first_N = small_N.long()
            repeats = first_N.shape[0] // num_outcomes
            targets_N, correct_N, confidence_N, known_N = (
                values_M.to(first_N.device).repeat_interleave(repeats) for values_M in outcomes[:4]
            )
            if predicted_N is not None:
                correct_N = predicted_N == targets_N
            if valid_N is not None:
                known_N = known_N & valid_N
            if num_classes <= MAX_CLASSES:
                self._count_labels("class", first_N, targets_N, known_N, num_labels=num_classes)
            if domains_M is not None:
                domains_N = domains_M.to(first_N.device).repeat_interleave(repeats)
                inside_N = (domains_N >= 0) & (domains_N < MAX_DOMAINS)
                inside_N = inside_N if valid_N is None else inside_N & valid_N
                self._count_labels("domain", first_N, domains_N, inside_N, num_labels=MAX_DOMAINS)
            parts = statistics.outcome_counts(
                first_N,
                layout=self.layouts["eval"],
                correct_N=correct_N,
                confidence_N=confidence_N,
                valid_N=known_N,
                easy_above=easy_above,
                hard_below=hard_below,
            )
            self.add("eval", parts)
        return len(fits) == len(seen)

    def _count_labels(
        self,
        kind: LabelKind,
        first_N: Tensor,
        labels_N: Tensor,
        known_N: Tensor | None,
        *,
        num_labels: int,
    ) -> None:
        shape = (self.num_experts, num_labels)
        if kind not in self.labels or self.labels[kind].shape != shape:
            with torch.inference_mode(False):
                self.labels[kind] = torch.zeros(shape, dtype=torch.int32, device=first_N.device)
        known_N = torch.ones_like(first_N, dtype=torch.bool) if known_N is None else known_N
        cells_N = first_N * num_labels + torch.where(known_N, labels_N, 0)
        counts = statistics.sum_by(cells_N, known_N.int(), size=self.labels[kind].numel())
        self.labels[kind].add_(counts.view(shape))


def _once_each(rows_M: Tensor, valid_N: Tensor | None) -> Tensor:
    """Return which of ascending rows are no padding and not there already, ``(M,)``."""
    valid_M = torch.diff(rows_M, prepend=rows_M.new_full((1,), -1)) > 0
    return valid_M if valid_N is None else valid_M & valid_N[rows_M]


def _can_be_probed(experts: nn.Module) -> bool:
    """Whether running experts once more is sure to change nothing and to need no other process."""
    parameters = [p for p in experts.parameters() if not p.is_meta and type(p) is nn.Parameter]
    return not any(part.training for part in experts.modules()) and (
        len(parameters) == len(list(experts.parameters()))
    )


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
