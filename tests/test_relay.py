"""The relay: the final loss stays its owner's, and nothing is left behind."""

import pytest
import torch
from classifier import EVERY_LOSS, Classifier, batch
from test_auxiliary import WAYS, assert_same, gradients, task_gradients
from torch.nn import functional as F

import ecomoe
from ecomoe.auxiliary import auxiliary_layers
from ecomoe.relay import LossRelay


class TestRelay:
    def hooks(self, model):
        return [
            (name, len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in model.named_modules()
        ]

    def test_the_logged_loss_stays_the_tasks(self):
        model = Classifier(**EVERY_LOSS)
        x, targets = batch()
        expected = F.cross_entropy(model.eval()(x), targets)
        relay = LossRelay(model.train())
        relay.watch(model)
        loss = F.cross_entropy(model(x), targets)
        relay.attach(loss)
        assert relay.num_attached == 1
        torch.testing.assert_close(loss, expected)

    def test_close_leaves_nothing(self):
        model = Classifier()
        before = self.hooks(model)
        relay = LossRelay(model)
        relay.watch(model)
        assert self.hooks(model) != before
        relay.close()
        relay.close()
        assert self.hooks(model) == before
        for _, _, slot in auxiliary_layers(model):
            assert slot.relay is slot.cell is slot.tokens is None
        model(batch()[0])
        assert ecomoe.aux_loss(model) > 0
        LossRelay(model).close()

    def test_a_second_one_is_refused_and_changes_nothing(self):
        model = Classifier()
        relay = LossRelay(model)
        before = self.hooks(model)
        with pytest.raises(ValueError, match=r"layer 'moes.0' already .* close the other"):
            LossRelay(model)
        with pytest.raises(ValueError, match="close the other"):
            LossRelay(model.moes[1])
        assert self.hooks(model) == before
        assert all(slot.relay is relay for _, _, slot in auxiliary_layers(model))

    def test_a_loss_without_a_graph_is_left_alone(self):
        model = Classifier().eval()
        relay = LossRelay(model)
        x, targets = batch()
        with torch.no_grad():
            relay.attach(F.cross_entropy(model(x), targets))
        assert relay.num_attached == 0

    def test_without_attach_only_the_task_teaches(self):
        model = Classifier(**EVERY_LOSS)
        expected = task_gradients(model, [batch()])
        relay = LossRelay(model)
        relay.watch(model)
        x, targets = batch()
        F.cross_entropy(model(x), targets).backward()
        for name, parameter in model.named_parameters():
            task = expected[name]
            task = torch.zeros_like(parameter) if task is None else task
            torch.testing.assert_close(parameter.grad, task)

    @pytest.mark.parametrize("skipped_is_bound", [False, True])
    def test_a_forward_pass_that_is_thrown_away_counts_for_nothing(self, skipped_is_bound):
        model = Classifier(**EVERY_LOSS)
        expected = gradients(model, "relay", [batch(0), batch(1)], scale=2.0)
        model.zero_grad()
        relay = LossRelay(model)
        relay.watch(model)
        for seed, kept in ((0, True), (2, False), (3, False), (1, True)):
            x, targets = batch(seed, num_tokens=12 + seed % 2)
            x, targets = (x, targets) if seed != 1 else batch(1)
            if not skipped_is_bound:
                loss = None
            loss = F.cross_entropy(model(x), targets)
            relay.attach(loss)
            if kept:
                loss.backward()
        assert_same({name: p.grad for name, p in model.named_parameters()}, expected)
        relay.close()

    def test_a_second_order_gradient_of_the_task(self):
        # As in a gradient penalty; what the relay holds is a constant in it.
        model = Classifier(**EVERY_LOSS)
        x, targets = batch()
        results = []
        for way in WAYS:
            model.zero_grad()
            relay = LossRelay(model) if way == "relay" else None
            if relay is not None:
                relay.watch(model)
            inputs = x.clone().requires_grad_()
            outputs = model(inputs)
            (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
            loss = F.cross_entropy(outputs, targets) + slope.square().sum()
            if relay is None:
                loss = loss + ecomoe.aux_loss(model)
            else:
                relay.attach(loss)
            loss.backward()
            results.append({name: p.grad for name, p in model.named_parameters()})
        assert_same(*results)
