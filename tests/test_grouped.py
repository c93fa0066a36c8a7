import pytest
import torch
from tolerances import assert_near
from torch.nn import functional as F

from ecomoe import grouped
from ecomoe.grouped import grouped_linear


def loop_linear(x_SD, weight_EFD, bias_EF, ends_E):
    """Return what `grouped_linear` means, slot by slot."""
    rows, start = [], 0
    for e, end in enumerate(ends_E.tolist()):
        for s in range(start, end):
            row = weight_EFD[e] @ x_SD[s]
            rows.append(row if bias_EF is None else row + bias_EF[e])
        start = end
    return torch.stack(rows) if rows else x_SD.new_zeros(0, weight_EFD.shape[1])


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
        monkeypatch.setattr(grouped, "_on_host", lambda tensor: False)


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
