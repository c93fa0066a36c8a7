"""Do hops, or experts of different seeds, do the same thing? Pure functions on tensors.

The equifinality paper (arXiv:2604.14419) explains why routing topology hardly matters by two
redundancies: the updates of a token's hops point the same way, and experts of different seeds play
overlapping roles by quite different weights.

Axes: H hops, N tokens, D features, K experts chosen for a token, P features of a router's space,
E and G experts of two models, V ids of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def collinearity(updates_HND: Tensor) -> Tensor:
    """Return the mean cosine between the updates of each two hops, in [-1, 1], ``(H, H)``.

    1 off the diagonal means that hops only lengthen an update; the paper found 0.805 between the
    first two.
    """
    unit_HND = F.normalize(updates_HND.to(torch.float64), dim=-1)
    return torch.einsum("hnd,gnd->hg", unit_HND, unit_HND) / updates_HND.shape[1]


def hop_diversity(expert_ids_HNK: Tensor) -> float:
    """Return how little consecutive hops share experts: one minus the mean Jaccard index, [0, 1].

    Raises:
        ValueError: There is one hop only.
    """
    if expert_ids_HNK.shape[0] < 2:
        raise ValueError("expert_ids has one hop, and diversity is between hops; pass at least two")
    earlier, later = expert_ids_HNK[:-1], expert_ids_HNK[1:]
    common = (earlier.unsqueeze(-1) == later.unsqueeze(-2)).sum((-2, -1)).to(torch.float64)
    return float(1.0 - (common / (2 * expert_ids_HNK.shape[-1] - common)).mean())


def displacement(positions_HNP: Tensor) -> float:
    """Return how far tokens get from first to last hop, over the length of their first position."""
    moved_N = torch.linalg.vector_norm(positions_HNP[-1] - positions_HNP[0], dim=-1)
    start_N = torch.linalg.vector_norm(positions_HNP[0], dim=-1)
    return float((moved_N / start_N.clamp_min(torch.finfo(start_N.dtype).tiny)).mean())


class Alignment(NamedTuple):
    """How alike the experts of two models are.

    Attributes:
        mean: Mean over the first model's experts of the likeness to their match.
        chance: The same between unrelated experts.
        partner_E: Each expert's match in the second model.
    """

    mean: float
    chance: float
    partner_E: Tensor


def vocabulary_alignment(
    first_ED: Tensor, second_GD: Tensor, *, first_VD: Tensor, second_VD: Tensor, top: int = 20
) -> Alignment:
    """Compare what experts of two models write, by the words that it speaks for.

    Each output vector is projected onto its own model's unembedding; an expert is the set of its
    ``top`` ids. Each expert of the first model is matched with the expert of the second whose set
    has the largest Jaccard index.

    Args:
        first_ED: Output vectors of the first model's experts.
        second_GD: Those of the second's.
        first_VD: Unembedding of the first model.
        second_VD: That of the second, over the same vocabulary.
        top: Ids that stand for an expert, from 1 to V.

    Returns:
        The best-match Jaccard index; ``chance`` is the mean over all pairs with the second model's
        ids shuffled, matched in the same way.

    Raises:
        ValueError: The vocabularies or ``top`` do not fit.
    """
    size = first_VD.shape[0]
    if second_VD.shape[0] != size:
        raise ValueError(
            f"vocabularies have {size} and {second_VD.shape[0]} ids; compare models that share one"
        )
    if not 1 <= top <= size:
        raise ValueError(f"top={top!r} must be from 1 to the vocabulary's {size} ids; change it")
    first_EV = _members(first_ED @ first_VD.mT, top)
    second_GV = _members(second_GD @ second_VD.mT, top)
    best_E, partner_E = _jaccard(first_EV, second_GV).max(1)
    generator = torch.Generator().manual_seed(0)
    shuffled_GV = torch.stack(
        [row_V[torch.randperm(size, generator=generator)] for row_V in second_GV.cpu()]
    ).to(second_GV)
    chance = _jaccard(first_EV, shuffled_GV).max(1).values.mean()
    return Alignment(float(best_E.mean()), float(chance), partner_E)


def weight_alignment(first_ED: Tensor, second_GD: Tensor) -> Alignment:
    """Compare experts' weights (W_up) by cosine, each expert with one of its own.

    The matching is the best one to one (Hungarian algorithm); the sign counts.

    Returns:
        The mean cosine of matched experts; ``chance`` is that of normal weights of the same sizes.
    """
    generator = torch.Generator().manual_seed(0)
    random = [
        torch.randn(weights.shape, generator=generator, dtype=torch.float64)
        for weights in (first_ED, second_GD)
    ]
    mean, partner_E = _matched(first_ED, second_GD)
    return Alignment(mean, _matched(*random)[0], partner_E)


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, loss) points that no other beats in both, by rising cost.

    >>> pareto_front([(1.0, 3.0), (2.0, 2.0), (3.0, 2.5)])
    [(1.0, 3.0), (2.0, 2.0)]
    """
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def _members(scores_EV: Tensor, top: int) -> Tensor:
    ids_ET = scores_EV.topk(top, dim=-1).indices
    return torch.zeros_like(scores_EV, dtype=torch.float64).scatter(-1, ids_ET, 1.0)


def _jaccard(first_EV: Tensor, second_GV: Tensor) -> Tensor:
    common_EG = first_EV @ second_GV.mT
    return common_EG / (first_EV.sum(-1, keepdim=True) + second_GV.sum(-1) - common_EG)


def _matched(first_ED: Tensor, second_GD: Tensor) -> tuple[float, Tensor]:
    from scipy.optimize import linear_sum_assignment

    unit_ED, unit_GD = (F.normalize(w.to(torch.float64), dim=-1) for w in (first_ED, second_GD))
    cosine_EG = (unit_ED @ unit_GD.mT).cpu()
    rows, columns = linear_sum_assignment(cosine_EG.numpy(), maximize=True)
    partner_E = torch.full((first_ED.shape[0],), -1, dtype=torch.int64)
    partner_E[torch.as_tensor(rows)] = torch.as_tensor(columns)
    return float(cosine_EG[rows, columns].mean()), partner_E
