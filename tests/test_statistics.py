import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ecomoe.ecology.outcomes import domains_of, outcomes_of
from ecomoe.ecology.statistics import (
    Layout,
    coactivation_lift,
    coefficient_of_variation,
    distribution_counts,
    load_entropy,
    max_violation,
    normalised_mutual_information,
    outcome_counts,
    pair_table,
    ratios,
    routing_counts,
    shares,
    sum_by,
    wilson_interval,
    wilson_intervals,
)

LAYOUT = Layout(5, 2)
TIER_OF_E = torch.tensor([0, 0, 0, 1, 1])
COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=40)


def routed(num_tokens, *, top_k=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits_NE = torch.randn(num_tokens, LAYOUT.num_experts, generator=generator)
    top = logits_NE.softmax(-1).topk(top_k)
    return top.indices, top.values


def counted(ids_NK, weights_NK, valid_N=None):
    return routing_counts(
        ids_NK, layout=LAYOUT, weights_NK=weights_NK, tier_of_E=TIER_OF_E, valid_N=valid_N
    )


def by_loop(ids_NK, weights_NK, valid_N):
    """The same counts, one token at a time."""
    pairs = list(itertools.combinations(range(LAYOUT.num_experts), 2))
    sums = {name: torch.zeros(shape).double() for name, shape in LAYOUT.shapes.items()}
    for ids, weights, valid in zip(ids_NK.tolist(), weights_NK.tolist(), valid_N, strict=True):
        if not valid:
            sums["padding"] += 1
            continue
        sums["num_tokens"] += 1
        sums["top1"][ids[0]] += 1
        sums["flow"][TIER_OF_E[ids[0]], TIER_OF_E[ids[1]]] += 1
        for rank, expert in enumerate(ids):
            sums["topk"][expert] += 1
            sums["gate"][expert] += weights[rank]
            for worse in ids[rank + 1 :]:
                sums["pairs"][pairs.index((min(expert, worse), max(expert, worse)))] += 1
    return sums


@pytest.mark.parametrize("top_k", [2, 3, 5])
def test_routing_counts_equal_a_loop(top_k):
    ids_NK, weights_NK = routed(40, top_k=top_k)
    valid_N = torch.arange(40) % 3 > 0
    parts = counted(ids_NK, weights_NK, valid_N)
    packed = LAYOUT.pack(parts, like=torch.zeros((), dtype=torch.float64))
    assert packed.shape == (LAYOUT.size,)
    expected = by_loop(ids_NK, weights_NK, valid_N)
    for name, value in LAYOUT.unpack(packed).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@settings(max_examples=200)
@given(st.integers(1, 30), st.integers(0, 30), st.integers(2, 5), st.integers(0, 99))
def test_counts_of_parts_add_up(first, second, top_k, seed):
    ids_NK, weights_NK = routed(first + second, top_k=top_k, seed=seed)
    like = torch.zeros((), dtype=torch.float64)
    whole, *parts = (
        LAYOUT.pack(counted(ids_NK[rows], weights_NK[rows]), like=like)
        for rows in (slice(None), slice(0, first), slice(first, None))
    )
    torch.testing.assert_close(whole, parts[0] + parts[1])
    sums = LAYOUT.unpack(whole)
    assert sums["top1"].sum() == sums["num_tokens"] == first + second
    assert sums["topk"].sum() == top_k * (first + second)
    assert sums["flow"].sum() == first + second
    assert sums["pairs"].sum() == math.comb(top_k, 2) * (first + second)


def test_one_choice_has_no_pairs_and_no_flow():
    parts = counted(*routed(7, top_k=1))
    assert not {"pairs", "flow"} & set(parts)


def test_too_many_experts_have_no_pairs():
    layout = Layout(300)
    parts = routing_counts(torch.tensor([[1, 299]]), layout=layout)
    assert "pairs" not in parts
    assert layout.size < 3000


def test_no_expert_twice_is_no_pair():
    parts = counted(torch.tensor([[4, 4, 0], [0, 0, 0]]), None)
    assert parts["pairs"].tolist() == [0, 0, 0, 2] + [0] * 6


@pytest.mark.parametrize("num_experts", [16, 64, 512])
def test_what_training_takes_grows_with_the_experts_alone(num_experts):
    layout = Layout(num_experts, 3, outcomes=False, paired=False)
    assert layout.size == 8 + 9 + 4 * num_experts
    packed = layout.pack({"judged": torch.ones(num_experts)}, like=torch.zeros(()))
    assert packed.tolist() == [0] * layout.size
    assert "judged" not in layout.unpack(packed)


def test_nan_stays_out_of_the_sums():
    weights_NK = torch.tensor([[0.5, 0.5], [torch.nan, torch.nan]])
    parts = counted(torch.tensor([[0, 1], [0, 1]]), weights_NK)
    assert parts["gate"].tolist() == [0.5, 0.5, 0, 0, 0]
    probs_NE = torch.tensor([[0.5, 0.5], [torch.nan, torch.nan], [0.5, 0.5]])
    sums = distribution_counts(probs_NE, valid_N=torch.tensor([True, True, False]))
    assert sums["nonfinite"] == 1
    assert sums["entropy"].item() == pytest.approx(math.log(2))


def test_low_precision_routing_is_counted_exactly():
    ids_NK, weights_NK = routed(3000)
    parts = counted(ids_NK, weights_NK.bfloat16())
    assert parts["top1"].dtype == torch.float64
    assert parts["top1"].sum() == 3000


def test_outcomes_by_expert():
    parts = outcome_counts(
        torch.tensor([0, 0, 1, 4]),
        layout=LAYOUT,
        correct_N=torch.tensor([True, False, True, True]),
        confidence_N=torch.tensor([0.9, 0.3, 0.5, 0.9]),
        valid_N=torch.tensor([True, True, True, False]),
    )
    assert parts["judged"].tolist() == [2, 1, 0, 0, 0]
    assert parts["correct"].tolist() == [1, 1, 0, 0, 0]
    assert parts["easy"].tolist() == [1, 0, 0, 0, 0]
    assert parts["hard"].tolist() == [1, 0, 0, 0, 0]


def test_outcomes_of_logits():
    logits = torch.tensor([[[4.0, 0.0], [0.0, 4.0], [4.0, 0.0]]])
    targets = torch.tensor([[1, 0, 1]])
    plain = outcomes_of(logits, targets)
    assert plain.correct_M.tolist() == [False, False, False]
    assert plain.confidence_M[0].item() == pytest.approx(1 / (1 + math.exp(-4)))
    shifted = outcomes_of(logits, targets, shift=True)
    assert shifted.correct_M.tolist()[:2] == [True, True]
    assert shifted.valid_M.tolist() == [True, True, False]
    ignored = outcomes_of(logits, torch.tensor([[0, -100, 0]]))
    assert ignored.valid_M.tolist() == [True, False, True]
    soft = outcomes_of(logits[0], torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9]]))
    assert soft.correct_M.tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_targets_that_are_no_class_are_unknown(dtype):
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0]])
    found = outcomes_of(logits, torch.tensor([0, 255, 0]).to(dtype), shift=True)
    assert found.valid_M.tolist() == [False, True, False]
    found = outcomes_of(logits, torch.tensor([0, -1, 2]))
    assert found.valid_M.tolist() == [True, False, False]
    assert found.losses_M[1:].tolist() == [0, 0]


