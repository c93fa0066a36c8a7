"""The experts' feed-forward map as one operator on the CPU.

Sorted slots go through both projections piece by piece: what lies between them stays in the cache,
and of the hidden layer only the pre-activation is kept for the backward pass, which computes the
activation again.

Axes: E experts, S slots sorted by expert, B experts of a piece, P rows of each of them, D input
features, H hidden features, G pre-activations (H, or 2 H where the layer is gated), F output
features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ecomoe import buffers
from ecomoe.activations import ACTIVATIONS, ELEMENTWISE
from ecomoe.grouped import grouped_linear, grouped_product
from ecomoe.pieces import (
    VERY_FEW_ROWS,
    add_outer,
    affine,
    cut,
    empty_gradient,
    most_rows,
    of_experts,
    product,
)


@torch.library.custom_op("ecomoe::feed_forward", mutates_args=())
def feed_forward(
    x_SD: Tensor,
    up_EGD: Tensor,
    up_bias_EG: Tensor | None,
    down_EFH: Tensor,
    down_bias_EF: Tensor | None,
    ends_E: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return each slot's output of its own expert ``(S, F)``, and the pre-activations.

    The layer is gated where ``up_EGD`` gives twice the features that ``down_EFH`` takes. The
    pre-activations ``(S, G)`` have no rows unless they are to be kept for a backward pass.
    """
    num_slots, d_hidden = x_SD.shape[0], down_EFH.shape[2]
    if _are_few(x_SD, up_EGD, down_EFH):
        pre_SG = grouped_product(x_SD, up_EGD, up_bias_EG, ends_E)
        hidden_SH = _activate(pre_SG, activation, out=x_SD.new_empty(num_slots, d_hidden))
        y_SF = grouped_product(hidden_SH, down_EFH, down_bias_EF, ends_E)
        return y_SF, pre_SG if keep else pre_SG.new_empty(0, up_EGD.shape[1])
    pre_SG = buffers.empty(x_SD, (num_slots if keep else 0, up_EGD.shape[1]))
    y_SF = buffers.empty(x_SD, (num_slots, down_EFH.shape[1]))
    pieces = cut(ends_E, x_SD.dtype)
    widths = x_SD.shape[1], up_EGD.shape[1], d_hidden, y_SF.shape[1]
    x, pre, hidden, y = (x_SD.new_empty(most_rows(pieces) * width) for width in widths)
    for piece in pieces:
        own = piece.experts
        pre_BPG = piece.of(pre_SG, pre) if keep else piece.spare(pre, up_EGD.shape[1])
        affine(piece.take(x_SD, x), up_EGD[own], of_experts(up_bias_EG, own), out=pre_BPG)
        if keep:
            piece.put(pre_BPG, pre_SG)
        hidden_BPH = _activate(pre_BPG, activation, out=piece.spare(hidden, d_hidden))
        y_BPF = piece.of(y_SF, y)
        affine(hidden_BPH, down_EFH[own], of_experts(down_bias_EF, own), out=y_BPF)
        piece.put(y_BPF, y_SF)
    return y_SF, pre_SG


@feed_forward.register_fake
def _(x_SD, up_EGD, up_bias_EG, down_EFH, down_bias_EF, ends_E, activation, keep):  # type: ignore[no-untyped-def]
    rows = x_SD.shape[0]
    y_SF = x_SD.new_empty(rows, down_EFH.shape[1])
    return y_SF, x_SD.new_empty(rows if keep else 0, up_EGD.shape[1])


