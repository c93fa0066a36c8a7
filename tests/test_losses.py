import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ecomoe import losses
from ecomoe.losses import Shares


def fp64(*shape, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def gradient_of(function, *inputs):
    assert torch.autograd.gradcheck(function, inputs)
    return torch.autograd.grad(function(*inputs), inputs)


@st.composite
def logits(draw, *, largest=30):
    num_tokens = draw(st.integers(1, 5))
    num_experts = draw(st.integers(1, 6))
    values = st.lists(
        st.floats(-largest, largest, width=32), min_size=num_experts, max_size=num_experts
    )
    rows = draw(st.lists(values, min_size=num_tokens, max_size=num_tokens))
    return torch.tensor(rows, dtype=torch.float64)


def shares_of(logits_NE, top_k):
    return losses.routing_shares(logits_NE, logits_NE.topk(top_k, -1).indices)


def starvation(logits_NE, shares, *, floor=0.5):
    affinity = losses.affinity(logits_NE, logits_NE.topk(1, -1).indices, shares)
    return losses.starvation_loss(shares, affinity, floor=floor)


class TestBalance:
    @given(logits(), st.data())
    def test_never_negative(self, logits_NE, data):
        top_k = data.draw(st.integers(1, logits_NE.shape[1]))
        assert losses.balance_loss(shares_of(logits_NE, top_k)) >= -1e-12

    @given(st.integers(1, 16), st.integers(1, 8), st.sampled_from([torch.float32, torch.float64]))
    def test_exactly_zero_for_uniform_assignment(self, num_experts, rounds, dtype):
        # Every expert is the first choice equally often, and the importance is uniform.
        ids_NK = torch.arange(num_experts).repeat(rounds).unsqueeze(1)
        logits_NE = torch.zeros(len(ids_NK), num_experts, dtype=dtype)
        loss = losses.balance_loss(losses.routing_shares(logits_NE, ids_NK))
        # "Exactly" up to the rounding of 1/E.
        assert abs(loss) <= 4 * num_experts * torch.finfo(dtype).eps

    @given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 4))
    def test_zero_to_the_bit_where_shares_are(self, num_experts, rounds):
        ids_NK = torch.arange(num_experts).repeat(rounds).unsqueeze(1)
        shares = losses.routing_shares(torch.zeros(len(ids_NK), num_experts), ids_NK)
        assert losses.balance_loss(shares) == 0.0

    @pytest.mark.parametrize("num_experts", [2, 5, 16])
    def test_value_when_one_expert_takes_all(self, num_experts):
        one_hot_E = F.one_hot(torch.tensor(0), num_experts).double()
        loss = losses.balance_loss(Shares(one_hot_E, one_hot_E, one_hot_E, 0 * one_hot_E))
        torch.testing.assert_close(loss.item(), math.log(num_experts) + (num_experts - 1.0))

    def test_gradient_is_the_documented_one(self):
        importance_E = torch.softmax(fp64(6, grad=False), -1).requires_grad_()
        top1_E = torch.softmax(fp64(6, seed=1, grad=False), -1)
        topk_E = torch.softmax(fp64(6, seed=2, grad=False), -1)
        loss = losses.balance_loss(Shares(importance_E, top1_E, topk_E, importance_E.detach()))
        (gradient,) = torch.autograd.grad(loss, importance_E)
        # KL: log(p E) + 1. Each CV^2: 2 E f, straight through to the importance; their mean.
        expected = torch.log(importance_E * 6) + 1 + 6 * (top1_E + topk_E)
        torch.testing.assert_close(gradient, expected.detach())

    def test_gradient_reaches_logits_at_temperature_one(self):
        logits_NE = fp64(7, 5)
        ids_NK = logits_NE.topk(2, -1).indices
        (gradient,) = torch.autograd.grad(
            losses.balance_loss(losses.routing_shares(logits_NE, ids_NK)), logits_NE
        )

        def surrogate(logits_NE):
            importance_E = torch.softmax(logits_NE, -1).mean(0)
            _, top1_E, topk_E, _ = losses.routing_shares(logits_NE.detach(), ids_NK)
            kl = (importance_E * torch.log(importance_E * 5)).sum()
            return kl + 5 * ((top1_E + topk_E) * importance_E).sum()

        torch.testing.assert_close(gradient, gradient_of(surrogate, logits_NE)[0])

    def test_descent_evens_out_a_collapsed_router(self):
        logits_NE = (0.1 * fp64(64, 4, grad=False) + torch.tensor([2.0, 0, 0, 0])).requires_grad_()
        before = shares_of(logits_NE.detach(), 1).top1_E.max()
        optimizer = torch.optim.SGD([logits_NE], lr=20.0)
        for _ in range(50):
            optimizer.zero_grad()
            losses.balance_loss(shares_of(logits_NE, 1)).backward()
            optimizer.step()
        assert before == 1.0
        assert shares_of(logits_NE.detach(), 1).top1_E.max() < 0.5

    def test_no_token_gives_no_share(self):
        share_E = losses.expert_shares(
            torch.empty(0, 2, dtype=torch.int64), num_experts=3, dtype=torch.float32
        )
        assert torch.equal(share_E, torch.zeros(3))