def test_nan_is_never_correct():
    found = outcomes_of(torch.full((2, 3), math.nan), torch.tensor([0, 1]))
    assert found.correct_M.tolist() == [False, False]
    assert found.valid_M.all()


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), "outputs has shape"),
        (torch.zeros(3, 1), torch.zeros(3).long(), "at least two classes"),
        (torch.zeros(3, 2), torch.zeros(4).long(), "targets has shape"),
        (torch.zeros(3, 2), torch.zeros(3), r"targets is a tensor of torch.float32; .*\.long\(\)"),
        (torch.zeros(3, 2), torch.zeros(3).bool(), "targets is a tensor of torch.bool"),
        (torch.zeros(3, 2), [0, 1, 1], "targets is list; it must be a tensor"),
        (torch.zeros(3, 2), None, "targets is NoneType"),
        ([[0.0, 1.0]], torch.zeros(1).long(), "outputs is list"),
        (torch.zeros(3, 2).long(), torch.zeros(3).long(), "outputs is a tensor of torch.int64"),
    ],
)
def test_wrong_outcomes(outputs, targets, message):
    with pytest.raises(ValueError, match=message):
        outcomes_of(outputs, targets)


@settings(max_examples=200)
@given(COUNTS)
def test_load_statistics_are_within_bounds(counts):
    num_experts = len(counts)
    assert sum(shares(counts)) == pytest.approx(1 if any(counts) else 0)
    assert 0 <= load_entropy(counts) <= math.log(num_experts) + 1e-12
    assert 0 <= coefficient_of_variation(counts) <= math.sqrt(num_experts - 1) + 1e-9
    assert -1e-12 <= max_violation(counts) <= num_experts - 1 + 1e-9


