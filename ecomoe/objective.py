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
from ecomoe.routing import Routing


def routing_losses(
    routing: Routing,
    *,
    temperature: Tensor,
    wanted: Wanted,
    weights: Mapping[str, float],
    reduce: ShareReducer | None,
) -> tuple[Tensor, dict[str, Tensor], Tensor | float]:
    """Return what `closed_form.routing_losses` does, operator by operator where that is asked for.

    A compiler and a `torch.func` transform have to look into the operators, and find the gradient
    by themselves.
    """
    logits_NE, own_NE = routing.logits_NE, routing.own_logits_NE
    transformed = torch._C._functorch.maybe_current_level() is not None
    if not torch.compiler.is_compiling() and not transformed and type(logits_NE) is Tensor:
        return closed_form.routing_losses(
            routing, temperature=temperature, wanted=wanted, weights=weights, reduce=reduce
        )
    terms, factor = losses.routing_terms(
        logits_NE,
        logits_NE if own_NE is None else own_NE,
        routing.expert_ids_NK,
        temperature=temperature,
        wanted=wanted,
        reduce=reduce,
    )
    detached = {name: term.detach() for name, term in terms.items()}
    return losses.weigh(terms, weights), detached, factor


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
