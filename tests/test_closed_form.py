"""What is computed in closed form is what automatic differentiation says."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ecomoe import EcoMoE, closed_form
from ecomoe.closed_form import (
    MOST_UNITS,
    balance,
    linear_twice,
    mean_powers,
    routing_means,
)
from ecomoe.routers import LinearRouter, Router


def logits():
    return (3 * torch.randn(7, 5, dtype=torch.float64)).requires_grad_()


def entropy(logits_NE, temperature):
    return torch.special.entr(torch.softmax(logits_NE / temperature, -1)).sum(-1).mean()


UNIT_E = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2], dtype=torch.float64)


def others(logits_NE):
    return 1 - F.one_hot(logits_NE.argmax(-1), 5)


def powers(logits_NE, order):
    return (torch.softmax(logits_NE, -1) / UNIT_E * others(logits_NE)).pow(order).mean(0)


def means(logits_NE, temperature):
    importance_E, _, mean = routing_means(logits_NE, logits_NE.argmax(-1), temperature)
    return importance_E, mean


CASES = {
    "powers": (
        lambda z: torch.stack(mean_powers(z, UNIT_E, z.argmax(-1))),
        lambda z: torch.stack([powers(z, order) for order in (1, 8)]),
    ),
    "probabilities": (lambda z: means(z, 0.7)[0], lambda z: torch.softmax(z, -1).mean(0)),
    "entropy": (lambda z: means(z, 0.7)[1], lambda z: entropy(z, 0.7)),
    "entropy at a tensor": (
        lambda z: means(z, torch.tensor(0.7))[1],
        lambda z: entropy(z, torch.tensor(0.7)),
    ),
    "probabilities and entropy": (
        lambda z: torch.hstack(means(z, 1.7)),
        lambda z: torch.hstack((torch.softmax(z, -1).mean(0), entropy(z, 1.7))),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_two_derivatives(case):
    function, reference = CASES[case]
    logits_NE = logits()
    torch.testing.assert_close(function(logits_NE), reference(logits_NE))
    assert torch.autograd.gradcheck(function, logits_NE)
    assert torch.autograd.gradgradcheck(function, logits_NE)


@pytest.mark.parametrize("rows", [3, 7])
def test_mean_of_others(rows, monkeypatch):
    logits_NE = logits()
    monkeypatch.setattr(closed_form, "CACHED", rows * logits_NE.shape[1])
    _, mean_E, _ = routing_means(logits_NE, logits_NE.argmax(-1), 1.0)
    expected_E = (torch.softmax(logits_NE, -1) * others(logits_NE)).mean(0)
    torch.testing.assert_close(mean_E, expected_E.detach())
    assert not mean_E.requires_grad


def test_balance_has_two_derivatives_by_the_importance():
    importance_E = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, requires_grad=True)
    top1_E, topk_E = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.0, 0.5, 0.25, 0.25]]).double()

    (slope_E,) = torch.autograd.grad(
        balance(importance_E, top1_E, topk_E), importance_E, create_graph=True
    )
    (curvature_E,) = torch.autograd.grad(slope_E.sum(), importance_E)
    expected_E = (importance_E * 4).log() + 1 + 4 * (top1_E + topk_E)
    torch.testing.assert_close(slope_E, expected_E)
    torch.testing.assert_close(curvature_E, 1 / importance_E)


def test_far_above_the_unit_powers_end_and_gradients_do_not():
    logits_NE = logits()
    first_N = logits_NE.argmax(-1)
    unit_E = UNIT_E.clone()
    unit_E[0] = 1e-9
    _, eighth_E = mean_powers(logits_NE, unit_E, first_N)
    choosing_others = (first_N != 0).double().mean()
    torch.testing.assert_close(eighth_E[0], choosing_others * MOST_UNITS**8)
    (gradient,) = torch.autograd.grad(eighth_E[0].log(), logits_NE)
    pull_N = 8 * (1 - torch.softmax(logits_NE, -1)[:, 0]) * (first_N != 0) / (first_N != 0).sum()
    torch.testing.assert_close(gradient[:, 0], pull_N.detach())


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_some_rows_at_a_time(case, rows, monkeypatch):
    function, reference = CASES[case]
    logits_NE = logits()
    monkeypatch.setattr(closed_form, "CACHED", rows * logits_NE.shape[1])
    torch.testing.assert_close(function(logits_NE), reference(logits_NE))
    gradients = [torch.autograd.grad(f(logits_NE).square().sum(), logits_NE) for f in CASES[case]]
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradgradcheck(function, logits_NE)


@pytest.mark.parametrize("case", CASES)
def test_no_more_rows_at_a_time_than_stay_in_the_cache(case, monkeypatch):
    rows_seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default):
                rows_seen.add(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    function, _ = CASES[case]
    logits_NE = logits()
    monkeypatch.setattr(closed_form, "CACHED", 3 * logits_NE.shape[1])
    with Watch():
        mean = function(logits_NE)
        assert rows_seen == {3, 1}
        rows_seen.clear()
        mean.sum().backward()
    assert rows_seen == {3, 1}


def test_all_means_keep_one_matrix():
    kept = set()

    def pack(tensor):
        if tensor.numel() > 1:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    logits_NE = logits()
    own_NE = logits_NE.detach().clone().requires_grad_()
    first_N = logits_NE.argmax(-1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        routing_means(logits_NE, first_N, torch.tensor(2.0))
        mean_powers(own_NE, torch.tensor(0.2), first_N, values_NE=logits_NE)
    assert kept == {tensor.untyped_storage().data_ptr() for tensor in (logits_NE, first_N)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [4, 6])
def test_the_second_scores_reach_the_weights_alone(dtype, rows, monkeypatch):
    monkeypatch.setattr(closed_form, "CACHED", rows * 4)
    x_ND = torch.randn(6, 4).to(dtype).requires_grad_()
    weight_ED, bias_E = torch.randn(3, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    slope_NE, own_slope_NE = torch.randn(2, 6, 3)
    found = torch.autograd.grad(
        linear_twice(x_ND, weight_ED, bias_E), (x_ND, weight_ED, bias_E), (slope_NE, own_slope_NE)
    )
    wide_ND = x_ND.float()
    expected = torch.autograd.grad(
        (F.linear(wide_ND, weight_ED, bias_E), F.linear(wide_ND.detach(), weight_ED, bias_E)),
        (x_ND, weight_ED, bias_E),
        (slope_NE, own_slope_NE),
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("rows", [2, 6])
def test_scores_that_nobody_uses_have_no_gradient(which, rows, monkeypatch):
    monkeypatch.setattr(closed_form, "CACHED", rows * 4)
    x_ND = torch.randn(6, 4).bfloat16().requires_grad_()
    weight_ED, bias_E = torch.randn(3, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    scores_NE = linear_twice(x_ND, weight_ED, bias_E)[which]
    plain_NE = F.linear(x_ND.float(), weight_ED, bias_E)
    torch.testing.assert_close(scores_NE, plain_NE)
    slope_NE = torch.randn(6, 3)
    found = torch.autograd.grad(scores_NE, (x_ND, weight_ED, bias_E), slope_NE)
    expected = torch.autograd.grad(plain_NE, (x_ND, weight_ED, bias_E), slope_NE)
    torch.testing.assert_close(found[0], expected[0] * (1 - which))
    torch.testing.assert_close(found[1:], expected[1:])


def test_the_linear_router_scores_once_what_other_routers_score_twice():
    router = LinearRouter(4, num_experts=3, top_k=1)
    x_ND = torch.randn(5, 4, requires_grad=True)
    for ours, plain in zip(
        router.logits_apart(x_ND), Router.logits_apart(router, x_ND), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)
        for parameter in router.parameters():
            one, other = (
                torch.autograd.grad(s.square().sum(), parameter, retain_graph=True)[0]
                for s in (ours, plain)
            )
            torch.testing.assert_close(one, other)


def test_a_subclass_with_scores_of_its_own_is_asked_for_them():
    class Shifted(LinearRouter):
        def logits(self, x_ND):
            return super().logits(x_ND) + 1.0

    torch.manual_seed(0)
    router = Shifted(4, num_experts=3, top_k=1)
    x_ND = torch.randn(5, 4)
    for scores_NE in router.logits_apart(x_ND):
        torch.testing.assert_close(scores_NE, router.logits(x_ND))


def test_in_bf16_the_router_keeps_no_wide_copy_of_the_tokens():
    layer = EcoMoE(8, 16, tiers=(4,), dtype=torch.bfloat16)
    kept = []
    x_ND = torch.randn(32, 8).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda none: none):
        layer(x_ND)
    assert not [t for t in kept if t.dtype == torch.float32 and t.shape == (32, 8)]
