import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ecomoe import losses
from ecomoe.routing import gate_weights, random_experts, route, top_k_experts

T1 = torch.tensor(1.0)


@st.composite
def routings(draw, *, distinct=False):
    """Logits (N, E) and k. Multiples of 1/64, so that adding such a constant does not round."""
    num_tokens = draw(st.integers(1, 5))
    num_experts = draw(st.integers(1, 7))
    integers = st.integers(-640, 640)
    if distinct:
        row = st.lists(integers, min_size=num_experts, max_size=num_experts, unique=True)
    else:
        row = st.lists(integers, min_size=num_experts, max_size=num_experts)
    rows = draw(st.lists(row, min_size=num_tokens, max_size=num_tokens))
    return torch.tensor(rows, dtype=torch.float32) / 64, draw(st.integers(1, num_experts))


temperatures = st.floats(0.01, 100.0).map(torch.tensor)


class TestSelection:
    @given(routings(), temperatures)
    def test_exactly_k_distinct_experts_a_token(self, drawn, temperature):
        logits_NE, top_k = drawn
        ids_NK = route(logits_NE, top_k=top_k, temperature=temperature).expert_ids_NK
        assert ids_NK.shape == (logits_NE.shape[0], top_k)
        assert ids_NK.dtype == torch.int64
        for row in ids_NK.tolist():
            assert len(set(row)) == top_k
            assert set(row) <= set(range(logits_NE.shape[1]))

    @given(routings(), temperatures)
    def test_counts_sum_to_the_slots(self, drawn, temperature):
        logits_NE, top_k = drawn
        num_tokens, num_experts = logits_NE.shape
        ids_NK = route(logits_NE, top_k=top_k, temperature=temperature).expert_ids_NK
        counts_E = torch.bincount(ids_NK.flatten(), minlength=num_experts)
        assert counts_E.sum() == num_tokens * top_k
        assert counts_E.max() <= num_tokens
        shares = losses.routing_shares(logits_NE, ids_NK)
        torch.testing.assert_close(shares.topk_E * num_tokens * top_k, counts_E.float())
        *all_tokens, others_E = shares
        for share_E in all_tokens:
            torch.testing.assert_close(share_E.sum(), T1)
        best_N = logits_NE.softmax(-1).gather(-1, ids_NK[:, :1])
        torch.testing.assert_close(others_E.sum(), T1 - best_N.mean(), rtol=1e-5, atol=1e-6)

    @given(routings(distinct=True))
    def test_the_best_come_first(self, drawn):
        logits_NE, top_k = drawn
        expected = [
            sorted(range(len(row)), key=lambda e, row=row: -row[e])[:top_k]
            for row in logits_NE.tolist()
        ]
        assert top_k_experts(logits_NE, top_k=top_k).tolist() == expected

    @pytest.mark.parametrize("num_tokens", [1, 40, 300])
    def test_the_best_two_of_many_come_first(self, num_tokens):
        logits_NE = torch.randn(num_tokens, 40)
        expected_NK = logits_NE.argsort(-1, descending=True)[:, :2]
        assert torch.equal(top_k_experts(logits_NE, top_k=2), expected_NK)

    @pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("intact", [0, 1, 2])
    def test_the_best_two_of_many_differ_whatever_the_scores(self, broken, intact):
        logits_NE = torch.full((300, 40), broken)
        logits_NE[:, :intact] = torch.randn(300, intact)
        ids_NK = top_k_experts(logits_NE, top_k=2)
        assert (ids_NK[:, 0] != ids_NK[:, 1]).all()
        assert ids_NK.min() >= 0
        assert ids_NK.max() < 40
        if broken < 0 and intact == 2:
            assert torch.equal(ids_NK.sort().values, torch.tensor([0, 1]).expand(300, 2))

    @given(routings(), temperatures, temperatures)
    def test_no_temperature_changes_it(self, drawn, one, other):
        logits_NE, top_k = drawn
        first = route(logits_NE, top_k=top_k, temperature=one)
        second = route(logits_NE, top_k=top_k, temperature=other)
        assert torch.equal(first.expert_ids_NK, second.expert_ids_NK)

    @given(routings(distinct=True), st.integers(-(2**12), 2**12), temperatures)
    def test_no_constant_changes_it(self, drawn, constant, temperature):
        logits_NE, top_k = drawn
        first = route(logits_NE, top_k=top_k, temperature=temperature)
        second = route(logits_NE + constant / 64, top_k=top_k, temperature=temperature)
        assert torch.equal(first.expert_ids_NK, second.expert_ids_NK)

    @given(routings(distinct=True), temperatures, st.randoms(use_true_random=False))
    def test_equivariant_to_permuting_tokens_and_relabelling_experts(
        self, drawn, temperature, random
    ):
        logits_NE, top_k = drawn
        num_tokens, num_experts = logits_NE.shape
        tokens = random.sample(range(num_tokens), num_tokens)
        experts = torch.tensor(random.sample(range(num_experts), num_experts))
        routing = route(logits_NE, top_k=top_k, temperature=temperature)
        moved = route(logits_NE[tokens][:, experts], top_k=top_k, temperature=temperature)
        # In the relabelled layer, expert e is what was experts[e].
        assert torch.equal(experts[moved.expert_ids_NK], routing.expert_ids_NK[tokens])
        torch.testing.assert_close(moved.weights_NK, routing.weights_NK[tokens])
        torch.testing.assert_close(moved.probs_NE, routing.probs_NE[tokens][:, experts])

    @pytest.mark.parametrize("broken", [[0], [1, 2], [0, 1, 2, 3]])
    def test_nan_scores_give_ids_in_range(self, broken):
        logits_NE = torch.randn(3, 4)
        logits_NE[1, broken] = torch.nan
        routing = route(logits_NE, top_k=2, temperature=T1)
        ids = routing.expert_ids_NK
        assert ids.min() >= 0
        assert ids.max() < 4
        assert (ids[:, 0] != ids[:, 1]).all()
        assert routing.weights_NK[[0, 2]].isfinite().all()


