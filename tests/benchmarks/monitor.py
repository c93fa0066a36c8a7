"""What monitoring costs: ``python -m tests.benchmarks.monitor``.

Forward and backward passes of a GPT-2-small-shaped model with EcoMoE layers on the CPU. No
optimizer steps, so the shares are upper bounds of those of a training step. Two figures of the cost
are printed. One holds everything and is noisy: processor time of blocks of four steps, A B B A and
B A A B in turn, A without a monitor and B with one, so that a steady drift of the machine's speed
cancels in each block; the median over blocks of B / A - 1 with the bootstrap interval of 95 %, and
the same of blocks without any monitor, which tells what the noise is. The other one is precise: the
time inside the monitor's own hooks. Both are shares, and the same for each layer, so fewer layers
(``--layers 2``) buy more blocks.

It prints the cost of a report, the bytes held, the transfers to the host and the graph breaks too.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ecomoe
from ecomoe.ecology import readers, taps, transfer

# On an accelerator the host waits for each of these; on a CPU they can at least be counted.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")
NUM_HELD = 4


class Block(nn.Module):
    """Attention and an EcoMoE layer, as GPT-2 stacks them."""

    def __init__(self, d_model: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.num_heads = num_heads
        self.mlp = ecomoe.EcoMoE(d_model, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, L, D) to (B, L, D)."""
        parts = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def step(model: nn.Module, tokens: torch.Tensor) -> float:
    """Return the seconds of processor time of one forward and backward pass."""
    start = time.process_time()
    loss = model(tokens).square().mean() + ecomoe.aux_loss(model)
    loss.backward()
    seconds = time.process_time() - start
    model.zero_grad(set_to_none=False)
    return seconds


class WaitCount(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Count the operator and run it."""
        self.count += func.overloadpacket.__name__ in WAITING
        return func(*args, **(kwargs or {}))


@contextmanager
def around_hooks(wrapper: Callable[[Callable[..., None]], Callable[..., None]]) -> Iterator[None]:
    """Put a wrapper around the monitor's hooks, for monitors that attach in the meantime."""
    places = [
        (taps.RootTap, "before"),
        (taps.RootTap, "after"),
        (readers.EcoTap, "_read_router"),
    ]
    originals = [getattr(owner, name) for owner, name in places]
    try:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, wrapper(original))
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


class Timings(NamedTuple):
    """What was measured, one for each block.

    Attributes:
        plain: Seconds of processor time of a step without a monitor.
        watched: Processor time of steps with a monitor over that of steps without, less 1.
        noise: The same with no monitor in either.
        hooks: The part of a step with a monitor that is spent inside hooks.
        reports: Seconds of a report after it.
    """

    plain: list[float]
    watched: list[float]
    noise: list[float]
    hooks: list[float]
    reports: list[float]


def time_blocks(model: nn.Module, tokens: torch.Tensor, *, num: int) -> Timings:
    """Return what the parts of some blocks take."""
    found = Timings([], [], [], [], [])
    inside = 0.0

    def timing(original: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: object, **kwargs: object) -> None:
            nonlocal inside
            start = time.process_time()
            original(*args, **kwargs)
            inside += time.process_time() - start

        return timed

    def watch() -> float:
        nonlocal inside
        with ecomoe.Monitor(model, every=10**9, view="off") as monitor:
            inside = 0.0
            seconds = step(model, tokens)
            found.hooks.append(inside / seconds)
            start = time.process_time()
            monitor.report()
            found.reports.append(time.process_time() - start)
        return seconds

    def plain() -> float:
        found.plain.append(step(model, tokens))
        return found.plain[-1]

    def block(other: Callable[[], float], *, turned: bool) -> float:
        order = [plain, other, other, plain]
        if turned:
            order = [other, plain, plain, other]
        seconds = [take() for take in order]
        outer, inner = seconds[0] + seconds[3], seconds[1] + seconds[2]
        return outer / inner - 1 if turned else inner / outer - 1

    with around_hooks(timing):
        for number in range(num):
            found.watched.append(block(watch, turned=number % 2 == 1))
            found.noise.append(block(lambda: step(model, tokens), turned=number % 2 == 1))
    return found


def count_waits(model: nn.Module, tokens: torch.Tensor) -> tuple[int, int]:
    """Return how often the host would wait: in the hooks of two steps, and in their report."""
    waits = WaitCount()
    transfers = 0

    def counting(original: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: object, **kwargs: object) -> None:
            with waits:
                original(*args, **kwargs)

        return counted

    original = transfer._to_host

    def counted(*args: object) -> tuple[torch.Tensor, ...]:
        nonlocal transfers
        transfers += 1
        return original(*args)  # type: ignore[arg-type]

    transfer._to_host = counted
    try:
        with around_hooks(counting), ecomoe.Monitor(model, every=10**9, view="off") as monitor:
            for _ in range(2):
                step(model, tokens)
            monitor.report()
            return waits.count, transfers
    finally:
        transfer._to_host = original


