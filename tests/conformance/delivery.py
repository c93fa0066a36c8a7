"""A tiny language model, trained by Trainer, and the gradient that it should have seen.

Run as a program, it is one rank of a data-parallel run: `torchrun delivery.py FOLDER`.
"""

import contextlib
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import ecomoe
from ecomoe.integrations.timm_training import TaskSession
from ecomoe.integrations.trainer import TrainerSession

LENGTH = 16
BATCH = 2

# Every loss that is a mean over tokens or a function of parameters alone, and none that is not.
LINEAR = {
    "balance_weight": 0.0,
    "oracle_weight": 4.0,
    "z_weight": 0.5,
    "ortho_weight": 1.0,
    "divergence_weight": 1.0,
    "strength": 1.0,
}
# The balance loss and, at this target, next to nothing else.
BALANCE = {"balance_weight": 4.0, "target_e": 1e-3, "strength": 1.0}


class Window(NamedTuple):
    """What one optimizer step saw: the share of training done, its micro-batches, its gradient."""

    progress: float
    batches: list[torch.Tensor]
    gradient: torch.Tensor


def tiny_gpt2(layer_arguments=LINEAR, **config) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "loss_type": "ForCausalLM"}
    model = GPT2LMHeadModel(GPT2Config(**(sizes | no_dropout | tokens | config)))
    for block in model.transformer.h:
        block.mlp = ecomoe.EcoMoE(32, 64, tiers=(2, 2, 2), temperature=2.0, **layer_arguments)
    return model


def texts(count, length=LENGTH) -> list[dict[str, torch.Tensor]]:
    # A skewed distribution, so that tokens and hence the experts' shares differ between batches.
    generator = torch.Generator().manual_seed(1)
    ids = (torch.rand(count, length, generator=generator) ** 2 * 64).long()
    # No label stands on the first token, so that Trainer's count of labels is the loss's.
    ignored = torch.tensor([-100])
    return [{"input_ids": row, "labels": torch.cat([ignored, row[1:]])} for row in ids]


def router_gradient(model) -> torch.Tensor:
    """All that only auxiliary losses and gates reach, as one vector."""
    gradients = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if "router" in name or "prototypes" in name
    ]
    whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in gradients]
    return torch.cat([grad.flatten() for grad in whole])


class Recorder(TrainerCallback):
    """Runs a session and keeps what each optimizer step sees."""

    def __init__(self):
        self.session = None
        self.windows = []
        self.batches = []
        self.logs = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.session = TrainerSession(model, args=args, state=state, optimizer=optimizer)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        window = Window(self.session.schedule.progress, self.batches, router_gradient(model))
        self.windows.append(window)
        self.batches = []

    def on_step_end(self, args, state, control, **kwargs):
        self.session.advance(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(logs | self.session.auxiliary_logs())

    def on_train_end(self, args, state, control, **kwargs):
        self.session.close()


class RecordingTrainer(Trainer):
    """Tells its recorder which batches it trains on; the loss is Trainer's own."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.recorder.batches.append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, num_items_in_batch)


def trainer_for(model, data, trainer_class=RecordingTrainer, more=None, **arguments):
    recorder = Recorder()
    options = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": BATCH,
        "learning_rate": 0.0,  # each window's gradient is taken at the same parameters
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(**(options | arguments)),
        train_dataset=data,
        callbacks=[recorder],
        **(more or {}),
    )
    trainer.recorder = recorder
    return trainer


def train(model, data, **arguments) -> list[Window]:
    trainer = trainer_for(model, data, **arguments)
    trainer.train()
    return trainer.recorder.windows


def language_loss(model, batch):
    return model(input_ids=batch, labels=batch).loss


def reference_gradient(window, layer_arguments=LINEAR, loss=language_loss, **config):
    """The gradient of task and auxiliary losses on the window as one big batch."""
    model = tiny_gpt2(layer_arguments, **config).train()
    for block in model.transformer.h:
        block.mlp.set_progress(window.progress)
    (loss(model, torch.cat(window.batches)) + ecomoe.aux_loss(model)).backward()
    return router_gradient(model)


def ratio(gradient, reference) -> float:
    """The gradient projected on the reference: 1 is right."""
    gradient, reference = gradient.double(), reference.double()
    return (gradient @ reference / (reference @ reference)).item()


def relative_error(gradient, reference) -> float:
    return ((gradient - reference).norm() / reference.norm()).item()


CASES = {"linear": LINEAR, "balance": BALANCE}


DDP_MODES = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
}


class LossTask(nn.Module):
    """A module whose forward returns the final loss, around a model that may be distributed."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return {"loss": language_loss(self.model, batch)}


def train_under_ddp(mode, batches, *, explicit=False) -> list[Window]:
    """One optimizer step over the batches, in a loop of one's own."""
    model = tiny_gpt2().train()
    ddp = nn.parallel.DistributedDataParallel(model, **DDP_MODES[mode])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    task = LossTask(ddp)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        # A static graph is one for all iterations, so that there every micro-batch synchronises.
        with contextlib.nullcontext() if last or mode == "static" else ddp.no_sync():
            if explicit:
                ((task(batch)["loss"] + ecomoe.aux_loss(model)) / len(batches)).backward()
            else:
                with TaskSession(task, model=ddp, optimizer=optimizer, total_steps=10):
                    (task(batch)["loss"] / len(batches)).backward()
    return [Window(0.0, batches, router_gradient(model))]


def train_under_fsdp(batches) -> list[Window]:
    """One optimizer step over the batches, each block and the whole sharded over the ranks."""
    model = tiny_gpt2().train()
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    task = LossTask(model)
    with TaskSession(task, model=model, optimizer=optimizer, total_steps=10):
        for index, batch in enumerate(batches):
            model.set_requires_gradient_sync(index == len(batches) - 1)
            (task(batch)["loss"] / len(batches)).backward()
    return [Window(0.0, batches, router_gradient(model))]


def main(out):
    warnings.simplefilter("error")
    runs = {
        case: train(tiny_gpt2(layer_arguments), texts(16), gradient_accumulation_steps=2)
        for case, layer_arguments in CASES.items()
    }
    rank = torch.distributed.get_rank()
    ids = torch.stack([text["input_ids"] for text in texts(8)])
    batches = list(ids[rank::2].split(BATCH))
    for mode in DDP_MODES:
        runs[f"task, {mode}"] = train_under_ddp(mode, batches)
    runs["task, sharded"] = train_under_fsdp(batches)
    runs["explicit"] = train_under_ddp("plain", batches, explicit=True)
    for name, windows in runs.items():
        torch.save([tuple(window) for window in windows], Path(out) / f"{name} {rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
