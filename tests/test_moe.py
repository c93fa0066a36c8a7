"""The layer against the reference in loops, in outputs and in all gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import LoopMoE
from tolerances import assert_near
from torch import nn

import ecomoe
from ecomoe import EcoMoE
from ecomoe.routers import ROUTERS, HashRouter

TIERS = [(8, 4, 4), (16, 8, 8), (4, 4, 4, 4), (16,), (1,)]
EVERY_LOSS = {"divergence_weight": 0.3, "z_weight": 0.02, "ortho_weight": 0.4, "strength": 1.0}
STEEP = 4.0  # a router that has made up its mind, unlike a fresh one


def make_layer(*arguments, seed=0, **keywords) -> EcoMoE:
    torch.manual_seed(seed)
    # Experts that differ: a mix-up shows, and the router's gradient is no small difference.
    layer = EcoMoE(*arguments, **{"spread": 1.0, **keywords})
    with torch.no_grad():
        if hasattr(layer.router, "score"):
            layer.router.score.weight.mul_(STEEP)
    return layer


def feed(layer, x):
    """Give a hash router ids of a small vocabulary, so that tokens come more than once."""
    if isinstance(layer.router, HashRouter):
        layer.router.tokens.ids = torch.arange(x[..., 0].numel()) % 7
    return x


def check_against_loops(layer, x, *, targets=None, dtype=torch.float64, activation="gelu"):
    """Compare outputs, auxiliary losses and every gradient of a loss that is made of both."""
    reference = LoopMoE(layer, activation=activation)
    x_loops = x.detach().double().requires_grad_()
    x = x.detach().requires_grad_()
    # A different slope for each output, so that no two errors cancel.
    outcome = reference(x_loops, targets)
    slope = torch.randn_like(outcome.output)
    (outcome.output * slope).sum().add(outcome.auxiliary).backward()

    keywords = {} if targets is None else {"targets": targets}
    y = layer(x, **keywords)
    auxiliary = ecomoe.aux_loss(layer)
    assert y.dtype == x.dtype
    (y * slope.to(y.dtype)).sum().add(auxiliary).backward()

    assert_near(y, outcome.output, dtype, name="output")
    for name, term in outcome.terms.items():
        assert_near(layer.auxiliary.terms[name], term.detach(), dtype, name=name)
    if x.numel():
        assert set(layer.auxiliary.terms) == set(outcome.terms)
    assert_near(auxiliary, outcome.auxiliary, dtype, name="auxiliary")
    assert_near(x.grad, x_loops.grad, dtype, name="x")
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            expected = reference.parameters[name].grad
            # A frozen or unused tensor has no gradient in the loops, and zeros in the layer.
            expected = torch.zeros_like(parameter) if expected is None else expected
            assert_near(parameter.grad, expected, dtype, name=name)
    return outcome


class TestAgainstLoops:
    @pytest.mark.parametrize("tiers", TIERS)
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_tiers_and_kinds_of_experts(self, tiers, gated, bias):
        layer = make_layer(
            6, 5, tiers=tiers, top_k=min(2, sum(tiers)), gated=gated, bias=bias,
            dtype=torch.float64, **EVERY_LOSS,
        )  # fmt: skip
        check_against_loops(layer, torch.randn(3, 7, 6, dtype=torch.float64))

    @pytest.mark.parametrize("top_k", range(1, 9))
    def test_every_number_of_experts_a_token(self, top_k):
        layer = make_layer(
            6, 5, tiers=(4, 2, 2), top_k=top_k, dtype=torch.float64, **EVERY_LOSS
        )  # fmt: skip
        check_against_loops(layer, torch.randn(9, 6, dtype=torch.float64))

    @pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu", "relu", "silu", "identity"])
    def test_activations(self, activation):
        layer = make_layer(6, 5, tiers=(3, 1), activation=activation, dtype=torch.float64)
        check_against_loops(layer, torch.randn(9, 6, dtype=torch.float64), activation=activation)

    @pytest.mark.parametrize("router", ROUTERS)
    @pytest.mark.parametrize("top_k", [1, 2, 4])
    @pytest.mark.parametrize("oracle_weight", [0.0, 0.5])
    def test_every_router(self, router, top_k, oracle_weight):
        layer = make_layer(
            6, 5, tiers=(3, 1), router=router, top_k=top_k, oracle_weight=oracle_weight,
            dtype=torch.float64, **EVERY_LOSS,
        )  # fmt: skip
        check_against_loops(layer, feed(layer, torch.randn(9, 6, dtype=torch.float64)))

    @pytest.mark.parametrize("router", ROUTERS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_every_router_in_narrower_dtypes(self, router, dtype):
        layer = make_layer(16, 8, tiers=(4, 2, 2), router=router, dtype=dtype, **EVERY_LOSS)
        check_against_loops(layer, feed(layer, torch.randn(20, 16).to(dtype)), dtype=dtype)

    @pytest.mark.parametrize("d_hidden", [None, 5])
    @pytest.mark.parametrize("bias", [False, True])
    def test_heads_with_a_competence_teacher(self, d_hidden, bias):
        layer = make_layer(
            6, d_hidden, num_classes=3, tiers=(3, 1), oracle_weight=0.5, bias=bias,
            dtype=torch.float64, **EVERY_LOSS,
        )  # fmt: skip
        assert layer.oracle == "competence"
        targets = torch.randint(3, (2, 5))
        check_against_loops(layer, torch.randn(2, 5, 6, dtype=torch.float64), targets=targets)

    def test_dense_teacher(self):
        dense = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6)).double()
        layer = make_layer(
            6, 5, tiers=(3, 1), oracle="dense", dense=dense, oracle_weight=0.5, dtype=torch.float64
        )
        check_against_loops(layer, torch.randn(9, 6, dtype=torch.float64))
        assert all(parameter.grad is None for parameter in dense.parameters())

    def test_dense_teacher_of_many_tokens_looks_at_some_evenly_spaced(self):
        keywords = {"oracle": "dense", "dense": nn.Linear(6, 6).double(), "oracle_weight": 0.5}
        layer = make_layer(6, 5, tiers=(3, 1), dtype=torch.float64, **keywords)
        x = torch.randn(600, 6, dtype=torch.float64)
        layer(x)
        over_some = layer.auxiliary.terms["oracle"]
        layer(x[::3])
        assert_near(over_some, layer.auxiliary.terms["oracle"], torch.float64)

    def test_prototype_teacher(self):
        layer = make_layer(6, 5, tiers=(3, 1), oracle_weight=0.5, dtype=torch.float64)
        assert layer.oracle == "prototype"
        check_against_loops(layer, torch.randn(9, 6, dtype=torch.float64))

    def test_callable_teacher(self):
        layer = make_layer(
            6, 5, tiers=(3, 1), oracle=lambda x_ND: torch.softmax(x_ND[:, :4], -1),
            oracle_weight=0.5, dtype=torch.float64,
        )  # fmt: skip
        check_against_loops(layer, torch.randn(9, 6, dtype=torch.float64))

    @pytest.mark.parametrize("progress", [0.0, 0.2, 1.0])
    def test_temperatures_of_the_schedule(self, progress):
        layer = make_layer(6, 5, tiers=(3, 1), temperature=3.0, dtype=torch.float64)
        layer.set_progress(progress)
        check_against_loops(layer, torch.randn(9, 6, dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("top_k", [1, 3])
    def test_narrower_dtypes(self, dtype, gated, top_k):
        layer = make_layer(
            16, 8, tiers=(4, 2, 2), top_k=top_k, gated=gated, dtype=dtype, **EVERY_LOSS
        )
        check_against_loops(layer, torch.randn(20, 16).to(dtype), dtype=dtype)


class TestUnusualBatches:
    @pytest.mark.parametrize("shape", [(0, 6), (4, 0, 6)])
    @pytest.mark.parametrize("router", ROUTERS)
    def test_no_token(self, shape, router):
        layer = make_layer(6, 5, tiers=(3, 1), router=router, dtype=torch.float64, **EVERY_LOSS)
        x = feed(layer, torch.randn(*shape, dtype=torch.float64, requires_grad=True))
        y = layer(x)
        assert y.shape == shape
        assert ecomoe.aux_loss(layer) == 0
        (y.sum() + ecomoe.aux_loss(layer)).backward()
        assert x.grad.shape == shape
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name

    @pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1, 6), (3, 6)])
    def test_fewer_tokens_than_experts(self, shape):
        layer = make_layer(6, 5, tiers=(4, 2, 2), dtype=torch.float64, **EVERY_LOSS)
        check_against_loops(layer, torch.randn(*shape, dtype=torch.float64))

    def test_all_tokens_on_the_same_experts(self):
        layer = make_layer(6, 5, tiers=(4, 2, 2), dtype=torch.float64, **EVERY_LOSS)
        with torch.no_grad():
            layer.router.score.bias[3] += 40.0
            layer.router.score.bias[5] += 20.0
        outcome = check_against_loops(layer, torch.randn(9, 6, dtype=torch.float64))
        assert outcome.expert_ids == [[3, 5]] * 9

    @pytest.mark.parametrize(("d_model", "d_hidden"), [(7, 5), (1, 1), (3, 16), (16, 3)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_widths_off_16_bytes(self, d_model, d_hidden, dtype):
        layer = make_layer(d_model, d_hidden, tiers=(3, 1), dtype=dtype)
        check_against_loops(layer, torch.randn(20, d_model).to(dtype), dtype=dtype)

    @pytest.mark.parametrize("top_k", [1, 2])
    @pytest.mark.parametrize("router", ROUTERS)
    def test_a_nan_token_stays_in_its_own_row(self, top_k, router):
        layer = make_layer(6, 5, tiers=(3, 1), top_k=top_k, router=router)
        x = feed(layer, torch.randn(9, 6))
        clean = layer.eval()(x)
        x[4, 2] = torch.nan
        decisions = []
        layer.router.register_forward_hook(lambda *hooked: decisions.append(hooked[-1]))
        y = layer(x)
        others = torch.arange(9) != 4
        assert y[4].isnan().all()
        # To rounding: the other tokens' products are grouped in another way.
        assert_near(y[others], clean[others], torch.float32)
        ids_NK = decisions[0].expert_ids_NK
        assert ids_NK.min() >= 0
        assert ids_NK.max() < 4
        if top_k == 2:
            assert ids_NK[4, 0] != ids_NK[4, 1]

    def test_a_layout_that_is_not_contiguous(self):
        layer = make_layer(6, 5, tiers=(3, 1), dtype=torch.float64)
        x = torch.randn(6, 9, 2, dtype=torch.float64).permute(1, 2, 0)
        check_against_loops(layer, x)


class TestInvariance:
    @pytest.mark.parametrize("router", sorted(ROUTERS.keys() - {"hash"}))
    def test_permuting_and_chunking_tokens(self, router):
        layer = make_layer(8, 8, tiers=(4, 2, 2), router=router, dtype=torch.float64).eval()
        x = torch.randn(33, 8, dtype=torch.float64)
        y = layer(x)
        order = torch.randperm(33)
        assert_near(layer(x[order]), y[order], torch.float64)
        assert_near(torch.cat([layer(part) for part in x.split(5)]), y, torch.float64)

    @pytest.mark.parametrize("router", sorted(ROUTERS.keys() - {"hash"}))
    def test_relabelling_experts(self, router):
        keywords = {"tiers": (4, 2, 2), "router": router, "dtype": torch.float64, **EVERY_LOSS}
        layer, other = make_layer(8, 8, **keywords), make_layer(8, 8, **keywords)
        order = torch.randperm(8)
        by_expert = ("experts.", "router.score.", "router.centroids", "prototypes")
        for name, tensor in other.state_dict().items():
            if name.startswith(by_expert):
                tensor.copy_(tensor[order].clone())
        x = torch.randn(33, 8, dtype=torch.float64)
        assert_near(other(x), layer(x), torch.float64)
        for name, term in layer.auxiliary.terms.items():
            assert_near(other.auxiliary.terms[name], term, torch.float64, name=name)

    @given(
        st.integers(0, 2**31),
        st.integers(1, 8),
        st.integers(1, 3),
        st.integers(0, 6),
        st.booleans(),
        st.sampled_from(sorted(ROUTERS)),
    )
    def test_unselected_experts_get_zero_gradients(
        self, seed, num_experts, top_k, num_tokens, gated, router
    ):
        layer = make_layer(
            4, 4, tiers=(num_experts,), top_k=min(top_k, num_experts), gated=gated, seed=seed,
            router=router,
        )  # fmt: skip
        decisions = []
        layer.router.register_forward_hook(lambda *hooked: decisions.append(hooked[-1]))
        layer(feed(layer, torch.randn(num_tokens, 4))).square().sum().add(
            ecomoe.aux_loss(layer)
        ).backward()
        used = decisions[0].expert_ids_NK.unique()
        unused = torch.ones(num_experts, dtype=torch.bool).index_fill(0, used, False)
        for name, parameter in layer.experts.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad[unused].any(), name
        # Weighed by its gate, a chosen expert always moves its output's bias.
        bias_EF = layer.experts.down_proj.bias
        assert bool(bias_EF.grad[used].any(-1).all())


class TestGradients:
    def test_the_pull_on_starving_experts_bends_no_feature(self):
        layer = make_layer(6, 5, tiers=(4, 2, 2))
        with torch.no_grad():
            layer.router.score.bias[0] = -20.0
        x = torch.randn(64, 6)
        bends, pulls = [], []
        for floor in (layer.usage_floor, 0.0):
            layer.usage_floor = floor
            tokens = x.clone().requires_grad_()
            layer.zero_grad()
            (layer(tokens) * 0.0).sum().add(ecomoe.aux_loss(layer)).backward()
            bends.append(tokens.grad)
            pulls.append(-layer.router.score.bias.grad[0])
        assert torch.equal(*bends)  # balance and entropy bend them, and nothing else
        assert pulls[1].abs() < 1e-6 < 1e-3 < pulls[0]

    def test_a_step_is_the_same_whether_it_is_known_that_nobody_starves(self, monkeypatch):
        layer = make_layer(4, 5, tiers=(4,), top_k=1, dtype=torch.float64)
        with torch.no_grad():
            layer.router.score.weight.copy_(3 * torch.eye(4))
        steps = []
        for known in (True, False):
            if not known:
                monkeypatch.setattr(ecomoe.losses, "is_none_starving", lambda *_, **__: False)
            layer.zero_grad()
            x = torch.eye(4, dtype=torch.float64).repeat(3, 1).requires_grad_()
            loss = layer(x).square().sum() + ecomoe.aux_loss(layer)
            loss.backward()
            terms = {name: term.item() for name, term in layer.auxiliary.terms.items()}
            gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
            steps.append((loss, terms, gradients))
        assert steps[0][1] == steps[1][1]
        assert steps[0][1]["starvation"] == 0.0
        torch.testing.assert_close(*((loss, *gradients) for loss, _, gradients in steps))

    def test_the_pull_bends_no_feature_where_it_is_asked_for_later(self):
        layer = make_layer(6, 5, tiers=(4, 2, 2), target_e=0.1)
        assert layer.usage_floor == 0.0
        x = torch.randn(64, 6)
        gradients = []
        for floor in (0.0, 0.5):
            layer.usage_floor = floor
            tokens = x.clone().requires_grad_()
            layer.zero_grad()
            (layer(tokens).sum() + ecomoe.aux_loss(layer)).backward()
            gradients.append((tokens.grad, layer.router.score.weight.grad))
        (x_before, weight_before), (x_after, weight_after) = gradients
        torch.testing.assert_close(x_after, x_before)
        assert not torch.allclose(weight_after, weight_before)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_shares_may_be_reduced_in_another_precision(self, dtype):
        layer = make_layer(6, 5, tiers=(4, 2, 2))
        x = torch.randn(16, 6)
        layer(x)
        expected = ecomoe.aux_loss(layer)
        layer.reduce_shares = lambda means, _: (
            type(means)(*(each.to(dtype) for each in means)), torch.ones((), dtype=dtype)
        )  # fmt: skip
        layer(x)
        loss = ecomoe.aux_loss(layer)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected)

    def test_the_pull_grows_while_the_temperature_falls(self):
        layer = make_layer(6, 5, tiers=(4, 2, 2), target_e=1.0)
        x, pulls = torch.randn(64, 6), []
        with torch.no_grad():
            layer.router.score.bias[0] = -100.0
        for progress in (0.0, 0.15, 0.3, 1.0):
            layer.set_progress(progress)
            layer(x)
            pulls.append(layer.auxiliary.terms["starvation"].item())
            ecomoe.aux_loss(layer)
        assert pulls[0] == pytest.approx(0.05 * pulls[3])
        assert pulls[1] == pytest.approx(0.525 * pulls[3])
        assert pulls[2] == pulls[3] > 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_pull_never_turns_into_a_push(self, dtype):
        layer = make_layer(6, 5, tiers=(4, 2, 2), target_e=1.0)
        # From a checkpoint of a layer that started hotter; below the end of its own annealing.
        for temperature, share in ((9.0, 0.05), (0.1, 1.0)):
            hotter = make_layer(6, 5, tiers=(4, 2, 2), temperature=temperature)
            layer.load_state_dict(hotter.state_dict())
            assert float(layer._sustain(dtype)) == pytest.approx(share)
        # The annealing's span is smaller than what the buffer resolves.
        for start in (0.30000002, 0.3 + 1e-16):
            layer = make_layer(6, 5, tiers=(4, 2, 2), temperature=start)
            for progress in (0.0, 0.1, 1.0):
                layer.set_progress(progress)
                assert 0.05 * (1 - 1e-6) <= float(layer._sustain(dtype)) <= 1.0

    def test_the_pull_is_whole_where_the_temperature_is_fixed(self):
        layer = make_layer(6, 5, tiers=(4, 2, 2), temperature=0.2)
        assert layer._sustain(torch.float32) == 1.0


class TestDropout:
    def test_hidden_and_output_features_are_dropped_in_training_alone(self):
        x = torch.randn(50, 8)
        for keywords in ({"dropout": 0.5}, {"output_dropout": 0.5}):
            layer = make_layer(8, 8, tiers=(2,), **keywords)
            plain = make_layer(8, 8, tiers=(2,))
            assert torch.equal(layer.eval()(x), plain.eval()(x))
            layer.train()
            assert not torch.equal(layer(x), plain(x))
        y = layer(x)
        assert 0.4 < (y == 0).float().mean() < 0.6
        kept = y != 0
        torch.testing.assert_close(y[kept], 2 * plain(x)[kept])

    def test_a_norm_stands_before_the_last_projection(self):
        norm = nn.LayerNorm(8)
        layer = make_layer(8, 8, tiers=(1,), top_k=1, hidden_norm=norm, activation="relu")
        x = torch.randn(5, 8)
        up, down = layer.experts.up_proj, layer.experts.down_proj
        hidden = norm(torch.relu(x @ up.weight[0].T + up.bias[0]))
        torch.testing.assert_close(layer(x), hidden @ down.weight[0].T + down.bias[0])
