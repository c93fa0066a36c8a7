"""How a CPU goes through sorted slots: piece by piece, one expert's product at a time.

A piece is small enough for what is computed from it to stay in the cache until it is used. In 16
bits its rows are counted in steps: oneDNN compiles a kernel for each number of rows that it meets,
which takes milliseconds, and routing brings new numbers in every step.

Axes: E experts, S slots sorted by expert, P a piece's slots, or more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ecomoe import buffers
from ecomoe.workers import share_out

# Rows of a piece, at most.
MAX_ROWS = 1024
# Rows an expert up to which reading its weights takes longer than its products.
FEW_ROWS = 64


def for_host(tensor: Tensor) -> bool:
    """Return whether operators made for a CPU may take the tensor.

    A `torch.func` transform has to look into operators, and these are closed to it.
    """
    if torch.compiler.is_compiling():
        return tensor.is_cpu
    return tensor.is_cpu and torch._C._functorch.maybe_current_level() is None


class Piece(NamedTuple):
    """Consecutive slots of one expert.

    Attributes:
        expert: Whose slots they are.
        start: The first slot.
        end: One past the last slot.
        rows: ``end - start``, or a little more: the rows of a window that covers the piece.
        first: Whether it is the expert's first piece.
    """

    expert: int
    start: int
    end: int
    rows: int
    first: bool


def cut(ends_E: Tensor, dtype: torch.dtype) -> list[list[Piece]]:
    """Cut sorted slots into the pieces of each expert that has any. Reads ``ends_E`` on the host.

    >>> [[tuple(p) for p in own] for own in cut(torch.tensor([3, 3, 1503]), torch.float32)]
    [[(0, 0, 3, 3, True)], [(2, 3, 753, 750, True), (2, 753, 1503, 750, False)]]
    """
    experts = []
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        num_slots = end - start
        if num_slots:
            num_pieces = -(-num_slots // MAX_ROWS)
            own = []
            for index in range(num_pieces):
                s = start + num_slots * index // num_pieces
                t = start + num_slots * (index + 1) // num_pieces
                own.append(Piece(expert, s, t, window_rows(t - s, dtype), index == 0))
            experts.append(own)
            start = end
    return experts


def window_rows(num_rows: int, dtype: torch.dtype) -> int:
    """Return the rows to compute for so many: the same few numbers again and again in 16 bits.

    >>> [window_rows(n, torch.bfloat16) for n in (5, 32, 33, 500, 600)]
    [5, 32, 64, 512, 640]
    """
    if dtype.itemsize > 2 or num_rows <= 32:
        return num_rows
    step = 32 if num_rows <= 512 else 64
    return -(-num_rows // step) * step


def window(rows_SX: Tensor, piece: Piece) -> Tensor:
    """Return the rows of a piece's window; those beyond the piece are another's, or zeros."""
    missing = piece.start + piece.rows - rows_SX.shape[0]
    if missing <= 0:
        return rows_SX[piece.start : piece.start + piece.rows]
    return F.pad(rows_SX[piece.start :], (0, 0, 0, missing))


def isolated(rows_SX: Tensor, piece: Piece, *, copy: Tensor) -> Tensor:
    """Return the rows of a piece's window with zeros beyond the piece, for a sum over rows.

    ``copy`` is memory for as many rows, which is used where the window has more than the piece.
    """
    own_PX = rows_SX[piece.start : piece.end]
    num_own = own_PX.shape[0]
    if num_own == piece.rows:
        return own_PX
    copy[:num_own].copy_(own_PX)
    copy[num_own : piece.rows].zero_()
    return copy[: piece.rows]


def most_rows(experts: list[list[Piece]]) -> int:
    """Return the rows of the largest window."""
    return max((piece.rows for own in experts for piece in own), default=0)


def empty_gradient(weight_EXY: Tensor, experts: list[list[Piece]]) -> Tensor:
    """Return memory for the gradient of stacked weights, zeros for experts that have no slots."""
    idle = set(range(weight_EXY.shape[0])).difference(own[0].expert for own in experts)
    if 2 * len(idle) > weight_EXY.shape[0]:
        return weight_EXY.new_zeros(weight_EXY.shape)  # pages of zeros, which nobody has to write
    gradient_EXY = buffers.empty(weight_EXY, weight_EXY.shape)
    for expert in idle:
        gradient_EXY[expert].zero_()
    return gradient_EXY


def share_pieces(work: Callable[[Iterable[list[Piece]]], None], experts: list[list[Piece]]) -> None:
    """Share experts out among workers, by their rows, where these are enough for it to pay."""
    rows = [sum(piece.rows for piece in own) for own in experts]
    if sum(rows) < FEW_ROWS * len(rows):
        work(experts)
    else:
        # An expert's weights are read and written however few slots it has.
        share_out(work, experts, [FEW_ROWS + number for number in rows])


def add_bias(rows_PX: Tensor, bias_X: Tensor | None, *, out: Tensor) -> None:
    """Write rows to another place, and add a bias on the way where there is one."""
    if bias_X is not None:
        torch.add(rows_PX, bias_X, out=out)
    elif out.data_ptr() != rows_PX.data_ptr():
        out.copy_(rows_PX)


def add_product(rows_PX: Tensor, columns_PY: Tensor, total_XY: Tensor, *, first: bool) -> None:
    """Write, or from an expert's second piece on add, the products summed over rows."""
    if first:
        torch.mm(rows_PX.mT, columns_PY, out=total_XY)
    else:
        total_XY.addmm_(rows_PX.mT, columns_PY)
