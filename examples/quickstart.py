"""Convert a ViT of timm and a GPT-2 of transformers, train both, and read their ecology.

    python -m examples.quickstart
    python -m examples.quickstart --data path/to/cifar10 --data path/to/text.txt

Each model trains beside a dense twin: the same model before conversion, on the same batches, with
experts half as wide as the dense FFN, so that two experts a token cost what the dense FFN costs;
the router comes on top.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import ecomoe
from examples.data import Images, Text, load

console = Console()


@dataclass(frozen=True)
class Outcome:
    """What one training run came to."""

    quality: float
    unit: str
    seconds: float


class LiveView:
    """A progress bar with the present ecology at its end, and a line at each evaluation."""

    def __init__(self, name: str, steps: int) -> None:
        self.progress = Progress(
            "[bold]{task.description}",
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            "{task.fields[ecology]}",
            console=console,
        )
        self.task = self.progress.add_task(name, total=steps, ecology="")

    def __enter__(self) -> LiveView:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=step)

    def show(self, step: int, quality: str, report: ecomoe.Report | None) -> None:
        """Print an evaluation and keep its ecology beside the bar."""
        ecology = ""
        if report is not None:
            dead = report.to_dict()["dead"]
            ecology = f"DEAD top1 {dead['top1']}, topk {dead['topk']}"
        self.progress.update(self.task, ecology=ecology)
        self.progress.console.print(f"  step {step:>5}  {quality}  {ecology}", highlight=False)


def sparse(model: nn.Module, *, router: str = "mlp") -> nn.Module:
    """Return a copy of ``model`` with EcoMoE in place of its FFNs, two half as wide as they."""
    return ecomoe.convert(
        copy.deepcopy(model),
        target_e=0.545,
        tiers=(8, 4, 4),
        init="random",
        expert_width=0.5,
        router=router,
    )


# --- a vision transformer of timm, in a hand-written loop ---------------------------------------


def build_vit(images: Images) -> nn.Module:
    """Return a small ViT that fits the images: 16 patches of digits, 64 of CIFAR-10."""
    from timm.models.vision_transformer import VisionTransformer

    _, channels, *sides = images.train[0].shape
    size = min(sides)
    return VisionTransformer(
        img_size=tuple(sides),
        patch_size=2 if size < 16 else 4,
        in_chans=channels,
        num_classes=len(images.classes),
        embed_dim=96,
        depth=4,
        num_heads=4,
        dynamic_img_pad=True,
    )


def train_vit(
    model: nn.Module, images: Images, *, steps: int, batch_size: int, log: Path | None
) -> tuple[Outcome, ecomoe.Report | None]:
    """Train and evaluate; ``log`` names the monitor's file, ``None`` means the dense twin."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(0)
    pixels, labels = images.train
    monitor = None
    if log is not None:
        monitor = ecomoe.Monitor(model, optimizer=optimizer, total_steps=steps, log=log)
    view = LiveView("ViT, EcoMoE" if monitor else "ViT, dense twin", steps)
    began = time.perf_counter()
    accuracy, report = 0.0, None
    try:
        with view:
            for step in range(1, steps + 1):
                model.train()
                rows = torch.randint(len(labels), (batch_size,), generator=generator)
                batch = shift(pixels[rows], generator)
                loss = F.cross_entropy(model(batch), labels[rows], label_smoothing=0.1)
                if monitor:
                    loss = loss + ecomoe.aux_loss(model)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                view.advance(step)
                if step % max(steps // 5, 1) == 0 or step == steps:
                    accuracy = evaluate_vit(model, images, monitor)
                    report = monitor.report() if monitor else None
                    view.show(step, f"test accuracy {accuracy:.1%}", report)
    finally:
        if monitor:
            monitor.close()
    return Outcome(accuracy, "test accuracy", time.perf_counter() - began), report


def shift(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Move a batch by up to a sixteenth of its size, all its images alike; digits stay put."""
    reach = batch.shape[-1] // 16
    down, right = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    return batch.roll((down, right), dims=(-2, -1))


@torch.no_grad()
def evaluate_vit(model: nn.Module, images: Images, monitor: ecomoe.Monitor | None) -> float:
    """Return the accuracy on the test images; the monitor sees the same forward passes."""
    model.eval()
    correct = 0
    for batch, labels in zip(*(part.split(500) for part in images.test), strict=True):
        outputs = model(batch)
        correct += int((outputs.argmax(-1) == labels).sum())
        if monitor:
            monitor.evaluate(outputs=outputs, targets=labels)
    return correct / len(images.test[1])


# --- GPT-2 of transformers, in the Trainer ------------------------------------------------------


def build_gpt() -> nn.Module:
    """Return a small GPT-2 over bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_positions=128,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def train_gpt(
    model: nn.Module, text: Text, *, steps: int, batch_size: int, log: Path | None
) -> tuple[Outcome, ecomoe.Report | None]:
    """Train with the Trainer as it is; the monitor is all that a converted model needs."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    def blocks(data: Tensor, count: int) -> list[dict[str, Tensor]]:
        starts = torch.randint(
            len(data) - 128, (count,), generator=torch.Generator().manual_seed(0)
        ).tolist()
        return [{"input_ids": data[s : s + 128], "labels": data[s : s + 128]} for s in starts]

    monitor = ecomoe.Monitor(log=log, view="off") if log is not None else None
    view = LiveView("GPT-2, EcoMoE" if monitor else "GPT-2, dense twin", steps)

    class ShowLive(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            view.advance(state.global_step)

        def on_evaluate(self, args, state, control, metrics, **kwargs):  # type: ignore[no-untyped-def]
            report = monitor.report("eval") if monitor else None
            view.show(state.global_step, f"test loss {metrics['eval_loss']:.3f}", report)

    with tempfile.TemporaryDirectory() as folder, view:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=32,
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                warmup_steps=steps // 10,
                eval_strategy="steps",
                eval_steps=max(steps // 5, 1),
                logging_steps=max(steps // 5, 1),
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                seed=0,
            ),
            train_dataset=blocks(text.train, steps * batch_size),
            eval_dataset=blocks(text.test, 128),
            callbacks=[monitor, ShowLive()] if monitor else [ShowLive()],
        )
        trainer.remove_callback(PrinterCallback)
        began = time.perf_counter()
        trainer.train()
        if steps % max(steps // 5, 1):
            trainer.evaluate()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    outcome = Outcome(losses[-1], "test loss, nats a byte", time.perf_counter() - began)
    return outcome, monitor.report("eval") if monitor else None


# --- both, with their twins ---------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run the quickstart."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SOURCE",
        help="parquet images, a text file, or a hub data set; may be given twice",
    )
    parser.add_argument("--vit-steps", type=int, default=700, help="optimizer steps of the ViT")
    parser.add_argument("--gpt-steps", type=int, default=350, help="optimizer steps of the GPT-2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--router",
        choices=["mlp", "linear", "cosine", "cosine_iso", "random", "hash"],
        default="mlp",
        help="of both models; 'hash' goes by token ids, so the ViT then keeps 'mlp'",
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the JSONL logs")
    options = parser.parse_args(arguments)
    for name in ("vit_steps", "gpt_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        images, text = load(options.data)
    except ValueError as error:
        parser.error(str(error))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out} cannot be made a folder ({error}); name another one")

    results = Table(title="Quality beside the dense twin")
    for heading in ("model", "data", "measure", "EcoMoE", "dense twin", "seconds"):
        results.add_column(heading)
    reports = []

    for label, data_name, build, train, data, steps, batch_size in (
        (
            "ViT (timm)",
            images.name,
            lambda: build_vit(images),
            train_vit,
            images,
            options.vit_steps,
            64,
        ),
        ("GPT-2 (transformers)", text.name, build_gpt, train_gpt, text, options.gpt_steps, 16),
    ):
        console.rule(f"{label} on {data_name}")
        torch.manual_seed(options.seed)
        dense = build()
        by_ids = options.router == "hash" and data is images
        moe = sparse(dense, router="mlp" if by_ids else options.router)
        log = options.out / f"{label.split()[0].lower()}.jsonl"
        log.unlink(missing_ok=True)
        torch.manual_seed(options.seed)
        ours, report = train(moe, data, steps=steps, batch_size=batch_size, log=log)
        torch.manual_seed(options.seed)
        twin, _ = train(dense, data, steps=steps, batch_size=batch_size, log=None)
        results.add_row(
            label,
            data_name,
            ours.unit,
            f"{ours.quality:.4f}",
            f"{twin.quality:.4f}",
            f"{ours.seconds:.0f} / {twin.seconds:.0f}",
        )
        reports.append((label, report, log))

    for label, report, log in reports:
        console.rule(f"Ecology of {label}")
        console.print(Group(report, f"every record of this run: {log}"))
    console.print(results)


if __name__ == "__main__":
    main()