class TestGates:
    @given(routings(), temperatures)
    def test_non_negative_and_of_sum_one(self, drawn, temperature):
        logits_NE, top_k = drawn
        weights_NK = route(logits_NE, top_k=top_k, temperature=temperature).weights_NK
        assert (weights_NK >= 0).all()
        torch.testing.assert_close(weights_NK.sum(-1), torch.ones(logits_NE.shape[0]))

    @given(routings(distinct=True), temperatures)
    def test_they_are_the_probabilities_of_the_chosen_renormalised(self, drawn, temperature):
        logits_NE, top_k = drawn
        routing = route(logits_NE.double(), top_k=top_k, temperature=temperature)
        chosen_NK = routing.probs_NE.gather(1, routing.expert_ids_NK)
        torch.testing.assert_close(routing.weights_NK, chosen_NK / chosen_NK.sum(-1, keepdim=True))

    @given(routings(distinct=True))
    def test_one_hot_as_the_temperature_falls(self, drawn):
        # Logits are at least 1/64 apart, which is 15 temperatures.
        logits_NE, top_k = drawn
        weights_NK = route(logits_NE, top_k=top_k, temperature=torch.tensor(1e-3)).weights_NK
        one_hot_NK = torch.zeros_like(weights_NK)
        one_hot_NK[:, 0] = 1.0
        torch.testing.assert_close(weights_NK, one_hot_NK, atol=1e-6, rtol=0)

    @given(routings())
    def test_even_as_the_temperature_rises(self, drawn):
        logits_NE, top_k = drawn
        weights_NK = route(logits_NE, top_k=top_k, temperature=torch.tensor(1e7)).weights_NK
        torch.testing.assert_close(weights_NK, torch.full_like(weights_NK, 1 / top_k))

    @given(st.floats(-80.0, 80.0), st.floats(1e-30, 1e30))
    def test_finite_at_any_temperature_that_fp32_holds(self, gap, temperature):
        logits_NE = torch.tensor([[0.0, gap]])
        routing = route(logits_NE, top_k=2, temperature=torch.tensor(temperature))
        assert routing.weights_NK.isfinite().all()
        assert routing.probs_NE.isfinite().all()

    def test_one_gate_is_one_with_the_gradient_of_log_p(self):
        logits_NE = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        ids_N1 = top_k_experts(logits_NE, top_k=1)
        temperature = torch.tensor(2.0)
        slope_N1 = torch.randn(5, 1, dtype=torch.float64)
        weights_N1 = gate_weights(logits_NE, ids_N1, temperature=temperature)
        assert (weights_N1 == 1).all()
        (gradient,) = torch.autograd.grad((slope_N1 * weights_N1).sum(), logits_NE)
        # d log p_i / d z_j = (1[i = j] - p_j) / T
        probs_NE = torch.softmax(logits_NE.detach() / temperature, -1)
        one_hot_NE = torch.nn.functional.one_hot(ids_N1[:, 0], 4)
        torch.testing.assert_close(gradient, slope_N1 * (one_hot_NE - probs_NE) / temperature)

    def test_gradient_of_several_gates(self):
        logits_NE = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        ids_NK = top_k_experts(logits_NE, top_k=3)
        temperature = torch.tensor(0.7, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda z: gate_weights(z, ids_NK, temperature=temperature), (logits_NE,)
        )


