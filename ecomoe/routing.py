"""From router logits to a routing decision.

Pure functions on tensors, and the record that every router returns.

Axes: N tokens, E experts, K experts chosen for a token (top-k).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Below the logits of fixed choices, in units of logits: e^-20 at a temperature of 5.
FIXED_MARGIN = 100.0


class Routing(NamedTuple):
    """What a router decided for N tokens.

    A forward hook on a router may return another one. The ids and the gates alone decide what the
    layer computes, and each may be replaced by itself. The losses are of the scores and the ids,
    and scores belong together: a hook that changes ``logits_NE`` replaces ``probs_NE`` and, where
    there are any, ``own_logits_NE`` as well, as `ecomoe.routing.route` of the changed scores does.
    Nothing checks that. Otherwise the entropy loss is that of ``probs_NE``, but its gradient goes
    to ``logits_NE`` as if they were its softmax, and under ``torch.compile`` it is another one,
    that of the logits alone.

    Attributes:
        logits_NE: Router scores, fp32 or wider.
        probs_NE: ``softmax(logits / T)``, shares of 1.
        expert_ids_NK: The chosen experts, int64, best first.
        weights_NK: Gate weights of the chosen experts, non-negative, summing to 1 for a token.
        own_logits_NE: The scores once more, with a gradient for the router's own parameters and
            none for the tokens; in training, where the layer asks for them.
        offset_N1: What all scores of a token had more than its logits have; ``None`` for nothing.
            In training, where the layer asks for it.
    """

    logits_NE: Tensor
    probs_NE: Tensor
    expert_ids_NK: Tensor
    weights_NK: Tensor
    own_logits_NE: Tensor | None = None
    offset_N1: Tensor | None = None


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which matrix products keep the tensor's precision."""
    kind = tensor.device.type
    # Autocast refuses a device that computes nothing; elsewhere it takes as long as some operators.
    if tensor.is_meta or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def top_k_experts(scores_NE: Tensor, *, top_k: int) -> Tensor:
    """Return the ids of the ``top_k`` best-scored experts of each token, best first, ``(N, K)``."""
    on_host = scores_NE.is_cpu and not torch.compiler.is_compiling()
    if on_host and top_k == 2 and scores_NE.numel() > 2**13 and scores_NE.shape[1] <= 256:
        return _best_two(scores_NE.detach())
    return scores_NE.topk(top_k, dim=-1).indices


def _best_two(scores_NE: Tensor) -> Tensor:
    """Return the ids of each token's best two experts; `topk` takes 2 to 3 times as long."""
    first_N1 = scores_NE.max(dim=-1, keepdim=True).indices
    lowest = -torch.inf if scores_NE.is_floating_point() else torch.iinfo(scores_NE.dtype).min
    others_NE = scores_NE.scatter(-1, first_N1, lowest)
    second_N1 = others_NE.max(dim=-1, keepdim=True).indices
    # Where all others are -inf, the first may come again.
    second_N1 = torch.where(second_N1 == first_N1, (first_N1 + 1) % scores_NE.shape[1], second_N1)
    return torch.cat((first_N1, second_N1), dim=-1)


def random_experts(like_NE: Tensor, *, top_k: int) -> Tensor:
    """Return ``top_k`` distinct experts per token, uniformly at random, ``(N, K)``.

    Draws from the global generator of the tensor's device, so ``torch.manual_seed`` reproduces it.
    """
    return torch.rand_like(like_NE).topk(top_k, dim=-1).indices


def gate_weights(logits_NE: Tensor, expert_ids_NK: Tensor, *, temperature: Tensor) -> Tensor:
    """Return the gates of the chosen experts: ``softmax(logits / T)`` over the chosen ones.

    With one expert a token the gate is always 1 and would carry no gradient to the router. There
    the straight-through form ``p / stop_gradient(p)`` is used: its value is 1, its gradient that of
    ``log p``, so that the task still teaches the router.
    """
    if expert_ids_NK.shape[-1] == 1:
        log_probs_NE = torch.log_softmax(logits_NE / temperature, dim=-1)
        log_prob_N1 = log_probs_NE.gather(-1, expert_ids_NK)
        return (log_prob_N1 - log_prob_N1.detach()).exp()
    return torch.softmax(logits_NE.gather(-1, expert_ids_NK) / temperature, dim=-1)


def route(
    logits_NE: Tensor,
    *,
    top_k: int,
    temperature: Tensor,
    random_routing: Tensor | None = None,
) -> Routing:
    """Choose ``top_k`` experts for each token and weigh them.

    A positive temperature cannot change which experts are chosen, only their gate weights.

    Args:
        logits_NE: Router scores, fp32 or wider.
        top_k: Experts per token, from 1 to E.
        temperature: Scalar tensor T > 0 (on the device, so that annealing never recompiles).
        random_routing: Scalar bool tensor, true during the random-routing warm-up, when experts are
            drawn uniformly with gates of ``1/top_k`` (section 3.4 of the E paper); ``None`` where
            there is no warm-up, and then no random number is drawn.
    """
    expert_ids_NK = top_k_experts(logits_NE, top_k=top_k)
    weights_NK = gate_weights(logits_NE, expert_ids_NK, temperature=temperature)
    return _decide(logits_NE, expert_ids_NK, weights_NK, temperature, random_routing)


def route_fixed(
    expert_ids_NK: Tensor,
    *,
    num_experts: int,
    temperature: Tensor,
    random_routing: Tensor | None = None,
) -> Routing:
    """Return the decision for experts that were chosen without scores, with gates of ``1/top_k``.

    The logits are 0 for the chosen experts and `FIXED_MARGIN` below for the others: finite, so that
    every loss of them is, and so far apart that the probabilities are the gates.

    Args:
        expert_ids_NK: The chosen experts, best first; distinct for a token.
        num_experts: E.
        temperature: As for `route`; its dtype is the decision's.
        random_routing: As for `route`.
    """
    num_tokens, top_k = expert_ids_NK.shape
    margin_NE = temperature.new_full((num_tokens, num_experts), -FIXED_MARGIN)
    logits_NE = margin_NE.scatter(-1, expert_ids_NK, 0.0)
    weights_NK = temperature.new_full((num_tokens, top_k), 1.0 / top_k)
    return _decide(logits_NE, expert_ids_NK, weights_NK, temperature, random_routing)


def _decide(
    logits_NE: Tensor,
    expert_ids_NK: Tensor,
    weights_NK: Tensor,
    temperature: Tensor,
    random_routing: Tensor | None,
) -> Routing:
    """Record a decision, or a random one in its place during the warm-up."""
    probs_NE = torch.softmax(logits_NE / temperature, dim=-1)
    if random_routing is not None:
        top_k = expert_ids_NK.shape[-1]
        random_ids_NK = random_experts(logits_NE, top_k=top_k)
        expert_ids_NK = torch.where(random_routing, random_ids_NK, expert_ids_NK)
        weights_NK = torch.where(random_routing, 1.0 / top_k, weights_NK)
    return Routing(logits_NE, probs_NE, expert_ids_NK, weights_NK)
