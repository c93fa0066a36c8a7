"""The experts' feed-forward map as one operator on the CPU.

Sorted slots go through both projections piece by piece: what lies between them stays in the cache,
and of the hidden layer only the pre-activation is kept for the backward pass, which computes the
activation again.

Axes: E experts, S slots sorted by expert, P rows of a piece's window, D input features, H hidden
features, G pre-activations (H, or 2 H where the layer is gated), F output features.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from ecomoe import buffers
from ecomoe.activations import ACTIVATIONS, ELEMENTWISE
from ecomoe.grouped import grouped_linear, grouped_product
from ecomoe.pieces import (
    FEW_ROWS,
    Piece,
    add_bias,
    add_product,
    cut,
    empty_gradient,
    isolated,
    most_rows,
    share_pieces,
    window,
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
        hidden_SH = x_SD.new_empty(num_slots, d_hidden)
        _activate(pre_SG, activation, out=hidden_SH)
        y_SF = grouped_product(hidden_SH, down_EFH, down_bias_EF, ends_E)
        return y_SF, pre_SG if keep else pre_SG.new_empty(0, up_EGD.shape[1])
    pre_SG = buffers.empty(x_SD, (num_slots if keep else 0, up_EGD.shape[1]))
    y_SF = buffers.empty(x_SD, (num_slots, down_EFH.shape[1]))
    experts = cut(ends_E, x_SD.dtype)
    most = most_rows(experts)

    def work(queue: Iterable[list[Piece]]) -> None:
        pre = x_SD.new_empty(most, up_EGD.shape[1])
        hidden = x_SD.new_empty(most, d_hidden)
        y = x_SD.new_empty(most, y_SF.shape[1])
        for piece in chain.from_iterable(queue):
            e, s, t, rows = piece.expert, piece.start, piece.end, piece.rows
            torch.mm(window(x_SD, piece), up_EGD[e].mT, out=pre[:rows])
            pre_PG = pre_SG[s:t] if keep else pre[: t - s]
            add_bias(pre[: t - s], None if up_bias_EG is None else up_bias_EG[e], out=pre_PG)
            _activate(pre_PG, activation, out=hidden[: t - s])
            torch.mm(hidden[:rows], down_EFH[e].mT, out=y[:rows])
            add_bias(y[: t - s], None if down_bias_EF is None else down_bias_EF[e], out=y_SF[s:t])

    share_pieces(work, experts)
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
    experts = cut(ends_E, x_SD.dtype)
    grad_up_EGD = empty_gradient(up_EGD, experts)
    grad_down_EFH = empty_gradient(down_EFH, experts)
    most = most_rows(experts)

    def work(queue: Iterable[list[Piece]]) -> None:
        hidden, slope = x_SD.new_empty(most, d_hidden), x_SD.new_empty(most, d_hidden)
        inner, outer = x_SD.new_empty(most, x_SD.shape[1]), x_SD.new_empty(most, grad_SF.shape[1])
        joined = x_SD.new_empty(most, up_EGD.shape[1]) if gated else slope
        for piece in chain.from_iterable(queue):
            e, s, t, rows = piece.expert, piece.start, piece.end, piece.rows
            own = t - s
            _activate(pre_SG[s:t], activation, out=hidden[:own])
            torch.mm(window(grad_SF, piece), down_EFH[e], out=slope[:rows])
            _activate_backward(slope[:own], pre_SG[s:t], activation, out=joined[:own])
            hidden[own:rows].zero_()
            joined[own:rows].zero_()
            if own == rows:
                torch.mm(joined[:rows], up_EGD[e], out=grad_x_SD[s:t])
            else:
                torch.mm(joined[:rows], up_EGD[e], out=inner[:rows])
                grad_x_SD[s:t].copy_(inner[:own])
            grad_PF, x_PD = isolated(grad_SF, piece, copy=outer), isolated(x_SD, piece, copy=inner)
            add_product(grad_PF, hidden[:rows], grad_down_EFH[e], first=piece.first)
            add_product(joined[:rows], x_PD, grad_up_EGD[e], first=piece.first)
            if has_biases:
                grad_up_bias_EG[e] += joined[:own].sum(0)
                grad_down_bias_EF[e] += grad_SF[s:t].sum(0)

    share_pieces(work, experts)
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
    """Whether the weights' reading is what takes time, and ``F.grouped_mm`` reads them as they are.

    It has less to do for an expert than a loop here.
    """
    step = 16 // x_SD.itemsize
    aligned = up_EGD.shape[2] % step == 0 == down_EFH.shape[2] % step
    contiguous = up_EGD.is_contiguous() and down_EFH.is_contiguous()
    few = x_SD.shape[0] < FEW_ROWS * up_EGD.shape[0]
    return few and aligned and contiguous and x_SD.itemsize < 8


def _activate(pre_PG: Tensor, activation: str, *, out: Tensor) -> Tensor:
    values, _ = ELEMENTWISE[activation]
    d_hidden = out.shape[1]
    values(pre_PG[:, :d_hidden], out)
    return out if pre_PG.shape[1] == d_hidden else out.mul_(pre_PG[:, d_hidden:])


def _activate_backward(grad_PH: Tensor, pre_PG: Tensor, activation: str, *, out: Tensor) -> None:
    values, gradient = ELEMENTWISE[activation]
    d_hidden = grad_PH.shape[1]
    if pre_PG.shape[1] == d_hidden:
        gradient(grad_PH, pre_PG, out)
        return
    gate_PH, up_PH = pre_PG[:, :d_hidden], pre_PG[:, d_hidden:]
    values(gate_PH, out[:, d_hidden:])
    out[:, d_hidden:].mul_(grad_PH)
    gradient(grad_PH.mul_(up_PH), gate_PH, out[:, :d_hidden])


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
