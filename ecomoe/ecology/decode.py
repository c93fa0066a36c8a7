"""What the routers of transformers return, read as one kind of decision.

72 families of models declare where their routers leave their logits. What else a router returns
comes in a few shapes, told apart by their structure and not by the names of classes:

- logits, gates and expert ids (most families; some give probabilities in place of logits);
- a one-hot dispatch mask, gates and logits (Switch, NLLB), after tokens over capacity were dropped;
- gates of all experts and logits (Llama 4), or logits alone (DBRX, JetMoE): the choice is their
  top-k;
- the two halves of a product key (Doge).

Axes: N tokens, E experts, K experts chosen for a token, Q keys of each half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ecomoe.ecology.taps import Decision


def decode(output: Any, *, logits_index: int, top_k: int | None, num_keys: int | None) -> Decision:
    """Return the decision in a router's output.

    Args:
        output: What the router's forward returned.
        logits_index: Position of its logits, where it is a tuple.
        top_k: K, which some shapes do not show.
        num_keys: Q of a product-key router.

    Raises:
        ValueError: The output has none of the known shapes.
    """
    parts = output if isinstance(output, tuple | list) else (output,)
    logits = parts[logits_index] if logits_index < len(parts) else None
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
        raise ValueError(f"output {logits_index} of the router is not the experts' logits")
    if num_keys is not None and logits.dim() == 3 and logits.shape[0] == 2:
        return _product_key(logits.detach(), top_k=_known(top_k), num_keys=num_keys)
    logits_NE, probs_NE = logits_and_probs(logits.detach().reshape(-1, logits.shape[-1]))
    rest = [part.detach() for part in parts if isinstance(part, Tensor) and part is not logits]
    integers = [part for part in rest if part.dim() >= 2 and not part.is_floating_point()]
    gates = [part for part in rest if part.dim() >= 2 and part.is_floating_point()]
    if integers and gates and integers[0] is rest[0] and integers[0].shape == logits.shape:
        return _dispatch_mask(integers[0], gates[0], logits_NE, probs_NE)
    if integers:
        ids_NK = integers[-1].reshape(-1, integers[-1].shape[-1]).long()
        gates = [gate for gate in gates if gate.numel() == ids_NK.numel()]
        if not gates or ids_NK.shape[0] != logits_NE.shape[0]:
            raise ValueError("the router returns expert ids, but no gates of their shape")
        return _best_first(ids_NK, gates[0].reshape(ids_NK.shape), logits_NE, probs_NE)
    ids_NK = logits_NE.topk(_known(top_k), dim=-1).indices
    full = [gate for gate in gates if gate.shape == logits_NE.shape]
    weights_NK = (full[0] if full else probs_NE).gather(-1, ids_NK)
    return Decision(ids_NK, weights_NK, logits_NE, probs_NE)


def logits_and_probs(scores_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and probabilities of scores that are either, without waiting for the device.

    A few families return softmax probabilities in the place of logits.
    """
    scores_NE = scores_NE.float()
    sums_N = scores_NE.sum(-1)
    is_probs = (scores_NE >= 0).all() & ((sums_N - 1).abs() < 1e-3).all()
    logits_NE = torch.where(is_probs, scores_NE.clamp_min(1e-30).log(), scores_NE)
    return logits_NE, torch.where(is_probs, scores_NE, logits_NE.softmax(-1))


def _best_first(
    ids_NK: Tensor, weights_NK: Tensor, logits_NE: Tensor, probs_NE: Tensor
) -> Decision:
    # Many families call topk(sorted=False): the first of the ids need not be the first choice.
    order_NK = weights_NK.argsort(dim=-1, descending=True, stable=True)
    return Decision(
        ids_NK.gather(-1, order_NK), weights_NK.gather(-1, order_NK), logits_NE, probs_NE
    )


def _dispatch_mask(mask: Tensor, gates: Tensor, logits_NE: Tensor, probs_NE: Tensor) -> Decision:
    num_experts = logits_NE.shape[-1]
    mask_NE = mask.reshape(-1, num_experts)
    if gates.shape[-1] == num_experts:  # NLLB: the mask shows the first choice, the gates both
        weights_NK, ids_NK = gates.reshape(-1, num_experts).topk(min(2, num_experts), dim=-1)
        return Decision(ids_NK, weights_NK, logits_NE, probs_NE, kept_NK=weights_NK > 0)
    ids_NK = logits_NE.argmax(-1, keepdim=True)
    kept_NK = mask_NE.gather(-1, ids_NK) > 0
    return Decision(ids_NK, gates.reshape(-1, 1), logits_NE, probs_NE, kept_NK=kept_NK)


def _product_key(logits_2NQ: Tensor, *, top_k: int, num_keys: int) -> Decision:
    (scores_NQ, others_NQ), (ids_NQ, other_ids_NQ) = logits_2NQ.float().topk(num_keys, dim=-1)
    num_tokens = logits_2NQ.shape[1]
    scores_NE = (scores_NQ.unsqueeze(-1) + others_NQ.unsqueeze(-2)).reshape(num_tokens, -1)
    experts_NE = (ids_NQ.unsqueeze(-1) * num_keys + other_ids_NQ.unsqueeze(-2)).reshape(
        num_tokens, -1
    )
    top_NK, places_NK = scores_NE.topk(top_k, dim=-1)
    logits_NE = torch.empty_like(scores_NE).scatter(-1, experts_NE, scores_NE)
    return Decision(
        experts_NE.gather(-1, places_NK), top_NK.softmax(-1), logits_NE, logits_NE.softmax(-1)
    )


def _known(top_k: int | None) -> int:
    if top_k is None:
        raise ValueError("the router shows neither expert ids nor a top_k to choose them by")
    return top_k
