"""What is computed in closed form is what automatic differentiation says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ecomoe import EcoMoE, closed_form, losses
from ecomoe.closed_form import linear_twice, routing_losses
from ecomoe.losses import Shares, Wanted
from ecomoe.routers import LinearRouter, Router
from ecomoe.routing import Routing


def logits(num_tokens=7):
    return (3 * torch.randn(num_tokens, 5, dtype=torch.float64)).requires_grad_()


WEIGHTS = {"balance": 0.7, "starvation": 0.3, "entropy": 0.2}
NOTHING = Wanted(balance=False, entropy=False, floor=0.0, sustain=1.0)
CASES = {
    "balance": NOTHING._replace(balance=True),
    "entropy": NOTHING._replace(entropy=True),
    "starvation": NOTHING._replace(balance=True, floor=1.0, sustain=0.6),
    "all": Wanted(balance=True, entropy=True, floor=0.9, sustain=torch.tensor(0.3)),
}
T = torch.tensor(0.7)


def closed(logits_NE, own_NE, wanted, *, top_k=2, temperature=T, reduce=None):
    probs_NE = torch.softmax(logits_NE / temperature, -1)
    ids_NK = logits_NE.topk(top_k, -1).indices
    routing = Routing(logits_NE, probs_NE, ids_NK, ids_NK, own_NE)
    given = {"wanted": wanted, "weights": WEIGHTS, "reduce": reduce}
    return routing_losses(routing, temperature=temperature, **given)


def plain(logits_NE, own_NE, wanted, *, top_k=2, temperature=T, reduce=None):
    ids_NK = logits_NE.topk(top_k, -1).indices
    terms, factor = losses.routing_terms(
        logits_NE, own_NE, ids_NK, temperature=temperature, wanted=wanted, reduce=reduce
    )
    return losses.weigh(terms, WEIGHTS), terms, factor


def assert_the_same(logits_NE, wanted, *, second=True, **keywords):
    """Compare losses, their gradients, and the gradients of these."""
    found = []
    for function in (closed, plain):
        both = [logits_NE.detach().clone().requires_grad_() for _ in range(2)]
        total, terms, factor = function(*both, wanted, **keywords)
        first = torch.autograd.grad(
            total.square(), both, create_graph=second, materialize_grads=True
        )
        kept = [total, factor * total, *(terms[name] for name in sorted(terms)), *first]
        if second:
            curved = torch.arange(1.0, 1.0 + logits_NE.numel()).view_as(logits_NE)
            slope = sum((grad_NE.sin() * curved).sum() for grad_NE in first)
            kept += torch.autograd.grad(slope, both, materialize_grads=True)
        found.append(kept)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_two_derivatives(case, rows, monkeypatch):
    monkeypatch.setattr(closed_form, "CACHED", rows * 5)
    assert_the_same(logits(), CASES[case])


@given(st.data())
def test_losses_and_gradients_of_any_routing(data):
    draw = data.draw
    num_tokens, num_experts = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    score = st.floats(-60, 60, width=32)
    row = st.lists(score, min_size=num_experts, max_size=num_experts)
    rows = draw(st.lists(row, min_size=num_tokens, max_size=num_tokens))
    wanted = Wanted(
        balance=True,
        entropy=draw(st.booleans()),
        floor=draw(st.sampled_from([0.0, 0.5, 1.0])),
        sustain=draw(st.floats(0.05, 1.0)),
    )
    assert_the_same(
        torch.tensor(rows, dtype=torch.float64),
        wanted,
        second=False,
        top_k=draw(st.integers(1, num_experts)),
        temperature=torch.tensor(draw(st.floats(0.2, 5.0)), dtype=torch.float64),
    )


@pytest.mark.parametrize("case", CASES)
def test_over_ranks(case):
    def reduce(means, num_tokens):
        others = (0.5 * torch.softmax(mean_E.detach().exp(), -1) for mean_E in means)
        through = (0.5 * own_E.detach() + each for own_E, each in zip(means, others, strict=True))
        straight = (
            all_E + (own_E - own_E.detach()) for all_E, own_E in zip(through, means, strict=True)
        )
        return type(means)(*straight), torch.tensor(num_tokens / 4.0)

    assert_the_same(logits(), CASES[case], reduce=reduce)


def test_no_token():
    wanted = CASES["all"]
    total, terms, _ = closed(logits(0), logits(0), wanted)
    assert total.isnan()
    assert terms.keys() == WEIGHTS.keys()
    scores_NE = logits(0)
    (closed(scores_NE, scores_NE, wanted)[0].nan_to_num() * 0.0).backward()
    assert scores_NE.grad.shape == (0, 5)


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_are_those_of_the_first(case):
    scores_NE = logits()
    assert torch.autograd.gradgradcheck(
        lambda z: closed(z, z, CASES[case], temperature=T.double())[0], scores_NE
    )


@pytest.mark.parametrize("case", CASES)
def test_the_first_derivative_is_the_same_where_a_second_is_asked_for(case):
    scores_NE = logits()
    for own_NE in (None, scores_NE):
        total, _, _ = closed(scores_NE, own_NE, CASES[case])
        (once_NE,) = torch.autograd.grad(total, scores_NE, retain_graph=True)
        (twice_NE,) = torch.autograd.grad(total, scores_NE, create_graph=True)
        torch.testing.assert_close(twice_NE, once_NE)


@pytest.mark.parametrize("case", CASES)
def test_no_more_rows_at_a_time_than_stay_in_the_cache(case, monkeypatch):
    rows_seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket
            if name in (torch.ops.aten._softmax, torch.ops.aten.log_, torch.ops.aten.addcmul_):
                rows_seen.update({args[0].shape[0]} if args[0].dim() == 2 else ())
            return func(*args, **(kwargs or {}))

    logits_NE = logits()
    ids_NK = logits_NE.topk(2, -1).indices
    probs_NE = torch.softmax(logits_NE / T, -1)
    monkeypatch.setattr(closed_form, "CACHED", 3 * logits_NE.shape[1])
    routing = Routing(logits_NE, probs_NE, ids_NK, ids_NK)
    with Watch():
        loss, *_ = routing_losses(routing, temperature=T, wanted=CASES[case], weights=WEIGHTS)
        assert rows_seen == {3, 1}
        rows_seen.clear()
        loss.backward()
    assert rows_seen == set()


@pytest.mark.parametrize("starving", [True, False])
def test_all_losses_keep_scores_once_and_their_gradients(starving):
    kept = set()

    def pack(tensor):
        if tensor.shape == (40, 5):
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    logits_NE = torch.eye(5).repeat(8, 1).requires_grad_()
    if starving:
        logits_NE = (logits_NE - torch.tensor([9.0, 0, 0, 0, 0])).detach().requires_grad_()
    probs_NE = torch.softmax(logits_NE.detach() / T, -1)
    ids_NK = logits_NE.topk(1, -1).indices
    routing = Routing(logits_NE, probs_NE, ids_NK, ids_NK, logits_NE.view_as(logits_NE))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        routing_losses(routing, temperature=T, wanted=CASES["all"], weights=WEIGHTS)
    assert len(kept) == (3 if starving else 2)


def entropy(logits_NE, temperature):
    return torch.special.entr(torch.softmax(logits_NE / temperature, -1)).sum(-1).mean()


UNIT_E = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2], dtype=torch.float64)


def others(logits_NE):
    return 1 - F.one_hot(logits_NE.argmax(-1), 5)


def powers(logits_NE, order):
    return (torch.softmax(logits_NE, -1) / UNIT_E * others(logits_NE)).pow(order).mean(0)


def affinity(logits_NE, unit_E=UNIT_E):
    shares = Shares(unit_E, unit_E, unit_E, unit_E)
    return losses.affinity(logits_NE, logits_NE.argmax(-1, keepdim=True), shares)


def shares(logits_NE):
    return losses.routing_shares(logits_NE, logits_NE.argmax(-1, keepdim=True))


PLAIN = {
    "powers": (
        lambda z: torch.stack(affinity(z)),
        lambda z: torch.stack([powers(z, order) for order in (1, 8)]),
    ),
    "probabilities": (lambda z: shares(z)[0], lambda z: torch.softmax(z, -1).mean(0)),
    "entropy": (
        lambda z: losses.entropy_loss(z, temperature=0.7),
        lambda z: torch.tensor(5.0).double().log() - entropy(z, 0.7),
    ),
}


@pytest.mark.parametrize("case", PLAIN)
def test_values_and_two_derivatives(case):
    function, reference = PLAIN[case]
    logits_NE = logits()
    torch.testing.assert_close(function(logits_NE), reference(logits_NE))
    assert torch.autograd.gradcheck(function, logits_NE)
    assert torch.autograd.gradgradcheck(function, logits_NE)


def test_mean_of_others():
    logits_NE = logits()
    mean_E = shares(logits_NE).others_E
    expected_E = (torch.softmax(logits_NE, -1) * others(logits_NE)).mean(0)
    torch.testing.assert_close(mean_E, expected_E.detach())
    assert not mean_E.requires_grad


def test_balance_has_two_derivatives_by_the_importance():
    importance_E = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, requires_grad=True)
    top1_E, topk_E = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.0, 0.5, 0.25, 0.25]]).double()

    loss = losses.balance_loss(Shares(importance_E, top1_E, topk_E, top1_E))
    (slope_E,) = torch.autograd.grad(loss, importance_E, create_graph=True)
    (curvature_E,) = torch.autograd.grad(slope_E.sum(), importance_E)
    expected_E = (importance_E * 4).log() + 1 + 4 * (top1_E + topk_E)
    torch.testing.assert_close(slope_E, expected_E)
    torch.testing.assert_close(curvature_E, 1 / importance_E)


def test_far_above_the_unit_powers_end_and_gradients_do_not():
    logits_NE = logits()
    first_N = logits_NE.argmax(-1)
    unit_E = UNIT_E.clone()
    unit_E[0] = 1e-9
    _, eighth_E = affinity(logits_NE, unit_E)
    choosing_others = (first_N != 0).double().mean()
    torch.testing.assert_close(eighth_E[0], choosing_others * losses.MOST_UNITS**8)
    (gradient,) = torch.autograd.grad(eighth_E[0].log(), logits_NE)
    pull_N = 8 * (1 - torch.softmax(logits_NE, -1)[:, 0]) * (first_N != 0) / (first_N != 0).sum()
    torch.testing.assert_close(gradient[:, 0], pull_N.detach())


def test_far_above_the_unit_closed_form_and_plain_agree():
    def rare(means, _):
        # The other ranks' tokens are far less inclined to the first expert than this one's.
        if isinstance(means, Shares):
            means = means._replace(others_E=means.others_E * UNIT_E.new_tensor([1e-7, 1, 1, 1, 1]))
        return means, torch.ones(())

    assert_the_same(logits(), CASES["starvation"], second=False, reduce=rare)


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
