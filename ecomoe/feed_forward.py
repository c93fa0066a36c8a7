"""The experts' feed-forward map, from tokens to gate-weighted sums, as one operator on the CPU.

Tokens go through both projections piece by piece: what lies between them stays in the cache, and no
slot's input nor output is ever kept. Of the hidden layer the pre-activation alone is, for the
backward pass, which computes the activation again. A gate's gradient, ``<grad, y>``, is there
``<W^T grad, h> + <grad, b>``, which needs no ``y``: the first of them is on the way to the tokens'
gradient anyway (SonicMoE's kernels do the same on a GPU).

Axes: N tokens, K experts chosen for a token, E experts, S slots sorted by expert, B experts of a
piece, P rows of each of them, R rows of all pieces, D input features, H hidden features, G
pre-activations (H, or 2 H where the layer is gated), F output features.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ecomoe import buffers
from ecomoe.activations import ACTIVATIONS, activate, activate_backward
from ecomoe.dispatch import Plan, combine, scatter_to_experts, sum_of_rows, unsort_slots
from ecomoe.few_slots import are_few, backward_few, forward_few
from ecomoe.grouped import expert_of_slot, grouped_linear
from ecomoe.pieces import (
    Layout,
    add_outer,
    affine,
    are_operators_seen,
    empty_gradient,
    most_rows,
    of_experts,
    product,
)


def _forward(
    x_ND: Tensor,
    gates_NK: Tensor | None,
    up_EGD: Tensor,
    up_bias_EG: Tensor | None,
    down_EFH: Tensor,
    down_bias_EF: Tensor | None,
    order_S: Tensor,
    ends_E: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    top_k = 1 if gates_NK is None else gates_NK.shape[1]
    num_slots, num_experts = len(order_S), up_EGD.shape[0]
    d_hidden, width = down_EFH.shape[2], up_EGD.shape[1]
    if are_few(num_slots, num_experts, x_ND.dtype):
        operands = up_EGD, up_bias_EG, down_EFH, down_bias_EF
        y_NF, pre_SG = forward_few(x_ND, gates_NK, *operands, order_S, ends_E, activation)
        return y_NF, pre_SG if keep else pre_SG.new_empty(0, width)
    layout = Layout(ends_E, x_ND.dtype)
    most = most_rows(num_slots, num_experts, x_ND.dtype)
    pre_SG = buffers.empty(x_ND, (num_slots if keep else 0, width))
    y_RF = buffers.empty(x_ND, (most, down_EFH.shape[1]))
    tokens_R = (order_S // top_k)[layout.slots_R]
    x, pre, hidden = (layout.spare_memory(x_ND, each) for each in (x_ND.shape[1], width, d_hidden))
    for piece in layout.pieces:
        own = piece.experts
        x_BPD = piece.take(x_ND, tokens_R, x)
        pre_BPG = piece.spare(pre, width)
        affine(x_BPD, up_EGD[own], of_experts(up_bias_EG, own), out=pre_BPG)
        if keep:
            piece.put(pre_BPG, layout.rows_S, pre_SG)
        hidden_BPH = activate(pre_BPG, activation, out=piece.spare(hidden, d_hidden))
        affine(hidden_BPH, down_EFH[own], of_experts(down_bias_EF, own), out=piece.of(y_RF))
    return sum_of_rows(y_RF, layout.rows_of(order_S), gates_NK), pre_SG


_feed_forward = torch.library.custom_op("ecomoe::routed_feed_forward", _forward, mutates_args=())


@_feed_forward.register_fake
def _(x_ND, gates_NK, up_EGD, up_bias, down_EFH, down_bias, order_S, ends_E, activation, keep):  # type: ignore[no-untyped-def]
    rows = order_S.shape[0] if keep else 0
    y_NF = x_ND.new_empty(x_ND.shape[0], down_EFH.shape[1])
    return y_NF, x_ND.new_empty(rows, up_EGD.shape[1])


def _backward(
    grad_NF: Tensor,
    x_ND: Tensor,
    gates_NK: Tensor | None,
    pre_SG: Tensor,
    up_EGD: Tensor,
    down_EFH: Tensor,
    down_bias_EF: Tensor | None,
    order_S: Tensor,
    ends_E: Tensor,
    activation: str,
    has_biases: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of tokens, gates, up projection, its bias, down projection, its bias.

    Those of what there is none of, gates or biases, are empty.
    """
    num_experts, d_model, d_hidden = up_EGD.shape[0], x_ND.shape[1], down_EFH.shape[2]
    if are_few(order_S.shape[0], num_experts, x_ND.dtype):
        operands = x_ND, gates_NK, pre_SG, up_EGD, down_EFH, down_bias_EF
        return backward_few(grad_NF, *operands, order_S, ends_E, activation, has_biases)
    gated = up_EGD.shape[1] != d_hidden
    top_k = 1 if gates_NK is None else gates_NK.shape[1]
    grad_NF = grad_NF.contiguous()
    layout = Layout(ends_E, x_ND.dtype)
    order_R = order_S[layout.slots_R]
    tokens_R, rows_S = order_R // top_k, layout.rows_of(order_S)
    # Rows beyond an expert's slots repeat one of its own: with a gate of 0.
    gates_R1 = layout.own_R.to(x_ND.dtype).unsqueeze(1)
    if gates_NK is not None:
        gates_R1 *= gates_NK.reshape(-1, 1)[order_R]
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    grad_gates_R = x_ND.new_empty(0 if gates_NK is None else len(order_R), dtype=wide)
    most = most_rows(order_S.shape[0], num_experts, x_ND.dtype)
    grad_x_RD = buffers.empty(x_ND, (most, d_model))
    num_biases = num_experts if has_biases else 0
    grad_up_bias_EG = x_ND.new_zeros(num_biases, up_EGD.shape[1], dtype=wide)
    grad_down_bias_EF = x_ND.new_zeros(num_biases, down_EFH.shape[1], dtype=wide)
    grad_up_EGD = empty_gradient(up_EGD, layout.busy)
    grad_down_EFH = empty_gradient(down_EFH, layout.busy)
    widths = d_model, d_hidden, d_hidden, grad_NF.shape[1]
    spare = partial(layout.spare_memory, x_ND)
    inner, hidden, slope, outer = map(spare, widths)
    pre = spare(up_EGD.shape[1])
    joined = spare(up_EGD.shape[1]) if gated else slope
    turned = spare(max(up_EGD.shape[1], grad_NF.shape[1]))
    groups = math.gcd(d_hidden, 16)
    for piece in layout.pieces:
        own = piece.experts
        gates_BP1 = piece.of(gates_R1)
        pre_BPG = piece.take(pre_SG, layout.slots_R, pre)
        grad_BPF = piece.take(grad_NF, tokens_R, outer)
        hidden_BPH = activate(pre_BPG, activation, out=piece.spare(hidden, d_hidden))
        slope_BPH = product(grad_BPF, down_EFH[own], out=piece.spare(slope, d_hidden))
        on_bias_BP: Tensor | float = 0.0
        if gates_NK is not None and down_bias_EF is not None:
            on_bias_BP = (grad_BPF @ down_bias_EF[own].unsqueeze(2)).squeeze(2)
        grad_BPF.mul_(gates_BP1)
        add_outer(grad_BPF, hidden_BPH, piece, grad_down_EFH, turned)
        if gates_NK is not None:
            # In groups: one sum in 16 bits would not tell experts apart that are nearly alike, and
            # the whole in 32 is another pass over twice as much memory.
            parts_BPX = hidden_BPH.mul_(slope_BPH).unflatten(2, (groups, -1)).sum(3)
            dot_BP = parts_BPX.sum(2, dtype=wide)
            piece.of(grad_gates_R.unsqueeze(1)).squeeze(2).copy_(dot_BP.add_(on_bias_BP))
        joined_BPG = piece.spare(joined, up_EGD.shape[1])
        activate_backward(slope_BPH, pre_BPG, activation, out=joined_BPG)
        x_BPD = piece.take(x_ND, tokens_R, inner).mul_(gates_BP1)
        add_outer(joined_BPG, x_BPD, piece, grad_up_EGD, turned)
        if has_biases:
            grad_up_bias_EG[own] += (gates_BP1.mT @ joined_BPG).squeeze(1)
            grad_down_bias_EF[own] += grad_BPF.sum(1)
        product(joined_BPG, up_EGD[own], out=piece.of(grad_x_RD))
    grad_gates_S = grad_gates_R if gates_NK is None else grad_gates_R[rows_S].to(gates_NK.dtype)
    return (
        sum_of_rows(grad_x_RD, rows_S, gates_NK),
        grad_gates_S.view(-1, top_k),
        grad_up_EGD,
        grad_up_bias_EG.to(x_ND.dtype),
        grad_down_EFH,
        grad_down_bias_EF.to(x_ND.dtype),
    )


