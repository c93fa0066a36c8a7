import pytest
import torch
from tolerances import assert_near
from torch import nn

from ecomoe import experts as experts_module
from ecomoe.activations import ELEMENTWISE
from ecomoe.dispatch import Plan, plan_dispatch
from ecomoe.experts import ExpertLinear, FFNExperts
from ecomoe.feed_forward import composed, feed_forward

# (S, D, H, F, slots of each expert): pieces of their own size, windows, several pieces an expert.
SIZES = [
    (7, 4, 3, 5, [3, 0, 4]),
    (0, 4, 3, 4, [0, 0]),
    (90, 4, 3, 4, [40, 17, 33]),
    (2600, 3, 4, 2, [0, 2500, 100]),
]
NAMES = ("x", "up", "up bias", "down", "down bias")


def operands(size, *, gated=False, bias=True, dtype=torch.float64):
    num_slots, d_model, d_hidden, d_output, counts = size
    num_experts, width = len(counts), (1 + gated) * d_hidden
    shapes = [(num_slots, d_model), (num_experts, width, d_model), (num_experts, width)]
    shapes += [(num_experts, d_output, d_hidden), (num_experts, d_output)]
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    for place, name in ((2, "up"), (4, "down")):
        if bias not in (True, name):
            tensors[place] = None
    return tensors, torch.tensor(counts).cumsum(0).to(torch.int32)


