"""The operator from tokens to their weighted sums, against single experts."""

import pytest
import torch
from tolerances import assert_near
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ecomoe.activations import ACTIVATIONS, ELEMENTWISE
from ecomoe.feed_forward import feed_forward
from ecomoe.few_slots import FEW_IN_16_BITS, FEW_OF_EXPERT, are_few

# (D, H, F, slots of each expert): pieces of their own size, windows, several pieces an expert, an
# expert without slots in the middle of a piece, few slots on multiples of 16 bytes.
SIZES = [
    (4, 3, 5, [4, 0, 4]),
    (4, 3, 4, [0, 0]),
    (4, 3, 4, [60, 37, 53]),
    (3, 4, 2, [0, 2500, 100]),
    (4, 3, 4, [50, 50, 0, 50, 50, 50, 50, 50]),
    (4, 8, 4, [5, 0, 7]),
    (8, 16, 8, [0, 1, 0, 0, 1, 0, 2, 0, 0, 0]),
]
NAMES = ("x", "gates", "up", "up bias", "down", "down bias")


def operands(size, *, top_k=2, gated=False, bias=True, dtype=torch.float64):
    """Return what is differentiated, and the plan: an order of the slots and their experts' ends.

    ``top_k=None`` is without gates, slots as they come sorted.
    """
    d_model, d_hidden, d_output, counts = size
    num_slots, num_experts, width = sum(counts), len(counts), (1 + gated) * d_hidden
    num_tokens = num_slots // (top_k or 1)
    shapes = [(num_tokens, d_model), (num_tokens, top_k or 1)]
    shapes += [(num_experts, width, d_model), (num_experts, width)]
    shapes += [(num_experts, d_output, d_hidden), (num_experts, d_output)]
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    gates = torch.rand(shapes[1], dtype=torch.promote_types(dtype, torch.float32))
    tensors[1] = None if top_k is None else gates.requires_grad_()
    for place, name in ((3, "up"), (5, "down")):
        if bias not in (True, name):
            tensors[place] = None
    order_S = torch.arange(num_slots) if top_k is None else torch.randperm(num_slots)
    return tensors, (order_S, torch.tensor(counts).cumsum(0).to(torch.int32))


