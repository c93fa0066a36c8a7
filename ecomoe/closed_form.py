"""A router's linear map and its losses, with gradients in closed form.

The losses' gradient is found along with their values, from the same softmax: the backward pass
multiplies, and no more. Second derivatives are those of `ecomoe.losses`.

Axes: N tokens, E experts, K experts chosen for a token, D input features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ecomoe import losses
from ecomoe.losses import Affinity, Means, ShareReducer, Shares, Wanted
from ecomoe.pieces import for_host, is_readable
from ecomoe.routing import Routing, without_autocast

# Scores of which several passes stay in the cache: 1 MiB in 32 bits.
CACHED = 2**18


def routing_losses(
    routing: Routing,
    *,
    temperature: Tensor,
    wanted: Wanted,
    weights: Mapping[str, float],
    reduce: ShareReducer | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor | float]:
    """Return the weighted sum of `ecomoe.losses.routing_terms`, these without a graph, the factor.

    Args:
        routing: What the router decided.
        temperature: T of ``routing.probs_NE``; it gets no gradient.
        wanted: Which losses; one at least.
        weights: Their weights by name.
        reduce: As for `ecomoe.losses.routing_terms`.
    """
    logits_NE, ids_NK = routing.logits_NE, routing.expert_ids_NK
    own_NE = logits_NE if routing.own_logits_NE is None else routing.own_logits_NE
    ranks = None if reduce is None else _Ranks(reduce)

    def again(logits_NE: Tensor, own_NE: Tensor, ids_NK: Tensor, temperature: Tensor) -> Tensor:
        terms, _ = losses.routing_terms(
            logits_NE,
            own_NE,
            ids_NK,
            temperature=temperature,
            wanted=wanted,
            reduce=None if ranks is None else ranks.replay(),
        )
        return losses.weigh(terms, weights)

    with torch.no_grad(), without_autocast(logits_NE):
        terms, factor, *gradients = _evaluate(routing, temperature, wanted, weights, ranks)
        total = losses.weigh(terms, weights)
    loss = _Known.apply(logits_NE, own_NE, ids_NK, temperature, total, *gradients, again)
    return loss, terms, factor


class _Ranks:
    """Reduces means over ranks, and can tell once more what came of it."""

    def __init__(self, reduce: ShareReducer) -> None:
        self.reduce = reduce
        self.reduced: list[Shares | Affinity] = []

    def __call__(self, means: Means, num_tokens: int) -> tuple[Means, Tensor]:
        """Return all ranks' means, and the factor on this one's losses."""
        of_all, factor = self.reduce(means, num_tokens)
        self.reduced.append(of_all)
        return of_all, factor

    def replay(self) -> ShareReducer:
        """Return what gives the same values, with the gradient of this rank's own."""
        known = iter(self.reduced)

        def reduce(means: Means, num_tokens: int, /) -> tuple[Means, Tensor]:
            pairs = zip(next(known), means, strict=True)
            through = (all_E + (own_E - own_E.detach()) for all_E, own_E in pairs)
            return type(means)(*through), means[0].new_ones(())

        return reduce


