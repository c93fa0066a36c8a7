import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import ecomoe
from ecomoe import EcoMoE
from ecomoe.routers import (
    ROUTERS,
    Affine,
    CosineRouter,
    HashRouter,
    LinearRouter,
    MLPRouter,
    RandomRouter,
    Router,
    build_router,
)
from ecomoe.routing import FIXED_MARGIN, Routing, route
from ecomoe.token_ids import hash_scores, scramble

T1 = torch.tensor(1.0)
NARROW = [torch.bfloat16, torch.float16]
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2])


@pytest.fixture(params=sorted(ROUTERS))
def router(request):
    router = build_router(request.param, 6, num_experts=5, top_k=2)
    if isinstance(router, HashRouter):
        router.tokens.ids = IDS
    return router


def floating(module):
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]


def one_expert(layer, x_D, expert):
    up, down = layer.experts.up_proj, layer.experts.down_proj
    hidden = F.gelu(up.weight[expert] @ x_D + up.bias[expert])
    return down.weight[expert] @ hidden + down.bias[expert]


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

    @pytest.mark.parametrize("changed", ["all", "logits", "probs"])
    def test_what_a_hook_may_change(self, changed):
        """Scores that belong together have one gradient, compiled or not; others have two.

        Nothing checks it: that would take another softmax of all scores.
        """

        def hook(router, args, routing):
            other = route(2.0 * routing.logits_NE, top_k=2, temperature=args[1])
            if changed == "all":
                return other
            if changed == "logits":
                return routing._replace(logits_NE=other.logits_NE)
            return routing._replace(probs_NE=other.probs_NE)

        layer = EcoMoE(6, 8, tiers=(5,), router="linear", strength=1.0, dtype=torch.float64)
        layer.set_progress(1.0)
        layer.router.register_forward_hook(hook)
        x_ND = torch.randn(7, 6, dtype=torch.float64)
        gradients = []
        torch.compiler.reset()
        for forward in (layer, torch.compile(layer, fullgraph=True, backend="eager")):
            forward(x_ND)
            loss = ecomoe.aux_loss(layer)
            gradients.append(torch.autograd.grad(loss, layer.router.score.weight)[0])
        assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12) == (changed == "all")

    @pytest.mark.parametrize("changed", ["expert_ids_NK", "weights_NK"])
    def test_ids_and_gates_alone_decide_what_a_layer_computes(self, changed):
        layer = EcoMoE(6, 8, tiers=(5,), router="linear", spread=1.0).eval()
        x_ND = torch.randn(7, 6)
        plain = layer.router(x_ND, layer.temperature)
        value = getattr(plain, changed).flip(-1)
        layer.router.register_forward_hook(lambda *args: args[2]._replace(**{changed: value}))
        y_ND = layer(x_ND)
        ids_NK, weights_NK = plain._replace(**{changed: value})[2:4]
        alone_NKF = torch.stack(
            [
                torch.stack([one_expert(layer, x_D, e) for e in ids_K])
                for x_D, ids_K in zip(x_ND, ids_NK, strict=True)
            ]
        )
        torch.testing.assert_close(y_ND, (weights_NK.unsqueeze(-1) * alone_NKF).sum(1))

    def test_every_parameter_gets_a_gradient(self, router):
        routing = router(torch.randn(7, 6), T1)
        assert routing.weights_NK.requires_grad == bool(list(router.parameters()))
        if routing.weights_NK.requires_grad:
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


