"""Race a sparse model against its dense twin of equal active FLOPs: loss against seconds.

    python -m examples.race gpt --data path/to/text.txt
    python -m examples.race vit --data path/to/cifar10

Both see the same batches, seed by seed, and step in turn in one process, so that a drift of the
machine's speed meets both. Each has its own learning-rate schedule over its own number of steps: a
sparse step takes longer, and a model that is stopped before its learning rate has come down is not
at its best. Time is that of the race's own training steps, without evaluations, so race on an idle
machine. (A step of fresh models takes less than one of trained models: nobody starves yet.)

A race that is cut off goes on where it stopped: results are in a JSON file, states beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ecomoe
from ecomoe.schedule import Schedule
from examples.data import Images, Text, load

Batch = tuple[Tensor, Tensor]
NAMES = ("dense", "ecomoe")
EVALUATIONS = 16  # a run


@dataclass(frozen=True)
class Plan:
    """Sizes of one race."""

    title: str
    steps: int
    sparse_steps: int
    batch: int
    d_model: int
    layers: int
    learning_rate: float
    experts: int = 8
    top_k: int = 1
    convert: dict[str, Any] = field(default_factory=dict)


# Half of the layers hold experts, which did best in a few short runs of one seed. The sparse steps
# are as many as took the dense twin's time on two cores.
PLANS = {
    "gpt": Plan(
        title="GPT on bytes",
        steps=400,
        sparse_steps=355,
        batch=16,
        d_model=192,
        layers=4,
        learning_rate=2e-3,
        experts=16,
        top_k=2,
        convert={"layers": "every other"},
    ),
    "vit": Plan(
        title="ViT",
        steps=600,
        sparse_steps=425,
        batch=64,
        d_model=128,
        layers=4,
        learning_rate=1e-3,
        experts=16,
        top_k=2,
        convert={"layers": "every other"},
    ),
}
CONTEXT = 128


class TextTask:
    """Predict the next byte; loss in nats a byte."""

    def __init__(self, text: Text, plan: Plan) -> None:
        self.text, self.plan, self.data = text, plan, text.name

    def build(self) -> nn.Module:
        """Return a GPT-2 over bytes."""
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=256,
                n_positions=CONTEXT,
                n_embd=self.plan.d_model,
                n_layer=self.plan.layers,
                n_head=max(1, self.plan.d_model // 64),
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
                use_cache=False,
            )
        )

    def batch(self, generator: torch.Generator) -> Batch:
        """Draw a training batch."""
        return self._windows(self.text.train, self.plan.batch, generator)

    def test_batches(self) -> list[Batch]:
        """Return the batches that every evaluation takes."""
        generator = torch.Generator().manual_seed(0)
        return [self._windows(self.text.test, 32, generator) for _ in range(2)]

    def _windows(self, data: Tensor, count: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(data) - CONTEXT, (count, 1), generator=generator)
        rows = data[starts + torch.arange(CONTEXT + 1)]
        return rows[:, :-1], rows[:, 1:]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss."""
        logits = model(batch[0]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


class ImageTask:
    """Classify images; loss in nats an image."""

    def __init__(self, images: Images, plan: Plan) -> None:
        self.images, self.plan, self.data = images, plan, images.name

    def build(self) -> nn.Module:
        """Return a ViT that fits the images."""
        from timm.models.vision_transformer import VisionTransformer

        _, channels, *sides = self.images.train[0].shape
        return VisionTransformer(
            img_size=tuple(sides),
            patch_size=2 if min(sides) < 16 else 4,
            in_chans=channels,
            num_classes=len(self.images.classes),
            embed_dim=self.plan.d_model,
            depth=self.plan.layers,
            num_heads=max(1, self.plan.d_model // 64),
            dynamic_img_pad=True,
        )

    def batch(self, generator: torch.Generator) -> Batch:
        """Draw a training batch, moved by a few pixels."""
        pixels, labels = self.images.train
        rows = torch.randint(len(labels), (self.plan.batch,), generator=generator)
        reach = pixels.shape[-1] // 16
        down, right = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
        return pixels[rows].roll((down, right), dims=(-2, -1)), labels[rows]

    def test_batches(self) -> list[Batch]:
        """Return the batches that every evaluation takes."""
        pixels, labels = (part[:1024] for part in self.images.test)
        return list(zip(pixels.split(128), labels.split(128), strict=True))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss."""
        return F.cross_entropy(model(batch[0]), batch[1])


Task = TextTask | ImageTask


class Racer:
    """One model with its optimizer and schedules, its steps and seconds so far, and its curve."""

    def __init__(self, model: nn.Module, task: Task, *, steps: int) -> None:
        self.model, self.task, self.steps = model, task, steps
        rate = task.plan.learning_rate
        matrices = [weight for weight in model.parameters() if weight.dim() > 1]
        vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": 0.05},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._share_of_rate)
        self.sparse = any(isinstance(module, ecomoe.EcoMoE) for module in model.modules())
        self.progress = Schedule(model, total_steps=steps) if self.sparse else None
        self.step = 0
        self.seconds: list[float] = []
        self.curve: list[dict[str, float]] = []

    def _share_of_rate(self, step: int) -> float:
        """Warm up over a twentieth of the steps, then come down to a fiftieth of the rate."""
        warm_up = max(1, self.steps // 20)
        if step < warm_up:
            return (step + 1) / warm_up
        return 1.0 - 0.98 * min(1.0, (step - warm_up) / max(1, self.steps - warm_up))

    def train(self, batch: Batch) -> None:
        """Take a step, and keep its seconds."""
        self.model.train()
        began = time.perf_counter()
        if self.progress is not None:
            self.progress.advance(self.step)
        loss = self.task.loss(self.model, batch)
        if self.sparse:
            loss = loss + ecomoe.aux_loss(self.model)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rates.step()
        self.seconds.append(time.perf_counter() - began)
        self.step += 1

    def evaluate(self, batches: list[Batch]) -> None:
        """Add a point to the curve."""
        self.model.eval()
        with torch.no_grad():
            losses = [float(self.task.loss(self.model, batch)) for batch in batches]
        self.curve.append(
            {
                "step": self.step,
                "seconds": sum(self.seconds),
                "loss": sum(losses) / len(losses),
            }
        )

    def state(self) -> dict[str, Any]:
        """Return all that a later process needs to go on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["rates"])
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]


