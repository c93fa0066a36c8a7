"""A router's linear map and the means that its losses are made of, with closed-form gradients.

The means keep the logits alone for their backward pass, which computes what else it needs again:
all of them together keep one matrix. The gradients are written in operators that have gradients
themselves, so that second derivatives are to be had.

Axes: N tokens, E experts, D input features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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


def mean_probabilities(logits_NE: Tensor, *, values_NE: Tensor | None = None) -> Tensor:
    """Return the mean of ``softmax(logits)`` over tokens, ``(E,)``; NaN without tokens.

    Args:
        logits_NE: The scores, which get the gradient.
        values_NE: A tensor of the same values that is kept in any case, to be kept in place of it.
    """
    return _MeanProbabilities.apply(logits_NE, values_NE)  # type: ignore[no-any-return]


def mean_of_others(logits_NE: Tensor, first_N: Tensor) -> Tensor:
    """Return the mean of ``softmax(logits)``, 0 for first choices, ``(E,)``; without gradient.

    Args:
        logits_NE: The scores.
        first_N: The expert that each token chose first.
    """

    def probabilities(logits_NE: Tensor, first_N: Tensor) -> Tensor:
        return torch.softmax(logits_NE, dim=-1).scatter(-1, first_N.unsqueeze(-1), 0.0)

    return _mean_by_blocks(probabilities, logits_NE.detach(), first_N)


def mean_entropy(logits_NE: Tensor, temperature: Tensor | float) -> Tensor:
    """Return the mean entropy of ``softmax(logits / T)``, nats; no gradient reaches T."""
    return _MeanEntropy.apply(logits_NE, temperature)  # type: ignore[no-any-return]


def mean_powers(
    logits_NE: Tensor, unit_E: Tensor, first_N: Tensor, *, values_NE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the means over tokens of ``softmax(logits) / unit`` and of its eighth power, ``(E,)``.

    Both count 0 for tokens whose first choice is the expert.

    Args:
        logits_NE: The scores, which get the gradient.
        unit_E: What probabilities are measured in, so that powers keep within fp32.
        first_N: The expert that each token chose first.
        values_NE: As for `mean_probabilities`.
    """
    both_2E = _MeanPowers.apply(logits_NE, unit_E.detach(), first_N, values_NE)
    return both_2E[0], both_2E[1]


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


def _mean_by_blocks(function: Callable[..., Tensor], logits_NE: Tensor, *others: Tensor) -> Tensor:
    """Return the mean over rows of a function of the rows of the logits, and of others' rows."""
    blocks = _blocks(logits_NE)
    if len(blocks) == 1:
        return function(logits_NE, *others).mean(0)
    sums = [function(logits_NE[rows], *(each[rows] for each in others)).sum(0) for rows in blocks]
    return torch.stack(sums).sum(0) / logits_NE.shape[0]


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


class _MeanProbabilities(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits_NE: Tensor, values_NE: Tensor | None) -> Tensor:
        return _mean_by_blocks(partial(torch.softmax, dim=-1), logits_NE)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        logits_NE, values_NE = inputs
        ctx.save_for_backward(logits_NE if values_NE is None else values_NE)

    @staticmethod
    def backward(ctx, grad_E: Tensor):  # type: ignore[no-untyped-def]
        (logits_NE,) = ctx.saved_tensors
        slope_E = grad_E / logits_NE.shape[0]

        def gradient(logits_NE: Tensor) -> Tensor:
            probs_NE = torch.softmax(logits_NE, dim=-1)
            found: Tensor = probs_NE * (slope_E - (probs_NE * slope_E).sum(-1, keepdim=True))
            return found

        return _by_blocks(gradient, logits_NE, at_once=torch.is_grad_enabled()), None


