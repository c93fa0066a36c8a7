"""What monitoring costs: ``python -m tests.benchmarks.monitor``.

Training steps of a GPT-2-small-shaped model with EcoMoE layers on the CPU, each timed with and
without hooks in turn, so that a drift of the machine's speed meets both. It prints the median cost
of a step, the bytes that the monitor holds, and its transfers to the host.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

import ecomoe
from ecomoe.ecology import taps, transfer


class Block(nn.Module):
    """Attention and an EcoMoE layer, as GPT-2 stacks them."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.num_heads = num_heads
        self.mlp = ecomoe.EcoMoE(d_model, 2 * d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, L, D) to (B, L, D)."""
        parts = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    """Return the seconds of one training step."""
    start = time.perf_counter()
    loss = model(tokens).square().mean() + ecomoe.aux_loss(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=15)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(given.d_model, 12) for _ in range(given.layers)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randn(given.batch, given.length, given.d_model)
    for _ in range(2):
        step(model, optimizer, tokens)
    plain, watched, hook_seconds = [], [], []
    observe = taps.LayerTap.observe

    def timed(*args: object, **kwargs: object) -> None:
        start = time.perf_counter()
        observe(*args, **kwargs)
        hook_seconds[-1] += time.perf_counter() - start

    taps.LayerTap.observe = timed
    for _ in range(given.pairs):
        plain.append(step(model, optimizer, tokens))
        with ecomoe.Monitor(model, every=10**9) as monitor:
            hook_seconds.append(0.0)
            watched.append(step(model, optimizer, tokens))
            held = sum(
                vector.numel() * vector.element_size()
                for tap in monitor._watch.taps
                for vector in tap.sums.values()
            )
            transfers = count_transfers(monitor)
    taps.LayerTap.observe = observe
    differences = [b - a for a, b in zip(plain, watched, strict=True)]
    median = statistics.median(plain)
    print(f"step {median:.3f} s ({given.batch * given.length} tokens, {given.layers} layers)")
    print(f"paired median difference {statistics.median(differences) / median:+.2%} of a step")
    print(f"time inside the taps {statistics.median(hook_seconds) / median:.2%} of a step")
    print(f"held {held / given.layers / 1024:.1f} KiB a layer, three kinds of traffic together")
    print(f"transfers to the host a report: {transfers}")


def count_transfers(monitor: ecomoe.Monitor) -> int:
    """Return how often a report moves tensors to the host."""
    calls = 0
    original = transfer._to_host

    def counted(*args: object) -> tuple[torch.Tensor, ...]:
        nonlocal calls
        calls += 1
        return original(*args)

    transfer._to_host = counted
    try:
        monitor.report()
    finally:
        transfer._to_host = original
    return calls


if __name__ == "__main__":
    main()
