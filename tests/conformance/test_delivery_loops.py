"""A loop of one's own, with ``task_loss + ecomoe.aux_loss(model)``: by hand or with Accelerate."""

import pytest
import torch
from accelerate import Accelerator
from delivery import (
    LINEAR,
    Window,
    language_loss,
    reference_gradient,
    relative_error,
    texts,
    tiny_gpt2,
)
from delivery import router_gradient as gradient_of
from torch.utils.data import DataLoader

import ecomoe
from ecomoe.schedule import Schedule


def batches(count):
    ids = torch.stack([text["input_ids"] for text in texts(2 * count)])
    return list(ids.split(2))


def total_loss(model, batch):
    return language_loss(model, batch) + ecomoe.aux_loss(model)


def reference(data, **arguments):
    return reference_gradient(Window(0.0, data, None), **arguments)


def checkpointed(model, *, reentrant):
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    return model


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("non_reentrant", [False, True])
def test_accumulation(steps, non_reentrant):
    data, model = batches(steps), tiny_gpt2().train()
    if non_reentrant:
        checkpointed(model, reentrant=False)
    for batch in data:
        (total_loss(model, batch) / steps).backward()
    assert relative_error(gradient_of(model), reference(data)) < 1e-5


def test_two_forward_passes_before_one_backward_pass():
    """Both passes are in the one auxiliary loss, weighted by their tokens."""
    data, model = batches(2), tiny_gpt2().train()
    task = sum(language_loss(model, batch) for batch in data) / 2
    (task + ecomoe.aux_loss(model)).backward()
    assert relative_error(gradient_of(model), reference(data)) < 1e-5


def test_loss_scaling():
    data, model = batches(2), tiny_gpt2().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch in data:
        scaler.scale(total_loss(model, batch) / 2).backward()
    assert relative_error(gradient_of(model) / 1024, reference(data)) < 1e-5
    scaler.step(optimizer)  # unscales
    assert relative_error(gradient_of(model), reference(data)) < 1e-5


def test_autocast():
    """In bf16 the experts round to 8 bits of mantissa; the router and its losses stay in fp32."""
    data, model = batches(2), tiny_gpt2().train()
    for batch in data:
        with torch.autocast("cpu", torch.bfloat16):
            loss = total_loss(model, batch)
        (loss / 2).backward()
    assert relative_error(gradient_of(model), reference(data)) < 5e-2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
def test_compiled():
    def build():
        torch.manual_seed(0)
        return ecomoe.EcoMoE(8, 16, tiers=(2, 2), **LINEAR).train()

    def loss(layer, x_ND):
        return layer(x_ND).square().mean() + ecomoe.aux_loss(layer)

    data = list(torch.randn(2, 5, 8))
    compiled, eager = build(), build()
    step = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for x_ND in data:
        (step(compiled, x_ND) / 2).backward()
    loss(eager, torch.cat(data)).backward()
    assert relative_error(gradient_of(compiled), gradient_of(eager)) < 1e-5


def test_evaluating_in_between():
    data, model = batches(2), tiny_gpt2().train()
    for batch in data:
        (total_loss(model, batch) / 2).backward()
        with torch.no_grad():
            model.eval()(input_ids=batch)
            assert ecomoe.aux_loss(model) == 0
        model.train()
    assert relative_error(gradient_of(model), reference(data)) < 1e-5


def test_a_loss_that_is_lost_is_told():
    model = checkpointed(tiny_gpt2().train(), reentrant=True)
    with pytest.warns(UserWarning, match="lost under reentrant checkpointing.*use_reentrant=False"):
        total_loss(model, batches(1)[0]).backward()


def test_a_loss_that_is_never_read_is_told():
    model = tiny_gpt2().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    language_loss(model, batches(1)[0]).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"never used.*add ecomoe\.aux_loss\(model\)"):
        language_loss(model, batches(1)[0]).backward()


@pytest.mark.parametrize("num_batches", [4, 7])
def test_accelerate(num_batches):
    """Windows of 4 micro-batches, or of 4 and 3; Accelerate divides each micro-batch by 4."""
    model = tiny_gpt2().train()
    ids = [text["input_ids"] for text in texts(2 * num_batches)]
    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(ids, 2))
    seen, data = [], []
    with Schedule(model, total_steps=10, optimizer=optimizer) as schedule:
        for batch in loader:
            data.append(batch)
            with accelerator.accumulate(model):
                accelerator.backward(total_loss(model, batch))
                if accelerator.sync_gradients:
                    seen.append((schedule.progress, data, gradient_of(model)))
                    data = []
                optimizer.step()
                optimizer.zero_grad()
        assert schedule.step == len(seen)
    assert [len(data) for _, data, _ in seen] == ([4] if num_batches == 4 else [4, 3])
    for progress, data, gradient in seen:
        expected = reference_gradient(Window(progress, data, None)) * len(data) / 4
        assert relative_error(gradient, expected) < 1e-5


def test_accelerate_with_the_monitor():
    model = tiny_gpt2().train()
    ids = [text["input_ids"] for text in texts(8)]
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(ids, 2))
    with ecomoe.Monitor(model, optimizer=optimizer, total_steps=4, view="off") as monitor:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(total_loss(model, batch))
                optimizer.step()
                optimizer.zero_grad()
        assert monitor.step_count == 2
        control = model.transformer.h[0].mlp.control
        temperature = model.transformer.h[0].mlp.temperature.item()
        assert temperature == pytest.approx(control.temperature_at(2 / 4))
    assert LINEAR["oracle_weight"] == control.oracle_weight
