"""How auxiliary losses reach the gradient: the explicit way, the relay, and that the two agree."""

import copy
import warnings

import pytest
import torch
from classifier import EVERY_LOSS, Classifier, batch
from torch.nn import functional as F

import ecomoe
from ecomoe import EcoMoE
from ecomoe.auxiliary import auxiliary_layers
from ecomoe.relay import LossRelay

WAYS = ["explicit", "relay"]


def gradients(model, way, batches, *, scale=1.0, weight=None):
    """Return all gradients after a backward pass on each batch, loss divided by their number."""
    model.zero_grad()
    relay = None
    if way == "relay":
        relay = LossRelay(model)
        relay.watch(model)
    for x, targets in batches:
        loss = F.cross_entropy(model(x), targets)
        if way == "explicit":
            loss = loss + ecomoe.aux_loss(model)
        if way == "relay" and weight is not None:
            # The owner has normalised its own loss, so that nothing divides after this.
            loss = loss / len(batches)
            relay.attach(loss, weight=weight)
            (loss * scale).backward()
        else:
            if way == "relay":
                relay.attach(loss)
            (loss * scale / len(batches)).backward()
    if relay is not None:
        relay.close()
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert actual[name] is None, name
        else:
            torch.testing.assert_close(
                actual[name], gradient, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


def task_gradients(model, batches):
    """Return the gradients of the task alone."""
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x, targets in batches:
            (F.cross_entropy(model(x), targets) / len(batches)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


class TestTheTwoWaysAgree:
    @pytest.mark.parametrize("num_calls", [1, 3])
    @pytest.mark.parametrize("num_batches", [1, 4])
    @pytest.mark.parametrize("scale", [1.0, 1024.0])
    def test_scaled_accumulated_and_called_several_times(self, num_calls, num_batches, scale):
        model = Classifier(num_calls=num_calls, **EVERY_LOSS)
        batches = [batch(seed) for seed in range(num_batches)]
        explicit = gradients(model, "explicit", batches, scale=scale)
        relayed = gradients(model, "relay", batches, scale=scale)
        assert_same(relayed, explicit)
        # And it is no small matter: the task alone gives another gradient.
        task = task_gradients(model, batches)["moes.0.router.score.weight"]
        total = explicit["moes.0.router.score.weight"] / scale
        assert (total - task).norm() > 0.1 * task.norm()

    def test_a_loss_that_is_normalised_over_the_window_already(self):
        model = Classifier(**EVERY_LOSS)
        batches = [batch(seed) for seed in range(4)]
        expected = gradients(model, "explicit", batches)
        assert_same(gradients(model, "relay", batches, weight=1 / 4), expected)

    @pytest.mark.parametrize("num_calls", [1, 3])
    @pytest.mark.parametrize(
        ("way", "reentrant"), [("explicit", False), ("relay", False), ("relay", True)]
    )
    # Checkpointing, when reentrant, asks for an input that requires a gradient.
    def test_checkpointing(self, way, reentrant, num_calls):
        batches = [batch(seed) for seed in range(2)]
        expected = gradients(Classifier(num_calls=num_calls, **EVERY_LOSS), "explicit", batches)
        model = Classifier(checkpointing=reentrant, num_calls=num_calls, **EVERY_LOSS)
        assert_same(gradients(model, way, batches), expected)

    @pytest.mark.parametrize("frozen", ["router", "experts", "all"])
    def test_frozen_parts(self, frozen):
        model = Classifier(**EVERY_LOSS)
        for moe in model.moes:
            (moe if frozen == "all" else getattr(moe, frozen)).requires_grad_(False)
        explicit = gradients(model, "explicit", [batch()])
        assert_same(gradients(model, "relay", [batch()]), explicit)
        assert explicit["embed.weight"].any()
        assert (explicit["moes.0.router.score.weight"] is None) == (frozen != "experts")

    def test_random_routing_still_trains_the_router(self):
        model = Classifier(warmup_fraction=0.5, **EVERY_LOSS)
        results = []
        for way in WAYS:
            torch.manual_seed(7)
            results.append(gradients(model, way, [batch()]))
        assert_same(*results)
        assert results[0]["moes.0.router.score.weight"].any()

    def test_two_forward_passes_before_one_backward_pass(self):
        model = Classifier(**EVERY_LOSS)
        (x, targets), (x2, targets2) = batch(0), batch(1, num_tokens=5)
        results = []
        for way in WAYS:
            model.zero_grad()
            if way == "relay":
                relay = LossRelay(model)
                relay.watch(model)
            loss = F.cross_entropy(model(x), targets) + F.cross_entropy(model(x2), targets2)
            if way == "explicit":
                (loss + ecomoe.aux_loss(model)).backward()
            else:
                relay.attach(loss)
                loss.backward()
            results.append({name: p.grad for name, p in model.named_parameters()})
        assert_same(*results)

    def test_evaluation_between_forward_and_backward(self):
        model = Classifier(**EVERY_LOSS)
        expected = gradients(model, "explicit", [batch()])
        model.zero_grad()
        relay = LossRelay(model)
        relay.watch(model)
        x, targets = batch()
        loss = F.cross_entropy(model(x), targets)
        relay.attach(loss)
        with torch.no_grad():
            model.eval()(batch(5)[0])
        model.train()
        loss.backward()
        assert_same({name: p.grad for name, p in model.named_parameters()}, expected)


class TestSeveralCalls:
    def test_each_call_counts_by_its_tokens(self):
        layer = EcoMoE(6, 5, tiers=(2, 2), dtype=torch.float64, **EVERY_LOSS)
        parts = batch()[0].split([1, 4, 7])
        losses = []
        for part in parts:
            single = copy.deepcopy(layer)
            single(part)
            losses.append(ecomoe.aux_loss(single))
        outputs = [layer(part) for part in parts]
        assert len(outputs) == 3
        expected = sum(len(p) * loss for p, loss in zip(parts, losses, strict=True)) / 12
        torch.testing.assert_close(ecomoe.aux_loss(layer), expected)

    def test_layers_are_summed(self):
        model = Classifier(**EVERY_LOSS)
        model(batch()[0])
        expected = sum(ecomoe.aux_loss(moe) for moe in model.moes)
        torch.testing.assert_close(ecomoe.aux_loss(model), expected)

    def test_a_call_without_tokens_counts_for_nothing(self):
        layer = EcoMoE(6, 5, tiers=(2, 2), dtype=torch.float64, **EVERY_LOSS)
        x = batch()[0]
        layer(x)
        expected = ecomoe.aux_loss(layer).detach()
        outputs = layer(x[:0]), layer(x)
        assert len(outputs[0]) == 0
        torch.testing.assert_close(ecomoe.aux_loss(layer).detach(), expected)


class TestExplicit:
    def test_reading_twice_gives_the_same(self):
        model = Classifier()
        model(batch()[0])
        assert ecomoe.aux_loss(model) == ecomoe.aux_loss(model) > 0

    @pytest.mark.parametrize("wrap", ["layer", "part"])
    def test_a_compiled_layer_counts_once(self, wrap):
        layer = EcoMoE(8, 8, tiers=(4,))
        compiled = torch.compile(layer, backend="eager")  # passes on what it is asked for
        layer(torch.randn(5, 8))
        model = compiled if wrap == "layer" else torch.nn.Sequential(compiled)
        assert ecomoe.aux_loss(model).item() == pytest.approx(ecomoe.aux_loss(layer).item())
        assert len(list(auxiliary_layers(model))) == 1

    def test_evaluation_has_none(self):
        model = Classifier()
        model.eval()(batch()[0])
        assert ecomoe.aux_loss(model) == 0
        model.train()
        with torch.no_grad():
            model(batch()[0])
        assert ecomoe.aux_loss(model) == 0
        assert all(not slot.terms for _, _, slot in auxiliary_layers(model))

    def test_after_the_step_the_value_is_there_for_a_log_without_its_graph(self):
        model = Classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, targets = batch()
        loss = F.cross_entropy(model(x), targets) + ecomoe.aux_loss(model)
        value = ecomoe.aux_loss(model).item()
        loss.backward()
        optimizer.step()
        logged = ecomoe.aux_loss(model)
        assert logged == value
        assert not logged.requires_grad

    def test_a_layer_that_a_step_leaves_out(self):
        # As in LayerDrop: what it left in an earlier step has no graph any more.
        model = Classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, targets = batch()
        (F.cross_entropy(model(x), targets) + ecomoe.aux_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        y = model.head(model.moes[0](model.embed(x)))
        (F.cross_entropy(y, targets) + ecomoe.aux_loss(model)).backward()
        assert model.moes[0].router.score.weight.grad.any()
        assert model.moes[1].router.score.weight.grad is None

    @pytest.mark.parametrize("part", ["reads", "never reads"])
    @pytest.mark.filterwarnings("ignore:the auxiliary losses .* never used")
    def test_an_optimizer_that_steps_unseen(self, part):
        # A fused step leaves the versions of its parameters as they are.
        layer = EcoMoE(8, 16, tiers=(2, 2))
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        for reads in (part == "reads", True):
            loss = layer(torch.randn(3, 8)).sum()
            (loss + ecomoe.aux_loss(layer) if reads else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        # A step that leaves the layer out finds a value without a graph.
        assert not ecomoe.aux_loss(layer).requires_grad

    @pytest.mark.filterwarnings("ignore:the auxiliary losses .* never used")
    def test_on_the_last_micro_batch_alone(self):
        model, expected = Classifier(**EVERY_LOSS), Classifier(**EVERY_LOSS)
        for read in (False, True):
            x, targets = batch(int(read))
            loss = F.cross_entropy(model(x), targets)
            (loss + ecomoe.aux_loss(model) if read else loss).backward()
        F.cross_entropy(expected(batch(0)[0]), batch(0)[1]).backward()
        for moe in expected.moes:
            moe.auxiliary = type(moe.auxiliary)()
        (F.cross_entropy(expected(x), targets) + ecomoe.aux_loss(expected)).backward()
        assert_same(
            {name: p.grad for name, p in model.named_parameters()},
            {name: p.grad for name, p in expected.named_parameters()},
        )

    @pytest.mark.parametrize("num_calls", [1, 3])
    def test_a_batch_that_is_skipped_leaves_nothing(self, num_calls):
        model = Classifier(num_calls=num_calls, **EVERY_LOSS)
        expected = gradients(model, "explicit", [batch(1)])
        model.zero_grad()
        for seed, factor in ((0, float("nan")), (1, 1.0)):
            x, targets = batch(seed)
            task = F.cross_entropy(model(x * factor), targets)
            if not task.isfinite():
                continue
            (task + ecomoe.aux_loss(model)).backward()
        assert_same({name: p.grad for name, p in model.named_parameters()}, expected)

    def test_a_forward_pass_without_gradients_has_none_of_an_earlier_ones(self):
        model = Classifier()
        x, targets = batch()
        (F.cross_entropy(model(x), targets) + ecomoe.aux_loss(model)).backward()
        with torch.no_grad():
            model(x)
        assert ecomoe.aux_loss(model) == 0

    def test_a_forward_pass_without_gradients_leaves_what_still_waits(self):
        model = Classifier(**EVERY_LOSS)
        expected = gradients(model, "explicit", [batch()])
        model.zero_grad()
        x, targets = batch()
        task = F.cross_entropy(model(x), targets)
        with torch.no_grad():
            model(batch(1)[0])
        (task + ecomoe.aux_loss(model)).backward()
        assert_same({name: p.grad for name, p in model.named_parameters()}, expected)

    def test_a_graph_that_is_retained_can_be_read_later(self):
        model = Classifier(**EVERY_LOSS)
        expected = gradients(model, "explicit", [batch()])
        model.zero_grad()
        x, targets = batch()
        F.cross_entropy(model(x), targets).backward(retain_graph=True)
        ecomoe.aux_loss(model).backward()
        assert_same({name: p.grad for name, p in model.named_parameters()}, expected)


class TestWarnings:
    def step(self, model, optimizer):
        x, targets = batch()
        F.cross_entropy(model(x), targets).backward()
        optimizer.step()

    def test_unread(self):
        model = Classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.step(model, optimizer)
        with pytest.warns(UserWarning, match=r"never used.*ecomoe.aux_loss\(model\).*Monitor"):
            self.step(model, optimizer)

    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
    @pytest.mark.parametrize("foreach", [False, True])
    def test_unread_is_noticed_with_a_frozen_router(self, optimizer, foreach):
        model = Classifier(divergence_weight=0.1)
        for moe in model.moes:
            moe.router.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer(trained, lr=0.1, foreach=foreach)
        self.step(model, optimizer)
        with pytest.warns(UserWarning, match="never used"):
            self.step(model, optimizer)

    def test_unread_calls_without_a_backward_pass_are_no_reason(self):
        # A layer called several times, with the losses read at the end.
        model = Classifier(num_calls=4)
        outputs = [model(batch(seed)[0]) for seed in range(3)]
        assert ecomoe.aux_loss(model) > 0
        assert len(outputs) == 3

    def test_unread_is_told_once_a_layer_and_needs_no_step(self):
        model = Classifier()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for seed in range(4):
                x, targets = batch(seed)
                F.cross_entropy(model(x), targets).backward()
        assert ["never used" in str(warning.message) for warning in told] == [True, True]

    def test_reentrant_checkpointing(self):
        model = Classifier(checkpointing=True)
        x, targets = batch()
        loss = F.cross_entropy(model(x), targets) + ecomoe.aux_loss(model)
        with pytest.warns(UserWarning, match=r"reentrant.*use_reentrant=False.*Monitor"):
            loss.backward()

    def test_both_ways_at_once(self):
        model = Classifier()
        relay = LossRelay(model)
        model(batch()[0])
        with pytest.warns(UserWarning, match=r"0 here.*count them twice.*drop one"):
            assert ecomoe.aux_loss(model) == 0
        assert ecomoe.aux_loss(model) == 0  # told once
        relay.close()


def test_no_model():
    with pytest.raises(ValueError, match=r"model=None must be an nn\.Module; pass"):
        ecomoe.aux_loss(None)


def test_the_model_is_walked_once_however_many_layers_it_has(monkeypatch):
    import torch.distributed.fsdp  # with which each layer is asked for the units that it is in

    model = Classifier()
    model(batch()[0])
    walked = []
    named_modules = torch.nn.Module.named_modules

    def counted(self, *arguments, **keywords):
        walked.append(self)
        return named_modules(self, *arguments, **keywords)

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    ecomoe.aux_loss(model).backward()
    assert sum(module is model for module in walked) == 1
