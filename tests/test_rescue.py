import functools

import pytest
import torch
from torch import nn

import ecomoe
from ecomoe import EcoMoE
from ecomoe.ecology.events import Event
from ecomoe.rescue import Rescued, expert_parameters, rescue
from ecomoe.routers import Router


def starved(top_k=2, router="mlp", **options):
    """Return a layer whose expert 1 is never chosen, tokens, and the slots of each expert."""
    torch.manual_seed(0)
    layer = EcoMoE(8, 16, tiers=(2, 2), top_k=top_k, router=router, **options)
    with torch.no_grad():
        layer.router.score.bias[1] = -50.0
    x = torch.randn(512, 8)
    return layer, x, slots_of(layer, x)


def slots_of(layer, x):
    ids = []
    hook = layer.router.register_forward_hook(lambda m, a, r: ids.append(r.expert_ids_NK))
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.train()
    hook.remove()
    return torch.bincount(ids[0].flatten(), minlength=layer.num_experts)


@pytest.mark.parametrize("router", ["mlp", "linear"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_dead_expert_shares_its_donors_tokens(router, top_k):
    layer, x, slots = starved(top_k, router)
    assert slots[1] == 0
    (found,) = rescue(layer, {"": slots})
    assert found == Rescued("", 1, int(slots.argmax()))
    after = slots_of(layer, x)
    donor = found.donor
    assert after[1] > 0.2 * slots[donor]
    if top_k == 1:
        others = [e for e in range(4) if e not in (1, donor)]
        assert (after[others] - slots[others]).abs().sum() <= 0.02 * slots.sum()


def test_top_1_computes_what_it_did_up_to_the_noise():
    layer, x, slots = starved(top_k=1)
    layer.eval()
    before = layer(x)
    rescue(layer, {"": slots}, noise=0.0)
    torch.testing.assert_close(layer(x), before)
    rescue(layer, {"": slots}, noise=0.01)
    error = (layer(x) - before).norm(dim=-1) / before.norm(dim=-1)
    assert error.median() < 0.05


def test_everything_of_the_expert_and_nothing_else_changes():
    layer, _, slots = starved(gated=True, ortho_weight=0.1)
    before = {name: value.clone() for name, value in layer.named_parameters()}
    (found,) = rescue(layer, {"": slots}, noise=0.0)
    own = {id(parameter) for parameter in expert_parameters(layer)}
    for name, value in layer.named_parameters():
        if id(value) not in own:
            assert torch.equal(value, before[name]), name
            continue
        expected = before[name].clone()
        expected[found.expert] = before[name][found.donor]
        assert torch.equal(value, expected), name
    assert {n for n, p in layer.named_parameters() if id(p) not in own} == {
        "router.hidden.weight",
        "router.hidden.bias",
    }


def test_several_dead_experts_spread_over_donors():
    layer = EcoMoE(8, 8, tiers=(6,))
    found = rescue(layer, {"": [0, 100, 0, 60, 0, 40]})
    assert [(f.expert, f.donor) for f in found] == [(0, 1), (2, 3), (4, 1)]


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(torch.optim.AdamW, lr=1e-3),
        functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
        functools.partial(torch.optim.Adafactor, lr=1e-3),
    ],
)
def test_the_optimizers_state_of_the_slices_becomes_the_donors(make):
    layer, x, slots = starved()
    optimizer = make(layer.parameters())
    for _ in range(2):
        (layer(x).square().mean() + ecomoe.aux_loss(layer)).backward()
        optimizer.step()
    before = {
        key: value.clone()
        for key, value in optimizer.state[layer.experts.up_proj.weight].items()
        if isinstance(value, torch.Tensor)
    }
    (found,) = rescue(layer, {"": slots}, optimizer=optimizer)
    checked = 0
    for key, value in optimizer.state[layer.experts.up_proj.weight].items():
        if isinstance(value, torch.Tensor) and value.shape[:1] == (4,):
            expected = before[key].clone()
            expected[found.expert] = before[key][found.donor]
            assert torch.equal(value, expected), key
            checked += 1
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, before[key])
    assert checked


def test_a_rescued_expert_learns_on_its_own():
    layer, x, slots = starved()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    (found,) = rescue(layer, {"": slots}, optimizer=optimizer)
    target = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(30):
        optimizer.zero_grad()
        ((layer(x) - target).square().mean() + ecomoe.aux_loss(layer)).backward()
        optimizer.step()
    assert slots_of(layer, x)[1] > 0.01 * 2 * len(x)
    up = layer.experts.up_proj.weight
    assert (up[found.expert] - up[found.donor]).norm() > 0.1 * up[found.donor].norm()


