"""Pieces cover each slot once, whatever the routing."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_near

from ecomoe import buffers
from ecomoe.feed_forward import feed_forward
from ecomoe.pieces import (
    MAX_PIECE_ROWS,
    MAX_ROWS,
    TURNED,
    TURNED_WIDTH,
    Layout,
    Piece,
    add_outer,
    cut,
    most_rows,
    padded_rows,
)

COUNTS = st.lists(st.integers(0, 70) | st.integers(900, 2200), min_size=1, max_size=20)


@given(COUNTS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_each_slot_is_in_one_piece_with_its_expert(counts, dtype):
    ends_E = torch.tensor(counts).cumsum(0)
    pieces = cut(ends_E, dtype)
    spans = list(pairwise([0, *ends_E.tolist()]))
    found = [span for piece in pieces for span in piece.spans if span[0] < span[1]]
    assert sum(end - start for start, end in found) == sum(counts)
    assert all(end == start for (_, end), (start, _) in pairwise(found))
    begun = set()
    for piece in pieces:
        assert 0 < piece.rows <= MAX_ROWS
        assert len(piece.spans) * piece.rows <= MAX_PIECE_ROWS
        for index, (start, end) in enumerate(piece.spans):
            expert = piece.expert + index
            assert spans[expert][0] <= start <= end <= spans[expert][1]
            assert end - start <= piece.rows <= padded_rows(MAX_ROWS, dtype)
            assert piece.first == (expert not in begun)
            begun.add(expert)


@given(COUNTS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_each_row_belongs_to_a_slot_of_its_expert(counts, dtype):
    ends_E = torch.tensor(counts).cumsum(0)
    layout = Layout(ends_E, dtype)
    num_slots = sum(counts)
    assert layout.slots_R[layout.rows_S].tolist() == list(range(num_slots))
    assert layout.own_R[layout.rows_S].all()
    assert int(layout.own_R.sum()) == num_slots
    assert len(layout.slots_R) <= most_rows(num_slots, len(counts), dtype)
    for large in (0, buffers.LARGE):
        with patch.object(buffers, "LARGE", large):
            room = len(layout.spare_memory(torch.empty(0, dtype=dtype), 1))
        assert max((piece.num_rows for piece in layout.pieces), default=0) <= room
        assert room <= MAX_PIECE_ROWS
    experts_S = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    begin = 0
    for piece in layout.pieces:
        assert piece.begin == begin
        for expert, (start, end) in enumerate(piece.spans, piece.expert):
            slots = layout.slots_R[begin : begin + piece.rows]
            if end > start:
                assert (experts_S[slots] == expert).all()
                assert ((start <= slots) & (slots < end)).all()
            begin += piece.rows
    order_S = torch.randperm(num_slots)
    assert torch.equal(layout.rows_of(order_S)[order_S], layout.rows_S)


@pytest.mark.parametrize("rows", [1023, 1024, 1025, 1500, 2048, 2049])
def test_several_experts_with_about_the_most_rows(rows):
    torch.manual_seed(0)
    up_EHD, down_EDH = torch.randn(3, 5, 4), torch.randn(3, 4, 5)
    x_SD = torch.randn(3 * rows, 4)
    ends_E = torch.tensor([rows, 2 * rows, 3 * rows], dtype=torch.int32)
    order_S = torch.arange(3 * rows)
    y_SD = feed_forward(x_SD, None, up_EHD, None, down_EDH, None, order_S, ends_E, "relu", False)[0]
    expected = torch.cat(
        [(x_SD[e * rows : (e + 1) * rows] @ up_EHD[e].T).relu() @ down_EDH[e].T for e in range(3)]
    )
    torch.testing.assert_close(y_SD, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(16, 3), (48, TURNED // 64), (80, TURNED_WIDTH)])
@pytest.mark.parametrize("other", [5, TURNED_WIDTH])
def test_gradients_of_weights_whether_or_not_operands_are_turned(dtype, rows, width, other):
    torch.manual_seed(0)
    a_BPX, b_BPY = (torch.randn(2, rows, each).to(dtype) for each in (width, other))
    piece = Piece(1, ((0, rows), (rows, 2 * rows)), rows, True)
    total_EXY = torch.full((4, width, other), torch.nan, dtype=dtype)
    before = a_BPX.clone()
    add_outer(a_BPX, b_BPY, piece, total_EXY, a_BPX.new_empty(a_BPX.numel()))
    expected = a_BPX.double().mT @ b_BPY.double()
    assert_near(total_EXY[1:3], expected, dtype)
    assert total_EXY[[0, 3]].isnan().all()
    assert torch.equal(a_BPX, before)
