"""The grouped linear map: to each slot, sorted by expert, the linear map of its expert.

``F.grouped_mm`` alone has no bias, no fp64, wants rows on multiples of 16 bytes, and under
``torch.compile`` takes bf16 only. As an operator of our own the same call works for all of them,
and the compiler sees one opaque node with fixed shapes.

Axes: E experts, S slots sorted by expert, D input features, F output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ecomoe import buffers
from ecomoe.pieces import (
    Layout,
    add_outer,
    affine,
    empty_gradient,
    most_rows,
    of_experts,
    product,
)


def grouped_linear(
    x_SD: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None, ends_E: Tensor
) -> Tensor:
    """Apply to each sorted slot the linear map of its expert, ``(S, F)``.

    An expert without slots gets a gradient of zeros, not ``None``.

    Raises:
        ValueError: Tokens and weights are on different devices.
    """
    # Else weights on the meta device would have the output left unwritten, without an error.
    if x_SD.device != weight_EFD.device:
        raise ValueError(
            f"tokens on {x_SD.device} must be where the experts' weights are, on "
            f"{weight_EFD.device}; move one of them"
        )
    return _GroupedLinear.apply(x_SD, weight_EFD, bias_EF, ends_E)  # type: ignore[no-any-return]


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


def _loop(x_SD: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None, ends_E: Tensor) -> Tensor:
    num_experts, width_out, width_in = weight_EFD.shape
    layout = Layout(ends_E, x_SD.dtype)
    most = most_rows(x_SD.shape[0], num_experts, x_SD.dtype)
    y_RF = buffers.empty(x_SD, (most, width_out))
    x = layout.spare_memory(x_SD, width_in)
    for piece in layout.pieces:
        own = piece.experts
        x_BPD = piece.take(x_SD, layout.slots_R, x)
        affine(x_BPD, weight_EFD[own], of_experts(bias_EF, own), out=piece.of(y_RF))
    return y_RF.index_select(0, layout.rows_S)


def _loop_backward(
    grad_SF: Tensor, x_SD: Tensor, weight_EFD: Tensor, ends_E: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    num_experts, width_out, width_in = weight_EFD.shape
    layout = Layout(ends_E, x_SD.dtype)
    most = most_rows(x_SD.shape[0], num_experts, x_SD.dtype)
    grad_x_RD = buffers.empty(x_SD, (most, width_in))
    wide = torch.promote_types(x_SD.dtype, torch.float32)
    grad_bias_EF = x_SD.new_zeros(num_experts if has_bias else 0, width_out, dtype=wide)
    grad_weight_EFD = empty_gradient(weight_EFD, layout.busy)
    widths = width_in, width_out, width_out
    inner, outer, turned = (layout.spare_memory(x_SD, width) for width in widths)
    own_R1 = layout.own_R.to(x_SD.dtype).unsqueeze(1)
    for piece in layout.pieces:
        own = piece.experts
        grad_BPF = piece.take(grad_SF, layout.slots_R, outer).mul_(piece.of(own_R1))
        x_BPD = piece.take(x_SD, layout.slots_R, inner)
        add_outer(grad_BPF, x_BPD, piece, grad_weight_EFD, turned)
        product(grad_BPF, weight_EFD[own], out=piece.of(grad_x_RD))
        if has_bias:
            grad_bias_EF[own] += grad_BPF.sum(1)
    grad_x_SD = grad_x_RD.index_select(0, layout.rows_S)
    return grad_x_SD, grad_weight_EFD, grad_bias_EF.to(x_SD.dtype)


@torch.library.custom_op("ecomoe::grouped_linear", mutates_args=())
def _grouped_linear(
    x_SD: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None, ends_E: Tensor
) -> Tensor:
    if _in_a_loop(x_SD):
        return _loop(x_SD, weight_EFD, bias_EF, ends_E)
    return grouped_product(x_SD, weight_EFD, bias_EF, ends_E)


def grouped_product(
    x_SD: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None, ends_E: Tensor
) -> Tensor:
    """Return `grouped_linear` by ``F.grouped_mm``, for dtypes of up to 32 bits."""
    y_SF = F.grouped_mm(_aligned(x_SD), _aligned(weight_EFD, axes=2).mT, offs=ends_E)
    y_SF = y_SF[:, : weight_EFD.shape[1]].contiguous()
    if bias_EF is not None:
        y_SF = y_SF + bias_EF.index_select(0, expert_of_slot(ends_E, x_SD.shape[0]))
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
        return _loop_backward(grad_SF, x_SD, weight_EFD, ends_E, has_bias)
    rows_SF = _aligned(grad_SF)
    grad_x_SD = F.grouped_mm(rows_SF, _aligned(weight_EFD, axes=2), offs=ends_E)
    grad_x_SD = grad_x_SD[:, :width_in].contiguous()
    grad_weight_EFD = F.grouped_mm(rows_SF.mT, _aligned(x_SD), offs=ends_E)
    grad_weight_EFD = grad_weight_EFD[:, :width_out, :width_in].contiguous()
    starts_E = torch.cat((ends_E.new_zeros(1), ends_E[:-1]))
    grad_weight_EFD.masked_fill_((starts_E == ends_E).view(-1, 1, 1), 0.0)
    grad_bias_EF = grad_SF.new_zeros(num_experts if has_bias else 0, width_out)
    if has_bias:
        expert_ids_S = expert_of_slot(ends_E, grad_SF.shape[0])
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


def expert_of_slot(ends_E: Tensor, num_slots: int) -> Tensor:
    """Return the expert of each sorted slot, int64, ``(S,)``."""
    slots_S = torch.arange(num_slots, device=ends_E.device, dtype=ends_E.dtype)
    return torch.searchsorted(ends_E, slots_S, right=True)
