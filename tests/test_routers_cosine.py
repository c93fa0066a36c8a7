"""The cosine routers: similarities, their gradients and z-loss, what E does, the papers' sizes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ecomoe
from ecomoe import EcoMoE
from ecomoe.routers import CosineRouter, IsoCosineRouter, LinearRouter

T1 = torch.tensor(1.0)


class TestCosine:
    def test_is_the_scaled_cosine_to_centroids_in_the_space(self):
        router = CosineRouter(6, num_experts=5, top_k=2, d_space=3)
        x_ND = torch.randn(7, 6)
        position_NP = x_ND @ router.projection.T
        cosine_NE = torch.cosine_similarity(position_NP[:, None], router.centroids[None], dim=-1)
        logits_NE = router(x_ND, T1).logits_NE
        differences_NE = cosine_NE - cosine_NE.amax(-1, keepdim=True)
        torch.testing.assert_close(logits_NE, 10.0 * differences_NE)
        torch.testing.assert_close(logits_NE + router.offset(x_ND), 10.0 * cosine_NE)

    @pytest.mark.parametrize("seed", range(8))
    def test_the_scales_gradient_is_exact_at_a_low_temperature(self, seed):
        torch.manual_seed(seed)
        router, x_ND, slope_NE = (
            CosineRouter(6, num_experts=5, top_k=2),
            torch.randn(7, 6),
            torch.rand(7, 5),
        )
        wide = copy.deepcopy(router).double()
        low = torch.tensor(0.3, dtype=torch.float64)
        (slope_NE.double() * wide(x_ND.double(), low).probs_NE).mean().backward()
        (slope_NE * router(x_ND, low.float()).probs_NE).mean().backward()
        expected = wide.log_scale.grad
        torch.testing.assert_close(router.log_scale.grad.double(), expected, rtol=2e-6, atol=1e-9)

    def test_the_z_loss_sees_the_scores_themselves(self):
        layer = EcoMoE(6, 5, tiers=(3, 2), router="cosine", z_weight=1.0, dtype=torch.float64)
        layer.router.double()
        x_ND = torch.randn(7, 6, dtype=torch.float64)
        layer(x_ND)
        scores_NE = layer.router.log_scale.exp() * layer.router.cosines(x_ND)
        expected = scores_NE.logsumexp(-1).square().mean()
        torch.testing.assert_close(layer.auxiliary.terms["z"], expected.detach())

    def test_the_z_loss_sees_the_scores_of_the_tokens_that_a_hook_gave_the_router(self):
        layer = EcoMoE(6, 5, tiers=(3, 2), router="cosine", z_weight=1.0, dtype=torch.float64)
        layer.router.double()
        x_ND, other_ND = torch.randn(2, 7, 6, dtype=torch.float64)
        layer(other_ND)
        expected = layer.auxiliary.terms["z"]
        layer.router.register_forward_pre_hook(lambda router, args: (other_ND, *args[1:]))
        layer(x_ND)
        torch.testing.assert_close(layer.auxiliary.terms["z"], expected)

    def test_the_z_loss_sees_the_scores_where_its_weight_is_set_later(self):
        layer = EcoMoE(6, 5, tiers=(3, 2), router="cosine")
        layer.z_weight = 1.0
        x_ND = torch.randn(7, 6)
        layer(x_ND)
        scores_NE = layer.router.log_scale.exp() * layer.router.cosines(x_ND)
        expected = scores_NE.logsumexp(-1).square().mean()
        torch.testing.assert_close(layer.auxiliary.terms["z"], expected.detach())

    def test_the_z_loss_of_a_router_that_knows_no_offset(self):
        class Own(nn.Module):
            def __init__(self, router):
                super().__init__()
                self.router = router

            def forward(self, *args):
                return self.router(*args)

        layer = EcoMoE(6, 5, tiers=(3, 2), z_weight=1.0)
        x_ND = torch.randn(7, 6)
        layer(x_ND)
        expected = layer.auxiliary.terms["z"]
        layer.router = Own(layer.router)
        layer(x_ND)
        torch.testing.assert_close(layer.auxiliary.terms["z"], expected)

    def test_the_temperature_divides_the_scaled_similarity(self):
        router = CosineRouter(6, num_experts=5, top_k=5)
        x_ND = torch.randn(7, 6)
        for temperature in (0.3, 1.0, 3.0):
            routing = router(x_ND, torch.tensor(temperature))
            ranked_NK = routing.logits_NE.gather(-1, routing.expert_ids_NK)
            gates_NK = torch.softmax(ranked_NK / temperature, dim=-1)
            torch.testing.assert_close(routing.weights_NK, gates_NK)
            assert (routing.logits_NE + router.offset(x_ND)).abs().max() <= 10.0

    def test_a_tokens_length_does_not_matter(self):
        router = CosineRouter(6, num_experts=5, top_k=2)
        x_ND = torch.randn(7, 6)
        routing, longer = router(x_ND, T1), router(1000 * x_ND, T1)
        torch.testing.assert_close(longer.logits_NE, routing.logits_NE)

    def test_a_token_without_direction_has_no_preference(self):
        router = CosineRouter(6, num_experts=5, top_k=2)
        x_ND = torch.zeros(3, 6, requires_grad=True)
        routing = router(x_ND, T1)
        assert not routing.logits_NE.any()
        routing.weights_NK[:, 0].sum().backward()
        assert not x_ND.grad.any()

    def test_a_centroid_without_direction_gets_no_gradient(self):
        router = CosineRouter(6, num_experts=5, top_k=2)
        with torch.no_grad():
            router.centroids[3] = 0.0
        router(torch.randn(7, 6), T1).probs_NE.square().sum().backward()
        assert not router.centroids.grad[3].any()
        assert router.centroids.grad[[0, 1, 2, 4]].any(-1).all()

    @pytest.mark.parametrize("length", [1e-11, 1.0, 1e6])
    def test_directions_are_those_of_torch_to_the_bit(self, length):
        router = CosineRouter(6, num_experts=5, top_k=2)
        x_ND = length * torch.randn(7, 6)
        gradients = []
        for unit in (router.cosines, lambda x_ND: F.linear(
            F.normalize(router.positions(x_ND), dim=-1), F.normalize(router.centroids, dim=-1)
        )):  # fmt: skip
            tokens_ND = x_ND.clone().requires_grad_()
            cosines_NE = unit(tokens_ND)
            inputs = (tokens_ND, *router.parameters())
            slope = torch.arange(35.0).view(7, 5)
            found = torch.autograd.grad(cosines_NE, inputs, slope, allow_unused=True)
            gradients.append((cosines_NE, *found[:-1]))
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("progress", [0.0, 0.15, 1.0])
    def test_e_sets_the_gates_of_a_layer(self, progress):
        """T of the control and of its annealing acts on the scaled similarity, whatever E."""
        for target_e in (0.2, 0.545, 2.0):
            layer = EcoMoE(6, 5, tiers=(3, 2), router="cosine", target_e=target_e)
            layer.set_progress(progress)
            seen = []
            layer.router.register_forward_hook(lambda *hooked, seen=seen: seen.append(hooked[-1]))
            layer(torch.randn(9, 6))
            similarity_NK = seen[0].logits_NE.gather(-1, seen[0].expert_ids_NK)
            temperature = layer.control.temperature_at(progress)
            gates_NK = torch.softmax(similarity_NK / temperature, dim=-1)
            torch.testing.assert_close(seen[0].weights_NK, gates_NK)

    def test_a_higher_e_keeps_a_cosine_router_less_decided(self):
        """E acts by T and by the entropy loss; the learned scale cannot make up for both."""
        entropies = []
        for target_e in (0.1, 10.0):
            torch.manual_seed(0)
            layer = EcoMoE(8, 4, tiers=(8,), router="cosine", target_e=target_e, strength=1.0)
            optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
            x_ND = torch.randn(64, 8)
            for _ in range(60):
                optimizer.zero_grad()
                task = (layer(x_ND) - x_ND.roll(1, -1).sign()).square().mean()
                (task + ecomoe.aux_loss(layer)).backward()
                optimizer.step()
            routing = layer.router(x_ND, layer.temperature)
            entropies.append(torch.special.entr(routing.probs_NE).sum(-1).mean().item())
        assert entropies[1] > entropies[0] + 0.1

    @pytest.mark.parametrize(("d_model", "num_experts"), [(512, 1024), (64, 16), (4, 2), (1, 1)])
    def test_iso_has_at_most_a_linear_routers_parameters(self, d_model, num_experts):
        def count(router):
            return sum(parameter.numel() for parameter in router.parameters())

        linear = count(LinearRouter(d_model, num_experts=num_experts, top_k=1))
        iso = IsoCosineRouter(d_model, num_experts=num_experts, top_k=1)
        wider = CosineRouter(d_model, num_experts=num_experts, top_k=1, d_space=iso.d_space + 1)
        assert count(iso) <= linear or iso.d_space == 1
        assert count(wider) > linear

    def test_the_papers_sizes(self):
        """512 features, 1024 experts: linear has 5.3 times the routing parameters of 64 dims."""
        sizes = {"num_experts": 1024, "top_k": 12}
        cosine = CosineRouter(512, **sizes)
        linear = LinearRouter(512, **sizes)
        counts = [sum(p.numel() for p in r.parameters() if p.dim() == 2) for r in (linear, cosine)]
        assert counts[0] / counts[1] == pytest.approx(5.33, abs=0.01)
        assert IsoCosineRouter(512, **sizes).d_space == 341