class TestFixed:
    def test_random_learns_nothing_and_is_saved(self):
        router = RandomRouter(6, num_experts=5, top_k=2)
        router.requires_grad_(True)
        assert not list(router.parameters())
        assert router.state_dict().keys() == {"projection", "centroids", "log_scale"}
        x_ND = torch.randn(7, 6, requires_grad=True)
        router(x_ND, T1).weights_NK[:, 0].sum().backward()
        assert x_ND.grad.any()

    def test_random_starts_as_cosine_does(self):
        routings = []
        for kind in (CosineRouter, RandomRouter):
            torch.manual_seed(0)
            routings.append(kind(6, num_experts=5, top_k=2)(torch.ones(1, 6), T1))
        assert torch.equal(routings[0].logits_NE, routings[1].logits_NE)

    def test_a_token_id_always_has_the_same_experts(self):
        router = HashRouter(6, num_experts=50, top_k=3)
        router.tokens.ids = IDS
        first = router(torch.randn(7, 6), T1).expert_ids_NK
        assert torch.equal(first[1], first[3])  # both are id 1
        assert len({tuple(row) for row in first.tolist()}) == 6
        router.tokens.ids = IDS.flip(0).view(1, 7)
        assert torch.equal(router(torch.randn(7, 6), 0.1 * T1).expert_ids_NK, first.flip(0))

    def test_its_decision_is_final_and_its_gates_are_equal(self):
        router = HashRouter(6, num_experts=5, top_k=2)
        router.tokens.ids = IDS
        for temperature in (0.3, 5.0):
            routing = router(torch.randn(7, 6), torch.tensor(temperature))
            assert (routing.weights_NK == 0.5).all()
            chosen_NK = routing.logits_NE.gather(-1, routing.expert_ids_NK)
            assert not chosen_NK.any()
            assert (routing.logits_NE == 0).sum() == 14
            assert routing.logits_NE.min() == -FIXED_MARGIN
            probs_NK = routing.probs_NE.gather(-1, routing.expert_ids_NK)
            torch.testing.assert_close(probs_NK, routing.weights_NK)

    def test_its_losses_are_constants(self):
        layer = EcoMoE(
            6, 5, tiers=(3, 2), router="hash", oracle=lambda x_ND: torch.full((7, 5), 0.2),
            oracle_weight=0.1, z_weight=0.1,
        )  # fmt: skip
        layer.router.tokens.ids = IDS
        y = layer(torch.randn(7, 6))
        loss = ecomoe.aux_loss(layer)
        assert loss.isfinite()
        assert not loss.requires_grad
        (y.sum() + loss).backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())

    def test_the_warm_up_draws_at_random(self):
        layer = EcoMoE(6, 5, tiers=(50,), router="hash", warmup_fraction=0.5)
        layer.router.tokens.ids = IDS
        seen = []
        layer.router.register_forward_hook(lambda *hooked: seen.append(hooked[-1].expert_ids_NK))
        for progress in (0.0, 0.0, 0.6, 0.6):
            layer.set_progress(progress)
            layer(torch.randn(7, 6))
        assert not torch.equal(seen[0], seen[1])
        assert torch.equal(seen[2], seen[3])

    def test_ids_are_spread_evenly_and_seeds_differ(self):
        ids_N = torch.arange(50_000)
        seeds = torch.tensor([[0], [12345]])
        firsts = [hash_scores(ids_N, num_experts=16, seed=seed).argmax(-1) for seed in seeds]
        expected, deviation = 50_000 / 16, (50_000 / 16) ** 0.5
        for first_N in firsts:
            counts_E = torch.bincount(first_N, minlength=16)
            assert (counts_E - expected).abs().max() < 5 * deviation
        both = torch.bincount(firsts[0] * 16 + firsts[1], minlength=256)
        assert (both - 50_000 / 256).abs().max() < 5 * (50_000 / 256) ** 0.5

    def test_bits_are_mixed_one_to_one(self):
        numbers = torch.cat([torch.arange(100_000), 2**32 - 1 - torch.arange(100_000)])
        mixed = scramble(numbers)
        assert len(mixed.unique()) == len(numbers)
        assert mixed.min() >= 0
        assert mixed.max() < 2**32