def test_ranks_draw_the_same_noise_and_the_global_generator_is_left_alone():
    layer, _, slots = starved()
    twin, _, _ = starved()
    state = torch.get_rng_state()
    rescue(layer, {"": slots})
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    rescue(twin, {"": slots})
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_reads_a_monitor_a_report_and_its_dict():
    for read in (lambda m: m, lambda m: m.report(), lambda m: m.report().to_dict()):
        layer, x, _ = starved()
        model = nn.Sequential(layer)
        with ecomoe.Monitor(model, view="off") as monitor:
            model(x)
            found = rescue(model, read(monitor))
        assert [(f.layer, f.expert) for f in found] == [("0", 1)]


def test_the_monitor_that_watches_the_model_is_the_default():
    layer, x, _ = starved()
    model = nn.Sequential(layer)
    with ecomoe.Monitor(model, view="off"):
        model(x)
        assert [(f.layer, f.expert) for f in rescue(model)] == [("0", 1)]
    with pytest.raises(ValueError, match="watches the model, and 0 do; pass one"):
        rescue(model)
    with (
        ecomoe.Monitor(model, view="off"),
        ecomoe.Monitor(model, view="off"),
        pytest.raises(ValueError, match="and 2 do"),
    ):
        rescue(model)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("watched", ["inside", "outside"])
def test_a_wrapped_model_is_the_model(watched):
    layer, x, _ = starved()
    model = nn.Sequential(layer)
    wrapped = torch.compile(Wrapper(model), backend="eager")
    seen, other = (model, wrapped) if watched == "inside" else (wrapped, model)
    with ecomoe.Monitor(seen, view="off") as monitor:
        seen(x)
        found = rescue(other, monitor)
    assert [(f.layer, f.expert) for f in found] == [("0", 1)]


def test_layers_that_a_wrappers_name_alone_tells_apart_are_both_rescued():
    model, slots = nn.Module(), None
    for name in ("module", "ffn"):
        layer, _, slots = starved()
        setattr(model, name, layer if name == "ffn" else nn.ModuleDict({"ffn": layer}))
    found = rescue(model, {"module.ffn": slots, "ffn": slots})
    assert {f.layer for f in found} == {"module.ffn", "ffn"}


def test_as_an_action_of_the_monitor():
    layer, x, _ = starved()
    model = nn.Sequential(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rescued = []

    def revive(event):
        if event.kind == "death" and event.basis == "topk":
            rescued.extend(ecomoe.rescue(model, monitor, event=event, optimizer=optimizer))

    with torch.no_grad():
        layer.router.score.bias[1] = 0.0
    with ecomoe.Monitor(
        model, optimizer=optimizer, every=2, view="off", on_event=revive
    ) as monitor:
        for step in range(8):
            if step == 2:
                with torch.no_grad():
                    layer.router.score.bias[1] = -50.0
            optimizer.zero_grad()
            (model(x).square().mean() + ecomoe.aux_loss(model)).backward()
            optimizer.step()
        kinds = [(e.kind, e.expert) for e in monitor.events if e.basis == "topk"]
    assert [(f.layer, f.expert) for f in rescued] == [("0", 1)]
    assert ("death", 1) in kinds
    assert ("revival", 1) in kinds


class OwnRouter(Router):
    def __init__(self, **keywords):
        super().__init__(**keywords)
        self.score = nn.Linear(8, self.num_experts)

    def logits(self, x_ND):
        return self.score(x_ND)


def test_a_cosine_routers_row_is_its_centroid():
    layer = EcoMoE(8, 8, tiers=(4,), router="cosine")
    rescue(layer, {"": [5, 0, 9, 5]}, noise=0.0)
    centroids = layer.router.centroids
    assert torch.equal(centroids[1], centroids[2])
    assert not torch.equal(centroids[0], centroids[2])


@pytest.mark.parametrize("router", ["hash", "random"])
def test_refuses_a_router_that_learns_nothing(router):
    message = f"{router.capitalize()}Router, learns nothing.* choose router='linear'"
    with pytest.raises(ValueError, match=message):
        rescue(EcoMoE(8, 8, tiers=(4,), router=router), {"": [5, 0, 9, 5]})


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (lambda layer: ("model", {"": [1]}), ["model='model'", "module"]),
        (lambda layer: (nn.Linear(2, 2), {"": [1]}), ["Linear", "no EcoMoE layer"]),
        (lambda layer: (layer, 7), ["usage is a int", "Monitor"]),
        (lambda layer: (layer, {"other": [1, 2, 3, 4]}), ["''", "'other'", "usage"]),
        (lambda layer: (layer, {"": [1, 2, 3]}), ["[1, 2, 3]", "4 counts"]),
        (lambda layer: (layer, {"": [1, 2, -3, 4]}), ["-3", ">= 0"]),
        (lambda layer: (layer, {"": [0, 0, 0, 0]}), ["not all 0"]),
        (lambda layer: (layer, {"": ["a", 1, 2, 3]}), ["['a', 1, 2, 3]", "4 counts"]),
        (lambda layer: (layer, {"": None}), ["usage['']=None", "4 counts"]),
    ],
)
def test_says_what_is_wrong(arguments, parts):
    model, usage = arguments(EcoMoE(8, 8, tiers=(4,)))
    with pytest.raises(ValueError, match=r"[;:] pass") as raised:
        rescue(model, usage)
    for part in parts:
        assert part in str(raised.value)