def sparse_twin(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy whose FFNs are experts: K of them are as wide as one FFN."""
    settings: dict[str, Any] = {
        "tiers": (plan.experts,),
        "top_k": plan.top_k,
        "expert_width": 1.0 / plan.top_k,
        "init": "random",
        "router": "linear",
        "verbose": False,
        **plan.convert,
    }
    return ecomoe.convert(copy.deepcopy(model), **settings)


def race(task: Task, seed: int, *, until: Callable[[], bool], state: Path) -> dict[str, Any] | None:
    """Run one seed until it is done or ``until`` says stop; None if stopped, to go on later."""
    plan = task.plan
    torch.manual_seed(seed)
    random.seed(seed)
    dense = task.build()
    sparse = sparse_twin(dense, plan)
    racers = {
        "dense": Racer(dense, task, steps=plan.steps),
        "ecomoe": Racer(sparse, task, steps=plan.sparse_steps),
    }
    if state.exists():
        saved = torch.load(state, weights_only=True)
        for name, racer in racers.items():
            racer.load(saved[name])
    tests = task.test_batches()
    while any(racer.step < racer.steps for racer in racers.values()):
        if until():
            state.parent.mkdir(parents=True, exist_ok=True)
            torch.save({name: racer.state() for name, racer in racers.items()}, state)
            return None
        # The one that is less far in its own schedule; the dense one first where both are equal.
        racer = min(racers.values(), key=lambda each: each.step / each.steps)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + racer.step)
        torch.manual_seed(seed * 1_000_003 + racer.step)
        racer.train(task.batch(generator))
        every = max(1, racer.steps // EVALUATIONS)
        if racer.step % every == 0 or racer.step == racer.steps:
            racer.evaluate(tests)
    state.unlink(missing_ok=True)
    curves = {name: racer.curve for name, racer in racers.items()}
    medians = [statistics.median(racers[name].seconds) for name in NAMES]
    return {
        "seed": seed,
        **curves,
        "result": outcome(curves, step_over_dense=medians[1] / medians[0]),
    }


def outcome(curves: dict[str, Any], *, step_over_dense: float) -> dict[str, Any]:
    """Return last losses and seconds, and when the sparse model was first as good as the twin."""
    goal = curves["dense"][-1]
    reached = [point["seconds"] for point in curves["ecomoe"] if point["loss"] <= goal["loss"]]
    return {
        **{name: curves[name][-1] for name in NAMES},
        "step_over_dense": step_over_dense,
        "reached": reached[0] / goal["seconds"] if reached else None,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the race's seeds, or go on with them."""
    parser = argparse.ArgumentParser(prog="python -m examples.race", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("task", choices=list(PLANS))
    parser.add_argument("--data", action="append", default=[], metavar="SOURCE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps of the dense twin")
    parser.add_argument("--sparse-steps", type=int, help="steps of the EcoMoE model")
    parser.add_argument("--experts", type=int)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--d-model", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--convert", type=json.loads, help="arguments of ecomoe.convert as JSON")
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="JSON, runs/race-TASK.json by default")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    changed = {
        name: getattr(given, name)
        for name in PLANS["gpt"].__dataclass_fields__
        if getattr(given, name, None) is not None
    }
    plan = Plan(**{**vars(PLANS[given.task]), **changed})
    try:
        images, text = load(given.data)
    except ValueError as error:
        parser.error(str(error))
    task = TextTask(text, plan) if given.task == "gpt" else ImageTask(images, plan)
    out = given.out or Path("runs") / f"race-{given.task}.json"
    content = json.loads(out.read_text()) if out.exists() else {"plan": vars(plan), "runs": {}}
    if content["plan"] != json.loads(json.dumps(vars(plan))):
        parser.error(f"--out {out} holds a race of other sizes; name another file or remove it")
    content["title"] = f"{plan.title}, {task.data}"
    content["setting"] = setting(plan)
    began = time.perf_counter()
    for seed in range(given.seeds):
        if str(seed) in content["runs"]:
            continue
        found = race(
            task,
            seed,
            until=lambda: time.perf_counter() - began > given.stop_after,
            state=out.with_suffix(f".{seed}.pt"),
        )
        if found is None:
            print("time is over: run the same command again to go on")
            return
        content["runs"][str(seed)] = found
        write(out, content)
        print(told(found), flush=True)


