"""The feed-forward map of few slots on a CPU: all of them at once, and none padded.

So few slots stay in the cache from one projection to the other, and what takes time is reading
weights, writing their gradients and calling operators: the fewest calls are the fastest.

Axes: N tokens, K experts chosen for a token, E experts, S slots sorted by expert, D input features,
H hidden features, G pre-activations (H, or 2 H where the layer is gated), F output features.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ecomoe.activations import activate, activate_backward
from ecomoe.dispatch import sum_of_rows
from ecomoe.grouped import expert_of_slot
from ecomoe.pieces import empty_gradient

# Slots an expert, on average, up to which padding them costs more than a batch saves; and slots in
# all, beyond which they leave the cache between two operators, which costs more where experts have
# more than a few.
FEW_OF_EXPERT = 32
FEW_IN_ALL = 4096
VERY_FEW_OF_EXPERT = 8
# Slots up to which they are few in 16 bits, where oneDNN takes as long for one row as for sixteen.
FEW_IN_16_BITS = 8
# Experts that have slots, and these.
Groups = list[tuple[int, slice]]


def are_few(num_slots: int, num_experts: int, dtype: torch.dtype) -> bool:
    """Return whether so many slots are computed without padding; sizes may be symbolic."""
    if dtype.itemsize <= 2:
        return num_slots <= FEW_IN_16_BITS
    most = min(FEW_OF_EXPERT * num_experts, FEW_IN_ALL)
    return num_slots <= max(most, VERY_FEW_OF_EXPERT * num_experts)


def forward_few(
    x_ND: Tensor,
    gates_NK: Tensor | None,
    up_EGD: Tensor,
    up_bias_EG: Tensor | None,
    down_EFH: Tensor,
    down_bias_EF: Tensor | None,
    order_S: Tensor,
    ends_E: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return the gate-weighted sums ``(N, F)`` and the slots' pre-activations ``(S, G)``."""
    num_slots, top_k = len(order_S), 1 if gates_NK is None else gates_NK.shape[1]
    experts_S, groups = expert_of_slot(ends_E, num_slots), _groups(ends_E)
    pre_SG = _products(x_ND.index_select(0, order_S // top_k), up_EGD.mT, ends_E, groups)
    if up_bias_EG is not None:
        pre_SG += up_bias_EG.index_select(0, experts_S)
    hidden_SH = activate(pre_SG, activation, out=pre_SG.new_empty(num_slots, down_EFH.shape[2]))
    y_SF = _products(hidden_SH, down_EFH.mT, ends_E, groups)
    if down_bias_EF is not None:
        y_SF += down_bias_EF.index_select(0, experts_S)
    return _sums_of_tokens(y_SF, order_S, gates_NK, top_k), pre_SG


def backward_few(
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
    """Return what `feed_forward_backward` does."""
    num_slots, top_k = len(order_S), 1 if gates_NK is None else gates_NK.shape[1]
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    tokens_S, experts_S = order_S // top_k, expert_of_slot(ends_E, num_slots)
    groups = _groups(ends_E)
    grad_SF = grad_NF.index_select(0, tokens_S)
    hidden_SH = activate(pre_SG, activation, out=pre_SG.new_empty(num_slots, down_EFH.shape[2]))
    slope_SH = _products(grad_SF, down_EFH, ends_E, groups)
    grad_gates_S = x_ND.new_empty(0, dtype=wide)
    if gates_NK is not None:
        dot_S = (hidden_SH * slope_SH).sum(1, dtype=wide)
        if down_bias_EF is not None:
            dot_S += (grad_SF * down_bias_EF.index_select(0, experts_S)).sum(1, dtype=wide)
        grad_gates_S = torch.empty_like(dot_S).scatter_(0, order_S, dot_S).to(gates_NK.dtype)
        gates_S1 = gates_NK.reshape(-1, 1).index_select(0, order_S).to(x_ND.dtype)
        grad_SF *= gates_S1
        slope_SH *= gates_S1
    gated = pre_SG.shape[1] != hidden_SH.shape[1]
    joined_SG = torch.empty_like(pre_SG) if gated else slope_SH
    activate_backward(slope_SH, pre_SG, activation, out=joined_SG)
    grad_x_SD = _products(joined_SG, up_EGD, ends_E, groups)
    num_biases = up_EGD.shape[0] if has_biases else 0
    return (
        _sums_of_tokens(grad_x_SD, order_S, None, top_k),
        grad_gates_S.view(-1, top_k),
        _outer(joined_SG, x_ND.index_select(0, tokens_S), up_EGD, groups),
        _sums(joined_SG, experts_S, groups, num_biases),
        _outer(grad_SF, hidden_SH, down_EFH, groups),
        _sums(grad_SF, experts_S, groups, num_biases),
    )


def _products(x_SX: Tensor, weight_EXY: Tensor, ends_E: Tensor, groups: Groups) -> Tensor:
    """Return each slot's product with its expert's matrix, ``(S, Y)``."""
    # It loops over all experts, but not in Python, and wants rows on multiples of 16 bytes.
    if 4 * len(groups) > weight_EXY.shape[0] and x_SX.itemsize <= 4:
        step = 16 // x_SX.itemsize
        aligned = weight_EXY.shape[1] % step == 0 == weight_EXY.shape[2] % step
        if aligned and (weight_EXY.is_contiguous() or weight_EXY.mT.is_contiguous()):
            return F.grouped_mm(x_SX, weight_EXY, offs=ends_E)
    y_SY = x_SX.new_empty(x_SX.shape[0], weight_EXY.shape[2])
    for expert, own in groups:
        torch.mm(x_SX[own], weight_EXY[expert], out=y_SY[own])
    return y_SY


def _outer(a_SX: Tensor, b_SY: Tensor, weight_EXY: Tensor, groups: Groups) -> Tensor:
    """Return each expert's products summed over its slots, as the gradient of a weight."""
    gradient_EXY = empty_gradient(weight_EXY, [expert for expert, _ in groups])
    for expert, own in groups:
        single = own.stop - own.start == 1
        (torch.mul if single else torch.mm)(a_SX[own].mT, b_SY[own], out=gradient_EXY[expert])
    return gradient_EXY


def _sums(rows_SX: Tensor, experts_S: Tensor, groups: Groups, num_experts: int) -> Tensor:
    """Return the sum of each expert's rows, ``(E, X)``, of none where no sums are wanted."""
    wide = torch.promote_types(rows_SX.dtype, torch.float32)
    sums_EX = rows_SX.new_zeros(num_experts, rows_SX.shape[1], dtype=wide)
    if num_experts:
        single = len(groups) == len(rows_SX)
        put = sums_EX.index_copy_ if single else sums_EX.index_add_
        put(0, experts_S, rows_SX.to(wide))
    return sums_EX.to(rows_SX.dtype)


def _groups(ends_E: Tensor) -> Groups:
    spans = pairwise([0, *ends_E.tolist()])
    return [(expert, slice(s, t)) for expert, (s, t) in enumerate(spans) if s < t]


def _sums_of_tokens(
    rows_SX: Tensor, order_S: Tensor, gates_NK: Tensor | None, top_k: int
) -> Tensor:
    """Return the gate-weighted sum of each token's slots, ``(N, X)``."""
    if len(order_S) == top_k:  # one token, whose slots need not be brought into their order
        if gates_NK is None:
            return rows_SX.sum(0, keepdim=True)
        return gates_NK.to(rows_SX.dtype).index_select(1, order_S).mm(rows_SX)
    rows_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S)))
    if gates_NK is None:
        return F.embedding_bag(rows_S.view(-1, top_k), rows_SX, mode="sum")
    return sum_of_rows(rows_SX, rows_S, gates_NK)