def count_graph_breaks(tokens: torch.Tensor) -> int:
    """Return the graph breaks in a watched model of two narrow blocks, both ways."""
    model = nn.Sequential(*[Block(48, 2, 48) for _ in range(2)])
    counters.clear()
    with ecomoe.Monitor(model, view="off") as monitor:
        outputs = torch.compile(model, backend="aot_eager")(tokens[..., :48])
        (outputs.sum() + ecomoe.aux_loss(model)).backward()
        assert monitor.report().to_dict()["layers"][0]["num_tokens"] == tokens[..., 0].numel()
    return sum(counters["graph_break"].values())


def bytes_held(num_experts: int) -> tuple[float, float, float]:
    """Return the bytes of tensors that the monitor holds, whatever the layers' width.

    Returns:
        A layer's while training, a layer's in the middle of an evaluation with labels of ten
        classes for 64 predictions, and what all layers share.
    """
    tiers = (num_experts // 2, num_experts // 4, num_experts // 4)
    model = nn.Sequential(*[ecomoe.EcoMoE(4, 4, tiers=tiers) for _ in range(NUM_HELD)])
    x = torch.randn(64, 4)
    with ecomoe.Monitor(model, view="off") as monitor, torch.no_grad():
        assert monitor._watch is not None
        constants = _tensors(monitor._watch._traffic.constants)
        shared = _size(constants.values())

        def of_a_layer() -> float:
            found: dict[int, torch.Tensor] = {}
            for tap in monitor._watch.taps:  # type: ignore[union-attr]
                found |= _tensors({k: v for k, v in vars(tap).items() if k != "traffic"})
            of_model = {id(t) for part in model.modules() for t in part.state_dict().values()}
            own = [t for key, t in found.items() if key not in {*constants, *of_model}]
            return _size(own) / NUM_HELD

        model(x)
        training = of_a_layer()
        model.eval()
        model(x)
        monitor.evaluate(outputs=torch.randn(64, 10), targets=torch.arange(64) % 10)
        evaluation = of_a_layer()
        monitor.report()
        assert of_a_layer() == training
    return training, evaluation, shared


def _tensors(value: Any) -> dict[int, torch.Tensor]:
    """Return all tensors in nested containers, by their identity."""
    if isinstance(value, torch.Tensor):
        return {id(value): value}
    inner = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple):
        return {}
    return {key: tensor for part in inner for key, tensor in _tensors(part).items()}


def _size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the quartiles around it."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, low, high


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its bootstrap interval of 95 %."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[50], medians[-51]


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=1536, help="of each of 16 experts")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=4, help="blocks of four steps, each kind")
    parser.add_argument("--held", action="store_true", help="print the bytes held, and end")
    given = parser.parse_args()
    print("held, KiB           training, evaluation: of a layer; shared by all layers of a model")
    for num_experts in (16, 128, 512):
        kib = [size / 1024 for size in bytes_held(num_experts)]
        print(f"  {num_experts:3} experts       {kib[0]:.1f}, {kib[1]:.1f}; {kib[2]:.1f}")
    if given.held:
        return
    torch.manual_seed(0)
    heads = max(1, given.d_model // 64)
    blocks = [Block(given.d_model, heads, given.hidden) for _ in range(given.layers)]
    model = nn.Sequential(*blocks)
    tokens = torch.randn(given.batch, given.length, given.d_model)
    step(model, tokens)
    found = time_blocks(model, tokens, num=given.rounds)
    whole = statistics.median(found.plain)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{given.layers} layers, D={given.d_model}, 16 experts of {given.hidden}, top 2, "
        f"{millions:.0f} M parameters, {given.batch * given.length} tokens a step, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, {given.rounds} blocks"
    )
    print(
        "a step              {:.3f} s, quartiles {:.3f} to {:.3f}".format(*quartiles(found.plain))
    )
    for name, ratios in (("with the monitor", found.watched), ("with none, twice", found.noise)):
        print(f"{name}    {{:+.2%}}, 95 % {{:+.2%}} to {{:+.2%}}".format(*median_interval(ratios)))
    print(
        "inside the hooks    {:.3%} of a step, 95 % {:.3%} to {:.3%}".format(
            *median_interval(found.hooks)
        )
    )
    report = statistics.median(found.reports)
    print(f"a report            {report * 1e3:.1f} ms, {report / whole / 100:.3%} of 100 steps")
    in_hooks, in_report = count_waits(model, tokens)
    print(f"host waits          {in_hooks} in the hooks of 2 steps, {in_report} a report")
    print(f"graph breaks        {count_graph_breaks(tokens)}")
    print(
        f"peak memory         {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    )


if __name__ == "__main__":
    main()
