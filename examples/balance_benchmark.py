"""Five ways to keep experts alive, on four tasks: quality, deaths, specialisation, seconds.

    python -m examples.balance_benchmark --seeds 3 --data path/to/cifar10 --data path/to/text.txt
    python -m examples.balance_benchmark --seeds 6 heads=12
    python -m examples.balance_benchmark --tasks vit --policies ecomoe switch --seeds 1
    python -m examples.balance_benchmark --tasks vit --steps vit=200
    python -m examples.balance_benchmark --table

Every run is resumable, and a run that is done is not done again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

import ecomoe
from ecomoe import EcoMoE
from examples.balance_table import summary, tables, told
from examples.data import Images, Text, load, standard_library
from examples.experiments.data import blocks
from examples.experiments.measure import Record, evaluate
from examples.experiments.models import GPT, Classifier, ViT, WideResNet, dense_ffn
from examples.experiments.protocol import Batches, Job, fit, split, steps_at
from examples.experiments.runner import brief, interruptible, rounded
from examples.experiments.storage import read_json, write_json
from examples.policies import POLICIES, Policy

TASKS = ("heads", "vit", "text", "upcycle")
TIERS, TOP_K = (8, 4, 4), 2
FEATURES, ROUTER_HIDDEN = 256, 128


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything.

    Attributes:
        images, tests: At most so many training and test images, averaged down to ``pixels``.
        patch: Side of the ViT's patches, in pixels.
        layers, width, hidden, context: Transformers; ``hidden`` is an expert's.
        steps: Optimizer steps by task.
        batch: Samples a step by task.
        test_tokens: Tokens of text to test on.
    """

    images: int
    tests: int
    pixels: int
    patch: int
    layers: int
    width: int
    hidden: int
    context: int
    steps: dict[str, int]
    batch: dict[str, int]
    test_tokens: int


