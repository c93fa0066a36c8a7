"""Time whole training steps of converted models: ``python -m tests.benchmarks.models``.

A converted model and its dense twin of equal active FLOPs (experts half as wide, two a token) step
in turn on the same batches, with the same fused AdamW. A step is forward, backward, optimizer.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ecomoe
from ecomoe.schedule import Schedule
from tests.benchmarks.results import TIME_IS_OVER, add_options, open_results, to_measure
from tests.benchmarks.timing import now, quartiles

PARTS = ("forward", "backward", "optimizer", "step")
Batch = tuple[Tensor, Tensor]


def gpt2(layers: int) -> tuple[nn.Module, Callable[[torch.Generator], Batch]]:
    """Return a GPT-2 of the small one's width, and how to draw its batches: 1,024 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)

    def draw(generator: torch.Generator) -> Batch:
        tokens = torch.randint(config.vocab_size, (2, 513), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]

    return GPT2LMHeadModel(config), draw


def vit(layers: int) -> tuple[nn.Module, Callable[[torch.Generator], Batch]]:
    """Return a ViT of the tiny one's shape, and how to draw its batches: 3,152 tokens."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(embed_dim=192, depth=layers, num_heads=3)

    def draw(generator: torch.Generator) -> Batch:
        images = torch.randn(16, 3, 224, 224, generator=generator)
        return images, torch.randint(1000, (16,), generator=generator)

    return model, draw


MODELS = {"gpt2-small": (gpt2, 12), "vit-tiny": (vit, 12)}


class Trained:
    """A model with its optimizer, and what its steps took by part."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model.to(device).train()
        self.device, self.dtype = device, dtype
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.sparse = any(isinstance(module, ecomoe.EcoMoE) for module in model.modules())
        self.schedule = Schedule(model, total_steps=1000) if self.sparse else None
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def step(self, batch: Batch) -> None:
        """Train on a batch and keep the seconds of each part."""
        inputs, targets = (part.to(self.device) for part in batch)
        marks = [now(inputs)]
        if self.schedule is not None:
            self.schedule.advance(len(self.seconds["step"]))
        narrow = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=narrow):
            out = self.model(inputs)
            logits = out if isinstance(out, Tensor) else out.logits
            loss = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())
            if self.sparse:
                loss = loss + ecomoe.aux_loss(self.model)
        marks.append(now(inputs))
        loss.backward()
        marks.append(now(inputs))
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(now(inputs))
        spent = [after - before for before, after in itertools.pairwise(marks)]
        for part, seconds in zip(PARTS, [*spent, marks[-1] - marks[0]], strict=True):
            self.seconds[part].append(seconds)


def measure(
    name: str, *, layers: int | None, dtype: str, device: torch.device, seconds: float, rounds: int
) -> dict[str, Any]:
    """Measure one model; return its record."""
    torch.manual_seed(0)
    build, depth = MODELS[name]
    depth = layers or depth
    dense, draw = build(depth)
    sparse = ecomoe.convert(
        copy.deepcopy(dense), init="random", expert_width=0.5, tiers=(8, 4, 4), verbose=False
    )
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    runs = {
        key: Trained(model, device, kind) for key, model in (("dense", dense), ("ecomoe", sparse))
    }
    generator = torch.Generator().manual_seed(0)
    began, index = time.perf_counter(), 0
    while index < rounds + 2 or time.perf_counter() - began < seconds:
        batch = draw(generator)
        for run in sorted(runs.values(), key=lambda run: run.sparse == bool(index % 2)):
            run.step(batch)
        index += 1
    record: dict[str, Any] = {"model": name, "layers": depth, "dtype": dtype, "rounds": index - 2}
    for key, run in runs.items():
        times = {part: run.seconds[part][2:] for part in PARTS}
        twin = {part: runs["dense"].seconds[part][2:] for part in PARTS}
        record[key] = {
            "parameters": sum(weight.numel() for weight in run.model.parameters()),
            "seconds": {part: quartiles(times[part]) for part in PARTS},
            "over_dense": {
                part: quartiles([a / b for a, b in zip(times[part], twin[part], strict=True)])
                for part in PARTS
            },
        }
    return record


def main(arguments: list[str] | None = None) -> None:
    """Measure the models that are asked for and not measured yet."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.models", description=__doc__.split("\n")[0]
    )
    add_options(parser)
    parser.add_argument("--quick", action="store_true", help="models of 4 layers, not of 12")
    parser.add_argument("--list", action="store_true", help="print the models' names, and end")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--layers", type=int, help="layers; by default 4 with --quick, else 12")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds a model")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of a model at least")
    given = parser.parse_args(arguments)
    layers = given.layers or (4 if given.quick else None)
    asked = {
        f"{name}-{layers or MODELS[name][1]}-layers-{dtype}": (name, dtype)
        for name in given.model
        for dtype in given.dtype
    }
    if given.list:
        print("\n".join(asked))
        return
    torch.set_num_threads(given.threads)
    results = open_results(parser, given)
    began = time.perf_counter()
    for key in to_measure(asked, () if given.again else results.content.get("models", {}), results):
        if time.perf_counter() - began > given.stop_after:
            print(TIME_IS_OVER)
            return
        name, dtype = asked[key]
        record = measure(
            name,
            layers=layers,
            dtype=dtype,
            device=torch.device(given.device),
            seconds=given.seconds,
            rounds=given.rounds,
        )
        results.add("models", key, record)
        low, median, high = record["ecomoe"]["over_dense"]["step"]
        print(
            f"{key}: a step takes {median:.2f} [{low:.2f}, {high:.2f}] of the dense twin's "
            "(median and quartiles of paired steps)",
            flush=True,
        )


if __name__ == "__main__":
    main()
