import pickle

import pytest
import torch
from reference import ACTIVATIONS as FORMULAS
from tolerances import assert_near
from torch import nn
from torch.nn import functional as F

from ecomoe import EcoMoE
from ecomoe.dispatch import plan_dispatch, scatter_to_experts, unsort_slots
from ecomoe.experts import (
    ACTIVATIONS,
    ExpertLinear,
    Experts,
    FFNExperts,
    HeadExperts,
    tier_of_experts,
)


def run(experts, x_ND, ids_NK):
    """Send tokens to the experts named, and bring their outputs back, ``(N, K, F)``."""
    plan = plan_dispatch(ids_NK, num_experts=experts.num_experts)
    x_SD = scatter_to_experts(x_ND, plan, top_k=ids_NK.shape[1])
    return unsort_slots(experts(x_SD, plan), plan, top_k=ids_NK.shape[1])


class TestActivations:
    @pytest.mark.parametrize("name", sorted(ACTIVATIONS))
    def test_formula_and_gradient(self, name):
        x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(ACTIVATIONS[name](x), FORMULAS[name](x))
        (gradient,) = torch.autograd.grad(ACTIVATIONS[name](x).sum(), x)
        (expected,) = torch.autograd.grad(FORMULAS[name](x).sum(), x)
        torch.testing.assert_close(gradient, expected)

    @pytest.mark.parametrize("name", sorted(ACTIVATIONS))
    def test_experts_with_it_can_be_pickled(self, name):
        experts = FFNExperts(4, 3, num_experts=2, activation=name)
        copy = pickle.loads(pickle.dumps(experts))
        x_ND, ids_NK = torch.randn(5, 4), torch.tensor([[0], [1], [1], [0], [1]])
        assert torch.equal(run(copy, x_ND, ids_NK), run(experts, x_ND, ids_NK))


class TestStart:
    @pytest.mark.parametrize("spread", [0.0, 0.1, 0.6, 1.0])
    def test_experts_share_what_they_do_not_have_of_their_own(self, spread):
        torch.manual_seed(0)
        linear = ExpertLinear(8, 400, 50, spread=spread)
        weight_EP = linear.weight.detach().flatten(1)
        torch.testing.assert_close(
            weight_EP.std() * 400**0.5, torch.tensor(3**-0.5), rtol=0.02, atol=0
        )
        cosines_EE = F.normalize(weight_EP) @ F.normalize(weight_EP).T
        others = cosines_EE[~torch.eye(8, dtype=torch.bool)]
        torch.testing.assert_close(
            others, torch.full_like(others, 1 - spread**2), rtol=0, atol=0.03
        )
        assert (len(linear.bias.detach().unique(dim=0)) == 1) == (spread == 0)

    def test_the_layer_starts_its_experts_nearly_alike(self):
        x_MD = torch.randn(64, 12)
        for keywords in ({"d_hidden": 24}, {"d_hidden": None, "num_classes": 12}):
            spreads = {}
            for name, given in (("default", {}), ("apart", {"spread": 1.0})):
                layer = EcoMoE(12, tiers=(4, 2, 2), **keywords, **given)
                y_MEF = layer.experts.all_outputs(x_MD)
                spreads[name] = (y_MEF - y_MEF.mean(1, keepdim=True)).std() / y_MEF.std()
            assert 0 < spreads["default"] < 0.05 < 0.25 < spreads["apart"]


class TestShapes:
    @pytest.mark.parametrize("bias", [False, True])
    def test_plain(self, bias):
        experts = FFNExperts(4, 3, num_experts=2, d_output=5, bias=bias)
        shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
        weights = {"up_proj.weight": (2, 3, 4), "down_proj.weight": (2, 5, 3)}
        biases = {"up_proj.bias": (2, 3), "down_proj.bias": (2, 5)}
        assert shapes == weights | (biases if bias else {})
        assert experts.d_output == 5

    def test_gated_weights_follow_the_layout_of_transformers(self):
        experts = FFNExperts(4, 3, num_experts=2, gated=True, activation="silu", bias=False)
        shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
        assert shapes == {"gate_up_proj.weight": (2, 6, 4), "down_proj.weight": (2, 4, 3)}
        x_ND = torch.randn(1, 4)
        gate, up = (experts.gate_up_proj.weight[1] @ x_ND[0]).chunk(2)
        expected = experts.down_proj.weight[1] @ (F.silu(gate) * up)
        torch.testing.assert_close(run(experts, x_ND, torch.tensor([[1]]))[0, 0], expected)

    def test_heads(self):
        experts = HeadExperts(4, 7, num_experts=2)
        assert experts.d_output == 7
        x_ND = torch.randn(1, 4)
        expected = experts.head.weight[1] @ x_ND[0] + experts.head.bias[1]
        torch.testing.assert_close(run(experts, x_ND, torch.tensor([[1]]))[0, 0], expected)

    def test_every_expert_draws_for_itself_within_the_bound_of_a_linear_layer(self):
        linear = ExpertLinear(3, 100, 50)
        assert linear.weight.abs().max() <= 0.1
        torch.testing.assert_close(
            linear.weight.std((1, 2)), torch.full((3,), 0.1 / 3**0.5), rtol=0.05, atol=0
        )
        assert not torch.equal(linear.weight[0], linear.weight[1])

    def test_tiers_number_through(self):
        assert tier_of_experts((3, 1, 2)) == [0, 0, 0, 1, 2, 2]

    def test_a_subclass_must_say_what_it_computes(self):
        with pytest.raises(NotImplementedError, match="Experts must define forward"):
            Experts()(None, None)


