"""How a CPU goes through sorted slots: a few neighbouring experts at a time.

Their rows are padded to one number, so that one batched product serves them all: per row it takes
half of the time of products one by one in 16 bits, and nine tenths of it in 32. A piece is small
enough for what is computed from it to stay in the cache until it is used. In 16 bits its rows are
counted in steps: oneDNN compiles a kernel for each number of rows that it meets, which takes
milliseconds, and routing brings new numbers in every step.

Axes: E experts, S slots sorted by expert, B experts of a piece, P rows of each of them, R rows of
all pieces, one piece behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ecomoe import buffers

# Rows of an expert in a piece, at most, and of all its experts.
MAX_ROWS = 1024
MAX_PIECE_ROWS = 4096
# Rows an expert up to which reading its weights takes longer than its products.
FEW_ROWS = 64
# Between which rows an expert ``(W x^T)^T`` is faster than ``x W^T``, although it has to be
# transposed: 0.7 of the time at 16 rows, for MKL in 32 bits (True) and oneDNN in 16 (False).
WEIGHTS_FIRST = {True: (8, 56), False: (0, 56)}
# Values from which on turning an operand, some rows at a time, before a product takes less time
# than leaving that to the product: both together 0.5 of it at 48 rows. With more rows than few,
# operands have to be so wide, too.
TURNED = 2**16
TURNED_ROWS = 32
TURNED_WIDTH = 512
# Experts of a piece: few numbers, for the kernels' sake.
BATCHES = (8, 4, 2)
# Bytes of zeros from which fresh pages cost less than writing them.
FRESH = 32 * 2**20
# How much more than its experts alone a piece may cost.
MAX_EXCESS = 1.25


def for_host(tensor: Tensor) -> bool:
    """Return whether operators made for a CPU may take the tensor.

    A `torch.func` transform has to look into operators, and these are closed to it.
    """
    if torch.compiler.is_compiling():
        return tensor.is_cpu
    return tensor.is_cpu and torch._C._functorch.maybe_current_level() is None


def are_operators_seen() -> bool:
    """Whether somebody records operators, and shall see one where values decide what is done."""
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return traced or is_in_torch_dispatch_mode()


def is_readable(tensor: Tensor) -> bool:
    """Whether its values may be read here and now: nothing waits, and nobody looks on."""
    return type(tensor) is Tensor and for_host(tensor) and not are_operators_seen()


@dataclass(frozen=True)
class Piece:
    """Slots of one expert, or of neighbouring experts.

    Attributes:
        expert: The first expert.
        spans: Each expert's slots: the first, and one past the last.
        rows: Rows P that are computed for each expert.
        first: Whether no piece before it has slots of the same expert.
        begin: Where its rows begin among those of all pieces.
    """

    expert: int
    spans: tuple[tuple[int, int], ...]
    rows: int
    first: bool
    begin: int = 0

    @property
    def experts(self) -> slice:
        """Where the experts are on an axis of experts."""
        return slice(self.expert, self.expert + len(self.spans))

    @property
    def numbers(self) -> range:
        """The numbers of its experts."""
        return range(self.expert, self.expert + len(self.spans))

    @property
    def num_rows(self) -> int:
        """Rows of all its experts."""
        return len(self.spans) * self.rows

    def of(self, rows_RX: Tensor) -> Tensor:
        """Return the piece's part of all rows, ``(B, P, X)``."""
        own = rows_RX[self.begin : self.begin + self.num_rows]
        return own.view(len(self.spans), self.rows, rows_RX.shape[1])

    def spare(self, memory: Tensor, width: int) -> Tensor:
        """Return spare memory as the piece's rows, ``(B, P, width)``."""
        return memory[: self.num_rows * width].view(len(self.spans), self.rows, width)

    def take(self, source_NX: Tensor, index_R: Tensor, memory: Tensor) -> Tensor:
        """Return the rows ``(B, P, X)`` of a source that an index over all rows names."""
        rows_BPX = self.spare(memory, source_NX.shape[1])
        own_R = index_R[self.begin : self.begin + self.num_rows]
        torch.index_select(source_NX, 0, own_R, out=rows_BPX.flatten(0, 1))
        for index, (start, end) in enumerate(self.spans):
            if start == end:  # what is there is another expert's, and may not be finite
                rows_BPX[index].zero_()
        return rows_BPX

    def put(self, rows_BPX: Tensor, rows_S: Tensor, target_SX: Tensor) -> None:
        """Write its experts' rows into those of sorted slots, whose rows among all are given."""
        own = slice(self.spans[0][0], self.spans[-1][1])
        index_S = rows_S[own] - self.begin
        torch.index_select(rows_BPX.flatten(0, 1), 0, index_S, out=target_SX[own])