class TestStarvation:
    def test_exactly_zero_while_nobody_is_below_the_floor(self):
        # Usage of 3/8, 3/8, 1/4: the last one has 3/4 of the uniform third.
        ids_NK = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]).unsqueeze(1)
        logits_NE = fp64(8, 3)
        shares = losses.routing_shares(logits_NE, ids_NK)
        loss = starvation(logits_NE, shares)
        loss.backward()
        assert loss == 0.0
        assert not logits_NE.grad.any()

    @pytest.mark.parametrize("basis", [1, 2])
    def test_value_and_gradient_on_either_basis(self, basis):
        logits_NE = fp64(6, 4)
        probs_NE = torch.softmax(logits_NE, -1)
        even_E = torch.full((4,), 0.25, dtype=torch.float64)
        # Usage 0.2 of uniform for the first, and none for the second.
        starved_E = torch.tensor([0.05, 0.0, 0.45, 0.5], dtype=torch.float64)
        chosen_NE = F.one_hot(logits_NE.argmax(-1), 4)
        others_NE = probs_NE * (1 - chosen_NE)
        shares = [probs_NE.mean(0), even_E, even_E, others_NE.mean(0).detach()]
        shares[basis] = starved_E
        loss = starvation(logits_NE, Shares(*shares))
        eighth_E, first_E = others_NE.pow(8).mean(0).pow(1 / 8), others_NE.mean(0)
        expected = -0.6 * (0.4 * eighth_E[0].log() + 0.6 * first_E[0].log()) - first_E[1].log()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, logits_NE), torch.autograd.grad(expected, logits_NE)
        )

    def test_it_is_known_on_a_cpu_that_nobody_starves(self):
        logits_NE = fp64(8, 3)
        ids_NK = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]).unsqueeze(1)
        shares = losses.routing_shares(logits_NE, ids_NK)
        # The last one has 3/4 of uniform usage.
        assert losses.is_none_starving(shares, floor=0.75)
        assert not losses.is_none_starving(shares, floor=0.76)
        on_device = Shares(*(share_E.to("meta") for share_E in shares))
        assert not losses.is_none_starving(on_device, floor=0.75)
        with FlopCounterMode(display=False):
            assert not losses.is_none_starving(shares, floor=0.75)
        known = torch.func.vmap(
            lambda top1_E: (
                top1_E * (not losses.is_none_starving(shares._replace(top1_E=top1_E), floor=0.75))
            )
        )
        assert torch.equal(known(shares.top1_E.expand(2, 3)), shares.top1_E.expand(2, 3))

    def test_vanishes_continuously_at_the_floor(self):
        logits_NE = torch.tensor([[0.1, 0.9]]).log()
        usage_E = torch.tensor([0.24, 0.76])
        others_E = torch.tensor([0.1, 0.0])
        shares = Shares(logits_NE.exp()[0], usage_E, usage_E, others_E)
        torch.testing.assert_close(
            starvation(logits_NE, shares), torch.tensor(-0.04 * math.log(0.1))
        )

    def test_most_of_the_pull_is_on_tokens_of_others_that_are_inclined_to_the_expert(self):
        # Six tokens are the third expert's own; a quarter of the others are inclined to it.
        logits_NE = torch.zeros(46, 3, dtype=torch.float64)
        logits_NE[:20, 0] = 2.0
        logits_NE[20:40, 1] = 2.0
        logits_NE[:10, 2] = 1.0
        logits_NE[40:, 2] = 1.0
        logits_NE.requires_grad_()
        (gradient,) = torch.autograd.grad(starvation(logits_NE, shares_of(logits_NE, 1)), logits_NE)
        pull_N = -gradient[:, 2]
        assert pull_N[:10].sum() > 0.8 * pull_N[:40].sum() > 0
        assert not pull_N[40:].any()

    def test_pull_on_a_dead_expert_is_on_every_token_by_its_probability(self):
        logits_NE = fp64(32, 4, grad=False)
        logits_NE[:, 0] -= 20
        logits_NE.requires_grad_()
        (gradient,) = torch.autograd.grad(starvation(logits_NE, shares_of(logits_NE, 1)), logits_NE)
        prob_N = torch.softmax(logits_NE.detach(), -1)[:, 0]
        torch.testing.assert_close(-gradient[:, 0], prob_N / prob_N.sum(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("below", [1.0, 10.0, 60.0])
    def test_pull_on_a_dead_expert_does_not_fade_as_it_sinks(self, below):
        logits_NE = fp64(32, 4, grad=False)
        logits_NE[:, 0] -= 4 + below
        logits_NE = logits_NE.requires_grad_()
        shares = shares_of(logits_NE, 2)
        (gradient,) = torch.autograd.grad(starvation(logits_NE, shares), logits_NE)
        assert -1.0 <= gradient[:, 0].sum() <= -0.9
        # Most of it on the tokens that are nearest to choosing the expert.
        margin_N = logits_NE[:, 0] - logits_NE[:, 1:].logsumexp(-1)
        assert gradient[:, 0].argmin() == margin_N.argmax()

    def test_finite_where_the_importance_underflows(self):
        logits_NE = torch.tensor([[300.0, 0.0, 202.0], [200.0, -100.0, 102.0]], requires_grad=True)
        shares = shares_of(logits_NE, 1)
        loss = 2.0**24 * (losses.balance_loss(shares) + starvation(logits_NE, shares))
        loss.backward()
        assert loss.isfinite()
        assert logits_NE.grad.isfinite().all()

    @pytest.mark.parametrize("scale", [1.0, 2.0**16, 2.0**24])
    @pytest.mark.parametrize("below", [15.0, 17.0, 60.0])
    def test_pull_on_an_expert_that_is_sure_of_its_few_tokens(self, below, scale):
        # To all tokens but one it is next to nothing: 1e-8 to the eighth power underflows.
        logits_NE = torch.zeros(400, 3)
        logits_NE[:, 0] = torch.linspace(-20.0, 0.0, 400) - below
        logits_NE[0, 0] = 15.0
        logits_NE.requires_grad_()
        shares = shares_of(logits_NE, 1)
        loss = starvation(logits_NE, shares) * scale
        loss.backward()
        assert loss.isfinite()
        assert logits_NE.grad.isfinite().all()
        assert -1.0 <= logits_NE.grad[:, 0].sum() / scale <= -0.9

    def test_descent_revives_a_dead_expert(self):
        x_ND = fp64(256, 8, grad=False)

        def steps_to_revive(loss):
            weight_ED, bias_E = fp64(4, 8, seed=1), torch.zeros(4, dtype=torch.float64)
            bias_E[0] = -12.0
            bias_E.requires_grad_()
            optimizer = torch.optim.SGD([weight_ED, bias_E], lr=0.1)
            for step in range(300):
                logits_NE = x_ND @ weight_ED.T + bias_E
                shares = shares_of(logits_NE, 1)
                if shares.top1_E[0] > 0.05:
                    return step
                optimizer.zero_grad()
                loss(logits_NE, shares).backward()
                optimizer.step()
            return 300

        assert steps_to_revive(starvation) < 100
        assert steps_to_revive(lambda _, shares: losses.balance_loss(shares)) == 300


class TestEntropy:
    @given(logits(largest=300), st.floats(0.01, 100.0))
    def test_within_its_bounds(self, logits_NE, temperature):
        entropy_N = losses.token_entropy(logits_NE, temperature=temperature)
        assert (entropy_N >= 0).all()
        assert (entropy_N <= math.log(logits_NE.shape[1]) + 1e-12).all()
        assert losses.entropy_loss(logits_NE, temperature=temperature) >= -1e-12

    @pytest.mark.parametrize("num_experts", [1, 2, 16])
    def test_extremes(self, num_experts):
        even_NE = torch.full((3, num_experts), 7.0)
        torch.testing.assert_close(
            losses.token_entropy(even_NE), torch.full((3,), math.log(num_experts))
        )
        assert losses.entropy_loss(even_NE).abs() < 1e-6
        decided_NE = 1e4 * F.one_hot(torch.zeros(3, dtype=torch.int64), num_experts).float()
        assert torch.equal(losses.token_entropy(decided_NE), torch.zeros(3))

    def test_gradient(self):
        logits_NE = fp64(4, 5)
        gradient_of(lambda z: losses.entropy_loss(z, temperature=2.5), logits_NE)
        gradient_of(lambda z: losses.token_entropy(z, temperature=2.5).sum(), logits_NE)

    def test_gradient_stays_finite_for_a_decided_router(self):
        logits_NE = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
        losses.entropy_loss(logits_NE, temperature=0.3).backward()
        assert logits_NE.grad.isfinite().all()


class TestOracle:
    def test_value_and_gradient(self):
        logits_NE = fp64(4, 3)
        teacher_NE = torch.softmax(fp64(4, 3, seed=1, grad=False), -1)
        loss = losses.oracle_loss(logits_NE, teacher_NE)
        expected = F.kl_div(torch.log_softmax(logits_NE, -1), teacher_NE, reduction="batchmean")
        torch.testing.assert_close(loss, expected)
        (gradient,) = gradient_of(lambda z: losses.oracle_loss(z, teacher_NE), logits_NE)
        probs_NE = torch.softmax(logits_NE, -1).detach()
        torch.testing.assert_close(gradient, (probs_NE - teacher_NE) / 4)

    @given(logits())
    def test_zero_for_an_agreeing_router_and_never_negative(self, logits_NE):
        teacher_NE = torch.softmax(logits_NE, -1)
        assert losses.oracle_loss(logits_NE, teacher_NE).abs() < 1e-10
        assert losses.oracle_loss(logits_NE.flip(-1), teacher_NE) >= -1e-10

    def test_a_teacher_that_is_certain(self):
        logits_NE = fp64(2, 3)
        teacher_NE = F.one_hot(torch.tensor([2, 0]), 3).double()
        loss = losses.oracle_loss(logits_NE, teacher_NE)
        torch.testing.assert_close(loss, F.cross_entropy(logits_NE, torch.tensor([2, 0])))
        loss.backward()
        assert logits_NE.grad.isfinite().all()

    def test_no_gradient_reaches_the_teacher(self):
        teacher_logits_NE = fp64(2, 3, seed=1)
        losses.oracle_loss(fp64(2, 3), torch.softmax(teacher_logits_NE, -1)).backward()
        assert teacher_logits_NE.grad is None


class TestTeachers:
    def test_competence_prefers_the_lowest_loss(self):
        losses_NE = torch.tensor([[0.1, 2.0, 1.0], [3.0, 3.0, 0.5]], requires_grad=True)
        teacher_NE = losses.competence_teacher(losses_NE, sharpness=2.0)
        assert teacher_NE.argmax(-1).tolist() == [0, 2]
        torch.testing.assert_close(teacher_NE[0, 0] / teacher_NE[0, 2], torch.tensor(1.8).exp())
        assert not teacher_NE.requires_grad

    def test_dense_prefers_the_nearest_expert_whatever_the_unit(self):
        dense_ND = fp64(4, 6)
        outputs_NED = dense_ND.unsqueeze(1) + fp64(4, 3, 6, seed=1) * torch.tensor(
            [1.0, 0.01, 0.5]
        ).view(3, 1)
        teacher_NE = losses.dense_teacher(outputs_NED, dense_ND)
        assert teacher_NE.argmax(-1).tolist() == [1] * 4
        torch.testing.assert_close(
            losses.dense_teacher(1e3 * outputs_NED, 1e3 * dense_ND), teacher_NE
        )
        assert not teacher_NE.requires_grad

    def test_dense_is_even_where_every_expert_is_the_dense_block(self):
        zeros_ND = torch.zeros(3, 6)
        teacher_NE = losses.dense_teacher(zeros_ND.unsqueeze(1).expand(3, 4, 6), zeros_ND)
        torch.testing.assert_close(teacher_NE, torch.full((3, 4), 0.25))

    def test_prototype_prefers_the_nearest_angle(self):
        prototypes_ED = torch.eye(3, 5, requires_grad=True)
        x_ND = torch.tensor([[0.1, 5.0, 0.0, 0.0, 0.0], [2.0, 0.1, 0.0, 0.0, 1.0]])
        teacher_NE = losses.prototype_teacher(x_ND, prototypes_ED)
        assert teacher_NE.argmax(-1).tolist() == [1, 0]
        torch.testing.assert_close(losses.prototype_teacher(7 * x_ND, prototypes_ED), teacher_NE)
        assert not teacher_NE.requires_grad


class TestZ:
    def test_value_and_gradient(self):
        logits_NE = fp64(4, 3)
        (gradient,) = gradient_of(losses.z_loss, logits_NE)
        log_partition_N1 = torch.log(logits_NE.exp().sum(-1, keepdim=True))
        torch.testing.assert_close(losses.z_loss(logits_NE), (log_partition_N1**2).mean())
        expected = 2 * log_partition_N1 * torch.softmax(logits_NE, -1) / 4
        torch.testing.assert_close(gradient, expected.detach())


class TestCosines:
    def test_orthogonality(self):
        gradient_of(losses.orthogonality_loss, fp64(4, 6))
        assert losses.orthogonality_loss(torch.eye(4, 6)) < 1e-12
        torch.testing.assert_close(
            losses.orthogonality_loss(torch.tensor([[1.0, 0], [-3.0, 0]])), torch.tensor(1.0)
        )
        # cos 60 deg for one pair of three, 0 for the others
        vectors = torch.tensor([[1.0, 0, 0], [0.5, math.sqrt(0.75), 0], [0, 0, 2.0]])
        torch.testing.assert_close(losses.orthogonality_loss(vectors), torch.tensor(0.25 / 3))

    def test_divergence(self):
        gradient_of(losses.divergence_loss, fp64(3, 2, 5))
        same_NKD = fp64(3, 1, 5).expand(3, 2, 5)
        torch.testing.assert_close(losses.divergence_loss(same_NKD).item(), 1.0)
        assert losses.divergence_loss(torch.eye(2, 5).expand(3, 2, 5)) < 1e-12

    @given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 999))
    def test_divergence_within_its_bounds(self, num_tokens, top_k, width, seed):
        value = losses.divergence_loss(fp64(num_tokens, top_k, width, seed=seed))
        assert -1e-12 <= value <= 1 + 1e-12

    def test_one_expert_has_nothing_to_differ_from(self):
        for loss, shape in (
            (losses.orthogonality_loss, (1, 4)),
            (losses.divergence_loss, (3, 1, 4)),
        ):
            vectors = fp64(*shape)
            value = loss(vectors)
            assert value == 0
            value.backward()
            assert not vectors.grad.any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_vector_of_zeros_has_a_finite_gradient(self, dtype):
        for loss, shape in (
            (losses.orthogonality_loss, (3, 4)),
            (losses.divergence_loss, (2, 3, 4)),
        ):
            vectors = torch.zeros(*shape, dtype=dtype, requires_grad=True)
            loss(vectors).backward()
            assert vectors.grad.isfinite().all()

    def test_prototype_moves_the_prototypes_alone(self):
        x_ND, prototypes_ED = fp64(5, 6), fp64(3, 6, seed=1)
        ids_NK = torch.tensor([[0, 1], [2, 0], [0, 2], [2, 1], [0, 1]])
        assert torch.autograd.gradcheck(
            lambda p: losses.prototype_loss(x_ND, p, ids_NK), (prototypes_ED,)
        )
        losses.prototype_loss(x_ND, prototypes_ED, ids_NK).backward()
        assert x_ND.grad is None
        assert not prototypes_ED.grad[1].any()  # nobody's first choice
        assert prototypes_ED.grad[[0, 2]].abs().sum(-1).all()

    def test_prototype_finds_the_direction_of_its_tokens(self):
        x_ND = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        prototypes = nn.Parameter(torch.tensor([[1.0, -0.5]]))
        optimizer = torch.optim.SGD([prototypes], lr=0.5)
        ids_NK = torch.zeros(2, 1, dtype=torch.int64)
        for _ in range(200):
            optimizer.zero_grad()
            losses.prototype_loss(x_ND, prototypes, ids_NK).backward()
            optimizer.step()
        direction = F.normalize(prototypes.detach(), dim=-1)
        torch.testing.assert_close(direction, torch.full((1, 2), math.sqrt(0.5)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_loss_is_a_scalar_in_the_dtype_of_its_input(dtype):
    logits_NE = torch.randn(5, 4, dtype=dtype)
    vectors_ED = torch.randn(4, 6, dtype=dtype)
    ids_NK = logits_NE.topk(2, -1).indices
    for loss in (
        losses.balance_loss(losses.routing_shares(logits_NE, ids_NK)),
        starvation(logits_NE, losses.routing_shares(logits_NE, ids_NK), floor=1.0),
        losses.entropy_loss(logits_NE, temperature=torch.tensor(2.0)),
        losses.oracle_loss(logits_NE, torch.softmax(logits_NE, -1)),
        losses.z_loss(logits_NE),
        losses.orthogonality_loss(vectors_ED),
        losses.divergence_loss(torch.randn(5, 2, 6, dtype=dtype)),
        losses.prototype_loss(torch.randn(5, 6, dtype=dtype), vectors_ED, ids_NK),
    ):
        assert loss.shape == ()
        assert loss.dtype == dtype


def test_balance_of_an_expert_that_no_token_can_reach():
    """Its importance underflows to 0, where the derivative of x log x is infinite."""
    logits_NE = torch.tensor([[0.0, 1.0, -200.0], [0.5, 1.0, -200.0]], requires_grad=True)
    shares = losses.routing_shares(logits_NE, torch.tensor([[1, 0], [1, 0]]))
    assert shares.importance_E[2] == 0
    losses.balance_loss(shares).backward()
    assert logits_NE.grad.isfinite().all()
    assert logits_NE.grad[0, 0] != 0