class TestBuild:
    @pytest.mark.parametrize("name", sorted(ROUTERS))
    def test_an_unknown_option_is_refused(self, name):
        with pytest.raises(ValueError, match="names 'd_spcae', and router="):
            EcoMoE(6, 5, router=name, router_options={"d_spcae": 3})

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"router": "best"}, "router='best' must be one of mlp, linear, cosine"),
            ({"router": "cosine", "router_options": 3}, "router_options=3 must be a dict"),
            ({"router": "cosine", "router_options": {"d_space": 0}}, "d_space=0 must be an int"),
            ({"router": "cosine", "router_options": {"d_space": 2.0}}, "d_space=2.0 must be"),
            (
                {"router": "cosine", "router_options": {"d_space": 10**15}},
                r"d_space=10{15} must be an int from 1 to 64.* d_model=6 features.*; lower d_space",
            ),
            (
                {"router": "hash", "router_options": {"d_space": 2}},
                "takes no options; leave out router_options",
            ),
            (
                {"router": "cosine", "router_options": {"d_space": 3, "d_spcae": 4}},
                "takes 'd_space'; leave out 'd_spcae'",
            ),
        ],
    )
    def test_wrong_arguments(self, keywords, message):
        with pytest.raises(ValueError, match=message):
            EcoMoE(6, 5, **keywords)

    def test_one_dimension_more_than_the_features_is_the_last_that_counts(self):
        with pytest.raises(ValueError, match="d_space=102 must be an int from 1 to 101"):
            CosineRouter(100, num_experts=5, top_k=2, d_space=102)
        wide = CosineRouter(4, num_experts=5, top_k=2, d_space=40, dtype=torch.float64)
        enough = CosineRouter(4, num_experts=5, top_k=2, d_space=5, dtype=torch.float64)
        with torch.no_grad():
            basis_PD, square_DD = torch.linalg.qr(wide.projection)
            inside_ED = F.normalize(wide.centroids) @ basis_PD
            outside_E1 = (1 - inside_ED.square().sum(1, keepdim=True)).sqrt()
            enough.projection.copy_(F.pad(square_DD, (0, 0, 0, 1)))
            enough.centroids.copy_(torch.cat([inside_ED, outside_E1], 1))
        x_ND = torch.randn(50, 4, dtype=torch.float64)
        torch.testing.assert_close(enough.logits(x_ND), wide.logits(x_ND))

    def test_options_reach_the_router(self):
        layer = EcoMoE(6, 5, router="random", router_options={"d_space": 3})
        assert layer.router.d_space == 3
        assert "d_space=3" in repr(layer.router)


class TestPrecision:
    @pytest.mark.parametrize("dtype", NARROW)
    def test_scores_of_narrow_tokens_are_computed_in_fp32(self, router, dtype):
        x_ND = torch.randn(7, 6).to(dtype)
        routing = router(x_ND, T1)
        exact_router = copy.deepcopy(router).double()
        if isinstance(router, HashRouter):  # copies leave the ids behind
            exact_router.tokens.ids = IDS
        exact = exact_router(x_ND.double(), T1.double())
        assert routing.logits_NE.dtype == routing.weights_NK.dtype == torch.float32
        torch.testing.assert_close(
            routing.logits_NE.double(), exact.logits_NE, rtol=1e-6, atol=1e-5
        )

    def test_autocast_changes_nothing(self, router):
        x_ND = torch.randn(7, 6)
        expected = router(x_ND, T1)
        with torch.autocast("cpu", torch.bfloat16):
            routing = router(x_ND, T1)
        for tensor, reference in zip(routing[:4], expected[:4], strict=True):
            assert torch.equal(tensor, reference)

    @pytest.mark.parametrize("narrow", [nn.Module.half, nn.Module.bfloat16])
    def test_casts_to_narrower_types_spare_the_values(self, router, narrow):
        before = {name: value.clone() for name, value in router.state_dict().items()}
        narrow(router)
        router.to(torch.bfloat16)
        nn.Sequential(router).half()
        for name, value in router.state_dict().items():
            assert torch.equal(value, before[name]), name
            assert value.dtype == before[name].dtype

    def test_casts_to_wider_types_and_back(self, router):
        router.double()
        assert {t.dtype for t in floating(router)} <= {torch.float64}
        assert router(torch.randn(7, 6, dtype=torch.float64), T1).logits_NE.dtype == torch.float64
        router.float()
        assert {t.dtype for t in floating(router)} <= {torch.float32}

    def test_a_cast_and_a_move_at_once(self, router):
        router.to(device="meta", dtype=torch.bfloat16)
        for tensor in router.state_dict().values():
            assert tensor.device.type == "meta"
            assert tensor.dtype in (torch.float32, torch.int64)


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
