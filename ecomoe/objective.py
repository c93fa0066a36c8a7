"""What a layer has its router, prototypes and experts minimise besides the task.

Axes: N tokens, D input features, E experts, K experts chosen for a token, F output features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ecomoe import closed_form, losses
from ecomoe.experts import Experts
from ecomoe.losses import ShareReducer, Wanted
from ecomoe.oracle import Oracle, imitation_loss
from ecomoe.pieces import is_readable
from ecomoe.routing import Routing


def routing_losses(
    routing: Routing,
    *,
    temperature: Tensor,
    weights: Mapping[str, float],
    floor: float,
    sustain: Tensor | float,
    reduce: ShareReducer | None,
) -> tuple[Tensor | None, dict[str, Tensor], Tensor | float]:
    """Return the weighted sum of balance, starvation and entropy, each of them, and the factor.

    The sum is ``None`` where none of them has a weight; the losses by name have no graph, and the
    factor is what a reducer over ranks has all of a layer's losses multiplied by. They are computed
    in closed form, but operator by operator where a compiler or a `torch.func` transform has to
    look into the operators, and finds the gradient by itself.

    Args:
        routing: What the router decided.
        temperature: T of the decision.
        weights: The weights by name.
        floor: Share of uniform usage below which an expert starves; 0 for no starvation loss.
        sustain: Share of its full weight that this one has.
        reduce: Makes means over this rank's tokens those over all ranks'.
    """
    logits_NE, ids_NK = routing.logits_NE, routing.expert_ids_NK
    wanted = Wanted(weights["balance"] > 0, weights["entropy"] > 0, floor, sustain)
    if not wanted.balance and not wanted.entropy:
        factor: Tensor | float = 1.0
        if reduce is not None:
            shares = losses.routing_shares(logits_NE, ids_NK)
            _, factor = losses.over_ranks(reduce, shares, len(logits_NE))
        return None, {}, factor
    transformed = torch._C._functorch.maybe_current_level() is not None
    if not torch.compiler.is_compiling() and not transformed:
        return closed_form.routing_losses(
            routing, temperature=temperature, wanted=wanted, weights=weights, reduce=reduce
        )
    own_NE = logits_NE if routing.own_logits_NE is None else routing.own_logits_NE
    terms, factor = losses.routing_terms(
        logits_NE, own_NE, ids_NK, temperature=temperature, wanted=wanted, reduce=reduce
    )
    detached = {name: term.detach() for name, term in terms.items()}
    return losses.weigh(terms, weights), detached, factor


def share_annealed(
    temperature: Tensor, first: float, last: float, *, at_start: float
) -> Tensor | float:
    """Return what goes from ``at_start`` to 1 as a temperature goes from ``first`` to ``last``."""
    if first == last:
        return 1.0
    # Outside of the span are a checkpoint of a layer that started hotter, and rounding.
    if is_readable(temperature):  # a tensor takes as long as ten numbers
        share_to_go = min(max((float(temperature) - last) / (first - last), 0.0), 1.0)
        return 1.0 - (1.0 - at_start) * share_to_go
    to_go = ((temperature - last) / (first - last)).clamp(0.0, 1.0)
    return torch.rsub(to_go, 1.0, alpha=1.0 - at_start)


def other_terms(
    weights: Mapping[str, float],
    *,
    x_ND: Tensor,
    routing: Routing,
    y_NKF: Tensor | None,
    targets: Tensor | None,
    oracle: Oracle | None,
    experts: Experts,
    dense: nn.Module | None,
    prototypes_ED: Tensor | None,
) -> dict[str, Tensor]:
    """Return the other losses by name, before their weights; one of weight 0 is not computed.

    Args:
        weights: The weights by name.
        x_ND: The tokens.
        routing: Where they go.
        y_NKF: The outputs of the experts that each token chose; divergence reads them.
        targets: Class ids of the tokens; the competence teacher reads them.
        oracle: The teacher.
        experts: What it may ask.
        dense: The dense block that it may compare with.
        prototypes_ED: The prototypes, which have a loss of their own wherever there are any.
    """
    logits_NE = routing.logits_NE
    terms = {}
    if weights["oracle"] > 0:
        assert oracle is not None
        terms["oracle"] = imitation_loss(
            oracle,
            x_ND,
            logits_NE,
            experts=experts,
            dense=dense,
            prototypes_ED=prototypes_ED,
            targets=targets,
        )
    if prototypes_ED is not None:
        wide_ND = x_ND.to(prototypes_ED.dtype)
        terms["prototype"] = losses.prototype_loss(wide_ND, prototypes_ED, routing.expert_ids_NK)
    if weights["ortho"] > 0:
        assert prototypes_ED is not None
        terms["ortho"] = losses.orthogonality_loss(prototypes_ED)
    if weights["divergence"] > 0:
        assert y_NKF is not None
        terms["divergence"] = losses.divergence_loss(y_NKF.to(logits_NE.dtype))
    if weights["z"] > 0:
        offset_N1 = routing.offset_N1
        terms["z"] = losses.z_loss(logits_NE if offset_N1 is None else logits_NE + offset_N1)
    return terms