def test_refuses_a_router_that_does_not_tell_its_rows_and_changes_nothing():
    first, second = EcoMoE(8, 8, tiers=(4,)), EcoMoE(8, 8, tiers=(4,))
    second.router = OwnRouter(num_experts=4, top_k=2)
    model = nn.Sequential(first, second)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"layer '1', OwnRouter.*expert_parameters"):
        rescue(model, {"0": [5, 0, 5, 5], "1": [5, 0, 5, 5]})
    for one, other in zip(model.parameters(), before, strict=True):
        assert torch.equal(one, other)
    # Nobody to rescue, nothing to refuse.
    assert rescue(model, {"0": [5, 5, 5, 5], "1": [5, 5, 5, 5]}) == []


def test_says_so_where_nobody_lives_to_be_copied_and_changes_nothing():
    model = nn.Sequential(EcoMoE(8, 8, tiers=(4,)), EcoMoE(8, 8, tiers=(128,)))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"layer '1'.*all 128 experts are DEAD.*relative"):
        # Even use is 0.8 % of the slots, and DEAD under 1 % of them.
        rescue(model, {"0": [5, 0, 5, 5], "1": [1] * 128}, thresholds="paper")
    for one, other in zip(model.parameters(), before, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "event",
    ["death", 3, Event(kind="revival", step=1, phase="train", layer="", expert=1)],
    ids=["name", "number", "revival"],
)
def test_refuses_an_event_that_is_no_death(event):
    layer = EcoMoE(8, 8, tiers=(4,))
    with pytest.raises(
        ValueError,
        match=r"event=.* must be an Event of kind 'death'.*; pass .*on_event.*leave event",
    ):
        rescue(layer, {"": [5, 0, 5, 5]}, event=event)


class TestBetweenForwardAndBackward:
    @pytest.mark.parametrize("collected", [False, True])
    def test_it_is_refused_and_the_step_goes_on(self, collected):
        layer, x, slots = starved()
        before = [parameter.clone() for parameter in layer.parameters()]
        y = layer(x)
        loss = y.square().mean() + (ecomoe.aux_loss(layer) if collected else 0)
        with pytest.raises(ValueError, match=r"layer ''.* waits for backward.*; call rescue after"):
            rescue(layer, {"": slots})
        for one, other in zip(layer.parameters(), before, strict=True):
            assert torch.equal(one, other)
        (loss + (0 if collected else ecomoe.aux_loss(layer))).backward()
        assert layer.experts.up_proj.weight.grad.any()
        assert len(rescue(layer, {"": slots})) == 1
        assert y.requires_grad  # it lives, and waits for nothing

    def test_layers_that_nobody_rescues_may_wait(self):
        layer, x, slots = starved()
        other = EcoMoE(8, 8, tiers=(4,))
        y = other(x)
        assert len(rescue(nn.Sequential(layer, other), {"0": slots, "1": [5, 5, 5, 5]})) == 1
        y.sum().backward()

    def test_an_output_thrown_away_waits_for_nothing(self):
        layer, x, slots = starved()
        layer(x)
        assert len(rescue(layer, {"": slots})) == 1


def test_refuses_an_optimizer_that_is_none():
    layer = EcoMoE(8, 8, tiers=(4,))
    with pytest.raises(ValueError, match="optimizer=str"):
        rescue(layer, {"": [5, 0, 5, 5]}, optimizer="adam")
