"""The training protocol of section 3.4, resumable at any step.

A batch, a learning rate and the schedule are functions of the step alone, so a run that was killed
goes on from its last checkpoint exactly as if it had not been.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ecomoe
from ecomoe import EcoMoE
from examples.experiments.measure import Batch, Record

Progress = Callable[[int, Record | None], None]


@dataclass(kw_only=True)
class Job:
    """A training run.

    Attributes:
        model: Trained in place.
        optimizer: Its groups' learning rates fall to zero by a cosine.
        batch_at: A training batch from its step.
        total_steps: Optimizer steps.
        loss: From model, inputs and targets to the loss, auxiliary losses included.
        evaluate: From the model to a record.
        evaluate_at: Numbers of steps done after which to evaluate.
        before_step: Called with the share of the training done.
        after_step: The same, after the optimizer's step.
        monitor: Watches the model; its state is part of the checkpoint.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch_at: Callable[[int], Batch]
    total_steps: int
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    evaluate: Callable[[nn.Module], Record]
    evaluate_at: frozenset[int]
    before_step: Callable[[float], None] = lambda progress: None
    after_step: Callable[[float], None] = lambda progress: None
    monitor: ecomoe.Monitor | None = None


def fit(
    job: Job, folder: Path, *, on_progress: Progress | None = None
) -> tuple[list[Record], float]:
    """Train to the end, or on from the checkpoint in ``folder``; return records and seconds.

    Seconds are those of training alone, without evaluation and input, over all starts. Each record
    is also a line of ``folder/log.jsonl``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / "checkpoint.pt", folder / "log.jsonl"
    history: list[Record] = []
    seconds, start = 0.0, 0
    rates = [group["lr"] for group in job.optimizer.param_groups]
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        job.model.load_state_dict(state["model"])
        job.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        history, seconds, start = state["history"], state["seconds"], state["step"]
        if job.monitor is not None:
            job.monitor.load_state_dict(state["monitor"])
    # Lines written after the last checkpoint are written again.
    log.write_text("".join(json.dumps(record) + "\n" for record in history))
    device = next(job.model.parameters()).device
    for step in range(start, job.total_steps):
        inputs, targets = job.batch_at(step)
        began = time.perf_counter()
        progress = step / job.total_steps
        for group, rate in zip(job.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
        job.model.train()
        job.before_step(progress)
        loss = job.loss(job.model, inputs.to(device), targets.to(device))
        job.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        job.optimizer.step()
        job.after_step((step + 1) / job.total_steps)
        seconds += time.perf_counter() - began
        record = None
        if step + 1 in job.evaluate_at or step + 1 == job.total_steps:
            record = {"step": step + 1, **job.evaluate(job.model)}
            history.append(record)
            with log.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
            _save(checkpoint, job, history, seconds, step + 1)
        if on_progress is not None:
            on_progress(step + 1, record)
    return history, seconds


def _save(path: Path, job: Job, history: list[Record], seconds: float, step: int) -> None:
    state = {
        "model": job.model.state_dict(),
        "optimizer": job.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "history": history,
        "seconds": seconds,
        "step": step,
        "monitor": None if job.monitor is None else job.monitor.state_dict(),
    }
    # A run killed while it saves must find the former checkpoint.
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    unfinished.replace(path)


def two_rates(
    model: nn.Module, *, encoder_lr: float, expert_lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return AdamW with one learning rate for EcoMoE layers and another for all else."""
    inside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, EcoMoE)
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) not in inside], "lr": encoder_lr},
        {"params": [p for p in trained if id(p) in inside], "lr": expert_lr},
    ]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, weight_decay=weight_decay)


def steps_at(percents: Iterable[int], total_steps: int) -> frozenset[int]:
    """Return the steps done at hundredths of the training, at least 1."""
    return frozenset(max(1, round(percent / 100 * total_steps)) for percent in percents)


class Batches:
    """Shuffled batches of a training set as a function of the step; each epoch anew.

    Args:
        inputs: Images or ids, first axis samples.
        targets: As many.
        size: Samples a batch; the last, smaller one of an epoch is left out.
        seed: Of order and augmentation.
        augment: Whether images are moved, and mirrored where they have colours.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, *, size: int, seed: int, augment: bool
    ) -> None:
        self.inputs, self.targets = inputs, targets
        self.size = min(size, len(inputs))
        self.per_epoch = len(inputs) // self.size
        self.seed = seed
        self.augment = augment
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, step: int) -> Batch:
        """Return the inputs and targets of a step."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.inputs), generator=generator)
        rows = self._order[index * self.size : (index + 1) * self.size]
        inputs, targets = self.inputs[rows], self.targets[rows]
        if self.augment:
            inputs = moved(inputs, torch.Generator().manual_seed(self.seed * 7_000_003 + step))
        return inputs, targets


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop each image at random out of itself, padded by an eighth; mirror coloured ones."""
    count, colours, height, width = images.shape
    reach = height // 8
    padded = F.pad(images, (reach,) * 4, mode="reflect").permute(0, 2, 3, 1)
    down, right = torch.randint(2 * reach + 1, (2, count, 1, 1), generator=generator)
    rows = down + torch.arange(height)[None, :, None]
    columns = right + torch.arange(width)[None, None, :]
    if colours == 3:
        mirror = torch.rand(count, 1, 1, generator=generator) < 0.5
        columns = torch.where(mirror, columns.flip(-1), columns)
    images_index = torch.arange(count)[:, None, None]
    return padded[images_index, rows, columns].permute(0, 3, 1, 2).contiguous()


def split(samples: tuple[Tensor, Tensor], size: int) -> list[Batch]:
    """Return a test set in batches, in order."""
    return list(zip(samples[0].split(size), samples[1].split(size), strict=True))


class ForcedDeath:
    """Holds one expert of every layer just below selection between two shares of the training.

    After each step its bias in the router's last map is lowered until no token of the batch would
    have chosen it. After the release nothing touches it any more: what brings it back is training.

    Args:
        model: Holds the layers.
        window: The two shares.
        expert: Whom.
    """

    def __init__(self, model: nn.Module, window: tuple[float, float], *, expert: int = 0) -> None:
        self.window, self.expert = window, expert
        self._logits: dict[EcoMoE, Tensor] = {}
        self._layers = [module for module in model.modules() if isinstance(module, EcoMoE)]
        for layer in self._layers:
            layer.router.register_forward_hook(self._reader(layer))

    def _reader(self, layer: EcoMoE) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple[Any, ...], routing: Any) -> None:
            if module.training:
                self._logits[layer] = routing.logits_NE.detach()

        return read

    @torch.no_grad()
    def __call__(self, progress: float) -> None:
        """Call after each step with the share of the training done."""
        if not self.window[0] <= progress <= self.window[1]:
            return
        for layer in self._layers:
            logits_NE = self._logits[layer]
            own_N = logits_NE[:, self.expert]
            others_NE = logits_NE.clone()
            others_NE[:, self.expert] = -torch.inf
            bar_N = others_NE.topk(layer.top_k, dim=-1).values[:, -1]
            excess = (own_N - bar_N).max().clamp_min(0.0)
            bias = layer.router.score.bias
            bias[self.expert] -= torch.where(excess > 0, excess + 0.05, 0.0)
