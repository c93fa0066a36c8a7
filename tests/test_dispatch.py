import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_near
from torch.nn import functional as F

from ecomoe import dispatch
from ecomoe.dispatch import (
    combine,
    grouped_linear,
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


def loop_linear(x_SD, weight_EFD, bias_EF, ends_E):
    """Return what `grouped_linear` means, slot by slot."""
    rows, start = [], 0
    for e, end in enumerate(ends_E.tolist()):
        for s in range(start, end):
            row = weight_EFD[e] @ x_SD[s]
            rows.append(row if bias_EF is None else row + bias_EF[e])
        start = end
    return torch.stack(rows) if rows else x_SD.new_zeros(0, weight_EFD.shape[1])


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
        torch.testing.assert_close(combine(y_NKD, weights_NK), x_ND, atol=1e-14, rtol=1e-14)

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
            return combine(unsort_slots(y_SD, plan, top_k=top_k), weights_NK)

        order = random.sample(range(num_tokens), num_tokens)
        torch.testing.assert_close(layer(x_ND[order], ids_NK[order]), layer(x_ND, ids_NK)[order])

    def test_gradients(self):
        ids_NK = torch.tensor([[2, 0], [0, 1], [2, 1]])
        plan = plan_dispatch(ids_NK, num_experts=4)
        x_ND = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        y_SD = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
        y_NKD = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
        weights_NK = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
        for function, inputs in (
            (lambda x: scatter_to_experts(x, plan, top_k=2), (x_ND,)),
            (lambda y: unsort_slots(y, plan, top_k=2), (y_SD,)),
            (combine, (y_NKD, weights_NK)),
        ):
            assert torch.autograd.gradcheck(function, inputs)
            assert torch.autograd.gradgradcheck(function, inputs)


class TestCombine:
    def test_in_the_precision_of_the_gates(self):
        y_NKF = torch.randn(50, 4, 8).bfloat16()
        weights_NK = torch.softmax(torch.randn(50, 4), -1)
        expected = (weights_NK.double().unsqueeze(-1) * y_NKF.double()).sum(1)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = combine(y_NKF, weights_NK)
        for y_NF in (combine(y_NKF, weights_NK), narrow):
            assert y_NF.dtype == torch.float32
            assert_near(y_NF, expected, torch.float32)


# (S, D, F, slots of each expert)
SIZES = [
    (7, 4, 8, [3, 0, 4]),
    (7, 3, 5, [0, 7, 0]),
    (5, 8, 4, [0, 0, 5]),
    (1, 1, 1, [1]),
    (0, 4, 8, [0, 0]),
]


def operands(size, *, bias, dtype):
    num_slots, width_in, width_out, counts = size
    ends_E = torch.tensor(counts).cumsum(0).to(torch.int32)
    tensors = [
        torch.randn(num_slots, width_in),
        torch.randn(len(counts), width_out, width_in),
        torch.randn(len(counts), width_out) if bias else None,
    ]
    tensors = [t if t is None else t.to(dtype).requires_grad_() for t in tensors]
    return tensors, ends_E


@pytest.fixture(params=["loop", "grouped_mm"])
def _way(request, monkeypatch):
    """Take the way of a CPU, and that of an accelerator: F.grouped_mm runs on a CPU, too."""
    if request.param == "grouped_mm":
        monkeypatch.setattr(dispatch, "_on_host", lambda tensor: False)


@pytest.mark.usefixtures("_way")
class TestGroupedLinear:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_against_a_loop_over_slots(self, size, bias, dtype):
        inputs, ends_E = operands(size, bias=bias, dtype=dtype)
        wide = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
        y_SF = grouped_linear(*inputs, ends_E)
        expected = loop_linear(*wide, ends_E)
        assert y_SF.dtype == dtype
        assert_near(y_SF, expected, dtype)
        slope = torch.randn_like(expected)
        y_SF.backward(slope.to(dtype))
        if expected.requires_grad:
            expected.backward(slope.to(dtype).double())
        for tensor, reference in zip(inputs, wide, strict=True):
            if tensor is not None:
                assert tensor.grad.dtype == dtype
                gradient = reference.grad
                gradient = torch.zeros_like(reference) if gradient is None else gradient
                assert_near(tensor.grad, gradient, dtype)

    def test_an_expert_without_slots_gets_exact_zeros(self):
        # Memory that was used before, where an unwritten gradient would show.
        del_me = [torch.full((3, 8, 4), torch.nan) for _ in range(20)]
        del del_me
        inputs, ends_E = operands(SIZES[0], bias=True, dtype=torch.float32)
        grouped_linear(*inputs, ends_E).sum().backward()
        _, weight_EFD, bias_EF = inputs
        for gradient in (weight_EFD.grad, bias_EF.grad):
            assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
            assert gradient[0].any()
            assert gradient[2].any()

    def test_a_broken_slot_stays_with_its_row_and_its_expert(self):
        inputs, ends_E = operands(SIZES[0], bias=True, dtype=torch.float32)
        with torch.no_grad():
            inputs[0][1] = torch.nan
        y_SF = grouped_linear(*inputs, ends_E)
        assert y_SF[1].isnan().all()
        assert y_SF[[0, 2, 3, 4, 5, 6]].isfinite().all()
        y_SF.sum().backward()
        assert inputs[1].grad[1:].isfinite().all()

    def test_strided_and_expanded_operands(self):
        (x_SD, weight_EFD, bias_EF), ends_E = operands(SIZES[0], bias=True, dtype=torch.float32)
        expected = grouped_linear(x_SD, weight_EFD, bias_EF, ends_E)
        strided = torch.stack([x_SD, x_SD], -1)[..., 0]
        weight = weight_EFD.mT.contiguous().mT
        assert not strided.is_contiguous()
        assert not weight.is_contiguous()
        y_SF = grouped_linear(strided, weight, bias_EF, ends_E)
        torch.testing.assert_close(y_SF, expected)
        # The gradient of a sum is an expanded tensor, with strides of 0.
        y_SF.sum().backward()
        assert weight_EFD.grad.isfinite().all()


class TestOperator:
    @pytest.mark.parametrize("bias", [False, True])
    def test_first_and_second_gradient(self, bias):
        inputs, ends_E = operands(SIZES[1], bias=bias, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda *t: grouped_linear(*t, ends_E), inputs)
        assert torch.autograd.gradgradcheck(lambda *t: grouped_linear(*t, ends_E), inputs)

    @pytest.mark.parametrize("bias", [False, True])
    def test_fake_implementations_tell_the_truth(self, bias):
        inputs, ends_E = operands(SIZES[0], bias=bias, dtype=torch.float32)
        inputs = [t if t is None else t.detach() for t in inputs]
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            torch.ops.ecomoe.grouped_linear.default, (*inputs, ends_E), test_utils=checks
        )
        x_SD, weight_EFD, _ = inputs
        torch.library.opcheck(
            torch.ops.ecomoe.grouped_linear_backward.default,
            (torch.randn(7, 8), x_SD, weight_EFD, ends_E, bias),
            test_utils=checks,
        )

    def test_under_function_transforms(self):
        inputs, ends_E = operands(SIZES[0], bias=True, dtype=torch.float64)
        inputs = [t.detach() for t in inputs]

        def loss(x_SD, weight_EFD, bias_EF):
            return grouped_linear(x_SD, weight_EFD, bias_EF, ends_E).square().sum()

        def loop_loss(x_SD, weight_EFD, bias_EF):
            return loop_linear(x_SD, weight_EFD, bias_EF, ends_E).square().sum()

        gradients = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs)
        expected = torch.func.grad(loop_loss, argnums=(0, 1, 2))(*inputs)
        for gradient, reference in zip(gradients, expected, strict=True):
            assert_near(gradient, reference, torch.float64)

    @pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, 1, 0)])
    def test_batched_by_vmap(self, axes):
        inputs, ends_E = operands(SIZES[0], bias=True, dtype=torch.float64)
        inputs = [
            t.detach() if axis is None else torch.randn_like(torch.stack([t] * 3, axis))
            for t, axis in zip(inputs, axes, strict=True)
        ]

        def loss(x_SD, weight_EFD, bias_EF):
            return grouped_linear(x_SD, weight_EFD, bias_EF, ends_E).square().sum()

        gradient = torch.func.grad(loss, argnums=(0, 1, 2))
        batched = torch.func.vmap(gradient, axes)(*inputs)
        for index in range(3):
            parts = [
                t if axis is None else t.select(axis, index)
                for t, axis in zip(inputs, axes, strict=True)
            ]
            for part, expected in zip(batched, gradient(*parts), strict=True):
                assert_near(part[index], expected, torch.float64)

    def test_all_slots_on_one_expert_is_one_linear_map(self):
        x_SD, weight_EFD = torch.randn(6, 4), torch.randn(3, 8, 4)
        ends_E = torch.tensor([0, 6, 6], dtype=torch.int32)
        y_SF = grouped_linear(x_SD, weight_EFD, None, ends_E)
        torch.testing.assert_close(y_SF, F.linear(x_SD, weight_EFD[1]))
