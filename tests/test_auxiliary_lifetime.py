"""What auxiliary losses leave behind: in copies, in memory, in a log."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from classifier import EVERY_LOSS, Classifier, batch
from torch.nn import functional as F

import ecomoe
from ecomoe.auxiliary import auxiliary_layers
from ecomoe.relay import LossRelay
from ecomoe.terms import TermMeans

WAYS = ["explicit", "relay"]


class TestCopies:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_after_a_training_forward(self, way, how):
        model = Classifier(**EVERY_LOSS)
        if way == "relay":
            relay = LossRelay(model)
            relay.watch(model)
        y = model(batch()[0])
        if how == "deepcopy":
            other = copy.deepcopy(model)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        for _, _, slot in auxiliary_layers(other):
            assert slot.relay is slot.cell is slot.tokens is None
            assert not slot.terms
        assert ecomoe.aux_loss(other) == 0
        # The copy is on the explicit way, the original where it was.
        assert torch.equal(other(batch()[0]), y)
        assert ecomoe.aux_loss(other) > 0
        if way == "relay":
            assert all(slot.relay is relay for _, _, slot in auxiliary_layers(model))
            relay.close()
        else:
            assert ecomoe.aux_loss(model) > 0


class Saved:
    """Stands in for a tensor that a graph has saved; dies with the graph."""

    def __init__(self, tensor):
        # Without its graph: a saved output would keep itself alive.
        self.tensor = tensor.detach()


class TestMemory:
    @pytest.fixture
    def saved(self):
        """Count what graphs hold on to."""
        alive = weakref.WeakSet()

        def pack(tensor):
            holder = Saved(tensor)
            alive.add(holder)
            return holder

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
            yield alive

    @pytest.mark.parametrize("way", WAYS)
    def test_no_graph_outlives_its_backward_pass(self, way, saved):
        model = Classifier(**EVERY_LOSS)
        relay = LossRelay(model) if way == "relay" else None
        x, targets = batch()
        loss = F.cross_entropy(model(x), targets)
        if relay is None:
            loss = loss + ecomoe.aux_loss(model)
        else:
            relay.attach(loss)
        assert len(saved) > 20
        loss.backward()
        del loss
        gc.collect()
        assert len(saved) == 0

    @pytest.mark.filterwarnings("ignore:the auxiliary losses .* never used")
    @pytest.mark.parametrize("frozen", [None, "router", "experts", "all", "embed"])
    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
    def test_unread_losses_hold_no_graph(self, frozen, optimizer, saved):
        model = Classifier(divergence_weight=0.1)
        for moe in model.moes if frozen else ():
            (moe if frozen == "all" else getattr(moe, frozen, moe.router)).requires_grad_(False)
        model.embed.requires_grad_(frozen != "embed")
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer(trained, lr=0.01, fused=True)
        for step in range(5):
            x, targets = batch(step)
            F.cross_entropy(model(x), targets).backward()
            optimizer.step()
            assert len(saved) == 0

    def test_forward_passes_thrown_away_do_not_pile_up(self, saved):
        model = Classifier(**EVERY_LOSS)
        held = []
        for step in range(5):
            model(batch(step)[0])
            held.append(len(saved))
        assert max(held) == held[0]


class TestTermMeans:
    def test_means_by_name_and_the_total(self):
        model = Classifier(**EVERY_LOSS)
        means = TermMeans(model)
        expected, totals = [], []
        for seed in range(3):
            model(batch(seed)[0])
            totals.append(ecomoe.aux_loss(model).item())
            expected += [moe.auxiliary.terms["z"].item() for moe in model.moes]
            means.add()
        computed = means.compute()
        names = {"balance", "starvation", "entropy", "oracle", "prototype", "ortho", "divergence"}
        names |= {"z", "total"}
        assert computed.keys() == names
        assert computed["z"] == pytest.approx(sum(expected) / 6)
        assert computed["total"] == pytest.approx(sum(totals) / 3)
        assert means.compute() == {}


def test_a_kept_result_survives_the_schedule():
    layer = ecomoe.EcoMoE(8, 16, tiers=(2, 2), warmup_fraction=0.1)
    kept = layer(torch.randn(3, 8))
    layer.set_progress(0.5)
    (layer(torch.randn(3, 8)).sum() + ecomoe.aux_loss(layer)).backward()
    assert kept.requires_grad
