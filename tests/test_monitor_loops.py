"""The monitor in the loops of Accelerate and Lightning, and with layers of another package."""

import gc
import re
from pathlib import Path

import pytest
import torch
from language import REAL, make_data, make_model

import ecomoe
from ecomoe.ecology.sinks import read_records, read_runs

GUIDE = Path(__file__).parent.parent / "docs" / "monitor.md"
BATCH, ACCUMULATION, STEPS = 4, 2, 6


def blocks(heading):
    """Return the Python of a section of the guide."""
    section = GUIDE.read_text().split(f"{heading}\n", 1)[1].split("\n## ")[0].split("\n### ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    gc.collect()  # what earlier tests left behind ends now, not within a run that is compared
    reset()
    yield lambda: accelerate.Accelerator(
        cpu=True, mixed_precision="bf16", gradient_accumulation_steps=ACCUMULATION
    )
    reset()


def run_accelerate(accelerator, log, *, save=None, stop=None, resume=None):
    """Train, evaluate and generate every other step; return the model."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(make_data(BATCH * ACCUMULATION * STEPS), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    monitor = ecomoe.Monitor(
        model, optimizer=optimizer, total_steps=STEPS, every=2, log=log, view="off"
    )
    accelerator.register_for_checkpointing(monitor)
    begun = 0
    if resume is not None:
        accelerator.load_state(str(resume))
        begun = monitor.step_count * ACCUMULATION
        loader = accelerator.skip_first_batches(loader, begun)
    taken = begun // ACCUMULATION
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss + ecomoe.aux_loss(model)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            taken += 1
            if taken % 2 == 0:
                evaluate(model)
            if taken == 4 and save is not None:
                accelerator.save_state(str(save))
            if taken == stop:
                break
    monitor.close()
    return model


def evaluate(model):
    model.eval()
    batch = torch.utils.data.default_collate(make_data(3))
    with torch.no_grad():
        model(**batch)
        model.generate(
            batch["input_ids"][:, :4], max_new_tokens=2, min_new_tokens=2, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    model.train()


@pytest.mark.filterwarnings("ignore:.*attention mask.*")
def test_accelerate(accelerator, tmp_path):
    model = run_accelerate(accelerator(), tmp_path / "run.jsonl")
    records = list(read_records(tmp_path / "run.jsonl"))
    seen = [(r["step"], r["phase"], r["layers"][0]["num_tokens"]) for r in records]
    in_training = 2 * ACCUMULATION * BATCH * REAL
    in_generation = 3 * (4 + 5)  # without a cache, the second call takes the whole sequence again
    assert seen == [
        (2, "train", in_training),
        (2, "eval", 3 * REAL),
        (4, "train", in_training),
        (4, "generate", in_generation),
        (4, "eval", 3 * REAL),
        (6, "train", in_training),
        (6, "generate", in_generation),
        (6, "eval", 3 * REAL),
        (6, "generate", in_generation),
    ]
    assert all(r["metrics"]["judged"] == 3 * (REAL - 1) for r in records if r["phase"] == "eval")
    assert [r["progress"] for r in records if r["phase"] == "train"] == pytest.approx(
        [1 / 3, 2 / 3, 1], abs=1e-6
    )
    moe = model.transformer.h[0].mlp
    assert moe.temperature.item() == pytest.approx(moe.control.temperature_at(1.0))


def test_accelerate_resumes(accelerator, tmp_path):
    whole = run_accelerate(accelerator(), tmp_path / "whole.jsonl", save=tmp_path / "whole")
    log, checkpoint = tmp_path / "parts.jsonl", tmp_path / "parts"
    run_accelerate(accelerator(), log, save=checkpoint, stop=5)
    records = list(read_records(tmp_path / "whole.jsonl"))
    # Until the checkpoint nothing is resumed: else this machine does not compute the same twice.
    assert [r for r in read_records(log) if r["step"] <= 4] == [
        r for r in records if r["step"] <= 4
    ]
    resumed = run_accelerate(accelerator(), log, resume=checkpoint)
    (run,) = read_runs(log)
    assert run.records == records
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore")  # those of Lightning about its own environment
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    names = {}
    exec(blocks("### Lightning")[0], names)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make_model()

        def training_step(self, batch, index):
            return self.model(**batch).loss + ecomoe.aux_loss(self.model)

        def validation_step(self, batch, index):
            self.model(**batch)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def loader(num):
        return torch.utils.data.DataLoader(make_data(num), batch_size=BATCH)

    class Save(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    def run(log, *, callbacks=(), resume=None):
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=2, accumulate_grad_batches=2, logger=False,
            callbacks=[names["Ecology"](log=log, every=2, view="off"), *callbacks],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        module = Module()
        trainer.fit(module, loader(6 * BATCH), loader(2 * BATCH), ckpt_path=resume)
        assert not [hook for part in module.modules() for hook in part._forward_hooks]
        (run,) = read_runs(log)
        return run.records

    whole = run(tmp_path / "run.jsonl", callbacks=[Save()])
    assert [(r["step"], r["phase"], r["layers"][0]["num_tokens"]) for r in whole] == [
        (2, "train", 4 * BATCH * REAL),
        (3, "eval", 2 * BATCH * REAL),
        (4, "train", 4 * BATCH * REAL),
        (6, "train", 4 * BATCH * REAL),
        (6, "eval", 2 * BATCH * REAL),
    ]
    resumed = run(tmp_path / "run.jsonl", resume=tmp_path / "saved.ckpt")
    assert resumed == whole


def test_worked_example_of_another_package_s_layer():
    names = {}
    torch.manual_seed(0)
    for block in blocks("## Layers of another package"):
        exec(block, names)
    model, monitor = names["model"], names["monitor"]
    received = [0] * 8

    def count(number):
        def hook(module, args):
            received[number] += len(args[0])

        return hook

    for number, expert in enumerate(model[0].experts):
        expert.register_forward_pre_hook(count(number))
    for _ in range(3):
        model(torch.randn(5, 20, 16)).sum().backward()
    (layer,) = monitor.report("train").to_dict()["layers"]
    monitor.close()
    assert layer["counts"]["topk"] == received
    assert (layer["num_tokens"], layer["top_k"]) == (300, 2)
    assert layer["token_entropy"] > 0
    assert layer["lockdown"]["probes"] > 0