class TestWarmUp:
    def test_uniform_over_experts_and_over_sets(self):
        # One draw of many tokens; p below 1e-4 would be chance once in ten thousand seeds.
        num_tokens, num_experts, top_k = 20_000, 5, 2
        ids_NK = random_experts(torch.zeros(num_tokens, num_experts), top_k=top_k)
        for place in range(top_k):
            counts = torch.bincount(ids_NK[:, place], minlength=num_experts)
            assert stats.chisquare(counts.numpy()).pvalue > 1e-4
        pairs = torch.bincount(ids_NK[:, 0] * num_experts + ids_NK[:, 1], minlength=25)
        pairs = pairs.view(num_experts, num_experts)
        assert not pairs.diagonal().any()
        off_diagonal = pairs[~torch.eye(num_experts, dtype=torch.bool)]
        assert len(off_diagonal) == math.perm(num_experts, top_k)
        assert stats.chisquare(off_diagonal.numpy()).pvalue > 1e-4

    @given(st.integers(0, 2**31), st.integers(2, 12), st.data())
    def test_uniform_whatever_the_seed(self, seed, num_experts, data):
        top_k = data.draw(st.integers(1, num_experts))
        torch.manual_seed(seed)
        ids_NK = random_experts(torch.zeros(2_000, num_experts), top_k=top_k)
        place = data.draw(st.integers(0, top_k - 1))
        counts = torch.bincount(ids_NK[:, place], minlength=num_experts)
        # Over the 200 examples together, chance fails this once in fifty thousand runs.
        assert stats.chisquare(counts.numpy()).pvalue > 1e-7

    @given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 20))
    def test_reproducible_by_seed_and_distinct(self, seed, num_experts, num_tokens):
        logits_NE = torch.zeros(num_tokens, num_experts)
        top_k = max(1, num_experts // 2)
        draws = []
        for _ in range(2):
            torch.manual_seed(seed)
            draws.append(random_experts(logits_NE, top_k=top_k))
        assert torch.equal(*draws)
        assert all(len(set(row)) == top_k for row in draws[0].tolist())

    def test_chance_decides_only_while_it_lasts(self):
        logits_NE = torch.randn(50, 6, requires_grad=True)
        chosen = route(logits_NE, top_k=3, temperature=T1)
        warm = route(logits_NE, top_k=3, temperature=T1, random_routing=torch.tensor(True))
        over = route(logits_NE, top_k=3, temperature=T1, random_routing=torch.tensor(False))
        assert torch.equal(over.expert_ids_NK, chosen.expert_ids_NK)
        assert torch.equal(over.weights_NK, chosen.weights_NK)
        assert not torch.equal(warm.expert_ids_NK, chosen.expert_ids_NK)
        torch.testing.assert_close(warm.weights_NK, torch.full((50, 3), 1 / 3))
        # The task teaches the router nothing about a choice that it did not make.
        (gradient,) = torch.autograd.grad(warm.weights_NK.sum(), logits_NE)
        assert not gradient.any()

    def test_no_random_number_is_drawn_without_it(self):
        state = torch.get_rng_state()
        route(torch.randn(5, 4, generator=torch.Generator()), top_k=2, temperature=T1)
        assert torch.equal(torch.get_rng_state(), state)


def test_scores_may_be_whole_numbers_as_a_hash_is():
    scores_NE = torch.stack([torch.randperm(5) - 2 for _ in range(3000)])
    ids_NK = top_k_experts(scores_NE, top_k=2)
    assert torch.equal(ids_NK, scores_NE.argsort(dim=-1, descending=True)[:, :2])
