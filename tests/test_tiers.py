import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomoe.ecology.tiers import effective_depth, flow_lift, hard_gradient, tier_sums


def test_depth_of_the_papers_trajectory():
    """Table 12, usage of the four tiers in percent."""
    collapsed = effective_depth([50.0, 25.2, 0.9, 23.9])
    recovered = effective_depth([45.1, 18.2, 9.1, 27.5])
    assert collapsed["tiers_above"] == 3
    assert collapsed["perplexity"] < recovered["perplexity"] < 4


@settings(max_examples=200)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6))
def test_depth_is_within_bounds(counts):
    depth = effective_depth(counts)
    assert 0 <= depth["tiers_above"] <= len(counts)
    assert depth["perplexity"] <= len(counts) + 1e-9
    assert depth["perplexity"] >= (1 - 1e-9 if any(counts) else 0)


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 100), min_size=2, max_size=4),
    st.lists(st.integers(1, 100), min_size=2, max_size=4),
)
def test_independent_flow_has_a_lift_of_one(rows, columns):
    size = min(len(rows), len(columns))
    flow = [[row * column for column in columns[:size]] for row in rows[:size]]
    assert all(cell == pytest.approx(1) for row in flow_lift(flow) for cell in row)


def test_lift_of_the_papers_flow():
    """Table 10, 16 experts: the raw self-loop is 65.3 %, but most of it is the tier's size."""
    lift = flow_lift([[65.3, 6.0, 11.6], [1.6, 0.0, 0.6], [9.7, 1.5, 3.7]])
    assert lift[0][0] == pytest.approx(65.3 * 100 / (82.9 * 76.6), abs=1e-3)
    assert lift[0][0] < 1.05


def test_empty_tiers_have_no_lift():
    assert flow_lift([[5, 0], [0, 0]]) == [[1.0, None], [None, None]]


@pytest.mark.parametrize(
    ("hard", "gradient"),
    [([0.12, 0.05, 0.08], 1.5), ([0.1], None), ([0.1, None], None), ([0.1, 0.0], None)],
)
def test_hard_gradient(hard, gradient):
    found = hard_gradient(hard)
    assert (found is None) if gradient is None else math.isclose(found, gradient)


def test_tiers_must_fit():
    with pytest.raises(ValueError, match=r"tiers=\(2, 2\) sum to 4 for 3 experts"):
        tier_sums([1, 2, 3], (2, 2))