class TestAllOutputs:
    @pytest.mark.parametrize("kind", ["plain", "gated", "heads"])
    @pytest.mark.parametrize("num_tokens", [0, 1, 6])
    def test_each_expert_on_each_token(self, kind, num_tokens):
        if kind == "heads":
            experts = HeadExperts(4, 7, num_experts=3)
        else:
            experts = FFNExperts(4, 5, num_experts=3, gated=kind == "gated")
        x_MD = torch.randn(num_tokens, 4)
        outputs_MEF = experts.all_outputs(x_MD)
        assert outputs_MEF.shape == (num_tokens, 3, experts.d_output)
        every = torch.arange(3).expand(num_tokens, 3)
        assert_near(outputs_MEF, run(experts, x_MD, every), torch.float32)


class TestAutocast:
    def test_products_are_narrow_and_gradients_as_wide_as_the_parameters(self):
        experts = FFNExperts(8, 8, num_experts=2)
        x_ND, ids_NK = torch.randn(5, 8, requires_grad=True), torch.tensor([[0, 1]] * 5)
        with torch.autocast("cpu", torch.bfloat16):
            y_NKF = run(experts, x_ND, ids_NK)
        assert y_NKF.dtype == torch.bfloat16
        assert_near(y_NKF, run(experts, x_ND, ids_NK), torch.bfloat16)
        y_NKF.sum().backward()
        assert x_ND.grad.dtype == torch.float32
        assert all(p.grad.dtype == torch.float32 for p in experts.parameters())

    def test_disabled_inside(self):
        experts = HeadExperts(8, 8, num_experts=2)
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            assert run(experts, torch.randn(1, 8), torch.tensor([[1]])).dtype == torch.float32


class TestDropout:
    @pytest.mark.parametrize("kind", ["plain", "heads"])
    def test_in_training_alone(self, kind):
        if kind == "heads":
            experts = HeadExperts(4, 7, num_experts=1, dropout=0.5, bias=False)
        else:
            experts = FFNExperts(4, 64, num_experts=1, dropout=0.5, activation="identity")
        x_ND, ids_NK = torch.randn(400, 4), torch.zeros(400, 1, dtype=torch.int64)
        quiet = run(experts.eval(), x_ND, ids_NK)
        assert torch.equal(run(experts, x_ND, ids_NK), quiet)
        experts.train()
        torch.manual_seed(1)
        once = run(experts, x_ND, ids_NK)
        assert not torch.equal(run(experts, x_ND, ids_NK), once)
        torch.manual_seed(1)
        assert torch.equal(run(experts, x_ND, ids_NK), once)
        # What is kept is scaled up, so that the mean stays.
        same = torch.stack([run(experts, x_ND, ids_NK) for _ in range(200)]).mean(0)
        assert (same - quiet).abs().mean() < 0.2 * quiet.abs().mean()


def test_a_shared_norm_and_an_activation_with_parameters_are_trained():
    activation, norm = nn.PReLU(), nn.LayerNorm(5)
    experts = FFNExperts(4, 5, num_experts=2, activation=activation, norm=norm)
    assert {"activation.weight", "norm.weight", "norm.bias"} <= dict(
        experts.named_parameters()
    ).keys()
    run(experts, torch.randn(6, 4), torch.tensor([[0, 1]] * 6)).square().sum().backward()
    assert activation.weight.grad.any()
    assert norm.weight.grad.any()


def test_autocast_leaves_fp64_alone_as_it_does_in_linear_maps():
    experts = FFNExperts(4, 3, num_experts=2, dtype=torch.float64)
    x_ND, ids_NK = torch.randn(5, 4, dtype=torch.float64), torch.tensor([[0], [1], [1], [0], [1]])
    want = run(experts, x_ND, ids_NK)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x_ND, x_ND).dtype == torch.float64
        assert torch.equal(run(experts, x_ND, ids_NK), want)
