"""Several hops against a plain loop, what they share with one layer, and halting."""

import copy
import io
import pickle

import pytest
import torch
from reference import LoopMoE
from tolerances import assert_near
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import ecomoe
from ecomoe import EcoMoE
from ecomoe.cost import flops_per_token, routing_parameters
from ecomoe.multihop import MultiHop, halting, make_static, relative_norm
from ecomoe.relay import LossRelay
from ecomoe.schedule import Schedule

EVERY_LOSS = {"divergence_weight": 0.3, "z_weight": 0.02, "ortho_weight": 0.4, "strength": 1.0}
TOPOLOGIES = [(1, 6), (2, 3), (3, 2), (6, 1)]


def build(hops=3, *, top_k=2, static=False, learned_scale=False, seed=0, **keywords):
    torch.manual_seed(seed)
    settings = {"tiers": (4, 2), "router": "cosine", "dtype": torch.float64, **keywords}
    layer = EcoMoE(6, 5, top_k=top_k, **settings)
    if static:
        make_static(layer)
    return MultiHop(layer, hops=hops, learned_scale=learned_scale)


class LoopStatic(LoopMoE):
    def expert(self, e, token):
        return self.parameters["experts.head.weight"][e][:, 0] + 0 * token.sum()


def loops(model, x):
    """Accumulated update, mean auxiliary loss and parameters, by plain loops over tokens."""
    static = type(model.layer.experts).__name__ == "StaticExperts"
    reference = (LoopStatic if static else LoopMoE)(model.layer)
    total, losses = torch.zeros_like(x), []
    for _ in range(model.hops):
        outcome = reference(x + total)
        total = total + outcome.output
        losses.append(outcome.auxiliary)
    return total, sum(losses) / len(losses), reference.parameters


class TestAgainstLoops:
    @pytest.mark.parametrize(("hops", "top_k"), TOPOLOGIES)
    @pytest.mark.parametrize("static", [False, True])
    def test_outputs_losses_and_gradients(self, hops, top_k, static):
        model = build(hops, top_k=top_k, static=static, **EVERY_LOSS)
        x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
        x_loops = x.detach().clone().requires_grad_()
        expected, auxiliary, parameters = loops(model, x_loops)
        slope = torch.randn_like(expected)
        ((expected * slope).sum() + auxiliary).backward()
        y = model(x)
        loss = ecomoe.aux_loss(model)
        ((y * slope).sum() + loss).backward()
        assert_near(y, expected, torch.float64)
        assert_near(loss, auxiliary, torch.float64)
        assert_near(x.grad, x_loops.grad, torch.float64)
        for name, parameter in model.layer.named_parameters():
            assert_near(parameter.grad, parameters[name].grad, torch.float64, name=name)

    def test_one_hop_is_the_layer(self):
        model = build(1).eval()
        x = torch.randn(9, 6, dtype=torch.float64)
        assert torch.equal(model(x), model.layer(x))

    def test_updates_add_up_to_the_output(self):
        model = build(3).eval()
        x = torch.randn(2, 9, 6, dtype=torch.float64)
        updates = model.updates(x)
        assert updates.shape == (3, 2, 9, 6)
        assert_near(updates.sum(0), model(x), torch.float64)

    def test_the_position_moves_with_every_hop(self):
        model = build(2, top_k=1, tiers=(16,)).eval()
        seen = []
        model.layer.router.register_forward_hook(lambda *h: seen.append(h[-1].expert_ids_NK))
        model(torch.randn(200, 6, dtype=torch.float64))
        assert (seen[0] != seen[1]).any()

    def test_a_learned_scale_multiplies(self):
        model = build(1, learned_scale=True)
        x = torch.randn(9, 6, dtype=torch.float64)
        y = model.eval()(x)
        with torch.no_grad():
            model.scale.fill_(2.5)
        assert_near(model(x), 2.5 * y, torch.float64)
        model(x).square().sum().backward()
        assert model.scale.grad.any()
        model.to(torch.bfloat16)
        assert model.scale.dtype == torch.float32
        assert model(x.bfloat16()).dtype == torch.bfloat16


