import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomoe.ecology.taxonomy import (
    CATEGORIES,
    Thresholds,
    categories_of,
    category_of,
    uncertain_experts,
)

PAPER = Thresholds()


@pytest.mark.parametrize(
    ("usage", "accuracy", "category"),
    [
        (0.03, 0.50, "PURE_CORE"),
        (0.03, 0.4999, "BROAD_CORE"),
        (0.03, 0.30, "BROAD_CORE"),
        (0.03, 0.2999, "WEAK_CORE"),
        (0.0299, 0.25, "EDGE"),
        (0.01, 0.25, "EDGE"),
        (0.01, 0.2499, "NOISE"),
        (0.0099, 1.0, "DEAD"),
        (0.0, None, "DEAD"),
        (0.03, None, "CORE"),
        (0.02, None, "FRINGE"),
    ],
)
def test_every_bound_of_the_paper(usage, accuracy, category):
    assert category_of(usage, accuracy, PAPER) == category


@settings(max_examples=200)
@given(st.floats(0, 1), st.none() | st.floats(0, 1), st.floats(0, 1))
def test_every_expert_has_a_category_and_more_usage_never_kills(usage, accuracy, more):
    assert category_of(usage, accuracy, PAPER) in CATEGORIES
    if category_of(usage, accuracy, PAPER) != "DEAD":
        assert category_of(max(usage, more), accuracy, PAPER) != "DEAD"


@settings(max_examples=200)
@given(st.integers(1, 1024))
def test_an_even_load_kills_nobody_by_relative_thresholds(num_experts):
    counts = [10] * num_experts
    categories = categories_of(
        counts, total=sum(counts), accuracies=None, thresholds=Thresholds.named("relative")
    )
    assert categories == ["CORE"] * num_experts


def test_an_even_load_of_128_experts_is_dead_by_the_paper():
    categories = categories_of([10] * 128, total=1280, accuracies=None, thresholds=PAPER)
    assert categories == ["DEAD"] * 128


def test_no_tokens_are_no_usage():
    assert categories_of([0, 0], total=0, accuracies=None, thresholds=PAPER) == ["DEAD"] * 2


def test_uncertainty_shrinks_with_tokens():
    few = uncertain_experts([1, 5, 94], total=100, thresholds=PAPER)
    many = uncertain_experts([500, 50_000, 940_000], total=990_500, thresholds=PAPER)
    assert few == [0, 1]
    assert many == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dead_usage", -0.1),
        ("core_usage", 1.1),
        ("pure_accuracy", "high"),
        ("broad_accuracy", 0.6),
        ("dead_usage", 0.5),
        ("hard_confidence", 0.8),
        ("event_z", float("nan")),
        ("edge_accuracy", True),
    ],
)
def test_wrong_thresholds(field, value):
    with pytest.raises(ValueError, match=field):
        Thresholds(**{field: value})


def test_wrong_name():
    with pytest.raises(ValueError, match=r"thresholds='strict' must be 'paper', 'relative'"):
        Thresholds.named("strict")


def test_own_thresholds_pass_through():
    own = Thresholds(dead_usage=0.005)
    assert Thresholds.named(own) is own
