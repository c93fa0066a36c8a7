"""Move tokens to their experts, apply stacked weights group by group, and bring results back.

Every shape is fixed by the inputs' shapes (S is always N * K), so nothing waits for the device and
everything compiles into one graph. No token is dropped: there is no capacity.

Axes: N tokens, E experts, K experts chosen for a token, S = N * K slots sorted by expert,
D input features, F output features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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


def plan_dispatch(expert_ids_NK: Tensor, *, num_experts: int) -> Plan:
    """Sort the slots by expert, stably: tokens keep their order within an expert."""
    flat_S = expert_ids_NK.reshape(-1)
    expert_ids_S, order_S = flat_S.sort(stable=True)
    slots_S = torch.arange(flat_S.shape[0], device=flat_S.device)
    inverse_S = torch.empty_like(order_S).scatter(0, order_S, slots_S)
    experts_E = torch.arange(num_experts, device=flat_S.device)
    ends_E = torch.searchsorted(expert_ids_S, experts_E, right=True).to(torch.int32)
    return Plan(order_S, inverse_S, expert_ids_S, ends_E)


def scatter_to_experts(x_ND: Tensor, plan: Plan, *, top_k: int) -> Tensor:
    """Copy every token to its ``top_k`` slots, sorted by expert, ``(S, D)``."""
    return _ToSlots.apply(x_ND, plan.order_S, plan.inverse_S, top_k)  # type: ignore[no-any-return]


def unsort_slots(y_SF: Tensor, plan: Plan, *, top_k: int) -> Tensor:
    """Bring sorted slots back to their tokens, ``(N, K, F)``."""
    flat_SF: Tensor = _Permute.apply(y_SF, plan.inverse_S, plan.order_S)
    return flat_SF.view(flat_SF.shape[0] // top_k, top_k, flat_SF.shape[-1])


def combine(y_NKF: Tensor, weights_NK: Tensor) -> Tensor:
    """Return the gate-weighted sum over each token's experts, ``(N, F)``, in the gates' dtype."""
    with without_autocast(weights_NK):
        return torch.matmul(weights_NK.unsqueeze(1), y_NKF.to(weights_NK.dtype)).squeeze(1)


def grouped_linear(
    x_SD: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None, ends_E: Tensor
) -> Tensor:
    """Apply to each sorted slot the linear map of its expert, ``(S, F)``.

    An expert without slots gets a gradient of zeros, not ``None``.
    """
    return _GroupedLinear.apply(x_SD, weight_EFD, bias_EF, ends_E)  # type: ignore[no-any-return]


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
        flat_SD = _Permute.apply(grad_SD, inverse_S, order_S)
        num_tokens = inverse_S.shape[0] // ctx.top_k
        grad_ND = flat_SD.reshape(num_tokens, ctx.top_k, flat_SD.shape[-1]).sum(1)
        return grad_ND, None, None, None


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


# The grouped linear map as one operator.
#
# F.grouped_mm alone has no bias, no fp64, wants rows on multiples of 16 bytes, and under
# torch.compile takes bf16 only. As an operator of our own the same call works for all of them, and
# the compiler sees one opaque node with fixed shapes.


def _in_a_loop(x_SD: Tensor) -> bool:
    """Whether to launch one product per expert, whose bounds are then read on the host.

    On a CPU that is the faster way (the bias is added inside each product). Elsewhere it is the way
    for what ``F.grouped_mm`` lacks: fp64, where the device is waited for.
    """
    narrow = x_SD.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return _on_host(x_SD) or not narrow


def _on_host(tensor: Tensor) -> bool:
    return tensor.is_cpu


def _aligned(tensor: Tensor, *, axes: int = 1) -> Tensor:
    """Pad the last axes with zeros: ``F.grouped_mm`` wants rows on multiples of 16 bytes."""
    step = 16 // tensor.itemsize
    pads = [pad for size in reversed(tensor.shape[-axes:]) for pad in (0, -size % step)]
    return F.pad(tensor, pads) if any(pads) else tensor.contiguous()


def _groups(ends_E: Tensor) -> list[tuple[int, int, int]]:
    """Return (expert, start, end) of the experts that have slots. Reads ``ends_E`` on the host."""
    ends = ends_E.tolist()
    return [(e, s, t) for e, (s, t) in enumerate(zip([0, *ends], ends, strict=False)) if t > s]


@torch.library.custom_op("ecomoe::grouped_linear", mutates_args=())
def _grouped_linear(
    x_SD: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None, ends_E: Tensor
) -> Tensor:
    if _in_a_loop(x_SD):
        y_SF = x_SD.new_empty(x_SD.shape[0], weight_EFD.shape[1])
        for e, s, t in _groups(ends_E):
            if bias_EF is None:
                torch.mm(x_SD[s:t], weight_EFD[e].mT, out=y_SF[s:t])
            else:
                torch.addmm(bias_EF[e], x_SD[s:t], weight_EFD[e].mT, out=y_SF[s:t])
        return y_SF
    y_SF = F.grouped_mm(_aligned(x_SD), _aligned(weight_EFD, axes=2).mT, offs=ends_E)
    y_SF = y_SF[:, : weight_EFD.shape[1]].contiguous()
    if bias_EF is not None:
        y_SF = y_SF + bias_EF.index_select(0, _expert_of_slot(ends_E, x_SD.shape[0]))
    return y_SF


@_grouped_linear.register_fake
def _(x_SD: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None, ends_E: Tensor) -> Tensor:
    return x_SD.new_empty(x_SD.shape[0], weight_EFD.shape[1])


@torch.library.custom_op("ecomoe::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad_SF: Tensor, x_SD: Tensor, weight_EFD: Tensor, ends_E: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_SF = grad_SF.contiguous()
    num_experts, width_out, width_in = weight_EFD.shape
    if _in_a_loop(x_SD):
        grad_x_SD = x_SD.new_empty(x_SD.shape)
        groups = _groups(ends_E)
        # Only experts without slots need the zeros.
        full = len(groups) == num_experts
        new = weight_EFD.new_empty if full else weight_EFD.new_zeros
        grad_weight_EFD = new(weight_EFD.shape)
        grad_bias_EF = grad_SF.new_zeros(num_experts if has_bias else 0, width_out)
        for e, s, t in groups:
            torch.mm(grad_SF[s:t], weight_EFD[e], out=grad_x_SD[s:t])
            torch.mm(grad_SF[s:t].mT, x_SD[s:t], out=grad_weight_EFD[e])
            if has_bias:
                torch.sum(grad_SF[s:t], 0, out=grad_bias_EF[e])
        return grad_x_SD, grad_weight_EFD, grad_bias_EF
    rows_SF = _aligned(grad_SF)
    grad_x_SD = F.grouped_mm(rows_SF, _aligned(weight_EFD, axes=2), offs=ends_E)
    grad_x_SD = grad_x_SD[:, :width_in].contiguous()
    grad_weight_EFD = F.grouped_mm(rows_SF.mT, _aligned(x_SD), offs=ends_E)
    grad_weight_EFD = grad_weight_EFD[:, :width_out, :width_in].contiguous()
    starts_E = torch.cat((ends_E.new_zeros(1), ends_E[:-1]))
    grad_weight_EFD.masked_fill_((starts_E == ends_E).view(-1, 1, 1), 0.0)
    grad_bias_EF = grad_SF.new_zeros(num_experts if has_bias else 0, width_out)
    if has_bias:
        expert_ids_S = _expert_of_slot(ends_E, grad_SF.shape[0])
        grad_bias_EF.index_add_(0, expert_ids_S, grad_SF)
    return grad_x_SD, grad_weight_EFD, grad_bias_EF


@_grouped_linear_backward.register_fake
def _(
    grad_SF: Tensor, x_SD: Tensor, weight_EFD: Tensor, ends_E: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    bias_shape = (weight_EFD.shape[0] if has_bias else 0, weight_EFD.shape[1])
    new_x_SD, new_weight_EFD = x_SD.new_empty(x_SD.shape), weight_EFD.new_empty(weight_EFD.shape)
    return new_x_SD, new_weight_EFD, grad_SF.new_empty(bias_shape)


class _GroupedLinear(torch.autograd.Function):
    """The operator with its gradient, in the form that `torch.func` transforms ask for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_SD: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None, ends_E: Tensor) -> Tensor:
        return torch.ops.ecomoe.grouped_linear(  # type: ignore[no-any-return]
            x_SD, weight_EFD, bias_EF, ends_E
        )

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        x_SD, weight_EFD, bias_EF, ends_E = inputs
        ctx.save_for_backward(x_SD, weight_EFD, ends_E)
        ctx.has_bias = bias_EF is not None

    @staticmethod
    def backward(ctx, grad_SF: Tensor):  # type: ignore[no-untyped-def]
        x_SD, weight_EFD, ends_E = ctx.saved_tensors
        grad_x_SD, grad_weight_EFD, grad_bias_EF = _GroupedLinearGradient.apply(
            grad_SF, x_SD, weight_EFD, ends_E, ctx.has_bias
        )
        return grad_x_SD, grad_weight_EFD, grad_bias_EF if ctx.has_bias else None, None