_feed_forward_backward = torch.library.custom_op(
    "ecomoe::routed_feed_forward_backward", _backward, mutates_args=()
)


@_feed_forward_backward.register_fake
def _(grad_NF, x_ND, gates_NK, pre_SG, up_EGD, down_EFH, down_bias, order, ends, name, has_biases):  # type: ignore[no-untyped-def]
    num_biases = up_EGD.shape[0] if has_biases else 0
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    return (
        x_ND.new_empty(x_ND.shape),
        x_ND.new_empty((0, 1), dtype=wide) if gates_NK is None else torch.empty_like(gates_NK),
        up_EGD.new_empty(up_EGD.shape),
        x_ND.new_empty(num_biases, up_EGD.shape[1]),
        down_EFH.new_empty(down_EFH.shape),
        x_ND.new_empty(num_biases, down_EFH.shape[1]),
    )


def composed(
    x_ND: Tensor,
    gates_NK: Tensor | None,
    up_EGD: Tensor,
    up_bias_EG: Tensor | None,
    down_EFH: Tensor,
    down_bias_EF: Tensor | None,
    order_S: Tensor,
    ends_E: Tensor,
    *,
    activation: str,
) -> Tensor:
    """Return what `feed_forward` returns first, from parts that can be differentiated twice."""
    top_k = 1 if gates_NK is None else gates_NK.shape[1]
    experts_S = expert_of_slot(ends_E, order_S.shape[0])
    plan = Plan(order_S, order_S.argsort(), experts_S, ends_E)
    x_SD = scatter_to_experts(x_ND, plan, top_k=top_k)
    pre_SG = grouped_linear(x_SD, up_EGD, up_bias_EG, ends_E)
    gate_SH, *up = pre_SG.split(down_EFH.shape[2], dim=-1)
    hidden_SH = ACTIVATIONS[activation](gate_SH)
    if up:
        hidden_SH = hidden_SH * up[0]
    y_SF = grouped_linear(hidden_SH, down_EFH, down_bias_EF, ends_E)
    if gates_NK is None:
        return unsort_slots(y_SF, plan, top_k=1).squeeze(1)
    return combine(y_SF, gates_NK, plan)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.activation, _ = inputs
    _, pre_SG = output
    ctx.mark_non_differentiable(pre_SG)
    ctx.set_materialize_grads(False)  # one of zeros for the pre-activations would be written
    ctx.save_for_backward(pre_SG, *tensors)