class Layout:
    """Which row of which piece is which slot's.

    Attributes:
        pieces: The pieces.
        num_experts: Experts, those without slots included.
        busy: Experts in pieces.
        slots_R: The slot of each row; in a row beyond its expert's slots the last of them, so that
            a value that is not finite stays with its expert.
        own_R: Whether the row is within its expert's slots.
        rows_S: The row of each slot.
    """

    def __init__(self, ends_E: Tensor, dtype: torch.dtype) -> None:
        self.pieces = cut(ends_E, dtype)
        self.num_experts = ends_E.shape[0]
        self.busy = {expert for piece in self.pieces for expert in piece.numbers}
        begin, columns = 0, []
        for piece in self.pieces:
            for start, end in piece.spans:
                # From a row's place among all rows to its slot, its last slot, its rows.
                columns.append((start - begin, end - 1, piece.rows))
                begin += piece.rows
        table_3Q = torch.tensor(columns, dtype=torch.int64).view(-1, 3).T
        shifts_R, last_R = table_3Q[:2].repeat_interleave(table_3Q[2], dim=1, output_size=begin)
        slots_R = torch.arange(begin).add_(shifts_R)
        self.own_R = slots_R <= last_R
        self.slots_R = torch.minimum(slots_R, last_R).clamp_(min=0)
        self.rows_S = self.own_R.nonzero().view(-1)

    def spare_memory(self, like: Tensor, width: int) -> Tensor:
        """Return memory for the rows of any piece, of so many features.

        Where it is kept for the next step, its size hangs on shapes alone.
        """
        num_slots, num_experts = self.rows_S.shape[0], self.num_experts
        rows = min(MAX_PIECE_ROWS, most_rows(num_slots, num_experts, like.dtype))
        if rows * width * like.itemsize < buffers.LARGE:
            rows = max((piece.num_rows for piece in self.pieces), default=0)
        return buffers.empty(like, (rows * width,))

    def rows_of(self, order_S: Tensor) -> Tensor:
        """Return the row of each slot in the order before they were sorted, ``(S,)``."""
        return torch.empty_like(order_S).scatter_(0, order_S, self.rows_S)


def most_rows(num_slots: int, num_experts: int, dtype: torch.dtype) -> int:
    """Return how many rows all pieces of so many slots have at most, whatever the routing."""
    # An expert's rows in steps; its share of what the largest of a piece's experts may cost more.
    step = 0 if dtype.itemsize > 2 else 32
    each = math.ceil(MAX_EXCESS * step + (MAX_EXCESS - 1.0) * FEW_ROWS)
    # In use are as many experts as slots at most. Slots may be symbolic: no floats.
    quarters = round(4 * MAX_EXCESS)
    in_use: int = torch.sym_min(num_experts, num_slots)  # type: ignore[assignment]
    return quarters * num_slots // 4 + each * in_use + 1


def cut(ends_E: Tensor, dtype: torch.dtype) -> list[Piece]:
    """Cut sorted slots into pieces; experts without slots may be in none. Reads ``ends_E``.

    >>> for piece in cut(torch.tensor([3, 3, 1503]), torch.float32):
    ...     print(piece.expert, piece.spans, piece.rows)
    0 ((0, 3),) 3
    2 ((3, 753),) 750
    2 ((753, 1503),) 750
    >>> for piece in cut(torch.tensor([5, 21, 30]), torch.bfloat16):
    ...     print(piece.expert, piece.spans, piece.rows)
    0 ((0, 5), (5, 21)) 16
    2 ((21, 30),) 16
    """
    ends = ends_E.tolist()
    spans = list(pairwise([0, *ends]))
    pieces = []
    expert = 0
    while expert < len(spans):
        number = _experts_at_once(spans[expert : expert + BATCHES[0]], dtype)
        pieces += _pieces(expert, tuple(spans[expert : expert + number]), dtype)
        expert += number
    begins = accumulate((piece.num_rows for piece in pieces), initial=0)
    return [replace(piece, begin=begin) for piece, begin in zip(pieces, begins, strict=False)]


