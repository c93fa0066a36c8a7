"""What is counted of a layer's routing, and what follows from the counts.

Everything counted is a plain sum, so counts of two batches, two micro-batches or two processes add
up to the counts of both. The counting functions run on the device and keep nothing that belongs to
one token; the others work on the host, on sums that were moved there once per report.

Two bases of usage are kept apart: ``top1`` counts each token at its first choice, ``topk`` counts
each of its slots.

Axes: N tokens, E experts, K experts chosen for a token, T tiers, R pairs of ranks, P pairs of
experts, M predictions, V all sums of a layer in one vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Basis: TypeAlias = Literal["top1", "topk"]
BASES: tuple[Basis, Basis] = ("top1", "topk")
LabelKind: TypeAlias = Literal["class", "token", "domain"]
LABEL_KINDS: tuple[LabelKind, ...] = ("class", "token", "domain")

# Above this the co-activation of all pairs would outweigh all other sums of a layer by far.
MAX_PAIRED_EXPERTS = 256


@dataclass(frozen=True)
class Layout:
    """Where each sum of a layer stands in its vector.

    Attributes:
        num_experts: E.
        num_tiers: T.
        outcomes: Whether there is room for what only an evaluation tells.
        paired: Whether there is room for the pairs of experts, the one sum that grows with E².
    """

    num_experts: int
    num_tiers: int = 1
    outcomes: bool = True
    paired: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each sum by name, in the order of the vector.

        ``num_tokens`` routed tokens; ``padding`` tokens left out; ``dropped`` slots that their
        expert had no capacity for; ``nonfinite`` tokens with a NaN or infinite logit; ``entropy``
        of the tokens' distributions, nats; ``probes`` tokens that were probed for lockdown, of
        which ``flips`` changed their set, with their ``margin``.
        By expert: ``top1`` first choices, ``topk`` slots, ``gate`` mass, ``executed`` slots as the
        experts themselves received them. By tiers: ``flow`` from the tier of the first to that of
        the second choice.

        Of an evaluation alone: ``judged`` first choices with a known outcome, of which
        ``correct``, ``easy`` and ``hard``, by expert; ``compared`` tokens that went through all
        experts, with the ``cosine`` of the outputs, in ``aligned`` passes with ``cka``.
        ``pairs`` of experts: tokens that chose both, (0, 1), (0, 2), ..., (1, 2), ...
        """
        experts, tiers = (self.num_experts,), (self.num_tiers, self.num_tiers)
        shapes: dict[str, tuple[int, ...]] = {}
        shapes |= dict.fromkeys(("num_tokens", "padding", "dropped", "nonfinite", "entropy"), ())
        shapes |= dict.fromkeys(("probes", "flips", "margin"), ())
        shapes |= {**dict.fromkeys(("top1", "topk", "gate"), experts), "flow": tiers}
        shapes["executed"] = experts
        if self.outcomes:
            shapes |= dict.fromkeys(("judged", "correct", "easy", "hard"), experts)
            shapes |= dict.fromkeys(("compared", "cosine", "aligned", "cka"), ())
        if self.paired and self.num_experts <= MAX_PAIRED_EXPERTS:
            shapes["pairs"] = (math.comb(self.num_experts, 2),)
        return shapes

    @property
    def size(self) -> int:
        """Length V of the vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def pack(self, parts: Mapping[str, Tensor], *, like: Tensor) -> Tensor:
        """Return the vector that holds ``parts`` and zeros elsewhere, ``(V,)``, as ``like``.

        Parts that have no place here are left out.
        """
        pieces: list[Tensor] = []
        gap = 0
        for name, shape in self.shapes.items():
            if name not in parts:
                gap += math.prod(shape)
                continue
            if gap:
                pieces.append(like.new_zeros(gap))
            gap = 0
            pieces.append(parts[name].to(like.dtype).reshape(-1))
        return torch.cat([*pieces, like.new_zeros(gap)])

    def unpack(self, sums_V: Tensor) -> dict[str, Tensor]:
        """Return the sums by name, as views of the vector."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        pieces = sums_V.split(sizes)
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }


