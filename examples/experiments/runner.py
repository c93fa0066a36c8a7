"""From an experiment to its runs and from the runs to one JSON file.

A run is known by everything that decides it, so experiments share runs, and a run that is done is
never done again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

import ecomoe
from ecomoe import EcoMoE, moe
from ecomoe.schedule import Schedule
from examples.experiments.data import TEXTS, Library, Samples
from examples.experiments.measure import Record, evaluate, temperature_scan
from examples.experiments.models import GPT, Classifier, WideResNet
from examples.experiments.protocol import (
    Batches,
    ForcedDeath,
    Job,
    fit,
    split,
    steps_at,
    two_rates,
)
from examples.experiments.records import Experiment, Scale, Setting
from examples.experiments.storage import read_json, write_json
from examples.experiments.topologies import Topology

MAX_LOGITS = 2**26


@contextmanager
def interruptible() -> Iterator[None]:
    """Say how to go on, in place of a traceback, where somebody presses Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one was", file=sys.stderr)
        raise SystemExit(130) from None


def evaluation_batch(samples: Samples) -> int:
    """Return how many samples are evaluated at once: their logits must fit in memory."""
    positions = 1 if samples.kind == "vision" else samples.test[0].shape[1]
    return max(1, min(500 if positions == 1 else 32, MAX_LOGITS // (positions * samples.classes)))


def build_model(setting: Setting, scale: Scale, samples: Samples) -> nn.Module:
    """Return the architecture of section 3.1 at the size of a scale."""
    if isinstance(setting, Topology):
        return setting.build(scale, samples)
    common = layer_arguments(setting)
    if samples.kind == "language":
        return GPT(
            vocabulary=samples.classes,
            layers=scale.layers,
            width=scale.width,
            heads=scale.heads,
            build_ffn=lambda width: _as_set(EcoMoE(width, scale.expert_hidden, **common), setting),
        )
    encoder = WideResNet(
        depth=scale.depth,
        widen=scale.widen,
        channels=samples.train[0].shape[1],
        stem=scale.stem,
        features=scale.features,
    )
    head = EcoMoE(scale.features, None, num_classes=samples.classes, **common)
    return Classifier(encoder, _as_set(head, setting))


def layer_arguments(setting: Setting) -> dict[str, Any]:
    """Return what a setting says of its layers."""
    control = setting.control
    given: dict[str, Any] = {
        "tiers": setting.tiers,
        "target_e": control.e,
        "temperature": control.temperature,
        "oracle_weight": control.oracle_weight,
        "balance_weight": control.balance_weight,
        "ortho_weight": setting.ortho_weight,
        "oracle": setting.oracle,
        "warmup_fraction": setting.warmup,
    }
    if setting.strength is not None:
        given |= {"strength": setting.strength, "router": "mlp", "spread": 1.0}
    if setting.spread is not None:
        given["spread"] = setting.spread
    return given


def layer_defaults(setting: Setting, scale: Scale) -> Record:
    """Return what the layer decides where a setting says nothing: changed, it is another run."""
    topology = isinstance(setting, Topology)
    given = setting.layer_arguments(scale.width) if topology else layer_arguments(setting)
    found = {
        name: parameter.default
        for name, parameter in inspect.signature(EcoMoE).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in given
    }
    if topology or setting.strength is None:
        found |= {
            "usage_floor": setting.control.usage_floor,
            "starvation": (moe.STARVATION_WEIGHT, moe.SUSTAIN_AT_START),
        }
    return found


def _as_set(layer: EcoMoE, setting: Setting) -> EcoMoE:
    # The paper's weights go with the paper's router and losses, which let experts starve.
    if setting.strength is not None:
        layer.usage_floor = 0.0
    return layer


def task_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy plus the auxiliary losses."""
    logits = model(inputs, targets=targets)
    task = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return task + ecomoe.aux_loss(model)


def run_setting(
    setting: Setting,
    scale: Scale,
    samples: Samples,
    *,
    seed: int,
    folder: Path,
    on_progress: Callable[[int, int, Record | None], None] | None = None,
) -> Record:
    """Train, measure and return one run; from ``folder/result.json`` where it is done already."""
    done = folder / "result.json"
    if done.exists():
        return read_json(done)  # type: ignore[no-any-return]
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(setting, scale, samples).to(device)
    kind = samples.kind
    batches = Batches(*samples.train, size=scale.batch[kind], seed=seed, augment=kind == "vision")
    epochs = max(1, round(scale.epochs[kind] * setting.effort))
    total = epochs * batches.per_epoch
    tests = split(samples.test, evaluation_batch(samples))
    schedule = Schedule(model, total_steps=total)
    death = ForcedDeath(model, setting.forced_death) if setting.forced_death else None
    percents = setting.percents if setting.percents and scale.name != "smoke" else scale.percents
    optimizer = two_rates(
        model,
        encoder_lr=scale.encoder_lr * setting.rate,
        expert_lr=scale.expert_lr * setting.rate,
        weight_decay=scale.weight_decay,
    )
    log = folder / "monitor.jsonl"
    if not (folder / "checkpoint.pt").exists():
        log.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
    # A report of hundreds of experts takes as long as several steps of a small model.
    every = total if isinstance(setting, Topology) else max(total // 20, 1)
    monitor = ecomoe.Monitor(model, optimizer=optimizer, log=log, every=every, view="off")
    job = Job(
        model=model,
        optimizer=optimizer,
        batch_at=batches,
        total_steps=total,
        loss=task_loss,
        evaluate=lambda trained: evaluate(trained, tests, labels=samples.classes, monitor=monitor),
        evaluate_at=steps_at(percents, total),
        before_step=lambda progress: schedule.advance(round(progress * total)),
        after_step=death or (lambda progress: None),
        monitor=monitor,
    )
    began = time.perf_counter()
    with monitor:
        history, seconds = fit(
            job,
            folder,
            on_progress=on_progress and (lambda step, record: on_progress(step, total, record)),
        )
    measured = setting.measure(model, tests, folder) if isinstance(setting, Topology) else {}
    scan = temperature_scan(model, tests, labels=samples.classes, temperatures=scale.temperatures)
    result = rounded(
        {
            "setting": _plain(setting),
            "scale": scale.name,
            "seed": seed,
            "data": {
                "name": samples.name,
                "train": len(samples.train[0]),
                "test": len(samples.test[0]),
                "classes": samples.classes,
            },
            "steps": total,
            "seconds": seconds,
            "wall_seconds": time.perf_counter() - began,
            "torch": torch.__version__,
            "history": [brief(record, total) for record in history],
            "final": history[-1],
            "measured": measured,
            "events": [
                {key: event[key] for key in ("kind", "step", "phase", "layer", "expert", "basis")}
                for event in (found.to_dict() for found in monitor.events)
            ],
            "temperature_scan": [
                {**brief(record, total), "temperature": record["temperature"]} for record in scan
            ],
        }
    )
    write_json(done, result)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return result


def brief(record: Record, total_steps: int) -> Record:
    """Return what a history needs of a record."""
    kept = ("dead", "dead_relative", "pure", "tier_usage", "hard_gradient")
    layers = [
        {name: layer[name] for name in kept} | {"usage": layer["usage"]["top1"]}
        for layer in record["layers"]
    ]
    step = record.get("step", total_steps)
    return {
        "percent": 100 * step / total_steps,
        **{name: record[name] for name in ("loss", "top1", "top2", "dead")},
        "layers": layers,
    }


def rounded(value: Any, digits: int = 5) -> Any:
    """Return plain data with floats cut to significant digits: results are read and committed."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return value


def _plain(setting: Setting) -> Record:
    values = asdict(setting)
    values["control"] = {**asdict(setting.control), "e": setting.control.e}
    return values


def run_folder(out: Path, setting: Setting, scale: Scale, samples: Samples, seed: int) -> Path:
    """Return where a run lives: the same for every experiment that needs it."""
    what = asdict(replace(setting, name="")), layer_defaults(setting, scale)
    identity = json.dumps([*what, asdict(scale), seed, samples.name, len(samples.train[0])])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return out / "runs" / f"{scale.name}-{setting.data}-{digest}"


def run_experiment(
    experiment: Experiment,
    scale: Scale,
    library: Library,
    *,
    seeds: int,
    out: Path,
    results: Path,
    conditions: int | None = None,
    console: Console | None = None,
) -> Path:
    """Run what is missing of an experiment; return its JSON file, written anew after each run.

    ``conditions`` leaves out all but the first so many.
    """
    console = console or Console()
    path = results / f"{experiment.name}-{scale.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs: list[Record] = []
    named: set[str] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for seed in range(seeds):
            for setting in experiment.settings[:conditions]:
                samples = library.get(setting.data)
                if samples.name not in named:
                    named.add(samples.name)
                    progress.console.print(f"data: {samples.name}", highlight=False)
                label = f"{experiment.name} · {setting.name} · seed {seed}"
                task = progress.add_task(label, total=None)

                def show(
                    step: int,
                    total: int,
                    record: Record | None,
                    task: Any = task,
                    label: str = label,
                ) -> None:
                    progress.update(task, completed=step, total=total)
                    if record is not None:
                        progress.update(task, description=f"{label} · {said(record)}")

                result = run_setting(
                    setting,
                    scale,
                    samples,
                    seed=seed,
                    folder=run_folder(out, setting, scale, samples, seed),
                    on_progress=show,
                )
                # A shared run may have been done under another experiment's name for it.
                runs.append({"name": setting.name, **result})
                progress.update(task, visible=False)
                progress.console.print(f"{label} · {said(result['final'])}", highlight=False)
                write_results(path, experiment, scale, seeds, runs)
    return path


def write_results(
    path: Path, experiment: Experiment, scale: Scale, seeds: int, runs: list[Record]
) -> None:
    """Write an experiment's JSON file: what it is, how to repeat it, and its runs."""
    content = {
        "experiment": experiment.name,
        "title": experiment.title,
        "section": experiment.section,
        "claim": experiment.claim,
        "note": experiment.note,
        "paper": experiment.paper,
        "scale": scale.name,
        "seeds": seeds,
        "command": command(experiment, f"--scale {scale.name} --seeds {seeds}"),
        "runs": runs,
    }
    write_json(path, content)


def command(experiment: Experiment, options: str) -> str:
    """Return what runs an experiment: ``DIR`` stands for images, ``TEXT`` for a text file."""
    kinds = {"TEXT" if setting.data in TEXTS else "DIR" for setting in experiment.settings}
    data = " ".join(f"--data {kind}" for kind in sorted(kinds))
    return f"python -m examples.experiments run {experiment.name} {options} {data}"


def said(record: Record) -> str:
    """Return a record in a few words."""
    dead = record["dead"]
    return (
        f"top-1 {record['top1']:.1%}, loss {record['loss']:.3f}, "
        f"DEAD top1 {dead['top1']}, topk {dead['topk']}"
    )
