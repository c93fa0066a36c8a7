"""What is measured of a model: quality, and the ecology of every layer.

Axes: B samples, N tokens (one a sample in vision), D features, E experts, K choices, T tiers,
C labels, M probe tokens, F expert outputs, S slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ecomoe
from ecomoe import EcoMoE
from ecomoe.ecology.statistics import max_violation, ratios, shares
from ecomoe.ecology.taxonomy import Thresholds, categories_of
from ecomoe.ecology.tiers import effective_depth, flow_lift, hard_gradient, tier_sums
from ecomoe.experts import tier_of_experts

NUM_PROBES = 128
Record = dict[str, Any]
Batch = tuple[Tensor, Tensor]


class LayerCounts:
    """Sums over the test set of one layer's decisions."""

    def __init__(self, name: str, layer: EcoMoE, *, labels: int) -> None:
        experts, tiers = layer.num_experts, len(layer.tiers)
        self.name, self.layer = name, layer
        self.tier_of_E = torch.tensor(tier_of_experts(layer.tiers))
        self.top1_E, self.topk_E, self.correct_E, self.easy_E, self.hard_E = torch.zeros(5, experts)
        self.flow_TT = torch.zeros(tiers, tiers)
        self.joint_EC = torch.zeros(experts, labels)
        self.squares_E, self.samples = torch.zeros(experts), 0
        self.ids_NK: Tensor | None = None
        self.predicted_N: Tensor | None = None
        self.probe_MD: Tensor | None = None

    def read_router(self, module: nn.Module, args: tuple[Any, ...], routing: Any) -> None:
        """Forward hook of the router."""
        self.ids_NK = routing.expert_ids_NK.cpu()
        if self.probe_MD is None and len(args[0]):
            x_ND = args[0].detach()
            self.probe_MD = x_ND[:: max(len(x_ND) // NUM_PROBES, 1)][:NUM_PROBES]

    def read_experts(self, module: nn.Module, args: tuple[Any, ...], outputs_SF: Tensor) -> None:
        """Forward hook of experts that are classifiers: each token's first-choice prediction."""
        first_N = args[1].inverse_S[:: self.layer.top_k]
        self.predicted_N = outputs_SF[first_N].argmax(-1).cpu()

    def add(self, labels_N: Tensor, targets_N: Tensor, correct_N: Tensor, sure_N: Tensor) -> None:
        """Add the outcomes of the last forward pass."""
        assert self.ids_NK is not None
        first_N = self.ids_NK[:, 0]
        repeats = len(first_N) // max(len(targets_N), 1)  # tokens (patches) a sample in vision
        first_BM = first_N.view(len(targets_N), repeats)
        counts_BE = torch.zeros(len(first_BM), len(self.top1_E))
        counts_BE.scatter_add_(1, first_BM, torch.ones(first_BM.shape))
        self.squares_E += counts_BE.square().sum(0)
        self.samples += len(first_BM)
        if repeats > 1:
            labels_N, targets_N, correct_N, sure_N = (
                values.repeat_interleave(repeats)
                for values in (labels_N, targets_N, correct_N, sure_N)
            )
        if self.predicted_N is not None:
            correct_N = self.predicted_N == targets_N
        for sums_E, flags_N in (
            (self.top1_E, torch.ones(len(first_N))),
            (self.correct_E, correct_N.float()),
            (self.easy_E, (sure_N > 0.7).float()),
            (self.hard_E, (sure_N < 0.4).float()),
        ):
            sums_E.scatter_add_(0, first_N, flags_N)
        self.topk_E += torch.bincount(self.ids_NK.flatten(), minlength=len(self.topk_E))
        pairs = first_N * self.joint_EC.shape[1] + labels_N
        self.joint_EC += torch.bincount(pairs, minlength=self.joint_EC.numel()).view_as(
            self.joint_EC
        )
        if self.ids_NK.shape[1] > 1:
            tiers_N2 = self.tier_of_E[self.ids_NK[:, :2]]
            steps_N = tiers_N2[:, 0] * len(self.flow_TT) + tiers_N2[:, 1]
            self.flow_TT += torch.bincount(steps_N, minlength=self.flow_TT.numel()).view_as(
                self.flow_TT
            )

    def record(self, thresholds: Thresholds) -> Record:
        """Return the layer's part of a record; the keys that `ecomoe.Report` has mean the same."""
        layer = self.layer
        counts = {"top1": self.top1_E.tolist(), "topk": self.topk_E.tolist()}
        accuracy = ratios(self.correct_E.tolist(), counts["top1"])
        category = {
            basis: categories_of(
                values, total=sum(values), accuracies=accuracy, thresholds=thresholds
            )
            for basis, values in counts.items()
        }
        dead = {basis: names.count("DEAD") for basis, names in category.items()}
        relative = {
            basis: categories_of(
                values,
                total=sum(values),
                accuracies=accuracy,
                thresholds=Thresholds(relative=True),
            ).count("DEAD")
            for basis, values in counts.items()
        }
        by_tier = tier_sums(counts["top1"], layer.tiers)
        hard = ratios(tier_sums(self.hard_E.tolist(), layer.tiers), by_tier)
        easy = ratios(tier_sums(self.easy_E.tolist(), layer.tiers), by_tier)
        # Patches of one image go together: n of them tell as little as n^2 / sum(c^2) apart.
        effective_E = self.top1_E.square() / self.squares_E.clamp_min(1)
        information, normalised = mutual_information(
            self.joint_EC, effective_E=effective_E, samples=self.samples
        )
        living = [
            "DEAD" not in names for names in zip(category["top1"], category["topk"], strict=True)
        ]
        return {
            "name": self.name,
            "num_experts": layer.num_experts,
            "tiers": list(layer.tiers),
            "num_tokens": int(self.top1_E.sum()),
            "usage": {basis: shares(values) for basis, values in counts.items()},
            "accuracy": accuracy,
            "category": category,
            "dead": dead,
            "dead_relative": relative,
            "pure": category["top1"].count("PURE_CORE"),
            "max_violation": {basis: max_violation(values) for basis, values in counts.items()},
            "tier_usage": shares(by_tier),
            "depth": effective_depth(by_tier),
            "flow": (self.flow_TT / self.flow_TT.sum().clamp_min(1)).tolist(),
            "flow_lift": flow_lift(self.flow_TT.tolist()),
            "hard": hard,
            "easy": easy,
            "hard_gradient": hard_gradient(hard),
            "information": information,
            "information_of_living": expert_information(
                self.joint_EC, living, effective_E=effective_E
            ),
            "specialisation": normalised,
            "redundancy": self.redundancy(category["topk"]),
        }

    def redundancy(self, category: list[str]) -> float | None:
        """Return the mean cosine between living experts' outputs on the same probe tokens.

        Outputs are centred over features, so that class logits are compared as such. 1 is a mush.
        """
        living = [index for index, name in enumerate(category) if name != "DEAD"]
        if len(living) < 2 or self.probe_MD is None:
            return None
        experts = self.layer.experts
        dtype = next(experts.parameters()).dtype
        outputs_MEF = experts.all_outputs(self.probe_MD.to(dtype))[:, living].float()
        unit_MEF = F.normalize(outputs_MEF - outputs_MEF.mean(-1, keepdim=True), dim=-1)
        cosine_EE = (unit_MEF @ unit_MEF.mT).mean(0)
        pairs = len(living) * (len(living) - 1)
        return float((cosine_EE.sum() - cosine_EE.diagonal().sum()) / pairs)


def mutual_information(
    joint_EC: Tensor, *, effective_E: Tensor | None = None, samples: int | None = None
) -> tuple[float, float]:
    """Return what experts say about labels: nats, and ``2 I / (H(experts) + H(labels))``, 0 to 1.

    Counts of independent experts and labels share information by chance alone; its expectation
    (Miller and Madow) is subtracted.

    Args:
        joint_EC: Counts of tokens.
        effective_E: Independent tokens of each expert; all of its tokens by default.
        samples: Independent tokens in all; all of them by default.

    >>> mutual_information(torch.eye(2) * 1e6)[1] > 0.999
    True
    """
    joint_EC = joint_EC.double()
    share_E = joint_EC.sum(1) / joint_EC.sum().clamp_min(1)
    share_C = joint_EC.sum(0) / joint_EC.sum().clamp_min(1)
    told_E = _told(joint_EC, effective_E)
    by_all = (int((share_C > 0).sum()) - 1) / (2 * max(samples or float(joint_EC.sum()), 1))
    information = max(float((share_E * told_E).sum()) + by_all, 0.0)
    both = float(torch.special.entr(share_E).sum() + torch.special.entr(share_C).sum())
    return information, 2 * information / both if both > 0 else 0.0


def expert_information(
    joint_EC: Tensor, living: list[bool], *, effective_E: Tensor | None = None
) -> float:
    """Return what a living expert's tokens say about the label, nats, the mean over those experts.

    An expert tells ``KL(p(label | expert) || p(label))``; weighed by usage, the sum over experts is
    the mutual information. Unweighed, it does not depend on how many experts share the tokens. What
    few tokens tell by chance, ``(C - 1) / 2n``, is subtracted.

    Args:
        joint_EC: Counts of tokens.
        living: Experts that count.
        effective_E: Independent tokens of each expert; all of its tokens by default.

    >>> round(expert_information(torch.eye(4) * 1e6, [True] * 4), 3) == round(math.log(4), 3)
    True
    """
    kept_E = torch.tensor(living) & (joint_EC.sum(1) > 0)
    if not kept_E.any():
        return 0.0
    return max(float(_told(joint_EC, effective_E)[kept_E].mean()), 0.0)


def _told(joint_EC: Tensor, effective_E: Tensor | None) -> Tensor:
    """Return ``KL(p(label | expert) || p(label))`` less what is expected by chance, ``(E,)``."""
    joint_EC = joint_EC.double()
    labels_C, tokens_E = joint_EC.sum(0), joint_EC.sum(1)
    joint_EC, labels_C = joint_EC[:, labels_C > 0], labels_C[labels_C > 0]
    given_EC = joint_EC / tokens_E.clamp_min(1)[:, None]
    told_E = torch.special.xlogy(given_EC, given_EC * labels_C.sum() / labels_C).sum(1)
    independent_E = tokens_E if effective_E is None else effective_E.double()
    return told_E - (len(labels_C) - 1) / (2 * independent_E.clamp_min(1))


@contextmanager
def reading(model: nn.Module, *, labels: int) -> Iterator[list[LayerCounts]]:
    """Count what every EcoMoE layer decides; the hooks are gone afterwards."""
    counts = [
        LayerCounts(name, layer, labels=labels)
        for name, layer in model.named_modules()
        if isinstance(layer, EcoMoE)
    ]
    hooks = []
    try:
        for entry in counts:
            hooks.append(entry.layer.router.register_forward_hook(entry.read_router))
            if entry.layer.num_classes is not None:
                hooks.append(entry.layer.experts.register_forward_hook(entry.read_experts))
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    labels: int,
    thresholds: Thresholds | None = None,
    monitor: ecomoe.Monitor | None = None,
) -> Record:
    """Return quality and the ecology of every layer on a test set.

    Specialisation is information about the label in vision, and about the token itself in language,
    where inputs are ids.

    Args:
        model: Maps a batch's inputs to logits ``(..., C)``; left in evaluation mode.
        batches: Inputs and targets.
        labels: Classes, or ids of the vocabulary.
        thresholds: Of the categories; the paper's by default.
        monitor: Told of each batch, where one watches the model, and made to report.
    """
    model.eval()
    device = next(model.parameters()).device
    total = loss = top1 = top2 = 0.0
    with reading(model, labels=labels) as counts:
        for inputs, targets in batches:
            outputs = model(inputs.to(device))
            if monitor is not None:
                monitor.evaluate(outputs=outputs, targets=targets)
            logits = outputs.flatten(0, -2).float().cpu()
            targets_N = targets.flatten()
            labels_N = targets_N if inputs.is_floating_point() else inputs.flatten()
            probs = logits.softmax(-1)
            sure_N, predicted_N = probs.max(-1)
            correct_N = predicted_N == targets_N
            total += len(targets_N)
            loss += float(F.cross_entropy(logits, targets_N, reduction="sum"))
            top1 += float(correct_N.sum())
            best = logits.topk(2, dim=-1).indices
            top2 += float((best == targets_N[:, None]).any(-1).sum())
            for entry in counts:
                entry.add(labels_N, targets_N, correct_N, sure_N)
        layers = [entry.record(thresholds or Thresholds()) for entry in counts]
    if monitor is not None:
        monitor.report("eval")
    return {
        "loss": loss / total,
        "top1": top1 / total,
        "top2": top2 / total,
        "perplexity": math.exp(min(loss / total, 700.0)),
        "layers": layers,
        "dead": {
            basis: sum(layer["dead"][basis] for layer in layers) for basis in ("top1", "topk")
        },
    }


def temperature_scan(
    model: nn.Module, batches: list[Batch], *, labels: int, temperatures: Iterable[float]
) -> list[Record]:
    """Evaluate a trained model at several temperatures of its gates (section 4.11)."""
    layers = [module for module in model.modules() if isinstance(module, EcoMoE)]
    before = [layer.temperature.clone() for layer in layers]
    records = []
    try:
        for temperature in temperatures:
            for layer in layers:
                layer.temperature.fill_(temperature)
            record = evaluate(model, batches, labels=labels)
            record["temperature"] = temperature
            records.append(record)
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.temperature.copy_(value)
    return records
