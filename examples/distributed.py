"""Train a small mixture on several processes, in one of four ways, and gather it on one.

    torchrun --standalone --nproc-per-node 2 -m examples.distributed ddp
    torchrun --standalone --nproc-per-node 2 -m examples.distributed fsdp
    torchrun --standalone --nproc-per-node 2 -m examples.distributed experts
    torchrun --standalone --nproc-per-node 2 -m examples.distributed experts+fsdp

The task is a teacher of 16 random linear maps, one for each cluster of inputs. Every process draws
tokens of its own; the loss that all train is the mean over processes.
"""

from __future__ import annotations

import argparse
import os

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import ecomoe
from ecomoe.distributed import (
    clip_grad_norm,
    expert_parameters,
    parallelize_experts,
    reduce_losses,
)

WIDTH, CLUSTERS = 32, 16


class Block(nn.Module):
    """A residual mixture; attention would stand beside it in a real model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.moe = ecomoe.EcoMoE(WIDTH, 64, tiers=(8, 4, 4), target_e=0.545)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(WIDTH, WIDTH))


def wrap(model: nn.Module, how: str, mesh: DeviceMesh) -> nn.Module:
    """Make ``model`` parallel; the optimizer comes after."""
    if how.startswith("experts"):
        model = parallelize_experts(model, mesh)
    reduce_losses(model)
    if not how.endswith("fsdp"):
        return DistributedDataParallel(model)
    # Sharded experts are at their place already; all else is FSDP's, unit by unit.
    ignored = set(expert_parameters(model))
    for block in model.children():
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    return fully_shard(model, mesh=mesh, ignored_params=ignored)


class Teacher:
    """Clustered tokens, and what a linear map of each cluster makes of them."""

    def __init__(self, device: torch.device, *, seed: int) -> None:
        same = torch.Generator().manual_seed(0)  # on every process
        self.centres_CD = torch.randn(CLUSTERS, WIDTH, generator=same).to(device)
        self.maps_CDD = (torch.randn(CLUSTERS, WIDTH, WIDTH, generator=same) / WIDTH**0.5).to(
            device
        )
        self.device = device
        self.generator = torch.Generator().manual_seed(1 + seed)

    def draw(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, both (num_tokens, WIDTH)."""
        cluster_N = torch.randint(CLUSTERS, (num_tokens,), generator=self.generator)
        noise_ND = torch.randn(num_tokens, WIDTH, generator=self.generator)
        cluster_N, noise_ND = cluster_N.to(self.device), noise_ND.to(self.device)
        x_ND = self.centres_CD[cluster_N] + 0.3 * noise_ND
        return x_ND, torch.einsum("nd,ndf->nf", x_ND, self.maps_CDD[cluster_N])


def train(model: nn.Module, teacher: Teacher, *, steps: int, num_tokens: int) -> None:
    layers = [module for module in model.modules() if isinstance(module, ecomoe.EcoMoE)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        for layer in layers:
            layer.set_progress(step / steps)
        x, target = teacher.draw(num_tokens)
        task = F.mse_loss(model(x), target)
        auxiliary = ecomoe.aux_loss(model)
        optimizer.zero_grad()
        (task + auxiliary).backward()
        norm = clip_grad_norm(model, 1.0)
        optimizer.step()
        if (step + 1) % max(steps // 5, 1) == 0:
            means = torch.stack((task.detach(), auxiliary.detach()))
            distributed.all_reduce(means)
            task_mean, auxiliary_mean = (means / distributed.get_world_size()).tolist()
            say(
                f"step {step + 1:>4}  task {task_mean:.4f}  auxiliary {auxiliary_mean:.4f}  "
                f"gradient {norm.item():.3f}"
            )


@torch.no_grad()
def check_gathered(model: nn.Module, teacher: Teacher) -> None:
    """Gather the weights, load them into a model of one process, and compare outputs."""
    inner = getattr(model, "module", model)
    options = StateDictOptions(full_state_dict=True)
    weights = get_model_state_dict(inner, options=options)  # on the first process; empty elsewhere
    x, _ = teacher.draw(64)
    y = model.eval()(x)
    if distributed.get_rank() == 0:
        alone = build().to(x.device).eval()
        alone.load_state_dict(weights)
        error = (alone(x) - y).abs().max().item()
        say(f"gathered on one process: {len(weights)} tensors, outputs differ by {error:.1e}")


def say(line: str) -> None:
    if distributed.get_rank() == 0:
        print(line, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("how", choices=["ddp", "fsdp", "experts", "experts+fsdp"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256, help="tokens a step on each process")
    options = parser.parse_args(arguments)
    for name in ("steps", "tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if "RANK" not in os.environ:
        parser.error(
            "launch it with torchrun --standalone --nproc-per-node 2 -m examples.distributed"
        )

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        size, rank = distributed.get_world_size(), distributed.get_rank()
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("ep",))
        model = wrap(build().to(device), options.how, mesh)
        held = sum(
            p.to_local().numel() if hasattr(p, "to_local") else p.numel()
            for p in model.parameters()
        )
        say(f"{options.how} on {size} processes, {held:,} parameters each")
        teacher = Teacher(device, seed=rank)
        train(model, teacher, steps=options.steps, num_tokens=options.tokens)
        check_gathered(model, teacher)
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