def routing_counts(
    expert_ids_NK: Tensor,
    *,
    layout: Layout,
    weights_NK: Tensor | None = None,
    tier_of_E: Tensor | None = None,
    valid_N: Tensor | None = None,
    kept_NK: Tensor | None = None,
) -> dict[str, Tensor]:
    """Count the decisions of N tokens, on their device.

    Args:
        expert_ids_NK: Chosen experts, best first.
        layout: Sizes of the layer.
        weights_NK: Gate weights of the chosen experts; without them there is no ``gate``.
        tier_of_E: The tier of each expert; without it there is no ``flow``.
        valid_N: False for the tokens to leave out (padding); ``None`` for none.
        kept_NK: False for the slots that were dropped; they count as tokens, for no expert.

    Returns:
        Sums by name, fp64 (fp32 on devices without it), for `Layout.pack`.
    """
    num_tokens, top_k = expert_ids_NK.shape
    experts = layout.num_experts
    wide = wide_dtype(expert_ids_NK.device)
    all_counted = valid_N is None and kept_NK is None
    if valid_N is None:
        counted_N = expert_ids_NK.new_ones(num_tokens, dtype=wide)
        parts = {"num_tokens": counted_N.sum()}
    else:
        counted_N = valid_N.to(wide)
        parts = {"num_tokens": counted_N.sum(), "padding": (1 - counted_N).sum()}
    slots_NK = counted_N[:, None].expand(-1, top_k)
    if kept_NK is not None:
        parts["dropped"] = (slots_NK * ~kept_NK).sum()
        slots_NK = slots_NK * kept_NK
    parts |= {
        "top1": sum_by(expert_ids_NK[:, 0], slots_NK[:, 0], size=experts),
        "topk": sum_by(expert_ids_NK, slots_NK, size=experts),
    }
    if weights_NK is not None:
        # A NaN token must not poison the sums of all others.
        mass_NK = torch.nan_to_num(weights_NK.to(wide), nan=0.0, posinf=0.0, neginf=0.0)
        mass_NK = mass_NK if all_counted else mass_NK * slots_NK
        parts["gate"] = sum_by(expert_ids_NK, mass_NK, size=experts)
    if top_k > 1 and (shape := layout.shapes.get("pairs")):
        ranks = [(i, j) for i in range(top_k) for j in range(i + 1, top_k)]
        first_NR = torch.stack([expert_ids_NK[:, i] for i, _ in ranks], dim=1)
        second_NR = torch.stack([expert_ids_NK[:, j] for _, j in ranks], dim=1)
        tokens_NR = torch.stack([slots_NK[:, j] for _, j in ranks], dim=1)
        low_NR, high_NR = torch.minimum(first_NR, second_NR), torch.maximum(first_NR, second_NR)
        pair_NR = low_NR * (2 * experts - low_NR - 1) // 2 + high_NR - low_NR - 1
        # A router that may choose no expert says so twice with the same id.
        unlike_NR = low_NR < high_NR
        parts["pairs"] = sum_by(
            torch.where(unlike_NR, pair_NR, 0), tokens_NR * unlike_NR, size=shape[0]
        )
    if top_k > 1 and tier_of_E is not None:
        tiers_N2 = tier_of_E[expert_ids_NK[:, :2]]
        steps_N = tiers_N2[:, 0] * layout.num_tiers + tiers_N2[:, 1]
        parts["flow"] = sum_by(steps_N, slots_NK[:, 1], size=layout.num_tiers**2)
    return parts


def distribution_counts(probs_NE: Tensor, *, valid_N: Tensor | None = None) -> dict[str, Tensor]:
    """Sum the entropies of N tokens' distributions over experts and count the broken ones.

    Args:
        probs_NE: Distributions, shares of 1; a row with a NaN or an infinity counts as
            ``nonfinite`` and adds no entropy.
        valid_N: False for the tokens to leave out.
    """
    wide = wide_dtype(probs_NE.device)
    # `torch.special.entr` takes three times as long: its logarithm is not vectorised.
    tiny = torch.finfo(probs_NE.dtype).tiny
    entropy_N = -(probs_NE * probs_NE.clamp_min(tiny).log()).sum(-1).to(wide)
    finite_N = torch.isfinite(entropy_N)
    counted_N = finite_N if valid_N is None else finite_N & valid_N
    broken_N = ~finite_N if valid_N is None else ~finite_N & valid_N
    return {
        "entropy": torch.where(counted_N, entropy_N, 0.0).sum(),
        "nonfinite": broken_N.to(wide).sum(),
    }