def write(out: Path, content: dict[str, Any]) -> None:
    """Write the results."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content) + "\n")


def setting(plan: Plan) -> str:
    """Say what raced."""
    layers = plan.convert.get("layers")
    named = {None: "every layer's FFN", "every other": "every other layer's FFN"}
    where = named.get(layers, f"the FFN of layers {layers}")
    return (
        f"{plan.layers} layers of {plan.d_model} features, {plan.batch} sequences a step, AdamW at "
        f"{plan.learning_rate:g} with linear decay, {plan.steps} dense and {plan.sparse_steps} "
        f"sparse steps; {where} is {plan.experts} experts, top-{plan.top_k}, "
        f"{1 / plan.top_k:.2g} times as wide; {torch.get_num_threads()} threads, fp32."
    )


def told(found: dict[str, Any]) -> str:
    """Say in a line how a seed went."""
    result = found["result"]
    reached = result["reached"]
    return (
        f"seed {found['seed']}: dense {result['dense']['loss']:.4f} after "
        f"{result['dense']['seconds']:.0f} s; EcoMoE {result['ecomoe']['loss']:.4f} after "
        f"{result['ecomoe']['seconds']:.0f} s, a step {result['step_over_dense']:.2f} of dense's; "
        + ("never there" if reached is None else f"there at {reached:.2f} of dense's seconds")
    )


if __name__ == "__main__":
    main()