class _GroupedLinearGradient(torch.autograd.Function):
    """The gradient with its own gradient, which the same two operators give."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_SF: Tensor, x_SD: Tensor, weight_EFD: Tensor, ends_E: Tensor, has_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.ecomoe.grouped_linear_backward(  # type: ignore[no-any-return]
            grad_SF, x_SD, weight_EFD, ends_E, has_bias
        )

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        grad_SF, x_SD, weight_EFD, ends_E, ctx.has_bias = inputs
        ctx.save_for_backward(grad_SF, x_SD, weight_EFD, ends_E)

    @staticmethod
    def backward(ctx, to_x_SD: Tensor, to_weight_EFD: Tensor, to_bias_EF: Tensor):  # type: ignore[no-untyped-def]
        grad_SF, x_SD, weight_EFD, ends_E = ctx.saved_tensors
        like_bias_EF = to_bias_EF if ctx.has_bias else None
        to_grad_SF = grouped_linear(to_x_SD, weight_EFD, like_bias_EF, ends_E)
        to_grad_SF = to_grad_SF + grouped_linear(x_SD, to_weight_EFD, None, ends_E)
        through_x_SD, through_weight_EFD, _ = _GroupedLinearGradient.apply(
            grad_SF, to_x_SD, to_weight_EFD, ends_E, False
        )
        return to_grad_SF, through_x_SD, through_weight_EFD, None, None


def _one_by_one(operator: Any) -> None:
    """Let ``torch.vmap`` run the operator on each element of a batch in turn."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            operator(
                *(
                    arg if dim is None else arg.select(dim, index)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for index in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    operator.register_vmap(rule)


_one_by_one(_grouped_linear)
_one_by_one(_grouped_linear_backward)


def _expert_of_slot(ends_E: Tensor, num_slots: int) -> Tensor:
    """Return the expert of each sorted slot, int64, ``(S,)``."""
    slots_S = torch.arange(num_slots, device=ends_E.device, dtype=ends_E.dtype)
    return torch.searchsorted(ends_E, slots_S, right=True)
