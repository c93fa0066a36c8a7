import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_near

from ecomoe import dispatch
from ecomoe.dispatch import (
    combine,
    plan_dispatch,
    scatter_to_experts,
    unsort_slots,
)


@st.composite
def assignments(draw, *, min_tokens=0):
    """Expert ids (N, K), distinct within a token, and the number of experts."""
    num_tokens = draw(st.integers(min_tokens, 6))
    num_experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, num_experts))
    rows = [
        draw(st.permutations(range(num_experts)).map(lambda p: p[:top_k]))
        for _ in range(num_tokens)
    ]
    return torch.tensor(rows, dtype=torch.int64).view(num_tokens, top_k), num_experts


class TestPlan:
    @given(assignments())
    def test_slots_are_sorted_stably_and_every_slot_appears_once(self, assignment):
        ids_NK, num_experts = assignment
        plan = plan_dispatch(ids_NK, num_experts=num_experts)
        flat = ids_NK.flatten().tolist()
        expected = sorted(range(len(flat)), key=lambda s: (flat[s], s))
        assert plan.order_S.tolist() == expected
        assert [expected[i] for i in plan.inverse_S.tolist()] == list(range(len(flat)))
        assert plan.expert_ids_S.tolist() == sorted(flat)
        assert plan.ends_E.tolist() == [sum(i <= e for i in flat) for e in range(num_experts)]
        assert plan.ends_E.dtype == torch.int32

    @given(assignments(), st.integers(1, 4), st.integers(0, 999))
    def test_identity_experts_give_the_input_back(self, assignment, width, seed):
        ids_NK, num_experts = assignment
        num_tokens, top_k = ids_NK.shape
        torch.manual_seed(seed)
        x_ND = torch.randn(num_tokens, width, dtype=torch.float64)
        weights_NK = torch.softmax(torch.randn(num_tokens, top_k, dtype=torch.float64), -1)
        plan = plan_dispatch(ids_NK, num_experts=num_experts)
        x_SD = scatter_to_experts(x_ND, plan, top_k=top_k)
        y_NKD = unsort_slots(x_SD, plan, top_k=top_k)
        assert torch.equal(y_NKD, x_ND.unsqueeze(1).expand(-1, top_k, -1))
        y_ND = combine(x_SD, weights_NK, plan)
        torch.testing.assert_close(y_ND, x_ND, atol=1e-14, rtol=1e-14)

    @given(assignments(min_tokens=1), st.randoms(use_true_random=False))
    def test_permuting_tokens_permutes_the_result(self, assignment, random):
        ids_NK, num_experts = assignment
        num_tokens, top_k = ids_NK.shape
        x_ND = torch.arange(3.0 * num_tokens).view(num_tokens, 3)
        weights_NK = torch.full((num_tokens, top_k), 1 / top_k)
        scale_E = torch.arange(1.0, num_experts + 1)

        def layer(x_ND, ids_NK):
            plan = plan_dispatch(ids_NK, num_experts=num_experts)
            y_SD = scatter_to_experts(x_ND, plan, top_k=top_k)
            y_SD = y_SD * scale_E[plan.expert_ids_S].unsqueeze(1)
            return combine(y_SD, weights_NK, plan)

        order = random.sample(range(num_tokens), num_tokens)
        torch.testing.assert_close(layer(x_ND[order], ids_NK[order]), layer(x_ND, ids_NK)[order])

    def test_gradients(self):
        ids_NK = torch.tensor([[2, 0], [0, 1], [2, 1]])
        plan = plan_dispatch(ids_NK, num_experts=4)
        x_ND = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        y_SD = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
        weights_NK = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
        for function, inputs in (
            (lambda x: scatter_to_experts(x, plan, top_k=2), (x_ND,)),
            (lambda y: unsort_slots(y, plan, top_k=2), (y_SD,)),
            (lambda y, w: combine(y, w, plan), (y_SD, weights_NK)),
        ):
            assert torch.autograd.gradcheck(function, inputs)
            assert torch.autograd.gradgradcheck(function, inputs)


class TestCombine:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("way", ["host", "anywhere"])
    def test_against_a_weighted_sum(self, dtype, autocast, way, monkeypatch):
        if way == "anywhere":
            monkeypatch.setattr(dispatch, "for_host", lambda tensor: False)
        num_tokens, top_k, width = 1500, 4, 8
        ids_NK = torch.rand(num_tokens, 6).topk(top_k).indices
        plan = plan_dispatch(ids_NK, num_experts=6)
        y_SF = torch.randn(num_tokens * top_k, width).to(dtype).requires_grad_()
        gates = torch.promote_types(dtype, torch.float32)
        weights_NK = torch.softmax(torch.randn(num_tokens, top_k, dtype=gates), -1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y_NF = combine(y_SF, weights_NK, plan)
        assert y_NF.dtype == dtype
        wide = [t.detach().double().requires_grad_() for t in (y_SF, weights_NK)]
        slots_NK = plan.inverse_S.view(num_tokens, top_k)
        expected = (wide[0][slots_NK] * wide[1].unsqueeze(-1)).sum(1)
        assert_near(y_NF, expected, dtype)
        slope = torch.randn_like(expected).to(dtype)
        y_NF.backward(slope)
        expected.backward(slope.double())
        for tensor, reference in zip((y_SF, weights_NK), wide, strict=True):
            assert tensor.grad.dtype == tensor.dtype
            assert_near(tensor.grad, reference.grad, dtype)
