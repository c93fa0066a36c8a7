"""When the layer and its experts take the operator from tokens to sums, and what it gives them."""

import pytest
import torch
from tolerances import assert_near
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import ecomoe
from ecomoe import experts as experts_module
from ecomoe.dispatch import Plan, plan_dispatch
from ecomoe.experts import ExpertLinear, FFNExperts
from ecomoe.feed_forward import feed_forward


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


class TestLayer:
    """The layer goes from tokens to sums in one operator, and slot by slot where somebody looks."""

    @staticmethod
    def step(layer, x):
        layer.zero_grad()
        x = x.clone().requires_grad_()
        y = layer(x)
        (y.float().square().sum() + ecomoe.aux_loss(layer)).backward()
        return {"y": y, "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("top_k", [1, 2, 3])
    @pytest.mark.parametrize("gated", [False, True])
    def test_both_ways_agree(self, top_k, gated, dtype):
        torch.manual_seed(0)
        layer = ecomoe.EcoMoE(8, 16, tiers=(3, 2), top_k=top_k, gated=gated, spread=1.0)
        layer.to(dtype)
        # No token goes to the last expert.
        layer.router.score.bias.data[-1] = -50.0
        x = torch.randn(300, 8).to(dtype)
        together = self.step(layer, x)
        seen = []
        handle = layer.experts.register_forward_hook(lambda m, args, y: seen.append(y.shape))
        apart = self.step(layer, x)
        handle.remove()
        assert seen == [(300 * top_k, 8)]
        assert not together["experts.down_proj.weight"][-1].any()
        for name, tensor in together.items():
            assert_near(tensor, apart[name], dtype, name=name)

    def test_without_gradients(self):
        layer = ecomoe.EcoMoE(8, 16, tiers=(3, 2))
        x = torch.randn(30, 8)
        expected = layer(x)
        with torch.no_grad():
            assert_near(layer(x), expected, torch.float32)
            assert layer(x[:0]).shape == (0, 8)

    def test_tied_projections_where_second_derivatives_are_asked_for(self):
        layer = ecomoe.EcoMoE(8, 8, tiers=(4,), spread=1.0, dtype=torch.float64)
        layer.experts.down_proj.weight = layer.experts.up_proj.weight
        weight, loss = (
            layer.experts.up_proj.weight,
            layer(torch.randn(6, 8).double()).square().sum(),
        )
        (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
        (twice,) = torch.autograd.grad(loss, weight, create_graph=True)
        torch.testing.assert_close(twice, once)

    def test_what_is_kept_for_backward(self):
        layer = ecomoe.EcoMoE(32, 64, tiers=(4,))
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(4096, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        for weight in layer.parameters():
            kept.pop(weight.untyped_storage().data_ptr(), None)
        dense = 4 * 4096 * (32 + 2 * 128)  # tokens, and the hidden layer before and after gelu
        assert sum(kept.values()) < 0.9 * dense

    @pytest.mark.parametrize("num_tokens", [1, 40])
    def test_a_trace_holds_for_other_routings(self, num_tokens):
        layer = ecomoe.EcoMoE(8, 16, tiers=(3, 2), spread=1.0).eval()
        with torch.no_grad():
            graph = make_fx(layer)(torch.randn(num_tokens, 8))
            for _ in range(4):
                x = torch.randn(num_tokens, 8)
                assert_near(graph(x), layer(x), torch.float32)
