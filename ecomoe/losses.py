"""The auxiliary losses, as pure functions of what a router decided.

Every loss is a scalar to be minimised, in nats where it is a divergence, averaged over tokens, and
without its weight: the layer multiplies and adds.

Axes: N tokens, E experts, K experts chosen for a token (top-k), D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ecomoe.pieces import is_readable
from ecomoe.routing import without_autocast

# Of a mean over tokens, its own unit, one token has no more where there are no more tokens. Of the
# eighth power, 2^112, fp32 can add up some thousands; far above the unit tokens count alike.
MOST_UNITS = 2.0**14
# Below these only where probabilities underflow: there, a loss scaler would have 1/m overflow.
LEAST_MEAN, LEAST_EIGHTH = 2.0**-8, 2.0**-64


class Shares(NamedTuple):
    """How the tokens of a batch are spread over E experts; the first three sum to 1.

    All are means over tokens, so that data-parallel ranks may average them.

    Attributes:
        importance_E: Mean of ``softmax(logits)``; carries the gradient.
        top1_E: Share of tokens whose first choice is the expert.
        topk_E: Share of all ``N * K`` slots.
        others_E: Mean of ``softmax(logits)``, 0 for tokens whose first choice is the expert.
    """

    importance_E: Tensor
    top1_E: Tensor
    topk_E: Tensor
    others_E: Tensor


def expert_shares(expert_ids: Tensor, *, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Return the share of each expert among ``expert_ids`` (any shape), ``(E,)``."""
    flat_S = expert_ids.reshape(-1)
    ones_S = torch.ones(flat_S.shape, dtype=dtype, device=flat_S.device)
    counts_E = torch.zeros(num_experts, dtype=dtype, device=flat_S.device)
    return counts_E.scatter_add(0, flat_S, ones_S) / max(flat_S.shape[0], 1)


def routing_shares(logits_NE: Tensor, expert_ids_NK: Tensor) -> Shares:
    """Return soft importance and hard assignment shares of a batch; NaN and 0 without tokens.

    The importance is taken at temperature 1 on purpose: at a high T ``softmax(logits / T)`` looks
    uniform while its argmax is concentrated, and a balance loss would see nothing to mend.
    """
    probs_NE = torch.softmax(logits_NE, dim=-1)
    others_NE = probs_NE.detach().scatter(-1, expert_ids_NK[:, :1], 0.0)
    top1_E, topk_E = assignment_shares(logits_NE, expert_ids_NK)
    return Shares(probs_NE.mean(0), top1_E, topk_E, others_NE.mean(0))


