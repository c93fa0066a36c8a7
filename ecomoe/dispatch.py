"""Move tokens to their experts, apply stacked weights group by group, and bring results back.

Every shape is fixed by the inputs' shapes (S is always N * K), so nothing waits for the device and
everything compiles into one graph. No token is dropped: there is no capacity.

Axes: N tokens, E experts, K experts chosen for a token, S = N * K slots sorted by expert,
D input features, F output features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ecomoe import buffers
from ecomoe.pieces import MAX_ROWS, for_host
from ecomoe.routing import without_autocast


class Plan(NamedTuple):
    """Which slot goes where.

    Attributes:
        order_S: For each sorted slot, its index in the flat ``(N, K)`` slots; int64.
        inverse_S: For each flat slot, its index among the sorted ones; int64.
        expert_ids_S: The expert of each sorted slot; int64, ascending.
        ends_E: One past the last sorted slot of each expert; int32.
    """

    order_S: Tensor
    inverse_S: Tensor
    expert_ids_S: Tensor
    ends_E: Tensor


def sort_slots(expert_ids_NK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the slots by expert, stably: tokens keep their order within an expert.

    Returns:
        ``order_S``, ``expert_ids_S`` and ``ends_E`` of a `Plan`, for whoever needs no more of it.
    """
    expert_ids_S, order_S = expert_ids_NK.reshape(-1).sort(stable=True)
    experts_E = torch.arange(num_experts, device=expert_ids_S.device)
    ends_E = torch.searchsorted(expert_ids_S, experts_E, right=True, out_int32=True)
    return order_S, expert_ids_S, ends_E


def plan_dispatch(expert_ids_NK: Tensor, *, num_experts: int) -> Plan:
    """Sort the slots by expert, and say where each has gone."""
    order_S, expert_ids_S, ends_E = sort_slots(expert_ids_NK, num_experts=num_experts)
    slots_S = torch.arange(order_S.shape[0], device=order_S.device)
    inverse_S = torch.empty_like(order_S).scatter(0, order_S, slots_S)
    return Plan(order_S, inverse_S, expert_ids_S, ends_E)


def scatter_to_experts(x_ND: Tensor, plan: Plan, *, top_k: int) -> Tensor:
    """Copy every token to its ``top_k`` slots, sorted by expert, ``(S, D)``."""
    if not torch.is_grad_enabled():
        return x_ND.index_select(0, plan.order_S // top_k)
    return _ToSlots.apply(x_ND, plan.order_S, plan.inverse_S, top_k)  # type: ignore[no-any-return]


def unsort_slots(y_SF: Tensor, plan: Plan, *, top_k: int) -> Tensor:
    """Bring sorted slots back to their tokens, ``(N, K, F)``."""
    flat_SF: Tensor = _Permute.apply(y_SF, plan.inverse_S, plan.order_S)
    return flat_SF.view(flat_SF.shape[0] // top_k, top_k, flat_SF.shape[-1])


def combine(y_SF: Tensor, weights_NK: Tensor, plan: Plan) -> Tensor:
    """Return the gate-weighted sum of each token's slots, ``(N, F)``, in the dtype of ``y_SF``.

    Sums are taken in fp32 or wider. On a CPU the gates are rounded to the dtype of ``y_SF`` first,
    as the experts' outputs are.
    """
    if not torch.is_grad_enabled():
        return _sum_of_slots(y_SF, plan.inverse_S.view(weights_NK.shape), weights_NK)
    return _Combine.apply(y_SF, weights_NK, plan.order_S, plan.inverse_S)  # type: ignore[no-any-return]


class _ToSlots(torch.autograd.Function):
    """Gather whose gradient is a gather and a sum over K, in place of a scatter with collisions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_ND: Tensor, order_S: Tensor, inverse_S: Tensor, top_k: int) -> Tensor:
        return x_ND.index_select(0, order_S // top_k)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, order_S, inverse_S, ctx.top_k = inputs
        ctx.save_for_backward(order_S, inverse_S)

    @staticmethod
    def backward(ctx, grad_SD: Tensor):  # type: ignore[no-untyped-def]
        order_S, inverse_S = ctx.saved_tensors
        return _FromSlots.apply(grad_SD, order_S, inverse_S, ctx.top_k), None, None, None


class _FromSlots(torch.autograd.Function):
    """Sum of each token's slots, whose gradient is `_ToSlots`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y_SD: Tensor, order_S: Tensor, inverse_S: Tensor, top_k: int) -> Tensor:
        return _sum_of_slots(y_SD, inverse_S.view(-1, top_k), None)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, order_S, inverse_S, ctx.top_k = inputs
        ctx.save_for_backward(order_S, inverse_S)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):  # type: ignore[no-untyped-def]
        order_S, inverse_S = ctx.saved_tensors
        return _ToSlots.apply(grad_ND, order_S, inverse_S, ctx.top_k), None, None, None


class _Combine(torch.autograd.Function):
    """Gather and weighted sum in one pass; no slot is brought back to its token in memory."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y_SF: Tensor, weights_NK: Tensor, order_S: Tensor, inverse_S: Tensor) -> Tensor:
        return _sum_of_slots(y_SF, inverse_S.view(weights_NK.shape), weights_NK)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_NF: Tensor):  # type: ignore[no-untyped-def]
        y_SF, weights_NK, order_S, inverse_S = ctx.saved_tensors
        if for_host(y_SF) and not torch.is_grad_enabled():
            grad_y_SF, grad_weights_S = _combine_backward(grad_NF, y_SF, weights_NK, order_S)
            grad_weights_S = grad_weights_S.index_select(0, inverse_S)
            return grad_y_SF, grad_weights_S.view(weights_NK.shape), None, None
        grad_SF = _ToSlots.apply(grad_NF, order_S, inverse_S, weights_NK.shape[1])
        dot_S = torch.linalg.vecdot(y_SF.to(grad_SF.dtype), grad_SF)
        grad_weights_S = _Permute.apply(dot_S, inverse_S, order_S)
        weights_S = _Permute.apply(weights_NK.reshape(-1), order_S, inverse_S)
        grad_y_SF = grad_SF * weights_S.to(grad_SF.dtype).unsqueeze(1)
        grad_weights_NK = grad_weights_S.view(weights_NK.shape).to(weights_NK.dtype)
        return grad_y_SF, grad_weights_NK, None, None


class _Permute(torch.autograd.Function):
    """Row permutation whose gradient is the inverse permutation, a gather too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_SD: Tensor, index_S: Tensor, inverse_S: Tensor) -> Tensor:
        return x_SD.index_select(0, index_S)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, index_S, inverse_S = inputs
        ctx.save_for_backward(index_S, inverse_S)

    @staticmethod
    def backward(ctx, grad_SD: Tensor):  # type: ignore[no-untyped-def]
        index_S, inverse_S = ctx.saved_tensors
        return _Permute.apply(grad_SD, inverse_S, index_S), None, None


