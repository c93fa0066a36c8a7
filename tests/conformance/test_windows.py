"""Auxiliary gradients over accumulated, checkpointed and scaled windows, on every model."""

import warnings

import pytest
import torch
from delivery import LINEAR, ratio, relative_error, router_gradient
from matrix import (
    SETTINGS,
    TIMM,
    build,
    covers,
    inputs_of,
    layers_of,
    run,
    skip_left_out,
    task_loss,
)
from matrix import without_dropout as off
from torch import nn

import ecomoe
from ecomoe.integrations.timm_training import TaskSession


class Task(nn.Module):
    """A module whose forward returns the final loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return {"loss": task_loss(self.model, inputs)}


def model_of(name):
    model = ecomoe.convert(build(name), init="noise", **SETTINGS, **LINEAR).train()
    off(model)
    return model


def split(inputs):
    """One sample each."""
    count = len(next(iter(inputs.values())))
    return [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(count)]


def one_big_batch(name, batches):
    model = model_of(name)
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    (task_loss(model, whole) + ecomoe.aux_loss(model)).backward()
    return router_gradient(model)


def deliver(model, batches, *, explicit, scale=1.0):
    """Return the gradient of a window of micro-batches, as the loop's owner would take it."""
    model.zero_grad()
    task = Task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    factor = scale / len(batches)
    if explicit:
        for batch in batches:
            ((task(batch)["loss"] + ecomoe.aux_loss(model)) * factor).backward()
    else:
        with TaskSession(task, optimizer=optimizer, total_steps=10):
            for batch in batches:
                (task(batch)["loss"] * factor).backward()
    return router_gradient(model) / scale


def assert_right(gradient, reference):
    assert ratio(gradient, reference) == pytest.approx(1.0, abs=1e-5)
    assert relative_error(gradient, reference) < 1e-5


@covers("16", "17")
@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "relay"])
def test_windows(name, explicit):
    """Three micro-batches, a partial window of one, and a loss scaled by 1024."""
    model = model_of(name)
    samples = split(inputs_of(model, batch=4))
    for window in (samples[:3], samples[3:]):
        reference = one_big_batch(name, window)
        assert_right(deliver(model, window, explicit=explicit), reference)
        assert_right(deliver(model, window, explicit=explicit, scale=1024.0), reference)


@covers("15", "15 reentrant")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_windows(name, reentrant):
    """The relay delivers where a layer's loss is there only during ``backward()``."""
    if reentrant:
        skip_left_out("15 reentrant", name)
    model = model_of(name)
    samples = split(inputs_of(model, batch=2))
    if name in TIMM:
        model.set_grad_checkpointing()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert_right(deliver(model, samples, explicit=False), one_big_batch(name, samples))


@covers("25 task loss")
def test_the_task_loss_stays_as_it_is(name):
    model = model_of(name)
    inputs = inputs_of(model)
    alone = task_loss(model, inputs)
    task = Task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with TaskSession(task, optimizer=optimizer, total_steps=10) as session:
        loss = task(inputs)["loss"]
        assert torch.equal(loss, alone)
        loss.backward()
        logs = session.auxiliary_logs()
    assert logs["aux_total"] > 0
    assert {"aux_entropy", "aux_oracle", "aux_ortho", "aux_z"} <= logs.keys()


@covers("25 calls")
def test_a_layer_called_several_times_counts_once(name):
    """Its loss is the mean over the calls."""
    model = ecomoe.convert(build(name), **SETTINGS).train()
    calls = []
    (layer,) = layers_of(model)
    layer.register_forward_hook(
        lambda m, i, o: calls.append(
            sum(m.term_weights()[k] * v for k, v in m.auxiliary.terms.items())
        )
    )
    run(model, inputs_of(model))
    assert len(calls) == 2
    torch.testing.assert_close(ecomoe.aux_loss(model), sum(calls) / 2)