def outcome_counts(
    first_N: Tensor,
    *,
    layout: Layout,
    correct_N: Tensor,
    confidence_N: Tensor,
    valid_N: Tensor | None = None,
    easy_above: float = 0.7,
    hard_below: float = 0.4,
) -> dict[str, Tensor]:
    """Count, by first-choice expert, tokens of known outcome, correct, easy and hard ones.

    Args:
        first_N: First-choice expert of each token.
        layout: Sizes of the layer.
        correct_N: Whether the prediction for the token is right.
        confidence_N: The model's highest class probability for it.
        valid_N: False for the tokens to leave out (padding, ignored labels).
        easy_above: A token is easy when the confidence is above this (section 4.10).
        hard_below: A token is hard when the confidence is below this (section 4.10).
    """
    wide = wide_dtype(first_N.device)
    ones_N = torch.ones_like(correct_N) if valid_N is None else valid_N
    outcomes = {
        "judged": ones_N,
        "correct": correct_N & ones_N,
        "easy": (confidence_N > easy_above) & ones_N,
        "hard": (confidence_N < hard_below) & ones_N,
    }
    return {
        name: sum_by(first_N, flags_N.to(wide), size=layout.num_experts)
        for name, flags_N in outcomes.items()
    }


def sum_by(ids: Tensor, values: Tensor, *, size: int) -> Tensor:
    """Return the sum of the values of each id, ``(size,)``; ids and values share any shape."""
    return values.new_zeros(size).scatter_add_(0, ids.reshape(-1), values.reshape(-1))


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the sums: fp64 counts exactly up to 2**53 tokens; MPS has only fp32."""
    return torch.float32 if device.type == "mps" else torch.float64


def shares(counts: Sequence[float]) -> list[float]:
    """Return each count's share of the sum; zeros where nothing was counted.

    >>> shares([3, 1])
    [0.75, 0.25]
    """
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def ratios(parts: Sequence[float], wholes: Sequence[float]) -> list[float | None]:
    """Return part / whole for each entry, ``None`` where the whole is 0."""
    return [part / whole if whole else None for part, whole in zip(parts, wholes, strict=True)]


def load_entropy(counts: Sequence[float]) -> float:
    """Return the entropy of the load over experts, nats, from 0 to log E.

    Not to be confused with the token entropy, the mean entropy of single tokens' distributions:
    a router may be sure of every token and spread them evenly.

    >>> round(load_entropy([1, 1]), 4)
    0.6931
    """
    return sum(-share * math.log(share) for share in shares(counts) if share > 0)


def coefficient_of_variation(counts: Sequence[float]) -> float:
    """Return the standard deviation of the load over its mean, from 0 to sqrt(E - 1).

    >>> coefficient_of_variation([0, 2])
    1.0
    """
    usage, mean = shares(counts), 1 / len(counts)
    if not any(usage):
        return 0.0
    return math.sqrt(sum((share - mean) ** 2 for share in usage) / len(usage)) / mean


def max_violation(counts: Sequence[float]) -> float:
    """Return how far the highest load exceeds the mean, in means, from 0 to E - 1.

    >>> max_violation([1, 3])
    0.5
    """
    usage = shares(counts)
    return max(usage) * len(usage) - 1 if any(usage) else 0.0


def normalised_mutual_information(counts_EC: Tensor) -> float | None:
    """Return how much an expert tells of a class and a class of an expert, from 0 to 1.

    Their mutual information over the geometric mean of their entropies; ``None`` where one of them
    never varies. On few tokens it is biased upwards: compare like with like.

    Args:
        counts_EC: Tokens by expert and class.

    >>> normalised_mutual_information(torch.tensor([[4.0, 0.0], [0.0, 4.0]]))
    1.0
    """
    total = float(counts_EC.sum())
    if not total:
        return None
    joint_EC = counts_EC.double() / total
    experts_E, classes_C = joint_EC.sum(1), joint_EC.sum(0)
    parts = (experts_E, classes_C, joint_EC)
    entropies = [float(torch.special.entr(part).sum()) for part in parts]
    if min(entropies[:2]) <= 1e-12:
        return None
    shared = entropies[0] + entropies[1] - entropies[2]
    return min(1.0, max(0.0, shared / math.sqrt(entropies[0] * entropies[1])))


def wilson_interval(count: float, total: float, *, z: float = 1.96) -> tuple[float, float]:
    """Return the interval that a share ``count / total`` of independent trials may truly have.

    The score interval of Wilson (1927): unlike the normal approximation it keeps its coverage near
    0, where dead experts are. Tokens of one sequence are not independent, so on few sequences the
    truth is wider.

    Args:
        count: Successes.
        total: Trials; with none the interval is (0, 1).
        z: Half width in standard deviations; 1.96 for 95 %.

    >>> [round(bound, 3) for bound in wilson_interval(0, 400)]
    [0.0, 0.01]
    """
    if total <= 0:
        return 0.0, 1.0
    share, extra = count / total, z * z / total
    centre = share + extra / 2
    half = z * math.sqrt(max(0.0, share * (1 - share)) / total + extra / (4 * total))
    scale = 1 + extra
    # Rounding must not push the bounds past the share itself, nor past 0 and 1.
    low = min(max(0.0, (centre - half) / scale), share)
    return low, max(min(1.0, (centre + half) / scale), share)


def wilson_intervals(
    counts: Sequence[float], totals: Sequence[float] | float, *, z: float = 1.96, digits: int = 3
) -> list[list[float] | None]:
    """Return the `wilson_interval` of each share, rounded outwards; ``None`` without trials.

    >>> wilson_intervals([0, 50], 400), wilson_intervals([1], [0])
    ([[0.0, 0.00952], [0.0961, 0.162]], [None])
    """
    if not isinstance(totals, Sequence):
        totals = [totals] * len(counts)
    found: list[list[float] | None] = []
    for count, total in zip(counts, totals, strict=True):
        low, high = wilson_interval(count, total, z=z)
        bounds = [_rounded(low, math.floor, digits), _rounded(high, math.ceil, digits)]
        found.append(bounds if total else None)
    return found


def _rounded(bound: float, towards: Callable[[float], int], digits: int) -> float:
    if not bound:
        return 0.0
    shift = 10.0 ** (digits - 1 - math.floor(math.log10(bound)))
    return float(f"{towards(bound * shift) / shift:.{digits}g}")


def pair_table(pairs_P: Tensor, num_experts: int) -> Tensor:
    """Return the pairs of a `Layout` as a table, ``(E, E)``, symmetric, 0 on the diagonal.

    >>> pair_table(torch.tensor([5.0, 6.0, 7.0]), 3).tolist()
    [[0.0, 5.0, 6.0], [5.0, 0.0, 7.0], [6.0, 7.0, 0.0]]
    """
    rows_P, columns_P = torch.triu_indices(num_experts, num_experts, offset=1)
    both_EE = pairs_P.new_zeros(num_experts, num_experts)
    both_EE[rows_P, columns_P] = pairs_P
    return both_EE + both_EE.T


def coactivation_lift(both_EE: Tensor, topk_E: Tensor) -> Tensor:
    """Return the lift of every pair of experts over independence, ``(E, E)``, symmetric.

    1 where two experts share as many tokens as their usage alone would make them, the diagonal 0.
    The expectation is that of drawing a token's further experts by their share of the slots.

    Args:
        both_EE: Tokens that chose both, as `pair_table` gives them.
        topk_E: Slots of each expert.
    """
    both_EE = both_EE.double()
    share_E = topk_E.double() / topk_E.sum().clamp_min(1)
    chance_EE = share_E[:, None] * share_E[None, :]
    chance_EE = chance_EE * (1 - torch.eye(chance_EE.shape[0], dtype=chance_EE.dtype))
    expected_EE = chance_EE / chance_EE.sum().clamp_min(1e-300) * both_EE.sum()
    return torch.where(expected_EE > 0, both_EE / expected_EE, 0.0)