@torch.library.custom_op("ecomoe::combine_backward", mutates_args=())
def _combine_backward(
    grad_NF: Tensor, y_SF: Tensor, weights_NK: Tensor, order_S: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of slots and of their gates, some rows at a time, on a CPU."""
    num_slots, top_k = y_SF.shape[0], weights_NK.shape[1]
    weights_S1 = weights_NK.reshape(-1, 1).index_select(0, order_S).to(y_SF.dtype)
    tokens_S = order_S // top_k
    grad_y_SF = buffers.empty(y_SF, y_SF.shape)
    dot_S = weights_NK.new_empty(num_slots)
    products = y_SF.new_empty(min(num_slots, MAX_ROWS), y_SF.shape[1])
    for s in range(0, num_slots, MAX_ROWS):
        t = min(s + MAX_ROWS, num_slots)
        rows = torch.index_select(grad_NF, 0, tokens_S[s:t], out=grad_y_SF[s:t])
        torch.mul(rows, y_SF[s:t], out=products[: t - s])
        torch.sum(products[: t - s], 1, dtype=dot_S.dtype, out=dot_S[s:t])
        rows.mul_(weights_S1[s:t])
    return grad_y_SF, dot_S


@_combine_backward.register_fake
def _(grad_NF: Tensor, y_SF: Tensor, weights_NK: Tensor, order_S: Tensor) -> tuple[Tensor, Tensor]:
    return y_SF.new_empty(y_SF.shape), weights_NK.new_empty(y_SF.shape[0])


def _sum_of_slots(y_SF: Tensor, slots_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
    """Return the (weighted) sum of the slots of each token, ``(N, F)``, in ``y_SF``'s dtype."""
    if for_host(y_SF):
        # Reads each slot once and writes each token once.
        weights_NK = None if weights_NK is None else weights_NK.to(y_SF.dtype)
        return F.embedding_bag(slots_NK, y_SF, mode="sum", per_sample_weights=weights_NK)
    y_NKF = y_SF.index_select(0, slots_NK.reshape(-1)).view(*slots_NK.shape, y_SF.shape[1])
    if weights_NK is None:
        return y_NKF.sum(1)
    with without_autocast(weights_NK):
        wide_NKF = y_NKF.to(weights_NK.dtype)
        return torch.matmul(weights_NK.unsqueeze(1), wide_NKF).squeeze(1).to(y_SF.dtype)


def sum_of_rows(rows_RX: Tensor, rows_S: Tensor, gates_NK: Tensor | None) -> Tensor:
    """Return the gate-weighted sum of each token's rows, ``(N, X)``."""
    if gates_NK is None:
        return rows_RX.index_select(0, rows_S)
    gates_NK = gates_NK.to(rows_RX.dtype)
    rows_NK = rows_S.view(gates_NK.shape)
    return F.embedding_bag(rows_NK, rows_RX, mode="sum", per_sample_weights=gates_NK)
