"""What monitoring costs: ``python -m tests.benchmarks.monitor``.

Forward and backward passes of a GPT-2-small-shaped model with EcoMoE layers on the CPU, with and
without hooks in turn, so that a drift of the machine's speed meets both. No optimizer steps, so the
shares are upper bounds of those of a training step. Two figures of the cost are printed: the paired
difference of processor time, which holds everything and is noisy (how noisy, pairs without any
monitor tell), and the time inside the monitor's own hooks, which is precise. It prints the cost of
a report, the bytes held, the transfers to the host and the graph breaks as well.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ecomoe
from ecomoe.ecology import readers, taps, transfer

# On an accelerator the host waits for each of these; on a CPU they can at least be counted.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")


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
    """Seconds of processor time, one for each round.

    Attributes:
        plain: A step without a monitor.
        again: Another one.
        watched: A step with a monitor.
        hooks: The part of ``watched`` that is spent inside hooks.
        reports: A report after it.
    """

    plain: list[float]
    again: list[float]
    watched: list[float]
    hooks: list[float]
    reports: list[float]


def time_rounds(model: nn.Module, tokens: torch.Tensor, *, num: int) -> Timings:
    """Return what the parts of some rounds take."""
    found = Timings([], [], [], [], [])

    def timing(original: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: object, **kwargs: object) -> None:
            start = time.process_time()
            original(*args, **kwargs)
            found.hooks[-1] += time.process_time() - start

        return timed

    def watch() -> None:
        with ecomoe.Monitor(model, every=10**9, view="off") as monitor:
            found.hooks.append(0.0)
            found.watched.append(step(model, tokens))
            start = time.process_time()
            monitor.report()
            found.reports.append(time.process_time() - start)

    turns = [
        lambda: found.plain.append(step(model, tokens)),
        watch,
        lambda: found.again.append(step(model, tokens)),
    ]
    with around_hooks(timing):
        for number in range(num):
            # Each is first in its turn, so that what one leaves behind meets all.
            for place in range(3):
                turns[(number + place) % 3]()
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


def bytes_held(model: nn.Module) -> float:
    """Return the bytes of tensors that a tap holds after a step, as a mean over layers."""
    with ecomoe.Monitor(model, view="off") as monitor:
        assert monitor._watch is not None
        with torch.no_grad():
            model(torch.randn(1, 8, model[0].norm1.normalized_shape[0]))
        of_taps = [_tensors(vars(tap)) for tap in monitor._watch.taps]
        return statistics.mean(
            sum(t.numel() * t.element_size() for t in found) for found in of_taps
        )


def _tensors(values: dict[str, object]) -> list[torch.Tensor]:
    found = [value for value in values.values() if isinstance(value, torch.Tensor)]
    for value in values.values():
        found += value.values() if isinstance(value, dict) else ()
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the quartiles around it."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, low, high


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=1536, help="of each of 16 experts")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    torch.manual_seed(0)
    heads = max(1, given.d_model // 64)
    blocks = [Block(given.d_model, heads, given.hidden) for _ in range(given.layers)]
    model = nn.Sequential(*blocks)
    tokens = torch.randn(given.batch, given.length, given.d_model)
    step(model, tokens)
    found = time_rounds(model, tokens, num=given.rounds)
    whole = statistics.median(found.plain + found.again)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{given.layers} layers, D={given.d_model}, 16 experts of {given.hidden}, top 2, "
        f"{millions:.0f} M parameters, {given.batch * given.length} tokens a step, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, {given.rounds} rounds"
    )
    print(
        "a step              {:.3f} s, quartiles {:.3f} to {:.3f}".format(*quartiles(found.plain))
    )
    for name, others in (("with the monitor", found.watched), ("with none, again", found.again)):
        differences = [(b - a) / whole for a, b in zip(found.plain, others, strict=True)]
        print(
            f"{name}    {{:+.2%}}, quartiles {{:+.2%}} to {{:+.2%}}".format(*quartiles(differences))
        )
    print(
        "inside the hooks    {:.2%} of a step, quartiles {:.2%} to {:.2%}".format(
            *quartiles([seconds / whole for seconds in found.hooks])
        )
    )
    report = statistics.median(found.reports)
    print(f"a report            {report * 1e3:.1f} ms, {report / whole / 100:.3%} of 100 steps")
    print(f"held a layer        {bytes_held(model) / 1024:.1f} KiB")
    in_hooks, in_report = count_waits(model, tokens)
    print(f"host waits          {in_hooks} in the hooks of 2 steps, {in_report} a report")
    print(f"graph breaks        {count_graph_breaks(tokens)}")
    print(
        f"peak memory         {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    )


if __name__ == "__main__":
    main()