def assignment_shares(logits_NE: Tensor, expert_ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return each expert's share of first choices and of slots, ``(E,)``; 0 without tokens."""
    num_tokens, top_k = expert_ids_NK.shape
    one_KN = logits_NE.new_ones(()).expand(top_k, num_tokens)
    counts_KE = logits_NE.new_zeros(top_k, logits_NE.shape[-1])
    counts_KE = counts_KE.scatter_add(1, expert_ids_NK.mT, one_KN)
    return counts_KE[0] / max(num_tokens, 1), counts_KE.sum(0) / max(num_tokens * top_k, 1)


def balance_loss(shares: Shares) -> Tensor:
    """Return how far routing is from uniform: 0 exactly when it is uniform, else positive.

    ``KL(importance || uniform) + (CV^2(top1) + CV^2(topk)) / 2``, section 4.7 of the E paper: a KL
    term on importance and a variance penalty on assignment counts. Counts have no gradient, so the
    penalty's value is that of the counts and its gradient flows through the importance
    (straight-through): ``dCV^2 = 2 E sum(share * d importance)``, twice the Switch Transformer's
    ``E sum(f P)`` (equation 4 there). Both bases are in it because the taxonomy counts both.
    """
    importance_E = shares.importance_E
    loss, _ = balance(shares)
    if not importance_E.requires_grad:
        return loss
    num_experts, counts_E = importance_E.numel(), shares.top1_E + shares.topk_E
    return loss + num_experts * counts_E.dot(importance_E - importance_E.detach())


def balance(shares: Shares) -> tuple[Tensor, Tensor]:
    """Return the value of `balance_loss`, and its gradient by the importance, up to a constant."""
    importance_E, top1_E, topk_E, _ = shares
    num_experts = importance_E.numel()
    log_E = positive(importance_E * num_experts).log()
    squares = top1_E.dot(top1_E) + topk_E.dot(topk_E)
    loss = importance_E.dot(log_E) + (squares * (num_experts / 2) - 1.0)
    return loss, torch.add(log_E, top1_E + topk_E, alpha=num_experts)


class Affinity(NamedTuple):
    """How much other experts' tokens are inclined to each of E experts; see `affinity`.

    Both carry the gradient, are in units of `Shares.others_E` and means over tokens, so that
    data-parallel ranks with the same shares may average them.

    Attributes:
        mean_E: Mean of the expert's probability, 0 for tokens that choose it first.
        eighth_E: Mean of the eighth power of the same.
    """

    mean_E: Tensor
    eighth_E: Tensor


def affinity(logits_NE: Tensor, expert_ids_NK: Tensor, shares: Shares) -> Affinity:
    """Return what `starvation_loss` raises: other experts' tokens' inclination to each expert.

    It is measured in units of its own mean: so the mean of the eighth power is 1/N or more, and
    does not underflow where an expert is much surer of its own tokens than of others'.

    Args:
        logits_NE: Router scores, which get the gradient.
        expert_ids_NK: The chosen experts, best first.
        shares: How the tokens, or all ranks' tokens, are spread.
    """
    units_NE = torch.softmax(logits_NE, dim=-1) / positive(shares.others_E)
    units_NE = units_NE.scatter(-1, expert_ids_NK[:, :1], 0.0)
    # The gradient does not end there: it would be that of tokens which hardly count.
    capped_NE = units_NE * (MOST_UNITS / units_NE.detach()).clamp_max(1.0)
    return Affinity(units_NE.mean(0), capped_NE.square().square().square().mean(0))


def starvation(shares: Shares, *, floor: float) -> Tensor:
    """Return how far below the floor each expert is, from 0 to 1 without tokens, ``(E,)``.

    Args:
        shares: How the tokens are spread; of the two bases, that counts on which it has fewer.
        floor: Share of uniform usage below which an expert starves, in (0, 1].
    """
    usage_E = torch.minimum(shares.top1_E, shares.topk_E)
    return (usage_E * (-usage_E.numel() / floor)).add(1.0).clamp_min(0.0)


def is_none_starving(shares: Shares, *, floor: float) -> bool:
    """Return whether it is known, without waiting for a device, that no expert is below the floor.

    `starvation_loss` is 0 then and has no gradient: nobody has to compute it.
    """
    top1_E = shares.top1_E
    if not is_readable(top1_E):
        return False
    least = torch.minimum(top1_E, shares.topk_E).min()
    return bool(least >= floor / top1_E.numel())


def positive(share_E: Tensor) -> Tensor:
    """Return shares that have a logarithm in fp32, also where they have underflowed."""
    return share_E.clamp_min(torch.finfo(torch.float32).tiny)


def starvation_loss(shares: Shares, affinity: Affinity, *, floor: float) -> Tensor:
    """Return ``-sum(w ((1 - w) log m8 + w log m1))``, nats; w: how far below the floor one is.

    w is the expert's `starvation`; m8 and m1 are the power means, of order 8 and 1, of its
    probability over other experts' tokens. What `balance_loss` does for a dying expert fades with
    its importance (``p log p``); here its logits are raised by w in all however low they are. An
    expert that has tokens gets most of it on those of others' that are most inclined to it: from a
    little of everything it would live and tell nothing. One that has none has no inclination to go
    by, and is raised for all.
    Where no expert starves, loss and gradient are 0, and routing is free.

    Args:
        shares: How the tokens are spread.
        affinity: Their `affinity`, which carries the gradient.
        floor: Share of uniform usage below which an expert starves, in (0, 1].
    """
    return pull_on_starving(starvation(shares, floor=floor), shares, affinity)


def pull_on_starving(want_E: Tensor, shares: Shares, affinity: Affinity) -> Tensor:
    """Return the `starvation_loss` of experts so far below the floor."""
    log_m1_E = affinity.mean_E.clamp_min(LEAST_MEAN).log()
    log_m8_E = affinity.eighth_E.clamp_min(LEAST_EIGHTH).log() / 8
    log_mean_E = positive(shares.others_E).log() + torch.lerp(log_m8_E, log_m1_E, want_E)
    return -want_E.dot(log_mean_E)


def token_entropy(logits_NE: Tensor, *, temperature: Tensor | float = 1.0) -> Tensor:
    """Return each token's entropy of ``softmax(logits / T)``, nats in ``[0, log E]``, ``(N,)``."""
    log_probs_NE = torch.log_softmax(logits_NE / temperature, dim=-1)
    return -(log_probs_NE.exp() * log_probs_NE).sum(-1)


def entropy_loss(logits_NE: Tensor, *, temperature: Tensor | float = 1.0) -> Tensor:
    """Return how far the mean token entropy is below its maximum, ``log E - H``, nats, >= 0.

    The gradient is that of ``-H``: minimising it keeps the router undecided (section 3.2 of the E
    paper, where its weight is H).
    """
    entropy_N = token_entropy(logits_NE, temperature=temperature)
    return math.log(logits_NE.shape[-1]) - entropy_N.mean()


class Wanted(NamedTuple):
    """Which losses of a routing there are to be; see `routing_terms`.

    Attributes:
        balance: Whether there is a `balance_loss`.
        entropy: Whether there is an `entropy_loss`.
        floor: Share of uniform usage below which an expert starves; 0 for no `starvation_loss`.
        sustain: Share of its full weight that this one has.
    """

    balance: bool
    entropy: bool
    floor: float
    sustain: Tensor | float


Means = TypeVar("Means", Shares, Affinity)


class ShareReducer(Protocol):
    """What is called with means over a rank's tokens; see `ecomoe.distributed.reduce_losses`."""

    def __call__(self, means: Means, num_tokens: int, /) -> tuple[Means, Tensor]:
        """Return those over all ranks' tokens, and the factor on the rank's auxiliary losses."""


def over_ranks(
    reduce: ShareReducer | None, means: Means, num_tokens: int
) -> tuple[Means, Tensor | float]:
    """Return all ranks' means, and the factor on this one's losses, in the means' precision."""
    if reduce is None:
        return means, 1.0
    reduced, factor = reduce(means, num_tokens)
    dtype = means[0].dtype
    return type(means)(*(each.to(dtype) for each in reduced)), factor.to(dtype)


def routing_terms(
    logits_NE: Tensor,
    own_NE: Tensor,
    expert_ids_NK: Tensor,
    *,
    temperature: Tensor,
    wanted: Wanted,
    reduce: ShareReducer | None = None,
) -> tuple[dict[str, Tensor], Tensor | float]:
    """Return a routing's losses by name, before their weights, and the factor on them all.

    `ecomoe.closed_form.routing_losses` computes the same at a fraction of the cost.

    Args:
        logits_NE: Router scores.
        own_NE: The same that get the gradient of the starvation loss, which stays in the router: a
            pull towards starving experts must not bend the tokens' features, which are to serve
            the task.
        expert_ids_NK: The chosen experts, best first.
        temperature: T of the entropy.
        wanted: Which losses.
        reduce: Makes means over this rank's tokens those over all ranks'.
    """
    shares, factor = over_ranks(reduce, routing_shares(logits_NE, expert_ids_NK), len(logits_NE))
    terms = {}
    if wanted.balance:
        terms["balance"] = balance_loss(shares)
    if wanted.floor > 0:
        own = affinity(own_NE, expert_ids_NK, shares)
        all_ranks, _ = over_ranks(reduce, own, len(logits_NE))
        loss = starvation_loss(shares, all_ranks, floor=wanted.floor)
        terms["starvation"] = loss * wanted.sustain
    if wanted.entropy:
        terms["entropy"] = entropy_loss(logits_NE, temperature=temperature)
    return terms, factor


def weigh(terms: dict[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the weighted sum of losses, of which there is one at least."""
    (first, term), *others = terms.items()
    total = weights[first] * term
    for name, term in others:
        total = torch.add(total, term, alpha=weights[name])
    return total


def oracle_loss(logits_NE: Tensor, teacher_NE: Tensor) -> Tensor:
    """Return ``KL(teacher || softmax(logits))``, nats, averaged over tokens.

    Args:
        logits_NE: Router scores.
        teacher_NE: A distribution over experts for each token; no gradient flows into it.
    """
    teacher_NE = teacher_NE.detach()
    log_probs_NE = torch.log_softmax(logits_NE, dim=-1)
    per_token_NE: Tensor = torch.special.xlogy(teacher_NE, teacher_NE) - teacher_NE * log_probs_NE
    return per_token_NE.sum(-1).mean()


def z_loss(logits_NE: Tensor) -> Tensor:
    """Return the mean squared log-partition of the router (ST-MoE, equation 5)."""
    return torch.logsumexp(logits_NE, dim=-1).square().mean()


def orthogonality_loss(prototypes_ED: Tensor) -> Tensor:
    """Return the mean squared cosine between distinct prototypes, in [0, 1]; 0 for one expert."""
    unit_ED = F.normalize(prototypes_ED, dim=-1)
    return _mean_squared_off_diagonal(_products(unit_ED, unit_ED))


def divergence_loss(outputs_NKD: Tensor) -> Tensor:
    """Return the mean squared cosine between outputs of the experts a token chose, in [0, 1].

    Minimising it drives the experts that share a token apart (the orthogonality loss of Guo et al.,
    2025, which the E paper cites as [7]); 0 where a token has one expert.
    """
    unit_NKD = F.normalize(outputs_NKD, dim=-1)
    return _mean_squared_off_diagonal(_products(unit_NKD, unit_NKD))


def prototype_loss(x_ND: Tensor, prototypes_ED: Tensor, expert_ids_NK: Tensor) -> Tensor:
    """Return ``1 - cos(x, prototype)`` averaged over tokens and their first choice, in [0, 2].

    It moves each prototype to the centre of its tokens, and only the prototype: ``x`` is detached.
    """
    chosen_ND = prototypes_ED.index_select(0, expert_ids_NK[:, 0])
    return 1.0 - F.cosine_similarity(x_ND.detach(), chosen_ND, dim=-1).mean()


def competence_teacher(losses_NE: Tensor, *, sharpness: float = 1.0) -> Tensor:
    """Return the teacher that prefers the expert of lowest loss: ``softmax(-sharpness * loss)``.

    Args:
        losses_NE: Task loss (nats) that each expert alone would have on each token.
        sharpness: Inverse temperature, 1/nats.
    """
    return torch.softmax(-sharpness * losses_NE.detach(), dim=-1)


def dense_teacher(outputs_NED: Tensor, dense_ND: Tensor, *, sharpness: float = 1.0) -> Tensor:
    """Return the teacher that prefers the expert nearest to the dense FFN's output.

    Distances are squared, relative to the dense output's mean square, so ``sharpness`` is free of
    units.
    """
    distance_NE = (outputs_NED - dense_ND.unsqueeze(1)).detach().square().mean(-1)
    scale = dense_ND.detach().square().mean().clamp_min(torch.finfo(dense_ND.dtype).tiny)
    return torch.softmax(-sharpness * distance_NE / scale, dim=-1)


def prototype_teacher(x_ND: Tensor, prototypes_ED: Tensor, *, sharpness: float = 10.0) -> Tensor:
    """Return the teacher that prefers the expert whose (detached) prototype is nearest in angle."""
    unit_ND = F.normalize(x_ND.detach(), dim=-1)
    unit_ED = F.normalize(prototypes_ED.detach(), dim=-1)
    return torch.softmax(sharpness * _products(unit_ND, unit_ED), dim=-1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products of all rows, in the precision of the rows."""
    with without_autocast(a):
        return a @ b.mT


def _mean_squared_off_diagonal(gram: Tensor) -> Tensor:
    """Return the mean square off the diagonal of the last two axes; 0 for a 1 x 1 matrix."""
    size = gram.shape[-1]
    if size == 1:
        return gram.sum() * 0.0
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    return (gram * (1.0 - eye)).square().sum((-2, -1)).mean() / (size * (size - 1))
