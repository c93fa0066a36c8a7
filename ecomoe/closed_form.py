"""A router's linear map and the means that its losses are made of, with closed-form gradients.

The means keep the logits alone for their backward pass, which computes what else it needs again:
all of them together keep one matrix. The gradients are written in operators that have gradients
themselves, so that second derivatives are to be had.

Axes: N tokens, E experts, D input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ecomoe.pieces import for_host
from ecomoe.routing import without_autocast

# Scores of which several passes stay in the cache: 1 MiB in 32 bits.
CACHED = 2**18
# Of a mean over tokens, its own unit, one token has no more where there are no more tokens. Of the
# eighth power, 2^112, fp32 can add up some thousands.
MOST_UNITS = 2.0**14


def routing_means(
    logits_NE: Tensor, first_N: Tensor, temperature: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return three means over tokens; all are NaN without tokens.

    They are those of ``softmax(logits)``, ``(E,)``; of the same, but 0 for first choices, ``(E,)``,
    without a gradient; and of the entropy of ``softmax(logits / T)``, nats.

    Args:
        logits_NE: The scores, which get the gradient.
        first_N: The expert that each token chose first.
        temperature: T, which gets none.
    """
    return _RoutingMeans.apply(logits_NE, first_N, temperature)  # type: ignore[no-any-return]