def linear_twice(x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x W^T + b`` in the weights' dtype, and once more without a gradient for the tokens.

    It is computed once, and ``x`` is kept for the backward pass as narrow as it comes.
    """
    return _LinearTwice.apply(x_ND, weight_ED, bias_E)  # type: ignore[no-any-return]


def _blocks(logits_NE: Tensor, *, at_once: bool = False) -> list[slice]:
    """Return rows to compute at a time, so that all that is made of them stays in the cache.

    They are all rows where a compiler or a transform looks, and on an accelerator.
    """
    whole = [slice(None)]
    if at_once or torch.compiler.is_compiling() or not for_host(logits_NE):
        return whole
    num_tokens, num_experts = logits_NE.shape
    rows = max(CACHED // max(num_experts, 1), 1)
    starts = range(0, num_tokens, rows)
    return [slice(start, start + rows) for start in starts] if len(starts) > 1 else whole


def _parts(tensor: Tensor, blocks: list[slice]) -> list[Tensor]:
    return [tensor] if len(blocks) == 1 else [tensor[rows] for rows in blocks]


def _mean(parts: Sequence[Tensor], num_tokens: int) -> Tensor:
    """Return the mean over the rows of all parts."""
    if len(parts) == 1:
        return parts[0].mean(0)
    return torch.stack([part.sum(0) for part in parts]).sum(0) / num_tokens


def _evaluate(
    routing: Routing,
    temperature: Tensor,
    wanted: Wanted,
    weights: Mapping[str, float],
    ranks: _Ranks | None,
) -> tuple[dict[str, Tensor], Tensor | float, Tensor, Tensor | None]:
    """Return losses by name, the factor, and their weighted sum's two gradients.

    The second is by the router's own scores, ``None`` where nobody starves.
    """
    logits_NE = routing.logits_NE
    num_tokens = logits_NE.shape[0]
    blocks = _blocks(logits_NE)
    grad_NE = torch.empty_like(logits_NE) if wanted.entropy else torch.zeros_like(logits_NE)
    own_grad_NE = None
    slopes = _parts(grad_NE, blocks)
    probs = [torch.softmax(part_NE, dim=-1) for part_NE in _parts(logits_NE, blocks)]
    firsts = _parts(routing.expert_ids_NK[:, :1], blocks)
    others = [p_NE.scatter(-1, f_N1, 0.0) for p_NE, f_N1 in zip(probs, firsts, strict=True)]
    hard = losses.assignment_shares(logits_NE, routing.expert_ids_NK)
    own = Shares(_mean(probs, num_tokens), *hard, _mean(others, num_tokens))
    shares, factor = losses.over_ranks(ranks, own, num_tokens)
    terms = {}
    if wanted.entropy:
        cool = _parts(routing.probs_NE, blocks)
        weight = weights["entropy"] / max(num_tokens, 1)
        scale = (
            weight / float(temperature)
            if is_readable(temperature)
            else temperature.to(logits_NE.dtype).reciprocal().mul_(weight)
        )
        terms["entropy"] = _entropy(slopes, cool, scale=scale)
    if wanted.balance:
        terms["balance"] = _add_balance(slopes, probs, shares, weight=weights["balance"])
    if wanted.floor > 0:
        # Other ranks would wait for one that knows it, and fewer tokens than experts starve some.
        known = ranks is None and num_tokens >= shares.top1_E.numel()
        if known and losses.is_none_starving(shares, floor=wanted.floor):
            terms["starvation"] = logits_NE.new_zeros(())
        else:
            own_grad_NE = torch.empty_like(logits_NE)
            loss = _starvation(
                _parts(own_grad_NE, blocks),
                probs,
                others,
                own.others_E,
                shares,
                floor=wanted.floor,
                weight=wanted.sustain * (weights["starvation"] / max(num_tokens, 1)),
                ranks=ranks,
            )
            terms["starvation"] = loss * wanted.sustain
    return terms, factor, grad_NE, own_grad_NE


def _add_balance(
    slopes: list[Tensor], probs: list[Tensor], shares: Shares, *, weight: float
) -> Tensor:
    """Return `losses.balance_loss`; add its gradient by the logits to ``slopes``."""
    num_tokens, _ = _size(probs)
    loss, slope_E = losses.balance(shares)
    slope_E.mul_(weight / max(num_tokens, 1))
    for grad_NE, probs_NE in zip(slopes, probs, strict=True):
        mean_N1 = probs_NE.mv(slope_E).unsqueeze(1)
        grad_NE.addcmul_(probs_NE, slope_E - mean_N1)
    return loss


def _starvation(
    slopes: list[Tensor],
    probs: list[Tensor],
    others: list[Tensor],
    others_E: Tensor,
    shares: Shares,
    *,
    floor: float,
    weight: Tensor | float,
    ranks: _Ranks | None,
) -> Tensor:
    """Return `losses.starvation_loss`; write its gradient to ``slopes``, and over ``others``."""
    num_tokens, _ = _size(probs)
    unit_E = losses.positive(shares.others_E)
    eighths = []
    for units_NE in others:
        units_NE.div_(unit_E)
        eighth_NE = units_NE.clamp_max(losses.MOST_UNITS)
        for _ in range(3):
            eighth_NE.mul_(eighth_NE)
        eighths.append(eighth_NE)
    own = Affinity(others_E / unit_E, _mean(eighths, num_tokens))
    affinity, _ = losses.over_ranks(ranks, own, num_tokens)
    want_E = losses.starvation(shares, floor=floor)
    pull_E = want_E * weight
    on_mean_E = pull_E * want_E
    on_eighth_E = pull_E - on_mean_E
    on_mean_E.div_(F.threshold(affinity.mean_E, losses.LEAST_MEAN, math.inf))
    on_eighth_E.div_(F.threshold(affinity.eighth_E, losses.LEAST_EIGHTH, math.inf))
    for grad_NE, probs_NE, units_NE, eighth_NE in zip(slopes, probs, others, eighths, strict=True):
        pull_NE = units_NE.mul_(on_mean_E).addcmul_(eighth_NE, on_eighth_E)
        torch.mul(probs_NE, pull_NE.sum(-1, keepdim=True), out=grad_NE).sub_(pull_NE)
    return losses.pull_on_starving(want_E, shares, affinity)


def _entropy(slopes: list[Tensor], probs: list[Tensor], *, scale: Tensor | float) -> Tensor:
    """Return `losses.entropy_loss` of ``softmax(logits / T)``; write its gradient to ``slopes``."""
    num_tokens, num_experts = _size(probs)
    tiny = torch.finfo(probs[0].dtype).tiny
    means = []
    for grad_NE, probs_NE in zip(slopes, probs, strict=True):
        product_NE = probs_NE.clamp_min(tiny).log_().mul_(probs_NE)
        mean_N1 = product_NE.sum(-1, keepdim=True)  # of log p
        apart_NE = torch.addcmul(product_NE, probs_NE, mean_N1, value=-1.0, out=grad_NE)
        apart_NE.mul_(scale)
        means.append(mean_N1)
    return math.log(num_experts) + _mean(means, num_tokens)[0]


def _size(parts: list[Tensor]) -> tuple[int, int]:
    return sum(len(part) for part in parts), parts[0].shape[1]


class _Known(torch.autograd.Function):
    """A scalar whose gradients are known; ``again`` computes it where second ones are asked for."""

    @staticmethod
    def forward(ctx, logits_NE, own_NE, ids_NK, temperature, total, grad_NE, own_grad_NE, again):  # type: ignore[no-untyped-def]
        ctx.again = again
        ctx.save_for_backward(logits_NE, own_NE, ids_NK, temperature, grad_NE, own_grad_NE)
        return total.view_as(total)

    @staticmethod
    def backward(ctx, slope):  # type: ignore[no-untyped-def]
        *operands, grad_NE, own_grad_NE = ctx.saved_tensors
        gradients = [grad_NE, own_grad_NE]
        if torch.is_grad_enabled():  # by create_graph=True
            # Views: both may be one tensor, and each would get the gradient by both.
            scores = [operand.view_as(operand) for operand in operands[:2]]
            wanted = [each_NE for each_NE in scores if each_NE.requires_grad]
            total = ctx.again(*scores, *operands[2:])
            found = iter(torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True))
            gradients = [next(found) if each.requires_grad else None for each in scores]
        return *(None if grad is None else slope * grad for grad in gradients), *(None,) * 6


class _LinearTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_ED, bias_E):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)  # mostly nobody asks for the second scores
        ctx.save_for_backward(x_ND, weight_ED)
        blocks = _blocks(x_ND, at_once=x_ND.dtype == weight_ED.dtype)
        if len(blocks) == 1:
            logits_NE = F.linear(x_ND.to(weight_ED.dtype), weight_ED, bias_E)
        else:
            logits_NE = weight_ED.new_empty(x_ND.shape[0], weight_ED.shape[0])
            for rows, wide_ND in _widened(x_ND, blocks, weight_ED.dtype):
                torch.addmm(bias_E, wide_ND, weight_ED.mT, out=logits_NE[rows])
        # No view: FSDP warns of those among what a unit returns.
        return logits_NE, logits_NE.detach()

    @staticmethod
    def backward(ctx, grad_NE: Tensor | None, own_NE: Tensor | None):  # type: ignore[no-untyped-def]
        x_ND, weight_ED = ctx.saved_tensors
        if grad_NE is None:
            if own_NE is None:
                return None, None, None
            grad_NE = torch.zeros_like(own_NE)
        both_NE = grad_NE if own_NE is None else grad_NE + own_NE
        at_once = x_ND.dtype == weight_ED.dtype or torch.is_grad_enabled()
        blocks = _blocks(x_ND, at_once=at_once)
        with without_autocast(x_ND):
            if len(blocks) == 1:
                to_x_ND = (grad_NE @ weight_ED).to(x_ND.dtype) if ctx.needs_input_grad[0] else None
                return to_x_ND, both_NE.mT @ x_ND.to(weight_ED.dtype), both_NE.sum(0)
            to_x_ND = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
            to_weight_ED = torch.zeros_like(weight_ED)
            for rows, wide_ND in _widened(x_ND, blocks, weight_ED.dtype):
                to_weight_ED.addmm_(both_NE[rows].mT, wide_ND)
                if to_x_ND is not None:
                    to_x_ND[rows] = torch.mm(grad_NE[rows], weight_ED, out=wide_ND)
            return to_x_ND, to_weight_ED, both_NE.sum(0)


def _widened(
    x_ND: Tensor, blocks: list[slice], dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows at a time in a wider dtype, all in the same memory."""
    memory_ND = x_ND.new_empty(x_ND[blocks[0]].shape, dtype=dtype)
    for rows in blocks:
        yield rows, memory_ND[: len(x_ND[rows])].copy_(x_ND[rows])
