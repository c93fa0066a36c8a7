"""Under Trainer, the auxiliary gradient is what one big batch would give, whoever owns the loss."""

from types import SimpleNamespace

import pytest
import torch
from delivery import (
    BALANCE,
    RecordingTrainer,
    language_loss,
    ratio,
    reference_gradient,
    relative_error,
    router_gradient,
    texts,
    tiny_gpt2,
    train,
    trainer_for,
)
from torch.nn import functional as F
from transformers.trainer_pt_utils import LabelSmoother

import ecomoe


def layers(model) -> list[ecomoe.EcoMoE]:
    return [module for module in model.modules() if isinstance(module, ecomoe.EcoMoE)]


# The five columns of the table, but for data-parallel ranks: test_delivery_parallel.py.
WINDOWS = {
    "accumulation 1": ({"gradient_accumulation_steps": 1}, 3 * [1]),
    "accumulation 4": ({"gradient_accumulation_steps": 4}, [4]),
    "partial window": ({"gradient_accumulation_steps": 3}, [3, 3, 1]),
    "reentrant": (
        {
            "gradient_accumulation_steps": 2,
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": True},
        },
        [2, 2],
    ),
    "non-reentrant": (
        {
            "gradient_accumulation_steps": 2,
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
        },
        [2, 2],
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_router_gradient_is_that_of_one_big_batch(case):
    arguments, sizes = WINDOWS[case]
    windows = train(tiny_gpt2(), texts(2 * sum(sizes)), **arguments)
    assert [len(window.batches) for window in windows] == sizes
    for window in windows:
        reference = reference_gradient(window)
        assert ratio(window.gradient, reference) == pytest.approx(1.0, abs=1e-5)
        assert relative_error(window.gradient, reference) < 1e-5


def smoothed_loss(model, batch):
    output = model(input_ids=batch)
    return LabelSmoother(epsilon=0.1)(output, batch, shift_labels=True)


def half_loss(model, batch):
    return language_loss(model, batch) / 2


def half_loss_func(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch / 2


class HalfLossTrainer(RecordingTrainer):
    """A subclass that computes its own loss: here a mean over each batch."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss / 2, outputs) if return_outputs else outputs.loss / 2


class PartsTrainer(RecordingTrainer):
    """A subclass that calls parts of the model, never the whole."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model.lm_head(model.transformer(inputs["input_ids"]).last_hidden_state)
        return half_loss_func(
            SimpleNamespace(logits=outputs), inputs["labels"], num_items_in_batch=num_items_in_batch
        )


class ScaledTrainer(RecordingTrainer):
    """A trainer with fp16's loss scaling."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


class PerBatchTrainer(RecordingTrainer):
    """As for a model that takes no ``num_items_in_batch``: its loss is a mean over a batch."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False


OWNERS = {
    "model, over the window": (RecordingTrainer, {}, {}, language_loss, 1.0),
    "model, over a batch": (PerBatchTrainer, {}, {}, language_loss, 1.0),
    "label smoother": (RecordingTrainer, {"label_smoothing_factor": 0.1}, {}, smoothed_loss, 1.0),
    "function": (RecordingTrainer, {}, {"compute_loss_func": half_loss_func}, half_loss, 1.0),
    "subclass": (HalfLossTrainer, {}, {}, half_loss, 1.0),
    "subclass, by parts": (PartsTrainer, {}, {}, half_loss, 1.0),
    "scaler": (ScaledTrainer, {}, {}, language_loss, 1024.0),
}


@pytest.mark.parametrize("owner", OWNERS)
def test_router_gradient_whoever_owns_the_loss(owner):
    trainer_class, arguments, more, loss, scale = OWNERS[owner]
    windows = train(
        tiny_gpt2(),
        texts(10),
        trainer_class=trainer_class,
        gradient_accumulation_steps=3,
        more=more,
        **arguments,
    )
    assert [len(window.batches) for window in windows] == [3, 2]
    for window in windows:
        reference = reference_gradient(window, loss=loss)
        assert relative_error(window.gradient / scale, reference) < 1e-5


def test_without_delivery_the_ratio_is_far_from_1():
    """What the other tests would see if the auxiliary losses were lost."""
    (window,) = train(tiny_gpt2(), texts(8), gradient_accumulation_steps=4)
    model = tiny_gpt2().train()
    language_loss(model, torch.cat(window.batches)).backward()
    assert abs(ratio(router_gradient(model), window.gradient)) < 0.05


@pytest.mark.parametrize(("steps", "size", "length"), [(1, 4, 16), (4, 4, 16), (4, 8, 64)])
def test_balance_over_micro_batches_is_within_the_documented_bound(steps, size, length):
    """It is nonlinear in a batch's means: exact for one batch, within E / N for several."""
    (window,) = train(
        tiny_gpt2(BALANCE),
        texts(steps * size, length),
        gradient_accumulation_steps=steps,
        per_device_train_batch_size=size,
    )
    bound = 1e-5 if steps == 1 else tiny_gpt2().transformer.h[0].mlp.num_experts / (size * length)
    reference = reference_gradient(window, BALANCE)
    assert relative_error(window.gradient, reference) < bound
    assert ratio(window.gradient, reference) == pytest.approx(1.0, abs=bound)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
def test_compiled(monkeypatch):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "")  # TrainingArguments sets them for the whole process
        monkeypatch.delenv(name)
    windows = train(
        tiny_gpt2(n_layer=1),
        texts(8),
        gradient_accumulation_steps=2,
        torch_compile=True,
        torch_compile_backend="aot_eager",
    )
    for window in windows:
        assert relative_error(window.gradient, reference_gradient(window, n_layer=1)) < 1e-5


def test_logged_loss_stays_the_task_loss():
    model = tiny_gpt2()
    trainer = trainer_for(model, texts(6), gradient_accumulation_steps=3)
    trainer.train()
    window, log = trainer.recorder.windows[0], trainer.recorder.logs[0]
    with torch.no_grad():
        task = language_loss(tiny_gpt2().train(), torch.cat(window.batches)).item()
    assert log["loss"] == pytest.approx(task, rel=1e-5)


def test_auxiliary_losses_are_logged_by_name():
    trainer = trainer_for(tiny_gpt2(), texts(6), gradient_accumulation_steps=3)
    trainer.train()
    window, log = trainer.recorder.windows[0], trainer.recorder.logs[0]
    model = tiny_gpt2().train()
    for layer in layers(model):
        layer.set_progress(window.progress)
    expected = []
    for batch in window.batches:
        language_loss(model, batch)
        terms = {name: 0.0 for name in layers(model)[0].auxiliary.terms}
        total = ecomoe.aux_loss(model).item()
        for layer in layers(model):
            for name, term in layer.auxiliary.terms.items():
                terms[name] += term.item() / 2
        ecomoe.aux_loss(model)
        model.zero_grad()
        expected.append(terms | {"total": total})
    for name in expected[0]:
        mean = sum(terms[name] for terms in expected) / 3
        assert log[f"aux_{name}"] == pytest.approx(mean, rel=1e-5, abs=1e-6)
    assert {key for key in log if key.startswith("aux_")} == {f"aux_{name}" for name in expected[0]}