def one_by_one(x_ND, gates_NK, up_EGD, up_bias_EG, down_EFH, down_bias_EF, plan, activation):
    """Return what the operator shall, slot by slot."""
    order_S, ends_E = plan
    top_k = 1 if gates_NK is None else gates_NK.shape[1]
    y_NF = x_ND.new_zeros(x_ND.shape[0], down_EFH.shape[1])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        slots = order_S[start:end]
        start = end
        pre = x_ND[slots // top_k] @ up_EGD[expert].T
        if up_bias_EG is not None:
            pre = pre + up_bias_EG[expert]
        gate, *up = pre.split(down_EFH.shape[2], dim=1)
        hidden = ACTIVATIONS[activation](gate)
        if up:
            hidden = hidden * up[0]
        y = hidden @ down_EFH[expert].T
        if down_bias_EF is not None:
            y = y + down_bias_EF[expert]
        if gates_NK is not None:
            y = y * gates_NK.flatten()[slots].unsqueeze(1)
        y_NF = y_NF.index_add(0, slots // top_k, y)
    return y_NF


# The same, with and without the operator that tracers see.
WAYS = {"untraced": feed_forward, "operator": torch.ops.ecomoe.routed_feed_forward}


class TestAgainstSingleExperts:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("top_k", [None, 1, 2])
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("bias", [False, True, "up", "down"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_values_and_gradients(self, size, top_k, gated, bias, dtype):
        self.check_values_and_gradients("untraced", size, top_k, gated, bias, dtype)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("top_k", [None, 2])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_the_operator(self, size, top_k, bias, dtype):
        self.check_values_and_gradients("operator", size, top_k, True, bias, dtype)

    @staticmethod
    def check_values_and_gradients(way, size, top_k, gated, bias, dtype):
        inputs, plan = operands(size, top_k=top_k, gated=gated, bias=bias, dtype=dtype)
        wide = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
        y_NF, _ = WAYS[way](*inputs, *plan, "silu", True)
        expected = one_by_one(*wide, plan, "silu")
        assert y_NF.dtype == dtype
        assert_near(y_NF, expected, dtype)
        slope = torch.randn_like(expected).to(dtype)
        y_NF.backward(slope)
        expected.backward(slope.double())
        for name, tensor, reference in zip(NAMES, inputs, wide, strict=True):
            if tensor is not None:
                assert tensor.grad.dtype == tensor.dtype
                assert_near(tensor.grad, reference.grad, dtype, name=name)

    @pytest.mark.parametrize("activation", sorted(ELEMENTWISE))
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("top_k", [None, 2])
    @pytest.mark.parametrize("way", WAYS)
    def test_activations_to_the_second_derivative(self, activation, gated, top_k, way):
        inputs, plan = operands(SIZES[0], gated=gated, top_k=top_k)

        def function(*tensors):
            tensors = iter(tensors)
            full = [None if t is None else next(tensors) for t in inputs]
            return WAYS[way](*full, *plan, activation, True)[0]

        given = [t for t in inputs if t is not None]
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)

    def test_without_a_backward_pass_nothing_is_kept(self):
        inputs, plan = operands(SIZES[3])
        y_NF, pre_SG = feed_forward(*inputs, *plan, "gelu", True)
        assert pre_SG.shape == (2600, 4)
        with torch.no_grad():
            alone_NF, none_SG = feed_forward(*inputs, *plan, "gelu", False)
        assert torch.equal(alone_NF, y_NF)
        assert none_SG.shape == (0, 4)

    @pytest.mark.parametrize("counts", [[0, 0], [0, 2, 0], [2, 1, 0, 1], [3, 0, 5]])
    @pytest.mark.parametrize("top_k", [None, 1, 2])
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("bias", [False, True, "up", "down"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_few_slots_without_a_backward_pass(self, counts, top_k, gated, bias, dtype):
        size = (4, 3, 5, counts)
        inputs, plan = operands(size, top_k=top_k, gated=gated, bias=bias, dtype=dtype)
        wide = [t if t is None else t.detach().double() for t in inputs]
        with torch.no_grad():
            y_NF, _ = feed_forward(*inputs, *plan, "silu", False)
        assert y_NF.dtype == dtype
        assert_near(y_NF, one_by_one(*wide, plan, "silu"), dtype)

    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("top_k", [None, 2])
    @pytest.mark.parametrize("size", [SIZES[2], SIZES[5], SIZES[6]])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_the_compiler_is_told(self, gated, top_k, size, dtype):
        inputs, plan = operands(size, gated=gated, top_k=top_k, dtype=dtype)
        inputs = [None if t is None else t.detach() for t in inputs]
        for keep in (False, True):
            torch.library.opcheck(
                torch.ops.ecomoe.routed_feed_forward.default,
                (*inputs, *plan, "gelu", keep),
                test_utils=("test_schema", "test_faketensor"),
            )
        x_ND, gates_NK, up_EGD, _, down_EFH, down_bias_EF = inputs
        y_NF, pre_SG = feed_forward(*inputs, *plan, "gelu", True)
        for has_biases in (False, True):
            operators = x_ND, gates_NK, pre_SG, up_EGD, down_EFH, down_bias_EF
            torch.library.opcheck(
                torch.ops.ecomoe.routed_feed_forward_backward.default,
                (y_NF, *operators, *plan, "gelu", has_biases),
                test_utils=("test_schema", "test_faketensor"),
            )


class TestFewSlots:
    """Of few slots none is padded, and experts without slots are not read."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("extra", [0, 2])
    def test_as_many_rows_are_kept_as_there_are_slots(self, dtype, extra):
        few = 3 * FEW_OF_EXPERT if dtype.itemsize > 2 else FEW_IN_16_BITS
        counts = [0, few + extra, 0]
        inputs, plan = operands((4, 3, 4, counts), dtype=dtype)
        assert are_few(few, 3, dtype)
        assert not are_few(few + 1, 3, dtype)
        _, pre_SG = feed_forward(*inputs, *plan, "gelu", True)
        assert pre_SG.shape == (few + extra, 3)

    @pytest.mark.parametrize("counts", [[0, 2, 0, 0, 0, 0, 0, 0, 0], [1, 3, 1, 2, 0, 1]])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("sizes", [(8, 16, 8), (3, 5, 3)])
    def test_broken_weights_of_idle_experts_are_nobody_s(self, counts, dtype, sizes):
        inputs, plan = operands((*sizes, counts), dtype=dtype)
        idle = torch.tensor(counts) == 0
        with torch.no_grad():
            for tensor in inputs[2:]:
                tensor[idle] = torch.nan
        y_NF, _ = feed_forward(*inputs, *plan, "gelu", True)
        y_NF.sum().backward()
        assert y_NF.isfinite().all()
        for name, tensor in zip(NAMES, inputs, strict=True):
            assert tensor.grad.isfinite().all(), name
        for name, tensor in zip(NAMES[2:], inputs[2:], strict=True):
            assert not tensor.grad[idle].any(), name
            assert tensor.grad[~idle].flatten(1).any(1).all(), name

    @pytest.mark.parametrize("counts", [[0, 1, 1, 0, 0, 0, 0, 0, 0], [3, 1, 2]])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_broken_token_stays_with_its_expert(self, counts, dtype):
        inputs, plan = operands((8, 16, 8, counts), top_k=None, dtype=dtype)
        with torch.no_grad():
            inputs[0][-1] = torch.nan
        y_NF, _ = feed_forward(*inputs, *plan, "gelu", True)
        assert y_NF.isnan().any(1).nonzero().flatten().tolist() == [sum(counts) - 1]
        y_NF.nansum().backward()
        own = max(expert for expert, count in enumerate(counts) if count)
        for tensor in inputs[2:]:
            broken = ~tensor.grad.flatten(1).isfinite().all(1)
            assert broken.nonzero().flatten().tolist() in ([own], [])

    @pytest.mark.parametrize("layout", ["transposed", "strided"])
    def test_weights_that_lie_otherwise_in_memory(self, layout):
        inputs, plan = operands((8, 16, 8, [3, 1, 2]), dtype=torch.float32)
        whole = [t.detach().clone().requires_grad_() for t in inputs]
        with torch.no_grad():
            for place in (2, 4):
                weight = inputs[place].detach()
                if layout == "transposed":
                    weight = weight.mT.contiguous().mT
                else:
                    weight = torch.stack((weight, weight), dim=3)[..., 0]
                inputs[place] = weight.requires_grad_()
        results = []
        for tensors in (inputs, whole):
            y_NF, _ = feed_forward(*tensors, *plan, "gelu", True)
            results.append([y_NF, *torch.autograd.grad(y_NF.square().sum(), tensors)])
        for name, one, other in zip(("y", *NAMES), *results, strict=True):
            assert_near(one, other, torch.float32, name=name)

    def test_a_token_of_which_nothing_is_wanted(self):
        inputs, plan = operands((4, 3, 4, [1, 0, 1]))
        inputs[0] = inputs[0].detach()
        y_NF, _ = feed_forward(*inputs, *plan, "gelu", True)
        (2 * y_NF[:0]).sum().backward()
        for name, tensor in zip(NAMES[1:], inputs[1:], strict=True):
            assert not tensor.grad.any(), name


def test_checkpointing_computes_the_same():
    for size in (SIZES[2], SIZES[6]):
        inputs, plan = operands(size)

        def function(*tensors, plan=plan):
            return feed_forward(*tensors, *plan, "gelu", True)[0]

        plain = torch.autograd.grad(function(*inputs).square().sum(), inputs)
        y_NF = checkpoint(function, *inputs, use_reentrant=False)
        for one, other in zip(torch.autograd.grad(y_NF.square().sum(), inputs), plain, strict=True):
            assert torch.equal(one, other)


def test_who_looks_sees_one_operator():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    for size in (SIZES[2], SIZES[6]):
        inputs, plan = operands(size)
        seen = []
        with Names():
            feed_forward(*inputs, *plan, "gelu", True)[0].sum().backward()
        own = [name for name in seen if name.startswith("ecomoe")]
        assert own == ["ecomoe::routed_feed_forward", "ecomoe::routed_feed_forward_backward"]
        assert not any("mm" in name for name in seen)


def test_gates_of_experts_that_are_nearly_alike():
    """What tells their gates' gradients apart is less than one rounding of these in 16 bits."""
    torch.manual_seed(0)
    (x_ND, gates_NK, up_EGD, up_bias_EG, down_EFH, _), plan = operands(
        (64, 128, 64, [600, 600]), dtype=torch.float32
    )
    wide = [x_ND, gates_NK, up_EGD, up_bias_EG, down_EFH * 0.01 + down_EFH[:1]]
    narrow = [t.detach().bfloat16() for t in wide]
    narrow[1] = gates_NK.detach().requires_grad_()
    y_NF, _ = feed_forward(*narrow, None, *plan, "gelu", True)
    reference = [t.detach().double() for t in narrow]
    reference[1].requires_grad_()
    expected = one_by_one(*reference, None, plan, "gelu")
    # A slope along the output: the terms of <slope, y> have one sign, and add up.
    y_NF.backward(y_NF.detach())
    expected.backward(y_NF.detach().double())
    error = (narrow[1].grad - reference[1].grad).abs() / reference[1].grad.abs().clamp_min(1.0)
    assert error.median() < 2**-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[40, 60, 40], [20, 0, *[20] * 6], [50, 0, *[50] * 6]])
def test_a_broken_slot_stays_with_its_expert(counts, dtype):
    inputs, plan = operands((4, 3, 4, counts), top_k=None, dtype=dtype)
    broken = sum(counts[:1]) + 5 if counts[1] else 0
    with torch.no_grad():
        inputs[0][broken] = torch.nan
    y_NF, _ = feed_forward(*inputs, *plan, "gelu", True)
    assert y_NF.isnan().any(1).nonzero().flatten().tolist() == [broken]
    y_NF.nansum().backward()
    own = int((plan[1] <= broken).sum())
    for name, tensor in zip(NAMES[2:], inputs[2:], strict=True):
        finite = tensor.grad.flatten(1).isfinite().all(1)
        assert finite[torch.arange(len(counts)) != own].all(), name
        assert finite[own] == (name == "down bias"), name


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_change_nothing_but_rounding(num_threads):
    inputs, plan = operands((8, 16, 8, [100, 1900, 700, 0, 1300]), dtype=torch.float64)
    before = torch.get_num_threads()
    results = []
    for number in (1, num_threads):
        torch.set_num_threads(number)
        try:
            y_NF, _ = feed_forward(*inputs, *plan, "gelu", True)
            results.append([y_NF, *torch.autograd.grad(y_NF.square().sum(), inputs)])
        finally:
            torch.set_num_threads(before)
    for one, several in zip(*results, strict=True):
        assert_near(several, one, torch.float64)
