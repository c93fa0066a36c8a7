"""Pieces cover each slot once, whatever the routing."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecomoe.feed_forward import feed_forward
from ecomoe.pieces import MAX_PIECE_ROWS, MAX_ROWS, cut, padded_rows

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


@pytest.mark.parametrize("rows", [1023, 1024, 1025, 1500, 2048, 2049])
def test_several_experts_with_about_the_most_rows(rows):
    torch.manual_seed(0)
    up_EHD, down_EDH = torch.randn(3, 5, 4), torch.randn(3, 4, 5)
    x_SD = torch.randn(3 * rows, 4)
    ends_E = torch.tensor([rows, 2 * rows, 3 * rows], dtype=torch.int32)
    y_SD = feed_forward(x_SD, up_EHD, None, down_EDH, None, ends_E, "relu", False)[0]
    expected = torch.cat(
        [(x_SD[e * rows : (e + 1) * rows] @ up_EHD[e].T).relu() @ down_EDH[e].T for e in range(3)]
    )
    torch.testing.assert_close(y_SD, expected, rtol=1e-4, atol=1e-4)
