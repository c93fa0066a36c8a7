"""The monitor as a callback of transformers' Trainer."""

import io
import json
import re

import pytest
import torch
from language import LENGTH, REAL, SIZE, make_data, make_model

import ecomoe
from ecomoe.ecology.sinks import read_records

pytestmark = pytest.mark.filterwarnings("ignore:`torch.*:DeprecationWarning")


def make_trainer(folder, callbacks, **options):
    from transformers import Trainer, TrainingArguments

    settings = {
        "max_steps": 8, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4,
        "save_strategy": "no", "per_device_train_batch_size": 4, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4, "seed": 1,
    } | options  # fmt: skip
    return Trainer(
        make_model(),
        TrainingArguments(str(folder), **settings),
        train_dataset=make_data(),
        eval_dataset=make_data(8),
        callbacks=callbacks,
    )


def hooks_of(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_records_logs_and_report(tmp_path, capsys):
    log = tmp_path / "run.jsonl"
    monitor = ecomoe.Monitor(log=log)
    trainer = make_trainer(tmp_path / "out", [monitor])
    trainer.train()
    records = list(read_records(log))
    assert [(r["step"], r["phase"]) for r in records] == [
        (2, "train"), (4, "train"), (4, "eval"), (6, "train"), (8, "train"), (8, "eval"),
    ]  # fmt: skip
    for record in records:
        calls = {"train": 2 * 2 * 4, "eval": 8}[record["phase"]]
        for layer in record["layers"]:
            assert layer["num_tokens"] == calls * REAL
            assert layer["padding"] == calls * (LENGTH - REAL)
            assert (layer["accuracy"] is None) == (record["phase"] == "train")
    assert records[-1]["metrics"]["judged"] == 8 * (REAL - 1)
    eval_log = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    # The Trainer divides by all labels, though the first of each sequence is never predicted.
    assert records[-1]["metrics"]["loss"] == pytest.approx(eval_log["eval_loss"], rel=1e-5)
    assert eval_log["eval_ecology/dead_top1"] == records[-1]["dead"]["top1"]
    train_log = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert train_log["ecology/e_now"] == pytest.approx(records[-1]["control"]["e_now"])
    for entry in (train_log, eval_log):
        assert 8 <= sum("ecology/" in key for key in entry) <= 10
    trainer.save_state()
    saved = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert saved["log_history"] == trainer.state.log_history
    assert records[-1]["progress"] == 1.0
    assert "tiers 2:2" in capsys.readouterr().out
    assert not hooks_of(trainer.model)


@pytest.mark.parametrize("view", ["report", "lines", "live"])
def test_text_starts_beside_no_progress_bar(tmp_path, monkeypatch, view):
    screen = io.StringIO()  # where both streams end on a terminal
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    make_trainer(tmp_path, [ecomoe.Monitor(view=view)], disable_tqdm=False, max_steps=4).train()
    text = screen.getvalue().replace("\x1b[A", "")  # a line up, in the same column
    assert "it/s]" in text
    assert "'ecology/dead_top1': " in text  # the progress line
    told = [found.start() for found in re.finditer(r"step \d+ (train|eval): DEAD", text)]
    assert len(told) == {"report": 1, "lines": 4, "live": 4}[view]
    for start in told:
        assert text[start - 1] in "\r\n"


def test_values_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(
        tmp_path, [ecomoe.Monitor(view="off")], report_to="tensorboard", max_steps=4
    )
    trainer.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.*")}
    tags = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    assert "train/ecology/dead_top1" in tags
    assert "eval/ecology/dead_top1" in tags


def test_values_reach_weights_and_biases(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monitor = ecomoe.Monitor(view="off")
    make_trainer(tmp_path, [monitor], report_to="wandb", max_steps=4).train()
    told = dict(wandb.run.summary)
    wandb.finish()
    report = monitor.report("train").to_dict()
    assert told["train/ecology/dead_top1"] == report["dead"]["top1"]
    assert told["train/ecology/e_now"] == pytest.approx(report["control"]["e_now"])
    assert told["eval/ecology/dead_top1"] == monitor.report("eval").to_dict()["dead"]["top1"]


def test_an_event_stops_the_trainer_in_good_order(tmp_path):
    events = []

    def stop(event):
        if event.kind == "death":
            events.append(event)
            trainer.control.should_training_stop = True

    settings = {"max_steps": 40, "save_strategy": "steps", "save_steps": 40}
    trainer = make_trainer(tmp_path, [ecomoe.Monitor(view="off", on_event=stop)], **settings)
    with torch.no_grad():
        trainer.model.transformer.h[1].mlp.router.score.bias[3] = -30
    trainer.train()
    assert {(event.layer, event.expert) for event in events} == {("transformer.h.1.mlp", 3)}
    assert trainer.state.global_step == events[-1].step < 20
    assert not hooks_of(trainer.model)


def test_training_is_bit_equal_with_a_broken_monitor(tmp_path, monkeypatch):
    monitored = make_trainer(tmp_path / "a", [ecomoe.Monitor(view="off")])
    monitored.train()
    monkeypatch.setattr("ecomoe.ecology.taps.LayerTap.observe", lambda *args, **kwargs: 1 / 0)
    broken = make_trainer(tmp_path / "b", [ecomoe.Monitor(view="off")])
    with pytest.warns(UserWarning, match="ZeroDivisionError") as told:
        broken.train()
    assert sum("ZeroDivisionError" in str(warning.message) for warning in told) == 1
    for name, value in monitored.model.state_dict().items():
        assert torch.equal(value, broken.model.state_dict()[name]), name


def test_resuming_gives_the_same_history(tmp_path):
    def run(name, *, stop=None, resume=None):
        log = tmp_path / f"{name}.jsonl"
        monitor = ecomoe.Monitor(log=log, view="off")
        trainer = make_trainer(tmp_path / name, [monitor], save_strategy="steps", save_steps=3)
        if stop is not None:

            class Stop(RuntimeError):
                pass

            def fail(*args, **kwargs):
                if trainer.state.global_step == stop:
                    raise Stop
                return original(*args, **kwargs)

            original, trainer.training_step = trainer.training_step, fail
            with pytest.raises(Stop):
                trainer.train()
        else:
            trainer.train(resume_from_checkpoint=resume)
        return list(read_records(log))

    whole = run("whole")
    partial = run("parts", stop=5)
    assert partial
    resumed = run("parts", resume=str(tmp_path / "parts" / "checkpoint-3"))
    assert json.dumps(resumed) == json.dumps(whole)


def test_checkpoint_comes_after_the_log_of_its_step(tmp_path):
    def run(name, resume=None):
        monitor = ecomoe.Monitor(view="off", log=tmp_path / f"{name}.jsonl")
        settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "max_steps": 4}
        trainer = make_trainer(tmp_path / name, [monitor], **settings)
        trainer.train(resume_from_checkpoint=resume)
        return list(read_records(tmp_path / f"{name}.jsonl"))

    whole = run("run")
    assert run("run", str(tmp_path / "run" / "checkpoint-2")) == whole


def test_failed_beginning_leaves_no_hook(tmp_path):
    trainer = make_trainer(tmp_path, [ecomoe.Monitor(view="off"), ecomoe.Monitor(view="off")])
    with pytest.raises(ValueError, match="already"):
        trainer.train()
    assert not hooks_of(trainer.model)


def test_evaluation_alone_needs_no_training(tmp_path):
    trainer = make_trainer(tmp_path, [ecomoe.Monitor(view="off")])
    trainer.evaluate()  # nothing is attached, nothing breaks


def test_model_of_transformers_without_ecomoe_layers(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    trainer = make_trainer(tmp_path, [monitor := ecomoe.Monitor(view="off")], max_steps=2)
    torch.manual_seed(0)
    trainer.model = trainer.model_wrapped = MixtralForCausalLM(
        MixtralConfig(
            hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=SIZE, num_local_experts=4, use_cache=False,
        )
    )  # fmt: skip
    trainer.callback_handler.model = trainer.model
    trainer.train()
    (layer,) = monitor.report("train").to_dict()["layers"]
    assert layer["name"] == "model.layers.0.mlp"
    assert layer["num_tokens"] == 2 * 2 * 4 * REAL
    assert layer["control"] is None
    assert layer["verified"] is True


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_told_from_evaluation(use_cache):
    model = make_model().eval()
    ids = torch.randint(1, SIZE, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with ecomoe.Monitor(model, view="off") as monitor:
        model.generate(
            ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False,
            use_cache=use_cache, pad_token_id=0,
        )  # fmt: skip
        model(ids)
        (layer, _) = monitor.report("generate").to_dict()["layers"]
        expected = 8 + 2 * 2 if use_cache else 8 + 10 + 12
        assert (layer["num_tokens"], layer["padding"]) == (expected, 2 if use_cache else 6)
        assert monitor.report("eval").to_dict()["layers"][0]["num_tokens"] == 10


def test_generation_in_the_middle_of_training_is_apart():
    model = make_model().train()
    ids = torch.randint(1, SIZE, (2, 5))
    with ecomoe.Monitor(model, view="off") as monitor:
        (model(ids, labels=ids, use_cache=True).loss + ecomoe.aux_loss(model)).backward()
        model.generate(
            ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=True, pad_token_id=0
        )
        assert monitor.report("train").to_dict()["layers"][0]["num_tokens"] == 10
        assert monitor.report("generate").to_dict()["layers"][0]["num_tokens"] == 14