@settings(max_examples=200)
@given(st.integers(1, 40), st.integers(1, 1000))
def test_even_load_is_the_extreme(num_experts, count):
    even = [count] * num_experts
    assert load_entropy(even) == pytest.approx(math.log(num_experts))
    assert coefficient_of_variation(even) == pytest.approx(0, abs=1e-9)
    assert max_violation(even) == pytest.approx(0, abs=1e-9)


@settings(max_examples=200)
@given(st.integers(0, 500), st.integers(1, 500))
def test_interval_is_wilsons(successes, failures):
    total = successes + failures
    low, high = wilson_interval(successes, total, z=stats.norm.ppf(0.975))
    known = stats.binomtest(successes, total).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((known.low, known.high))
    assert 0 <= low <= successes / total <= high <= 1


def test_interval_without_trials_is_everything():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_ratios_know_no_division_by_zero():
    assert ratios([1, 0], [2, 0]) == [0.5, None]


def test_sum_by_takes_any_shape():
    ids = torch.tensor([[0, 1], [1, 1]])
    assert sum_by(ids, torch.ones(2, 2), size=3).tolist() == [1, 3, 0]


def test_independent_choices_have_a_lift_of_one():
    generator = torch.Generator().manual_seed(0)
    ids_NK = torch.rand(20_000, 5, generator=generator).topk(2).indices
    parts = counted(ids_NK, torch.ones(20_000, 2))
    lift_EE = coactivation_lift(pair_table(parts["pairs"], 5), parts["topk"])
    apart_EE = ~torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(lift_EE, lift_EE.T)
    assert lift_EE.diagonal().tolist() == [0] * 5
    assert (lift_EE[apart_EE] - 1).abs().max() < 0.1


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=2, max_size=5))
def test_specialisation_is_within_bounds_and_symmetric(table):
    counts_EC = torch.tensor(table).double()
    found = normalised_mutual_information(counts_EC)
    if found is None:
        assert min(len(counts_EC[counts_EC.sum(1) > 0]), int((counts_EC.sum(0) > 0).sum())) < 2
        return
    assert 0 <= found <= 1
    assert found == pytest.approx(normalised_mutual_information(counts_EC.T), abs=1e-9)


def test_independent_experts_are_not_specialised():
    counts_EC = torch.tensor([1.0, 2.0, 3.0])[:, None] * torch.tensor([4.0, 1.0])
    assert normalised_mutual_information(counts_EC) == pytest.approx(0, abs=1e-12)
    assert normalised_mutual_information(torch.zeros(2, 2)) is None


@settings(max_examples=200)
@given(COUNTS)
def test_intervals_are_rounded_outwards(counts):
    total = sum(counts)
    found = wilson_intervals(counts, total)
    for count, bounds in zip(counts, found, strict=True):
        if not total:
            assert bounds is None
            continue
        low, high = wilson_interval(count, total)
        assert 0 <= bounds[0] <= low <= count / total <= high <= bounds[1] <= 1
        assert bounds == pytest.approx([low, high], rel=0.011)


def test_interval_of_each_share_has_its_own_total():
    assert wilson_intervals([1, 2, 0], [2, 4, 0]) == [[0.0945, 0.906], [0.15, 0.85], None]


def test_domains_are_of_samples_or_of_predictions():
    by_sample = domains_of(torch.tensor([3, 5]), torch.Size([2, 3]))
    assert by_sample.tolist() == [3, 3, 3, 5, 5, 5]
    assert domains_of(torch.arange(6).view(2, 3).int(), torch.Size([2, 3])).tolist() == [*range(6)]
    assert domains_of(torch.tensor([3, 5]), torch.Size([2])).tolist() == [3, 5]


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (torch.tensor([1]), r"shape \(1,\) for predictions of \(2, 3\); it must be \(2,\) or"),
        (torch.tensor(1), "domains has shape"),
        (torch.zeros(2, 3, 4).long(), "domains has shape"),
        (torch.zeros(2), "domains is a tensor of torch.float32; .* pass one id a sample"),
        ([0, 1], "domains is list"),
    ],
)
def test_wrong_domains(domains, message):
    with pytest.raises(ValueError, match=message):
        domains_of(domains, torch.Size([2, 3]))
