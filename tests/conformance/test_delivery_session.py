"""What a training session leaves behind (nothing), survives, and refuses."""

import contextlib
import copy
import inspect
import pickle
import tempfile
import warnings
from types import SimpleNamespace

import pytest
import torch
from delivery import (
    Recorder,
    RecordingTrainer,
    Window,
    language_loss,
    reference_gradient,
    relative_error,
    router_gradient,
    texts,
    tiny_gpt2,
    trainer_for,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments

import ecomoe
from ecomoe.integrations.trainer import TrainerSession, calling_trainer


def hooks(model) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def armed(model) -> bool:
    return any(m.auxiliary.relay for m in model.modules() if isinstance(m, ecomoe.EcoMoE))


def nothing_left(trainer) -> bool:
    return (
        not hooks(trainer.model_wrapped)
        and not armed(trainer.model)
        and not trainer.optimizer.optimizer._optimizer_step_post_hooks
        and "backward" not in vars(trainer.accelerator)
    )


def test_nothing_is_left_after_training():
    trainer = trainer_for(tiny_gpt2(), texts(4))
    trainer.train()
    assert nothing_left(trainer)
    trainer.recorder.session.close()
    assert nothing_left(trainer)


class Failing(RecordingTrainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise KeyError("broken batch")
        return super().training_step(*args, **kwargs)


def test_nothing_is_left_after_an_exception():
    trainer = trainer_for(tiny_gpt2(), texts(4), trainer_class=Failing)
    with pytest.raises(KeyError):
        trainer.train()
    assert nothing_left(trainer)
    assert not {"_run_epoch", "_evaluate", "_finalize_training"} & set(vars(trainer))
    trainer.recorder.session.close()


class Interrupting(TrainerCallback):
    def __init__(self, event):
        setattr(self, event, self.interrupt)

    def interrupt(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_epoch_end", "on_train_end"])
def test_a_new_trainer_and_monitor_go_on_after_an_interruption(event):
    model = tiny_gpt2()
    for interrupted in (True, False):
        trainer = trainer_for(model, texts(4))
        trainer.remove_callback(trainer.recorder)
        if interrupted:
            trainer.add_callback(Interrupting(event))
        monitor = ecomoe.Monitor(view="off")
        trainer.add_callback(monitor)
        with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
            trainer.train()
        assert nothing_left(trainer)
    assert monitor.step_count == 2


def test_training_again_works():
    trainer = trainer_for(tiny_gpt2(), texts(4))
    trainer.train()
    first = [window.gradient for window in trainer.recorder.windows]
    trainer.recorder.windows.clear()
    trainer.train()
    second = [window.gradient for window in trainer.recorder.windows]
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


def test_a_session_that_cannot_start_leaves_nothing():
    trainer = trainer_for(nn.Linear(2, 2), texts(4))
    with pytest.raises(ValueError, match="model=Linear holds no EcoMoE layer"):
        trainer.train()
    assert nothing_left(trainer)


def test_two_sessions_on_one_model_are_refused():
    trainer = trainer_for(tiny_gpt2(), texts(4))
    trainer.add_callback(type("Second", (Recorder,), {})())
    with pytest.raises(ValueError, match="a model takes one Monitor at a time"):
        trainer.train()


def test_data_parallel_in_one_process_is_refused():
    args = SimpleNamespace(n_gpu=2)
    with pytest.raises(ValueError, match=r"args\.n_gpu=2 .* must be 1: launch with `torchrun"):
        TrainerSession(tiny_gpt2(), args=args, state=None, trainer=object())


def test_without_a_trainer_there_is_no_session():
    args, state = SimpleNamespace(n_gpu=1), SimpleNamespace(max_steps=1, global_step=0)
    assert calling_trainer(args, state) is None
    with pytest.raises(ValueError, match=r"no transformers\.Trainer among the callers.*Monitor\("):
        TrainerSession(tiny_gpt2(), args=args, state=state)


class Stray(TrainerCallback):
    """Does to the model what callbacks do in between."""

    def __init__(self, act):
        self.act = act

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.act(model)

    on_step_end = on_substep_end


def evaluate(model):
    model.eval()
    model(**batch())
    with torch.no_grad():
        model(**batch())
    model.train()


def forward_in_training_mode(model):
    with torch.no_grad():
        model(**batch())


def generate(model):
    with torch.no_grad():
        model.generate(batch()["input_ids"][:, :4], max_new_tokens=2, do_sample=False)


def copy_it(model):
    twin = copy.deepcopy(model)
    assert not armed(twin)
    twin.activation_checkpointing_disable()
    language_loss(twin, batch()["input_ids"])
    assert ecomoe.aux_loss(twin) > 0


def pickle_it(model):
    twin = pickle.loads(pickle.dumps(model.transformer.h[0].mlp))
    assert not armed(twin)


def batch():
    return {"input_ids": torch.stack([text["input_ids"] for text in texts(2)])}


@pytest.mark.parametrize(
    "act",
    [evaluate, forward_in_training_mode, generate, copy_it, pickle_it],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # no_grad, reentrant
def test_what_happens_in_between_changes_no_gradient(act, reentrant):
    arguments = {"gradient_accumulation_steps": 2}
    if reentrant is not None:
        arguments |= {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
    undisturbed = trainer_for(tiny_gpt2(), texts(8), **arguments)
    undisturbed.train()
    disturbed = trainer_for(tiny_gpt2(), texts(8), **arguments)
    disturbed.add_callback(Stray(act))
    disturbed.train()
    pairs = zip(undisturbed.recorder.windows, disturbed.recorder.windows, strict=True)
    for ours, theirs in pairs:
        assert relative_error(theirs.gradient, ours.gradient) < 1e-6


def test_evaluating_in_training_changes_no_gradient():
    gradients = []
    for arguments in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        trainer = trainer_for(tiny_gpt2(), texts(4), more={"eval_dataset": texts(2)}, **arguments)
        trainer.train()
        gradients.append(torch.cat([window.gradient for window in trainer.recorder.windows]))
    assert torch.equal(*gradients)


class Unaided(RecordingTrainer):
    """Calls backward past the accelerator."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model.train(), inputs, num_items_in_batch=num_items_in_batch)
        loss.backward()
        return loss.detach()


def test_a_lost_loss_is_told_once():
    trainer = trainer_for(tiny_gpt2(), texts(6), trainer_class=Unaided)
    with pytest.warns(
        UserWarning, match=r"did not reach the gradient.*accelerator\.backward"
    ) as told:
        trainer.train()
    assert len(told) == 1


class Adding(RecordingTrainer):
    """Adds the auxiliary losses itself, too."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss + ecomoe.aux_loss(model)


def test_a_loss_added_twice_counts_once_and_is_told():
    once = trainer_for(tiny_gpt2(), texts(2))
    once.train()
    twice = trainer_for(tiny_gpt2(), texts(2), trainer_class=Adding)
    with pytest.warns(UserWarning, match="a Monitor already delivers the auxiliary losses"):
        twice.train()
    assert torch.equal(once.recorder.windows[0].gradient, twice.recorder.windows[0].gradient)


class Shared(nn.Module):
    """One layer called three times a forward pass, as in ALBERT, and on chunks of the tokens."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 32)
        self.moe = ecomoe.EcoMoE(
            32, 64, tiers=(2, 2), balance_weight=0.0, oracle_weight=4.0, z_weight=0.5, strength=1.0
        )
        self.reentrant = reentrant

    def block(self, x):
        return x + torch.cat([self.moe(x[:, :5]), self.moe(x[:, 5:])], dim=1)

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for _ in range(3):
            if self.reentrant is None:
                x = self.block(x)
            else:
                x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return {"loss": x.square().mean()}


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_layer_called_several_times_counts_once(reentrant):
    trainer = trainer_for(Shared(reentrant), texts(4), gradient_accumulation_steps=2)
    trainer.train()
    (window,) = trainer.recorder.windows
    model = Shared(None).train()
    model.moe.set_progress(window.progress)
    (model(torch.cat(window.batches))["loss"] + ecomoe.aux_loss(model)).backward()
    assert relative_error(window.gradient, router_gradient(model)) < 1e-5


@pytest.mark.parametrize("steps", [1, 3])
def test_resuming_gives_the_same_losses_to_the_bit(tmp_path, steps):
    def run(resume=None):
        model = tiny_gpt2({"warmup_fraction": 0.3})
        trainer = trainer_for(
            model,
            texts(12 * steps),
            output_dir=str(tmp_path / "run"),
            gradient_accumulation_steps=steps,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(resume_from_checkpoint=resume)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return logs, [window.progress for window in trainer.recorder.windows], model

    straight, progress, model = run()
    resumed, progress_again, model_again = run(str(tmp_path / "run" / "checkpoint-2"))
    assert progress == [step / 6 for step in range(6)]
    assert progress_again == progress[2:]
    assert resumed == straight
    for ours, theirs in zip(model.parameters(), model_again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_schedule_follows_the_trainer():
    trainer = trainer_for(tiny_gpt2(), texts(8))
    trainer.train()
    layer = trainer.model.transformer.h[0].mlp
    assert [window.progress for window in trainer.recorder.windows] == [0.0, 0.25, 0.5, 0.75]
    assert layer.temperature.item() == pytest.approx(layer.control.temperature_at(1.0))


def test_wrapped_again_by_another():
    """Whoever wraps the accelerator's backward after us keeps theirs, which then passes through."""
    trainer = trainer_for(tiny_gpt2(), texts(2))

    class Other(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            inner = trainer.accelerator.backward
            trainer.accelerator.backward = lambda loss, **kwargs: inner(loss, **kwargs)

    trainer.add_callback(Other())
    trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parameter = torch.ones((), requires_grad=True)
        trainer.accelerator.backward(parameter * 2)
    assert parameter.grad == 2


def test_the_monitor_is_all_there_is():
    """A plain Trainer and a plain model: losses delivered, schedule driven, terms logged."""
    gradients = []

    class Reader(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.append(router_gradient(model))

    model, data = tiny_gpt2(), texts(8)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            tempfile.mkdtemp(),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            num_train_epochs=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=data,
        callbacks=[ecomoe.Monitor(view="off"), Reader()],
    )
    trainer.train()
    ids = torch.stack([text["input_ids"] for text in data])
    (gradient,) = gradients
    assert relative_error(gradient, reference_gradient(Window(0.0, [ids], None))) < 1e-5
    log = trainer.state.log_history[0]
    with torch.no_grad():
        assert log["loss"] == pytest.approx(language_loss(tiny_gpt2().train(), ids).item(), 1e-5)
    assert {"aux_entropy", "aux_oracle", "aux_z", "aux_total"} <= set(log)
    layer = model.transformer.h[0].mlp
    assert layer.temperature.item() == pytest.approx(layer.control.temperature_at(1.0))
    assert nothing_left(trainer)


def test_trainer_still_has_the_seam():
    """What the session relies on in transformers; a new version that moves it fails here first."""
    step = inspect.getsource(Trainer.training_step)
    assert step.count("self.accelerator.backward(loss") == 1
    assert "loss / self.current_gradient_accumulation_steps" in step
    loop = inspect.getsource(Trainer._run_epoch)
    assert "self.current_gradient_accumulation_steps = len(batch_samples)" in loop
    begin = inspect.getsource(Trainer._inner_training_loop)
    assert "self.callback_handler.on_train_begin(args, self.state" in begin
    assert begin.index("_prepare_for_training") < begin.index("on_train_begin")