@torch.library.custom_op("ecomoe::feed_forward_backward", mutates_args=())
def feed_forward_backward(
    grad_SF: Tensor,
    x_SD: Tensor,
    pre_SG: Tensor,
    up_EGD: Tensor,
    down_EFH: Tensor,
    ends_E: Tensor,
    activation: str,
    has_biases: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of tokens, both projections and both biases (empty without biases)."""
    d_hidden = down_EFH.shape[2]
    gated = up_EGD.shape[1] != d_hidden
    grad_SF = grad_SF.contiguous()
    grad_x_SD = buffers.empty(x_SD, x_SD.shape)
    num_biases = up_EGD.shape[0] if has_biases else 0
    wide = torch.promote_types(x_SD.dtype, torch.float32)
    grad_up_bias_EG = x_SD.new_zeros(num_biases, up_EGD.shape[1], dtype=wide)
    grad_down_bias_EF = x_SD.new_zeros(num_biases, down_EFH.shape[1], dtype=wide)
    pieces = cut(ends_E, x_SD.dtype)
    grad_up_EGD = empty_gradient(up_EGD, pieces)
    grad_down_EFH = empty_gradient(down_EFH, pieces)
    widths = x_SD.shape[1], pre_SG.shape[1], d_hidden, d_hidden, grad_SF.shape[1]
    most = most_rows(pieces)
    inner, pre, hidden, slope, outer = (x_SD.new_empty(most * width) for width in widths)
    joined = x_SD.new_empty(most * pre_SG.shape[1]) if gated else slope
    for piece in pieces:
        own = piece.experts
        pre_BPG = piece.take(pre_SG, pre)
        grad_BPF = piece.take(grad_SF, outer)
        hidden_BPH = _activate(pre_BPG, activation, out=piece.spare(hidden, d_hidden))
        add_outer(grad_BPF, hidden_BPH, piece, grad_down_EFH)
        slope_BPH = product(grad_BPF, down_EFH[own], out=piece.spare(slope, d_hidden))
        joined_BPG = piece.spare(joined, pre_SG.shape[1])
        _activate_backward(slope_BPH, pre_BPG, activation, out=joined_BPG)
        add_outer(joined_BPG, piece.take(x_SD, inner), piece, grad_up_EGD)
        if has_biases:
            grad_up_bias_EG[own] += joined_BPG.sum(1)
            grad_down_bias_EF[own] += grad_BPF.sum(1)
        grad_x_BPD = piece.of(grad_x_SD, inner)
        piece.put(product(joined_BPG, up_EGD[own], out=grad_x_BPD), grad_x_SD)
    return (
        grad_x_SD,
        grad_up_EGD,
        grad_up_bias_EG.to(x_SD.dtype),
        grad_down_EFH,
        grad_down_bias_EF.to(x_SD.dtype),
    )


@feed_forward_backward.register_fake
def _(grad_SF, x_SD, pre_SG, up_EGD, down_EFH, ends_E, activation, has_biases):  # type: ignore[no-untyped-def]
    num_biases = up_EGD.shape[0] if has_biases else 0
    return (
        x_SD.new_empty(x_SD.shape),
        up_EGD.new_empty(up_EGD.shape),
        x_SD.new_empty(num_biases, up_EGD.shape[1]),
        down_EFH.new_empty(down_EFH.shape),
        x_SD.new_empty(num_biases, down_EFH.shape[1]),
    )


def _are_few(x_SD: Tensor, up_EGD: Tensor, down_EFH: Tensor) -> bool:
    """Whether ``F.grouped_mm``, which pads nothing, is faster, and reads the weights as they are.

    Reading them is all that takes time then; MKL's time for a batch goes with its padded rows.
    """
    aligned = up_EGD.shape[2] % 4 == 0 == down_EFH.shape[2] % 4
    contiguous = up_EGD.is_contiguous() and down_EFH.is_contiguous()
    few = x_SD.shape[0] < VERY_FEW_ROWS * up_EGD.shape[0]
    return few and aligned and contiguous and x_SD.itemsize == 4


def _activate(pre: Tensor, activation: str, *, out: Tensor) -> Tensor:
    values, _ = ELEMENTWISE[activation]
    d_hidden = out.shape[-1]
    values(pre[..., :d_hidden], out)
    return out if pre.shape[-1] == d_hidden else out.mul_(pre[..., d_hidden:])


def _activate_backward(grad: Tensor, pre: Tensor, activation: str, *, out: Tensor) -> None:
    values, gradient = ELEMENTWISE[activation]
    d_hidden = grad.shape[-1]
    if pre.shape[-1] == d_hidden:
        gradient(grad, pre, out)
        return
    gate, up = pre[..., :d_hidden], pre[..., d_hidden:]
    values(gate, out[..., d_hidden:])
    out[..., d_hidden:].mul_(grad)
    gradient(grad.mul_(up), gate, out[..., :d_hidden])


def composed(
    x_SD: Tensor,
    up_EGD: Tensor,
    up_bias_EG: Tensor | None,
    down_EFH: Tensor,
    down_bias_EF: Tensor | None,
    ends_E: Tensor,
    activation: str,
) -> Tensor:
    """Return what `feed_forward` returns first, from parts that can be differentiated twice."""
    pre_SG = grouped_linear(x_SD, up_EGD, up_bias_EG, ends_E)
    gate_SH, *up = pre_SG.split(down_EFH.shape[2], dim=-1)
    hidden_SH = ACTIVATIONS[activation](gate_SH)
    if up:
        hidden_SH = hidden_SH * up[0]
    return grouped_linear(hidden_SH, down_EFH, down_bias_EF, ends_E)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.activation, _ = inputs
    _, pre_SG = output
    ctx.mark_non_differentiable(pre_SG)
    ctx.set_materialize_grads(False)  # one of zeros for the pre-activations would be written
    ctx.save_for_backward(pre_SG, *tensors)


def _differentiate(ctx, grad_SF: Tensor | None, _: None):  # type: ignore[no-untyped-def]
    if grad_SF is None:
        return (None,) * 8
    pre_SG, *tensors = ctx.saved_tensors
    x_SD, up_EGD, up_bias_EG, down_EFH, down_bias_EF, ends_E = tensors
    if torch.is_grad_enabled():  # by create_graph=True
        return *_differentiable_gradients(grad_SF, tensors, ctx.activation), None, None, None
    has_biases = up_bias_EG is not None or down_bias_EF is not None
    grad_x_SD, grad_up_EGD, grad_up_bias_EG, grad_down_EFH, grad_down_bias_EF = (
        feed_forward_backward(
            grad_SF, x_SD, pre_SG, up_EGD, down_EFH, ends_E, ctx.activation, has_biases
        )
    )
    return (
        grad_x_SD,
        grad_up_EGD,
        None if up_bias_EG is None else grad_up_bias_EG,
        grad_down_EFH,
        None if down_bias_EF is None else grad_down_bias_EF,
        None,
        None,
        None,
    )


def _differentiable_gradients(
    grad_SF: Tensor, tensors: list[Tensor], activation: str
) -> list[Tensor | None]:
    wanted = [t for t in tensors[:-1] if t is not None and t.requires_grad]
    x_SD, up_EGD, up_bias_EG, down_EFH, down_bias_EF, ends_E = tensors
    y_SF = composed(x_SD, up_EGD, up_bias_EG, down_EFH, down_bias_EF, ends_E, activation)
    found = iter(torch.autograd.grad(y_SF, wanted, grad_SF, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in tensors[:-1]]


feed_forward.register_autograd(_differentiate, setup_context=_keep)