class _MeanPowers(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits_NE: Tensor, unit_E: Tensor, first_N: Tensor, values_NE: Tensor | None
    ) -> Tensor:
        def powers(logits_NE: Tensor, first_N: Tensor) -> Tensor:
            units_NE = _units(torch.softmax(logits_NE, dim=-1), unit_E, first_N)
            return torch.stack((units_NE, _eighth_power(units_NE)), dim=1)

        return _mean_by_blocks(powers, logits_NE, first_N)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        logits_NE, unit_E, first_N, values_NE = inputs
        ctx.save_for_backward(logits_NE if values_NE is None else values_NE, unit_E, first_N)

    @staticmethod
    def backward(ctx, grad_2E: Tensor):  # type: ignore[no-untyped-def]
        logits_NE, unit_E, first_N = ctx.saved_tensors
        slope_E, eighth_E = grad_2E / logits_NE.shape[0]

        def gradient(logits_NE: Tensor, first_N: Tensor) -> Tensor:
            probs_NE = torch.softmax(logits_NE, dim=-1)
            units_NE = _units(probs_NE, unit_E, first_N)
            pull_NE = units_NE * slope_E + _eighth_power(units_NE) * (8.0 * eighth_E)
            found: Tensor = pull_NE - probs_NE * pull_NE.sum(-1, keepdim=True)
            return found

        at_once = torch.is_grad_enabled()
        return _by_blocks(gradient, logits_NE, first_N, at_once=at_once), None, None, None


def _units(probs_NE: Tensor, unit_E: Tensor, first_N: Tensor) -> Tensor:
    return (probs_NE / unit_E).scatter(-1, first_N.unsqueeze(-1), 0.0)


def _eighth_power(units_NE: Tensor) -> Tensor:
    # Far above the unit tokens count alike, and powers stay finite in fp32. The gradient does not
    # end there: it would be that of tokens which hardly count.
    return units_NE.clamp_max(MOST_UNITS).square().square().square()


class _MeanEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits_NE: Tensor, temperature: Tensor | float) -> Tensor:
        def entropies(logits_NE: Tensor) -> Tensor:
            log_probs_NE = torch.log_softmax(logits_NE / temperature, dim=-1)
            return -(log_probs_NE.exp() * log_probs_NE).sum(-1)

        return _mean_by_blocks(entropies, logits_NE)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        logits_NE, temperature = inputs
        ctx.is_tensor = isinstance(temperature, Tensor)
        ctx.temperature = None if ctx.is_tensor else temperature
        ctx.save_for_backward(logits_NE, *([temperature] if ctx.is_tensor else []))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        logits_NE, *rest = ctx.saved_tensors
        temperature = rest[0] if rest else ctx.temperature
        scale = -grad / logits_NE.shape[0] / temperature  # T may be fp32 where the rest is fp64

        def gradient(logits_NE: Tensor) -> Tensor:
            log_probs_NE = torch.log_softmax(logits_NE / temperature, dim=-1)
            probs_NE = log_probs_NE.exp()
            entropy_N1 = -(probs_NE * log_probs_NE).sum(-1, keepdim=True)
            found: Tensor = probs_NE * (log_probs_NE + entropy_N1) * scale
            return found

        return _by_blocks(gradient, logits_NE, at_once=torch.is_grad_enabled()), None


class _LinearTwice(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
        logits_NE = F.linear(x_ND.to(weight_ED.dtype), weight_ED, bias_E)
        return logits_NE, logits_NE.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        x_ND, weight_ED, _ = inputs
        ctx.save_for_backward(x_ND, weight_ED)

    @staticmethod
    def backward(ctx, grad_NE: Tensor, own_NE: Tensor):  # type: ignore[no-untyped-def]
        x_ND, weight_ED = ctx.saved_tensors
        both_NE = grad_NE + own_NE
        with without_autocast(x_ND):
            grad_x_ND = (grad_NE @ weight_ED).to(x_ND.dtype) if ctx.needs_input_grad[0] else None
            return grad_x_ND, both_NE.mT @ x_ND.to(weight_ED.dtype), both_NE.sum(0)
