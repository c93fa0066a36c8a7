import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ecomoe.routers import ROUTERS, Affine, LinearRouter, MLPRouter, Router
from ecomoe.routing import Routing

T1 = torch.tensor(1.0)
NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture(params=sorted(ROUTERS))
def router(request):
    return ROUTERS[request.param](6, num_experts=5, top_k=2)


class TestDecision:
    def test_the_mlp_is_the_papers(self):
        router = MLPRouter(6, num_experts=5, top_k=2)
        assert router.hidden.weight.shape == (128, 6)
        assert router.score.weight.shape == (5, 128)
        x_ND = torch.randn(7, 6)
        hidden = torch.relu(x_ND @ router.hidden.weight.T + router.hidden.bias)
        expected = hidden @ router.score.weight.T + router.score.bias
        torch.testing.assert_close(router(x_ND, T1).logits_NE, expected)

    def test_the_linear_one_is_affine(self):
        router = LinearRouter(6, num_experts=5, top_k=2)
        x_ND = torch.randn(7, 6)
        expected = x_ND @ router.score.weight.T + router.score.bias
        torch.testing.assert_close(router(x_ND, T1).logits_NE, expected)

    def test_a_hook_sees_all_of_it(self, router):
        seen = []
        handle = router.register_forward_hook(lambda *hooked: seen.append(hooked[-1]))
        routing = router(torch.randn(7, 6), torch.tensor(2.0))
        handle.remove()
        assert isinstance(routing, Routing)
        assert seen == [routing]
        torch.testing.assert_close(routing.probs_NE, torch.softmax(routing.logits_NE / 2, -1))

    def test_every_parameter_gets_a_gradient(self, router):
        routing = router(torch.randn(7, 6), T1)
        (routing.weights_NK * torch.randn(7, 2)).sum().backward()
        for name, parameter in router.named_parameters():
            assert parameter.grad.any(), name

    def test_a_subclass_must_say_how_it_scores(self):
        with pytest.raises(NotImplementedError, match="Router must define logits"):
            Router(num_experts=2, top_k=1)(torch.randn(1, 2), T1)

    @given(st.integers(0, 999), st.randoms(use_true_random=False))
    def test_relabelling_experts_relabels_the_decision(self, seed, random):
        torch.manual_seed(seed)
        router = LinearRouter(3, num_experts=5, top_k=3, dtype=torch.float64)
        other = copy.deepcopy(router)
        order = torch.tensor(random.sample(range(5), 5))
        with torch.no_grad():
            other.score.weight.copy_(router.score.weight[order])
            other.score.bias.copy_(router.score.bias[order])
        x_ND = torch.randn(4, 3, dtype=torch.float64)
        first, second = router(x_ND, T1), other(x_ND, T1)
        assert torch.equal(order[second.expert_ids_NK], first.expert_ids_NK)
        torch.testing.assert_close(second.weights_NK, first.weights_NK)


class TestPrecision:
    @pytest.mark.parametrize("dtype", NARROW)
    def test_scores_of_narrow_tokens_are_computed_in_fp32(self, router, dtype):
        x_ND = torch.randn(7, 6).to(dtype)
        routing = router(x_ND, T1)
        exact = copy.deepcopy(router).double()(x_ND.double(), T1.double())
        assert routing.logits_NE.dtype == routing.weights_NK.dtype == torch.float32
        torch.testing.assert_close(
            routing.logits_NE.double(), exact.logits_NE, rtol=1e-6, atol=1e-6
        )

    def test_autocast_changes_nothing(self, router):
        x_ND = torch.randn(7, 6)
        expected = router(x_ND, T1)
        with torch.autocast("cpu", torch.bfloat16):
            routing = router(x_ND, T1)
        for tensor, reference in zip(routing, expected, strict=True):
            assert torch.equal(tensor, reference)

    @pytest.mark.parametrize("narrow", [nn.Module.half, nn.Module.bfloat16])
    def test_casts_to_narrower_types_spare_the_values(self, router, narrow):
        before = {name: value.clone() for name, value in router.state_dict().items()}
        narrow(router)
        router.to(torch.bfloat16)
        nn.Sequential(router).half()
        for name, value in router.state_dict().items():
            assert torch.equal(value, before[name]), name
            assert value.dtype == torch.float32

    def test_casts_to_wider_types_and_back(self, router):
        router.double()
        assert {p.dtype for p in router.parameters()} == {torch.float64}
        assert router(torch.randn(3, 6, dtype=torch.float64), T1).logits_NE.dtype == torch.float64
        router.float()
        assert {p.dtype for p in router.parameters()} == {torch.float32}

    def test_a_cast_and_a_move_at_once(self, router):
        router.to(device="meta", dtype=torch.bfloat16)
        for parameter in router.parameters():
            assert parameter.device.type == "meta"
            assert parameter.dtype == torch.float32


class TestAffine:
    def test_no_tool_that_looks_for_linear_layers_finds_it(self, router):
        assert not any(isinstance(module, nn.Linear) for module in router.modules())

    def test_draws_as_a_linear_layer_does(self):
        torch.manual_seed(3)
        affine = Affine(400, 300)
        affine.reset_parameters()
        linear = nn.Linear(400, 300)
        for mine, theirs in zip(affine.parameters(), linear.parameters(), strict=True):
            assert mine.abs().max() <= 1 / 20
            torch.testing.assert_close(mine.std(), theirs.std(), rtol=0.1, atol=0)
