"""The schedule follows the optimizer, and resumes exactly."""

import copy
import pickle

import pytest
import torch
from torch import nn

import ecomoe
from ecomoe.schedule import Schedule, unwrap_optimizer


def model(**arguments) -> nn.Module:
    torch.manual_seed(0)
    layers = [ecomoe.EcoMoE(8, 16, tiers=(2, 2), temperature=3.0, **arguments) for _ in range(2)]
    return nn.Sequential(nn.Linear(8, 8), *layers)


def train_step(model, optimizer) -> None:
    optimizer.zero_grad()
    (model(torch.randn(3, 8)).sum() + ecomoe.aux_loss(model)).backward()
    optimizer.step()


def temperatures(model) -> list[float]:
    return [layer.temperature.item() for layer in model[1:]]


class Wrapper(torch.optim.Optimizer):
    """Delegates to another optimizer without initialising itself, as Accelerate's wrapper does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


def test_layers_follow_the_optimizer():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with Schedule(net, total_steps=10, optimizer=optimizer) as schedule:
        control = net[1].control
        for step in range(12):
            assert schedule.step == step
            assert schedule.progress == min(step / 10, 1.0)
            expected = control.temperature_at(schedule.progress)
            assert temperatures(net) == pytest.approx([expected] * 2, rel=1e-6)
            train_step(net, optimizer)


def test_warmup_ends_on_its_step():
    net = model(warmup_fraction=0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    seen = []
    with Schedule(net, total_steps=10, optimizer=optimizer):
        for _ in range(5):
            seen.append(bool(net[1].random_routing))
            train_step(net, optimizer)
    assert seen == [True, True, True, False, False]


def test_closing_removes_the_hook():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    schedule = Schedule(net, total_steps=10, optimizer=optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    schedule.close()
    schedule.close()
    assert not optimizer._optimizer_step_post_hooks
    train_step(net, optimizer)
    assert schedule.step == 0


def test_closing_after_an_exception():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with pytest.raises(KeyError), Schedule(net, total_steps=10, optimizer=optimizer):
        raise KeyError
    assert not optimizer._optimizer_step_post_hooks


def test_a_wrapped_optimizer_is_counted_where_it_steps():
    net = model()
    inner = torch.optim.SGD(net.parameters(), lr=0.01)
    assert unwrap_optimizer(Wrapper(Wrapper(inner))) is inner
    with Schedule(net, total_steps=10, optimizer=Wrapper(inner)) as schedule:
        train_step(net, Wrapper(inner))
        assert schedule.step == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_count(fused):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with Schedule(net, total_steps=10, optimizer=optimizer) as schedule:
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            loss = net(torch.randn(3, 8)).sum() + ecomoe.aux_loss(net)
            scaler.scale(loss * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        assert schedule.step == 2


def test_resuming_is_exact():
    def run(net, optimizer, schedule, num_steps):
        for _ in range(num_steps):
            train_step(net, optimizer)

    def build():
        net = model()
        optimizer = torch.optim.AdamW(net.parameters())
        return net, optimizer, Schedule(net, total_steps=10, optimizer=optimizer)

    net, optimizer, schedule = build()
    torch.manual_seed(1)
    run(net, optimizer, schedule, 2)
    kept = copy.deepcopy((net.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    random_state = torch.get_rng_state()
    run(net, optimizer, schedule, 2)

    again, optimizer_again, schedule_again = build()
    for part, state in zip((again, optimizer_again, schedule_again), kept, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random_state)
    run(again, optimizer_again, schedule_again, 2)

    assert schedule_again.state_dict() == schedule.state_dict() == {"step": 4, "total_steps": 10}
    assert temperatures(again) == temperatures(net)
    for ours, theirs in zip(again.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_state_is_plain_data():
    state = Schedule(model(), total_steps=10).state_dict()
    assert pickle.loads(pickle.dumps(state)) == state == {"step": 0, "total_steps": 10}


def test_counting_does_not_wait_for_the_device():
    """On another device the schedule reads nothing: meta tensors have no value to read."""
    net = model().to("meta")
    schedule = Schedule(net, total_steps=10)
    for step in range(10):
        schedule.advance(step)


@pytest.mark.parametrize("total_steps", [0, -1, 1.5, True, None, "10"])
def test_wrong_total_steps(total_steps):
    with pytest.raises(ValueError, match=r"total_steps=.* must be an int >= 1; pass the number"):
        Schedule(model(), total_steps=total_steps)


@pytest.mark.parametrize("step", [-1, 1.5, True, None])
def test_wrong_step(step):
    schedule = Schedule(model(), total_steps=10)
    with pytest.raises(ValueError, match=r"step=.* must be an int >= 0; pass the optimizer steps"):
        schedule.advance(step)
    assert schedule.step == 0


def test_model_without_layers():
    with pytest.raises(ValueError, match=r"model=Linear holds no EcoMoE layer.*ecomoe\.convert"):
        Schedule(nn.Linear(2, 2), total_steps=10)


def test_no_model():
    with pytest.raises(ValueError, match=r"must be an nn\.Module; pass the converted model"):
        Schedule("gpt2", total_steps=10)


@pytest.mark.parametrize("optimizer", [object(), "adam", Wrapper(None)])
def test_optimizer_without_steps_to_count(optimizer):
    with pytest.raises(ValueError, match=r"must be a torch.optim.Optimizer.*call advance\(step\)"):
        Schedule(model(), total_steps=10, optimizer=optimizer)


@pytest.mark.parametrize("state", [{}, {"step": 3}, {"step": 3, "total_steps": 10, "lr": 1}])
def test_wrong_state(state):
    with pytest.raises(ValueError, match="it must have step and total_steps"):
        Schedule(model(), total_steps=10).load_state_dict(state)


def test_state_of_a_run_of_another_length():
    schedule = Schedule(model(), total_steps=10)
    with pytest.raises(ValueError, match=r"total_steps=20, this schedule has 10; .*advance"):
        schedule.load_state_dict({"step": 3, "total_steps": 20})
    assert schedule.step == 0