def _differentiate(ctx, grad_NF: Tensor | None, _: None):  # type: ignore[no-untyped-def]
    if grad_NF is None:
        return (None,) * 10
    pre_SG, *tensors = ctx.saved_tensors
    x_ND, gates_NK, up_EGD, up_bias_EG, down_EFH, down_bias_EF, order_S, ends_E = tensors
    if torch.is_grad_enabled():  # by create_graph=True
        gradients = _differentiable_gradients(grad_NF, tensors, ctx.activation)
        return *gradients, None, None, None, None
    has_biases = up_bias_EG is not None or down_bias_EF is not None
    backward = _feed_forward_backward if are_operators_seen() else _backward
    grad_x_ND, grad_gates_NK, grad_up_EGD, grad_up_bias_EG, grad_down_EFH, grad_down_bias_EF = (
        backward(
            grad_NF,
            x_ND,
            gates_NK,
            pre_SG,
            up_EGD,
            down_EFH,
            down_bias_EF,
            order_S,
            ends_E,
            ctx.activation,
            has_biases,
        )
    )
    return (
        grad_x_ND,
        None if gates_NK is None else grad_gates_NK,
        grad_up_EGD,
        None if up_bias_EG is None else grad_up_bias_EG,
        grad_down_EFH,
        None if down_bias_EF is None else grad_down_bias_EF,
        None,
        None,
        None,
        None,
    )


def _differentiable_gradients(
    grad_NF: Tensor, tensors: list[Tensor], activation: str
) -> list[Tensor | None]:
    # Views: two may be one tensor, as tied projections, and each would get the gradient by both.
    operands = [None if t is None else t.view_as(t) for t in tensors[:6]]
    wanted = [t for t in operands if t is not None and t.requires_grad]
    y_NF = composed(*operands, *tensors[6:], activation=activation)
    found = iter(torch.autograd.grad(y_NF, wanted, grad_NF, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in operands]


_feed_forward.register_autograd(_differentiate, setup_context=_keep)


class _FeedForward(torch.autograd.Function):
    """The operator without its name: to be called by that takes as long as five small ones."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


def feed_forward(
    x_ND: Tensor,
    gates_NK: Tensor | None,
    up_EGD: Tensor,
    up_bias_EG: Tensor | None,
    down_EFH: Tensor,
    down_bias_EF: Tensor | None,
    order_S: Tensor,
    ends_E: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gate-weighted sum of each token's experts ``(N, F)``, and the pre-activations.

    Without gates, a token has one expert, whose output it gets. The layer is gated where ``up_EGD``
    gives twice the features that ``down_EFH`` takes. The pre-activations ``(S, G)`` have no rows
    unless they are to be kept for a backward pass.
    """
    operands = x_ND, gates_NK, up_EGD, up_bias_EG, down_EFH, down_bias_EF
    compute = _forward
    if are_operators_seen():
        compute = _feed_forward
    elif keep:
        compute = _FeedForward.apply
    return compute(*operands, order_S, ends_E, activation, keep)