class TestAgainstSingleOperators:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("bias", [False, True, "up", "down"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_values_and_gradients(self, size, gated, bias, dtype):
        inputs, ends_E = operands(size, gated=gated, bias=bias, dtype=dtype)
        wide = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
        y_SF, _ = feed_forward(*inputs, ends_E, "silu", True)
        expected = composed(*wide, ends_E, "silu")
        assert y_SF.dtype == dtype
        assert_near(y_SF, expected, dtype)
        slope = torch.randn_like(expected).to(dtype)
        y_SF.backward(slope)
        expected.backward(slope.double())
        for name, tensor, reference in zip(NAMES, inputs, wide, strict=True):
            if tensor is not None:
                assert tensor.grad.dtype == dtype
                assert_near(tensor.grad, reference.grad, dtype, name=name)

    @pytest.mark.parametrize("activation", sorted(ELEMENTWISE))
    @pytest.mark.parametrize("gated", [False, True])
    def test_activations_to_the_second_derivative(self, activation, gated):
        inputs, ends_E = operands(SIZES[0], gated=gated)

        def function(*tensors):
            return feed_forward(*tensors, ends_E, activation, True)[0]

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)

    def test_without_a_backward_pass_nothing_is_kept(self):
        inputs, ends_E = operands(SIZES[3])
        y_SF, pre_SG = feed_forward(*inputs, ends_E, "gelu", True)
        assert pre_SG.shape == (2600, 4)
        with torch.no_grad():
            alone_SF, none_SG = feed_forward(*inputs, ends_E, "gelu", False)
        assert torch.equal(alone_SF, y_SF)
        assert none_SG.shape == (0, 4)

    @pytest.mark.parametrize("gated", [False, True])
    def test_what_the_compiler_is_told(self, gated):
        inputs, ends_E = operands(SIZES[2], gated=gated, dtype=torch.float32)
        inputs = [t.detach() for t in inputs]
        for keep in (False, True):
            torch.library.opcheck(
                torch.ops.ecomoe.feed_forward.default,
                (*inputs, ends_E, "gelu", keep),
                test_utils=("test_schema", "test_faketensor"),
            )
        x_SD, up_EGD, _, down_EFH, _ = inputs
        y_SF, pre_SG = feed_forward(*inputs, ends_E, "gelu", True)
        for has_biases in (False, True):
            arguments = (y_SF, x_SD, pre_SG, up_EGD, down_EFH, ends_E, "gelu", has_biases)
            torch.library.opcheck(
                torch.ops.ecomoe.feed_forward_backward.default,
                arguments,
                test_utils=("test_schema", "test_faketensor"),
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_slot_stays_with_its_expert(dtype):
    inputs, ends_E = operands((140, 4, 3, 4, [40, 60, 40]), dtype=dtype)
    with torch.no_grad():
        inputs[0][45] = torch.nan
    y_SF, _ = feed_forward(*inputs, ends_E, "gelu", True)
    broken = y_SF.isnan().any(1).nonzero().flatten()
    assert broken.tolist() == [45]
    y_SF.nansum().backward()
    for name, tensor in zip(NAMES[1:], inputs[1:], strict=True):
        finite = tensor.grad.flatten(1).isfinite().all(1)
        assert finite[[0, 2]].all(), name
        assert finite[1] == (name == "down bias"), name


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_change_nothing_but_rounding(num_threads):
    inputs, ends_E = operands((4000, 8, 16, 8, [100, 1900, 700, 0, 1300]), dtype=torch.float64)
    before = torch.get_num_threads()
    results = []
    for number in (1, num_threads):
        torch.set_num_threads(number)
        try:
            y_SF, _ = feed_forward(*inputs, ends_E, "gelu", True)
            results.append([y_SF, *torch.autograd.grad(y_SF.square().sum(), inputs)])
        finally:
            torch.set_num_threads(before)
    for one, several in zip(*results, strict=True):
        assert_near(several, one, torch.float64)


class TestWhenItIsTaken:
    """`FFNExperts` takes the operator only where nobody could tell."""

    @pytest.fixture
    def taken(self, monkeypatch):
        calls = []

        def count(*arguments):
            calls.append(arguments)
            return feed_forward(*arguments)

        monkeypatch.setattr(experts_module, "feed_forward", count)
        return calls

    @staticmethod
    def run(experts, dtype=torch.float32):
        ids_NK = torch.tensor([[0, 1], [1, 2], [2, 0]])
        plan: Plan = plan_dispatch(ids_NK, num_experts=3)
        return experts(torch.randn(6, 4, dtype=dtype), plan)

    @pytest.mark.parametrize("activation", ["gelu", nn.GELU(), nn.SiLU(), nn.ReLU(inplace=True)])
    def test_taken(self, taken, activation):
        self.run(FFNExperts(4, 3, num_experts=3, activation=activation))
        self.run(FFNExperts(4, 3, num_experts=3, activation=activation, dropout=0.5).eval())
        assert len(taken) == 2

    def test_modules_of_transformers(self, taken):
        activations = pytest.importorskip("transformers.activations")
        for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu", "quick_gelu"):
            self.run(FFNExperts(4, 3, num_experts=3, activation=activations.ACT2FN[name]))
        assert len(taken) == 6

    @pytest.mark.parametrize("activation", ["identity", nn.Tanh(), nn.ReLU6(), nn.PReLU()])
    def test_not_for_other_activations(self, taken, activation):
        self.run(FFNExperts(4, 3, num_experts=3, activation=activation))
        assert not taken

    def test_not_with_dropout_or_a_norm(self, taken):
        self.run(FFNExperts(4, 3, num_experts=3, dropout=0.5))
        self.run(FFNExperts(4, 3, num_experts=3, norm=nn.LayerNorm(3)))
        assert not taken

    @pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward"])
    def test_not_past_a_hook(self, taken, hook):
        for name in ("up_proj", "down_proj", "activation"):
            experts = FFNExperts(4, 3, num_experts=3, activation=nn.GELU())
            module = getattr(experts, name)
            handle = getattr(module, f"register_{hook}_hook")(lambda *_: None)
            self.run(experts)
            assert not taken, name
            handle.remove()
            self.run(experts)
            assert len(taken) == 1
            taken.clear()

    @pytest.mark.parametrize("name", ["up_proj", "down_proj", "activation"])
    def test_not_past_a_wrapped_forward(self, taken, name):
        experts = FFNExperts(4, 3, num_experts=3, activation=nn.GELU())
        module = getattr(experts, name)
        module.forward = module.forward
        self.run(experts)
        assert not taken

    def test_not_past_a_hook_on_every_module(self, taken):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
        try:
            experts = FFNExperts(4, 3, num_experts=3)
            self.run(experts)
        finally:
            handle.remove()
        assert not taken
        assert seen == [experts.up_proj, experts.down_proj, experts]

    @pytest.mark.parametrize("to", ["cpu", "disk"])
    def test_offloaded_weights(self, to, tmp_path):
        accelerate = pytest.importorskip("accelerate")
        experts = FFNExperts(4, 3, num_experts=3)
        torch.manual_seed(0)
        expected = self.run(experts)
        here = torch.device("cpu")
        if to == "cpu":
            accelerate.cpu_offload(experts, execution_device=here)
        else:
            accelerate.disk_offload(experts, tmp_path, execution_device=here)
        torch.manual_seed(0)
        assert torch.equal(self.run(experts), expected)

    def test_weights_elsewhere_are_an_error(self):
        experts = FFNExperts(4, 3, num_experts=3, device="meta")
        with pytest.raises(ValueError, match=r"tokens on cpu must be .* on meta"):
            self.run(experts)

    def test_not_past_another_projection_or_activation(self, taken):
        class Loud(ExpertLinear):
            def forward(self, x_SD, ends_E):
                return 2 * super().forward(x_SD, ends_E)

        experts = FFNExperts(4, 3, num_experts=3)
        experts.up_proj = Loud(3, 4, 3)
        self.run(experts)
        experts = FFNExperts(4, 3, num_experts=3)
        experts.activation = torch.tanh
        self.run(experts)
        assert not taken

    def test_a_parametrisation_takes_part(self, taken):
        class Double(nn.Module):
            def forward(self, weight):
                return 2 * weight

        experts = FFNExperts(4, 3, num_experts=3, bias=False, activation="relu")
        torch.manual_seed(0)
        plain = self.run(experts)
        nn.utils.parametrize.register_parametrization(experts.up_proj, "weight", Double())
        torch.manual_seed(0)
        torch.testing.assert_close(self.run(experts), 2 * plain)