def _experts_at_once(spans: list[tuple[int, int]], dtype: torch.dtype) -> int:
    """Return how many of the experts, from the first on, make a piece."""
    # An expert's weights are read and written however few slots it has.
    costs = [FEW_ROWS + padded_rows(t - s, dtype) if t > s else 0 for s, t in spans]
    if costs[0]:
        for number in BATCHES:
            highest = max(costs[:number])
            small = highest - FEW_ROWS <= min(MAX_ROWS, MAX_PIECE_ROWS // number)
            even = number * highest <= MAX_EXCESS * sum(costs[:number])
            if number <= len(spans) and small and even:
                return number
    return 1


def _pieces(expert: int, spans: tuple[tuple[int, int], ...], dtype: torch.dtype) -> list[Piece]:
    (start, _), *others = spans
    num_slots = max(t - s for s, t in spans)
    if num_slots <= MAX_ROWS:
        return [Piece(expert, spans, padded_rows(num_slots, dtype), True)] if num_slots else []
    assert not others
    number = -(-num_slots // MAX_ROWS)
    cuts = [start + num_slots * index // number for index in range(number + 1)]
    return [
        Piece(expert, ((s, t),), padded_rows(t - s, dtype), s == start) for s, t in pairwise(cuts)
    ]


def padded_rows(num_rows: int, dtype: torch.dtype) -> int:
    """Return the rows to compute for so many: the same few numbers again and again in 16 bits.

    >>> [padded_rows(n, torch.bfloat16) for n in (5, 32, 33, 250, 300, 600)]
    [16, 32, 48, 256, 320, 608]
    """
    if dtype.itemsize > 2:
        return num_rows
    step = 16 if num_rows <= 256 else 32
    return -(-num_rows // step) * step


def affine(x_BPD: Tensor, weight_BFD: Tensor, bias_BF: Tensor | None, *, out: Tensor) -> Tensor:
    """Write each expert's ``x W^T + b``."""
    few, many = WEIGHTS_FIRST[x_BPD.itemsize > 2]
    if few < x_BPD.shape[1] < many:
        if bias_BF is None:
            return out.copy_(torch.bmm(weight_BFD, x_BPD.mT).mT)
        return out.copy_(torch.baddbmm(bias_BF.unsqueeze(2), weight_BFD, x_BPD.mT).mT)
    if bias_BF is None:
        return product(x_BPD, weight_BFD.mT, out=out)
    # The product adds the bias itself, without another pass over what it wrote.
    if x_BPD.shape[0] == 1:
        torch.addmm(bias_BF[0], x_BPD[0], weight_BFD[0].T, out=out[0])
    else:
        torch.baddbmm(bias_BF.unsqueeze(1), x_BPD, weight_BFD.mT, out=out)
    return out


def of_experts(bias_EF: Tensor | None, experts: slice) -> Tensor | None:
    """Return some experts' biases, where there are any."""
    return None if bias_EF is None else bias_EF[experts]


def product(a_BXY: Tensor, b_BYZ: Tensor, *, out: Tensor) -> Tensor:
    """Write the product of each expert's matrices."""
    if a_BXY.shape[0] == 1:
        torch.mm(a_BXY[0], b_BYZ[0], out=out[0])
    else:
        torch.bmm(a_BXY, b_BYZ, out=out)
    return out


def add_outer(
    a_BPX: Tensor, b_BPY: Tensor, piece: Piece, total_EXY: Tensor, memory: Tensor
) -> None:
    """Write, or from an expert's second piece on add, the products summed over rows.

    ``memory`` is spare, for ``a_BPX`` once more.
    """
    if not piece.first:
        total_EXY[piece.expert].addmm_(a_BPX[0].mT, b_BPY[0])
    elif total_EXY.itemsize <= 2:
        a_BXP = a_BPX.mT
        if _pays_to_turn(a_BPX, b_BPY.shape[2]):
            a_BXP = memory[: a_BXP.numel()].view(a_BXP.shape)
            for start in range(0, piece.rows, TURNED_ROWS):
                rows = slice(start, start + TURNED_ROWS)
                a_BXP[..., rows].copy_(a_BPX[:, rows].mT)
        product(a_BXP, b_BPY, out=total_EXY[piece.experts])
    else:
        total_BXY = total_EXY[piece.experts]
        for index, (start, end) in enumerate(piece.spans):
            own = slice(end - start)
            torch.mm(a_BPX[index, own].mT, b_BPY[index, own], out=total_BXY[index])


def _pays_to_turn(a_BPX: Tensor, width: int) -> bool:
    # oneDNN turns a first operand again for each block of columns, for AMX, which mostly has no
    # fp16; of small ones the calls take longer than that.
    few, wide = a_BPX.shape[1] <= FEW_ROWS, min(a_BPX.shape[2], width) >= TURNED_WIDTH
    return a_BPX.dtype == torch.bfloat16 and a_BPX.numel() >= TURNED and (few or wide)


def empty_gradient(weight_EXY: Tensor, busy: Collection[int]) -> Tensor:
    """Return memory for the gradient of stacked weights, zeros for experts that are not busy."""
    num_experts = weight_EXY.shape[0]
    if 2 * len(busy) < num_experts and weight_EXY.nbytes >= FRESH:
        return buffers.zeros(weight_EXY, weight_EXY.shape)
    gradient_EXY = buffers.empty(weight_EXY, weight_EXY.shape)
    for before, after in pairwise([-1, *sorted(busy), num_experts]):
        if after - before > 1:
            gradient_EXY[before + 1 : after].zero_()
    return gradient_EXY