def mean_powers(
    logits_NE: Tensor, unit_E: Tensor, first_N: Tensor, *, values_NE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the means over tokens of ``softmax(logits) / unit`` and of its eighth power, ``(E,)``.

    Both count 0 for tokens whose first choice is the expert.

    Args:
        logits_NE: The scores, which get the gradient.
        unit_E: What probabilities are measured in, so that powers keep within fp32.
        first_N: The expert that each token chose first.
        values_NE: A tensor of the same values that is kept in any case, to be kept in place of it.
    """
    return _MeanPowers.apply(logits_NE, unit_E, first_N, values_NE)  # type: ignore[no-any-return]


def balance(importance_E: Tensor, top1_E: Tensor, topk_E: Tensor) -> Tensor:
    """Return `ecomoe.losses.balance_loss` of shares; the importance alone gets a gradient."""
    return _Balance.apply(importance_E, top1_E, topk_E)  # type: ignore[no-any-return]


def positive(share_E: Tensor) -> Tensor:
    """Return shares that have a logarithm in fp32, also where they have underflowed."""
    return share_E.clamp_min(torch.finfo(torch.float32).tiny)


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


def _means_by_blocks(
    means: Callable[..., tuple[Tensor, ...]], logits_NE: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    """Return means over rows from what gives those of some rows of the logits and of others."""
    blocks = _blocks(logits_NE)
    if len(blocks) == 1:
        return means(logits_NE, *others)
    parts = []
    for rows in blocks:
        weight = len(logits_NE[rows]) / len(logits_NE)
        parts.append([m * weight for m in means(logits_NE[rows], *(each[rows] for each in others))])
    return tuple(torch.stack(each).sum(0) for each in zip(*parts, strict=True))


def _by_blocks(
    gradient: Callable[..., Tensor], logits_NE: Tensor, *others: Tensor, at_once: bool
) -> Tensor:
    """Return a function of the rows of the logits, and of others' rows."""
    blocks = _blocks(logits_NE, at_once=at_once)
    if len(blocks) == 1:
        return gradient(logits_NE, *others)
    out_NE = torch.empty_like(logits_NE)
    for rows in blocks:
        out_NE[rows] = gradient(logits_NE[rows], *(each[rows] for each in others))
    return out_NE


class _RoutingMeans(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits_NE: Tensor, first_N: Tensor, temperature: Tensor | float
    ) -> tuple[Tensor, ...]:
        def means(logits_NE: Tensor, first_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            probs_NE = torch.softmax(logits_NE, dim=-1)
            importance_E = probs_NE.mean(0)
            others_NE = probs_NE.scatter(-1, first_N.unsqueeze(-1), 0.0)
            log_probs_NE = torch.log_softmax(logits_NE / temperature, dim=-1)
            entropy_N = -(log_probs_NE.exp() * log_probs_NE).sum(-1)
            return importance_E, others_NE.mean(0), entropy_N.mean()

        return _means_by_blocks(means, logits_NE, first_N)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        logits_NE, _, temperature = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.is_tensor = isinstance(temperature, Tensor)
        ctx.temperature = None if ctx.is_tensor else temperature
        ctx.save_for_backward(logits_NE, *([temperature] if ctx.is_tensor else []))

    @staticmethod
    def backward(ctx, grad_E: Tensor, _: None, grad: Tensor):  # type: ignore[no-untyped-def]
        logits_NE, *rest = ctx.saved_tensors
        temperature = rest[0] if rest else ctx.temperature
        slope_E = grad_E / logits_NE.shape[0]
        scale = -grad / logits_NE.shape[0] / temperature  # T may be fp32 where the rest is fp64

        def gradient(logits_NE: Tensor) -> Tensor:
            probs_NE = torch.softmax(logits_NE, dim=-1)
            own_NE = probs_NE * (slope_E - (probs_NE * slope_E).sum(-1, keepdim=True))
            cool_NE = logits_NE / temperature
            probs_NE = torch.softmax(cool_NE, dim=-1)
            # log p less its mean, of which the normaliser is no part.
            apart_NE = cool_NE - (probs_NE * cool_NE).sum(-1, keepdim=True)
            return torch.addcmul(own_NE, probs_NE * scale, apart_NE)

        return _by_blocks(gradient, logits_NE, at_once=torch.is_grad_enabled()), None, None


class _MeanPowers(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits_NE: Tensor, unit_E: Tensor, first_N: Tensor, values_NE: Tensor | None
    ) -> tuple[Tensor, ...]:
        def powers(logits_NE: Tensor, first_N: Tensor) -> tuple[Tensor, Tensor]:
            units_NE = _units(torch.softmax(logits_NE, dim=-1), unit_E, first_N)
            return units_NE.mean(0), _eighth_power(units_NE).mean(0)

        return _means_by_blocks(powers, logits_NE, first_N)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        logits_NE, unit_E, first_N, values_NE = inputs
        ctx.save_for_backward(logits_NE if values_NE is None else values_NE, unit_E, first_N)

    @staticmethod
    def backward(ctx, grad_E: Tensor, grad_eighth_E: Tensor):  # type: ignore[no-untyped-def]
        logits_NE, unit_E, first_N = ctx.saved_tensors
        slope_E = grad_E / logits_NE.shape[0]
        eighth_E = 8.0 * grad_eighth_E / logits_NE.shape[0]

        def gradient(logits_NE: Tensor, first_N: Tensor) -> Tensor:
            probs_NE = torch.softmax(logits_NE, dim=-1)
            units_NE = _units(probs_NE, unit_E, first_N)
            pull_NE = torch.addcmul(units_NE * slope_E, _eighth_power(units_NE), eighth_E)
            return torch.addcmul(pull_NE, probs_NE, pull_NE.sum(-1, keepdim=True), value=-1.0)

        at_once = torch.is_grad_enabled()
        return _by_blocks(gradient, logits_NE, first_N, at_once=at_once), None, None, None


def _units(probs_NE: Tensor, unit_E: Tensor, first_N: Tensor) -> Tensor:
    return (probs_NE / unit_E).scatter(-1, first_N.unsqueeze(-1), 0.0)


def _eighth_power(units_NE: Tensor) -> Tensor:
    # Far above the unit tokens count alike, and powers stay finite in fp32. The gradient does not
    # end there: it would be that of tokens which hardly count.
    return units_NE.clamp_max(MOST_UNITS).square().square().square()


class _Balance(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(importance_E: Tensor, top1_E: Tensor, topk_E: Tensor) -> Tensor:
        num_experts = importance_E.numel()
        kl = importance_E.dot(positive(importance_E * num_experts).log())
        squares = top1_E.dot(top1_E) + topk_E.dot(topk_E)
        return kl + (squares * (num_experts / 2) - 1.0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        importance_E, top1_E, topk_E = ctx.saved_tensors
        num_experts = importance_E.numel()
        slope_E = positive(importance_E * num_experts).log() + 1.0
        return grad * slope_E.add(top1_E + topk_E, alpha=num_experts), None, None


class _LinearTwice(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
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
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        x_ND, weight_ED, _ = inputs
        ctx.set_materialize_grads(False)  # mostly nobody asks for the second scores
        ctx.save_for_backward(x_ND, weight_ED)

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