class TestWhatIsShared:
    def test_schedule_losses_and_monitor_find_the_layer(self):
        model = nn.Sequential(nn.Linear(6, 6).double(), build(3, temperature=3.0))
        Schedule(model, total_steps=10).advance(10)
        assert model[1].layer.temperature == pytest.approx(0.3)
        with ecomoe.Monitor(model, view="off") as monitor:
            (model(torch.randn(8, 6).double()).sum() + ecomoe.aux_loss(model)).backward()
            layers = monitor.report("train").to_dict()["layers"]
        assert [layer["name"] for layer in layers] == ["1.layer"]
        assert layers[0]["num_tokens"] == 3 * 8  # each hop is seen
        assert sum(layers[0]["counts"]["topk"]) == 3 * 8 * 2

    @pytest.mark.parametrize("router", ["cosine", "random"])
    def test_every_hop_counts_also_where_nothing_below_is_trained(self, router):
        model = build(3, router=router, strength=1.0)
        x = torch.randn(9, 6).double()
        with torch.no_grad():
            updates = model.updates(x)
        alone = []
        for state in (x, x + updates[0], x + updates[0] + updates[1]):
            model.layer(state)
            alone.append(ecomoe.aux_loss(model).item())
        model(x)
        assert ecomoe.aux_loss(model).item() == pytest.approx(sum(alone) / 3)

    def test_one_graph_in_training(self):
        model = build(3, router="random", dtype=torch.float32, strength=1.0)
        eager = copy.deepcopy(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = torch.randn(9, 6)
        for forward, each in ((compiled, model), (eager, eager)):
            (forward(x).square().sum() + ecomoe.aux_loss(each)).backward()
        for one, other in zip(model.parameters(), eager.parameters(), strict=True):
            assert_near(one.grad, other.grad, torch.float32)
        torch._dynamo.reset()

    def test_a_relay_delivers_what_the_explicit_way_does(self):
        gradients = []
        for relayed in (False, True):
            model = build(3, **EVERY_LOSS)
            relay = LossRelay(model) if relayed else None
            if relay:
                relay.watch(model)
            torch.manual_seed(1)
            loss = model(torch.randn(9, 6).double()).square().sum()
            if relay:
                relay.attach(loss)
            else:
                loss = loss + ecomoe.aux_loss(model)
            loss.backward()
            gradients.append([p.grad for p in model.parameters()])
        for one, other in zip(*gradients, strict=True):
            assert_near(other, one, torch.float64)

    @pytest.mark.parametrize("static", [False, True])
    def test_state_dict_and_copies(self, static):
        model = build(2, static=static, learned_scale=True).eval()
        x = torch.randn(9, 6).double()
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = build(2, static=static, learned_scale=True, seed=1).eval()
        assert not torch.equal(other(x), model(x))
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert torch.equal(other(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))

    def test_fresh_parameters(self):
        model = build(2, static=True, learned_scale=True)
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            model.scale.fill_(7.0)
        model.reset_parameters()
        assert model.scale == 1.0
        after = model.state_dict()
        assert not torch.equal(
            after["layer.experts.head.weight"], before["layer.experts.head.weight"]
        )

    def test_one_graph(self):
        model = build(3, dtype=torch.float32).eval()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        x = torch.randn(9, 6)
        assert_near(compiled(x), model(x), torch.float32)
        assert counter.frame_count == 1
        torch._dynamo.reset()

    def test_costs_follow_the_papers_arithmetic(self):
        """512 features, 1024 rank-1 experts: what the printed sizes of the dense twins imply."""
        with torch.device("meta"):
            layer = EcoMoE(512, 1, tiers=(1024,), top_k=12, router="cosine", bias=False)
        dims = layer.router.projection.numel() + layer.router.centroids.numel()
        assert routing_parameters(layer) == dims + 1
        experts = sum(parameter.numel() for parameter in layer.experts.parameters())
        assert round((experts + dims) / (2 * 512)) == 1120  # the iso-parameter twin's hidden width
        assert flops_per_token(layer) == 2 * (12 * 2 * 512 + dims)


class Padded(nn.Module):
    """A model that is told of its padding, with one layer that hops."""

    def __init__(self):
        super().__init__()
        self.ffn = build(4)

    def forward(self, x, attention_mask=None):
        return self.ffn(x)


class TestWatchedWhileHalting:
    @pytest.fixture
    def seen(self):
        """A padded batch, what halting saved, and what a monitor says of it."""
        model = Padded().eval()
        x = torch.randn(5, 10, 6).double()
        mask = (torch.arange(10) < 7).expand(5, 10).long()
        decisions = []
        router = model.ffn.layer.router
        router.register_forward_hook(lambda m, a, r: decisions.append((m.part, r.expert_ids_NK)))
        labels = torch.randint(6, (50,))
        with ecomoe.Monitor(model, view="off") as monitor, halting(model, epsilon=0.2) as saved:
            monitor.evaluate(outputs=model(x, attention_mask=mask).view(50, 6), targets=labels)
            record = monitor.report("eval").to_dict()["layers"][0]
        return decisions, mask.flatten().bool(), saved, record

    def test_padding_is_left_out_of_every_hop(self, seen):
        decisions, valid, saved, record = seen
        counts, num_tokens = torch.zeros(6), 0
        for part, ids in decisions:
            real = valid if part is None else valid[part.rows_M]
            counts += torch.bincount(ids[real].flatten(), minlength=6)
            num_tokens += int(real.sum())
        assert record["counts"]["topk"] == counts.tolist()
        assert record["num_tokens"] == num_tokens
        assert record["padding"] == sum(saved.layers["ffn"].tokens) - num_tokens
        assert 0 < saved.layers["ffn"].tokens[-1] < 50

    def test_predictions_find_the_tokens_that_hopped_on(self, seen):
        """Each hop of a token counts, and no warning says that predictions do not fit."""
        decisions, valid, _, record = seen
        judged = torch.zeros(6)
        for part, ids in decisions:
            real = valid if part is None else valid[part.rows_M]
            judged += torch.bincount(ids[real, 0], minlength=6)
        assert [tokens > 0 for tokens in judged] == [a is not None for a in record["accuracy"]]


class TestHalting:
    def reference(self, model, x, epsilon):
        """Each token on its own, by the text of equation 7; returns outputs and hops."""
        outputs, hops = [], []
        for token in x:
            total = torch.zeros_like(token)
            for hop in range(1, model.hops + 1):  # noqa: B007 (used after the loop)
                update = model.layer(token + total)
                total = total + update
                if update.norm() / ((token + total).norm() + 1e-6) < epsilon:
                    break
            outputs.append(total)
            hops.append(hop)
        return torch.stack(outputs), hops

    def quantile(self, model, x, share):
        updates = model.updates(x)
        # Just below: whether a token's own norm is below itself would be decided by rounding.
        norms_N = relative_norm(updates[0], x + updates[0])
        return norms_N.quantile(share).item() * (1 - 1e-9)

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
    @pytest.mark.parametrize("static", [False, True])
    def test_tokens_stop_where_equation_7_says(self, share, static):
        model = build(4, static=static).eval()
        x = torch.randn(50, 6).double()
        epsilon = self.quantile(model, x, share)
        expected, hops = self.reference(model, x, epsilon)
        with halting(model, epsilon=epsilon) as saved:
            y = model(x.view(5, 10, 6))
        assert_near(y.view(50, 6), expected, torch.float64)
        done = [sum(h > hop for h in hops) for hop in range(4)]
        assert saved.layers[""].tokens == done
        assert saved.hops == pytest.approx(sum(hops) / 50)
        assert saved.share == pytest.approx(1 - sum(hops) / 200)
        assert saved.flops == flops_per_token(model.layer) * sum(hops)

    def test_halted_tokens_do_not_reach_the_experts(self):
        model = build(3).eval()
        x = torch.randn(50, 6).double()
        slots = []
        model.layer.experts.register_forward_hook(lambda *hooked: slots.append(len(hooked[-1])))
        epsilon = self.quantile(model, x, 0.5)
        slots.clear()
        with halting(model, epsilon=epsilon) as saved:
            model(x)
        assert slots == [2 * tokens for tokens in saved.layers[""].tokens]
        assert 0 < slots[1] < slots[0]

    def test_hash_routers_know_which_tokens_are_left(self):
        model = build(4, router="hash").eval()
        ids = torch.randint(9, (5, 10))
        x = torch.randn(50, 6).double()
        tokens = model.layer.router.tokens
        expected, hops = [], []
        for row, token in zip(x, ids.flatten(), strict=True):
            tokens.ids = token.view(1)
            outcome, done = self.reference(model, row[None], 0.5)
            expected.append(outcome[0])
            hops += done
        tokens.ids = ids
        with halting(model, epsilon=0.5) as saved:
            y = model(x.view(5, 10, 6))
        assert_near(y.view(50, 6), torch.stack(expected), torch.float64)
        assert saved.layers[""].tokens == [sum(h > hop for h in hops) for hop in range(4)]
        assert saved.layers[""].tokens[-1] < 50
        assert model.layer.router.part is None
        with pytest.raises(ValueError, match="got 50 token ids for 3 tokens"):
            model(x[:3])

    def test_everything_may_halt_and_nothing_may_come(self):
        model = build(3).eval()
        x = torch.randn(9, 6).double()
        with halting(model, epsilon=1e9) as saved:
            assert_near(model(x), model.layer(x), torch.float64)
            assert model(x[:0]).shape == (0, 6)
        assert saved.layers[""].tokens == [9, 0, 0]
        assert saved.share == pytest.approx(2 / 3)

    def test_one_within_another(self):
        model = build(3).eval()
        x = torch.randn(9, 6).double()
        with halting(model, epsilon=0.0) as outer:
            with halting(model, epsilon=1e9) as inner:
                model(x)
            model(x)
        assert inner.layers[""].tokens == [9, 0, 0]
        assert outer.layers[""].tokens == [9, 9, 9]
        assert model.halt is None

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_a_copy_made_within_does_not_halt(self, copied):
        model = build(3).eval()
        x = torch.randn(9, 6).double()
        with halting(model, epsilon=1e9):
            other = copied(model)
        assert torch.equal(other(x), model(x))

    def test_compiled_it_stops_the_same_tokens(self):
        model = build(3).eval()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = torch.randn(50, 6).double()
        epsilon = self.quantile(model, x, 0.5)
        for tokens in (50, 40):
            with halting(model, epsilon=epsilon) as saved:
                y = model(x[:tokens])
            with halting(model, epsilon=epsilon) as again:
                assert_near(compiled(x[:tokens]), y, torch.float64)
            assert again.layers[""].tokens == saved.layers[""].tokens
            assert 0 < saved.share < 2 / 3
        torch._dynamo.reset()

    def test_export_counts_nothing(self):
        """Its tokens are symbols; counted, they would make ``share`` one for good."""
        model = build(3).eval()
        x = torch.randn(50, 6).double()
        epsilon = self.quantile(model, x, 0.5)
        with torch.no_grad(), halting(model, epsilon=epsilon) as saved:
            exported = torch.export.export(model, (x,)).module()
            assert saved.layers[""].tokens == [0, 0, 0]
            other = torch.randn(50, 6).double()
            assert_near(exported(other), model(other), torch.float64)
        assert 0 < saved.share < 2 / 3

    def test_zero_stops_none(self):
        model = build(3).eval()
        x = torch.randn(9, 6).double()
        with halting(model, epsilon=0.0) as saved:
            assert_near(model(x), model(x), torch.float64)
        assert saved.share == 0.0

    def test_it_ends_with_its_block_also_by_an_error(self):
        model = build(3).eval()
        x = torch.randn(9, 6).double()
        want = model(x)
        with pytest.raises(KeyError), halting(model, epsilon=1e9):
            raise KeyError
        assert torch.equal(model(x), want)

    def test_training_within_is_refused(self):
        model = build(3).eval()
        x = torch.randn(40, 6).double()
        with halting(model, epsilon=1e9) as saved:
            with pytest.raises(ValueError, match=r"training mode.*within halting.*call model.eval"):
                model.train()(x)
            assert saved.share == 0.0
            model.eval()(x)
            assert saved.share > 0.0
        model.train()(x)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: halting(m.train(), epsilon=0.1), "training mode"),
            (lambda m: halting(nn.Linear(2, 2), epsilon=0.1), r"no MultiHop.*convert\(.*hops="),
            (lambda m: halting(m.forward, epsilon=0.1), "must be an nn.Module; pass"),
            (lambda m: halting(m, epsilon=-1.0), "epsilon=-1.0 must be"),
            (lambda m: halting(m, epsilon=float("inf")), "epsilon=inf must be a finite number"),
            (lambda m: halting(m, epsilon=float("nan")), "epsilon=nan must be a finite number"),
        ],
    )
    def test_wrong_use(self, change, message):
        with pytest.raises(ValueError, match=message), change(build(3).eval()):
            pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiHop(nn.Linear(2, 2)), "layer=Linear must be an EcoMoE layer"),
        (lambda: MultiHop(EcoMoE(6, 5, d_output=3)), "maps 6 features to 3"),
        (lambda: MultiHop(EcoMoE(6, num_classes=6)), "leave out num_classes"),
        (lambda: MultiHop(EcoMoE(6, 5), hops=0), "hops=0 must be an int >= 1"),
        (lambda: make_static(MultiHop(EcoMoE(6, 5))), "layer=MultiHop must be an EcoMoE layer"),
        (lambda: make_static(nn.Linear(6, 5)), "layer=Linear must be an EcoMoE layer"),
        (lambda: MultiHop(EcoMoE(6, 5), learned_scale=1), "learned_scale=1 must be True or False"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