SIZES = {
    "small": Size(
        images=12_000,
        tests=3_000,
        pixels=16,
        patch=4,
        layers=4,
        width=96,
        hidden=96,
        context=128,
        steps={"heads": 400, "vit": 800, "text": 400, "upcycle": 200},
        batch={"heads": 64, "vit": 64, "text": 8, "upcycle": 8},
        test_tokens=12_000,
    ),
    "smoke": Size(
        images=128,
        tests=64,
        pixels=8,
        patch=2,
        layers=1,
        width=16,
        hidden=16,
        context=16,
        steps=dict.fromkeys(("heads", "vit", "text", "upcycle"), 2),
        batch=dict.fromkeys(("heads", "vit", "text", "upcycle"), 16),
        test_tokens=512,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned, and by what.

    Attributes:
        data: Where it comes from, in words.
        train, test: Inputs and targets.
        labels: Classes, or ids of the vocabulary.
        augment: Whether images are moved.
        build: From a policy and a seed to a fresh model.
    """

    name: str
    data: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    labels: int
    augment: bool
    build: Callable[[Policy, int], nn.Module]


def make_task(name: str, size: Size, images: Images, text: Text, folder: Path) -> Task:
    """Return a task by its name."""
    if name in ("heads", "vit"):
        train, test = (
            (_sized(pixels[:count], size.pixels), labels[:count].long())
            for (pixels, labels), count in ((images.train, size.images), (images.test, size.tests))
        )
        classes = len(images.classes)
        build = (
            _heads(classes, train[0].shape[1]) if name == "heads" else _vit(size, train[0], classes)
        )
        return Task(
            name=name,
            data=images.name,
            train=train,
            test=test,
            labels=classes,
            augment=True,
            build=build,
        )
    train = blocks(text.train, size.context)
    test = blocks(text.test[: size.test_tokens], size.context)
    build = _gpt(size) if name == "text" else _upcycled(size, folder)
    return Task(
        name=name, data=text.name, train=train, test=test, labels=256, augment=False, build=build
    )


def _sized(pixels: Tensor, side: int) -> Tensor:
    return pixels if pixels.shape[-1] <= side else F.interpolate(pixels, (side, side), mode="area")


def _ffn(policy: Policy, size: Size) -> Callable[[int], nn.Module]:
    if not policy.sparse:
        return lambda width: dense_ffn(width, TOP_K * size.hidden)
    return lambda width: EcoMoE(
        width, size.hidden, tiers=TIERS, top_k=TOP_K, **policy.layer_options
    )


def _heads(classes: int, colours: int) -> Callable[[Policy, int], nn.Module]:
    def build(policy: Policy, seed: int) -> nn.Module:
        encoder = WideResNet(depth=10, widen=1, channels=colours, features=FEATURES)
        if policy.sparse:
            head: nn.Module = EcoMoE(
                FEATURES, None, tiers=TIERS, num_classes=classes, **policy.layer_options
            )
        else:
            # Heads are so small that the router counts too.
            router = FEATURES * ROUTER_HIDDEN + ROUTER_HIDDEN * sum(TIERS)
            hidden = (TOP_K * FEATURES * classes + router) // (FEATURES + classes)
            head = nn.Sequential(nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, classes))
        return Classifier(encoder, head)

    return build


def _vit(size: Size, pixels: Tensor, classes: int) -> Callable[[Policy, int], nn.Module]:
    return lambda policy, seed: ViT(
        shape=tuple(pixels.shape[1:]),
        patch=size.patch,
        classes=classes,
        layers=size.layers,
        width=size.width,
        heads=4,
        build_ffn=_ffn(policy, size),
    )


def _gpt(size: Size) -> Callable[[Policy, int], nn.Module]:
    return lambda policy, seed: GPT(
        vocabulary=256,
        layers=size.layers,
        width=size.width,
        heads=4,
        build_ffn=_ffn(policy, size),
    )


class Logits(nn.Module):
    """A language model of transformers that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.model(ids).logits


def _upcycled(size: Size, folder: Path) -> Callable[[Policy, int], nn.Module]:
    """Build a GPT-2 that was trained dense on Python source first, converted by the policy."""

    def build(policy: Policy, seed: int) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=256,
            n_positions=size.context,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=4,
            n_inner=size.hidden,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = GPT2LMHeadModel(config)
        path = folder / f"dense-{seed}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path))
        else:
            _train_dense(Logits(model), size, seed)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        if policy.sparse:
            options = {**policy.layer_options, "tiers": TIERS, "top_k": TOP_K, "verbose": False}
            return Logits(ecomoe.convert(model, **options))
        for block in model.transformer.h:
            _widen(block.mlp)
        return Logits(model)

    return build


def _train_dense(model: nn.Module, size: Size, seed: int) -> None:
    train = blocks(standard_library().train, size.context)
    batches = Batches(*train, size=size.batch["upcycle"], seed=seed, augment=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(size.steps["upcycle"]):
        ids, targets = batches(step)
        optimizer.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()


@torch.no_grad()
def _widen(mlp: Any) -> None:
    """Double a GPT-2 FFN's hidden features without changing what it computes, up to 1 % noise."""
    first, last = mlp.c_fc, mlp.c_proj
    twin = first.weight + 0.01 * first.weight.std() * torch.randn_like(first.weight)
    first.weight = nn.Parameter(torch.cat([first.weight, twin], dim=1))
    first.bias = nn.Parameter(torch.cat([first.bias, first.bias]))
    first.nf *= 2
    last.weight = nn.Parameter(torch.cat([last.weight, last.weight], dim=0) / 2)


def run(
    task: Task, policy: Policy, size: Size, *, seed: int, folder: Path, progress: Any
) -> Record:
    """Train and measure one cell of the table; from its JSON file where it is done already."""
    done, made_of = folder / "result.json", folder / "made_of.json"
    identity = {"data": f"{task.data}, {len(task.train[0])} samples", "size": asdict(size)}
    if made_of.exists() and (other := read_json(made_of)) != identity:
        raise ValueError(
            f"{folder} holds a run on {other['data']}, of another size or other data than asked "
            f"for ({identity['data']}); give these runs another --out"
        )
    write_json(made_of, identity)
    if done.exists():
        return read_json(done)  # type: ignore[no-any-return]
    torch.manual_seed(seed)
    model = task.build(policy, seed)
    total = size.steps[task.name]
    policy.prepare(model, total_steps=total)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tests = split(task.test, 500 if task.augment else 32)

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten()) + policy.extra_loss()

    job = Job(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05),
        batch_at=Batches(*task.train, size=size.batch[task.name], seed=seed, augment=task.augment),
        total_steps=total,
        loss=loss,
        evaluate=lambda trained: evaluate(trained, tests, labels=task.labels),
        evaluate_at=steps_at((25, 50, 75, 100), total),
        before_step=policy.before_step,
        after_step=lambda share: policy.after_step(),
    )
    history, seconds = fit(job, folder, on_progress=lambda step, record: progress(step, total))
    result = rounded(
        {
            "task": task.name,
            "policy": policy.name,
            "seed": seed,
            "steps": total,
            "seconds": seconds,
            "parameters": sum(p.numel() for p in model.parameters()),
            **summary(history),
            "history": [{**brief(record, total), **told(record["layers"])} for record in history],
        }
    )
    write_json(done, result)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return result


@interruptible()
def main(arguments: list[str] | None = None) -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument(
        "--seeds", nargs="+", default=["3"], metavar="N", help="of all tasks, or of one: heads=12"
    )
    parser.add_argument(
        "--steps", nargs="+", default=[], metavar="N", help="of all tasks, or of one: vit=200"
    )
    parser.add_argument("--scale", choices=SIZES, default="small")
    parser.add_argument("--data", action="append", default=[], metavar="SOURCE")
    parser.add_argument("--out", type=Path, default=Path("runs/balance"))
    parser.add_argument("--results", type=Path, help="JSON file of all runs; OUT/balance.json")
    parser.add_argument("--table", action="store_true", help="only print what there is")
    options = parser.parse_args(arguments)
    size = SIZES[options.scale]
    try:
        seeds = count_seeds(options.seeds, options.tasks)
        size = replace(size, steps=count_by_task("--steps", options.steps, size.steps))
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    path = options.results or options.out / f"balance-{options.scale}.json"
    runs: list[Record] = []
    if options.table:
        if not path.exists():
            parser.error(
                f"{path} does not exist; run the benchmark first, or pass its --scale or --results"
            )
        try:
            content = read_json(path)
        except ValueError as error:
            parser.error(str(error))
        runs = [
            run
            for run in content["runs"]
            if run["task"] in options.tasks and run["policy"] in options.policies
        ]
        show(runs, console)
        return
    try:
        images, text = load(options.data)
    except ValueError as error:
        parser.error(str(error))
    runs = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with Progress(console=console) as progress:
        for seed in range(max(seeds[name] for name in options.tasks)):
            for name in (name for name in options.tasks if seed < seeds[name]):
                folder = options.out / options.scale
                task = make_task(name, size, images, text, folder)
                for policy_name in options.policies:
                    label = f"{name} · {policy_name} · seed {seed}"
                    bar = progress.add_task(label, total=None)
                    try:
                        result = run(
                            task,
                            POLICIES[policy_name](),
                            size,
                            seed=seed,
                            folder=folder / f"{name}-{policy_name}-{seed}",
                            progress=lambda step, total, bar=bar: progress.update(
                                bar, completed=step, total=total
                            ),
                        )
                    except ValueError as error:
                        parser.error(str(error))
                    runs.append(result)
                    progress.update(bar, visible=False)
                    dead = result.get("dead", "no experts")
                    progress.console.print(f"{label}: loss {result['loss']:.4f}, DEAD {dead}")
                    content = {
                        "command": _command(options),
                        "images": images.name,
                        "text": text.name,
                        "size": asdict(size),
                        "runs": runs,
                    }
                    write_json(path, content)
    show(runs, console)
    console.print(f"results: {path}")


def show(runs: list[Record], console: Console) -> None:
    """Print a table of each task."""
    for shown in tables(runs):
        console.print(shown)


def count_seeds(given: Sequence[str], tasks: Sequence[str]) -> dict[str, int]:
    """Return how many seeds each task has, from ``["6", "heads=12"]``."""
    return count_by_task("--seeds", given, dict.fromkeys(tasks, 3))


def count_by_task(option: str, given: Sequence[str], otherwise: dict[str, int]) -> dict[str, int]:
    """Return a number for each task, from ``["6", "heads=12"]`` and what holds where none is."""
    counts = dict(otherwise)
    for each in sorted(given, key=lambda each: "=" in each):
        name, named, count = each.rpartition("=")
        if not count.isdecimal() or int(count) < 1 or (named and name not in counts):
            raise ValueError(
                f"{option} {each} must be a count of at least 1, or one task's, as heads=12; "
                f"tasks are {', '.join(counts)}"
            )
        counts.update(dict.fromkeys([name] if named else counts, int(count)))
    return counts


def _command(options: argparse.Namespace) -> str:
    """Return the command that repeats these runs."""
    parts = ["python -m examples.balance_benchmark", f"--scale {options.scale}"]
    if list(options.tasks) != list(TASKS):
        parts.append(f"--tasks {' '.join(options.tasks)}")
    if list(options.policies) != list(POLICIES):
        parts.append(f"--policies {' '.join(options.policies)}")
    parts.append(f"--seeds {' '.join(options.seeds)}")
    if options.steps:
        parts.append(f"--steps {' '.join(options.steps)}")
    return " ".join([*parts, "--data DIR --data TEXT"])


if __name__ == "__main__":
    main()
