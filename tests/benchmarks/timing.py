"""Time contenders in turn, call by call, so that a drift of the machine's speed meets all of them.

Axes: N tokens, D features.
"""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ecomoe

STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")

SLOW = 3.0  # over the dense twin: what is slower is called in fewer rounds
HOPELESS = 12.0  # what is slower than this is called in the first rounds alone
FEWEST = 3
KEPT = 3  # the first contenders are called in every round, however slow


@dataclass
class Contender:
    """A layer, and what its calls took, round by round.

    ``around`` is entered outside of what is timed, with the batch; it may prepare the layer.
    """

    name: str
    module: nn.Module
    around: Callable[[Tensor], Any] | None = None
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    stride: int = 1

    def call(self, kind: str, x_ND: Tensor, grad_ND: Tensor) -> float:
        """Run a forward pass ("forward") or a forward and a backward pass ("both"); return seconds.

        Gradients are None before it, as an optimizer leaves them.
        """
        training = kind == "both"
        self.module.train(training)
        self.module.zero_grad(set_to_none=True)
        x_ND = x_ND.detach().requires_grad_(training)
        with self._prepared(x_ND), torch.set_grad_enabled(training):
            began = now(x_ND)
            self.run(x_ND, grad_ND if training else None)
            return now(x_ND) - began

    def run(self, x_ND: Tensor, grad_ND: Tensor | None) -> None:
        """Run the layer, and its backward pass where there is a gradient of the output."""
        y_ND = self.module(x_ND)
        losses = []
        if isinstance(y_ND, tuple):
            y_ND, *losses = y_ND
        if grad_ND is None:
            return
        if any(isinstance(module, ecomoe.EcoMoE) for module in self.module.modules()):
            losses = [ecomoe.aux_loss(self.module)]
        losses = [loss for loss in losses if loss.requires_grad]
        torch.autograd.backward([y_ND, *losses], [grad_ND, *[None] * len(losses)])

    @contextmanager
    def _prepared(self, x_ND: Tensor) -> Iterator[None]:
        if self.around is None:
            yield
            return
        with self.around(x_ND):
            yield

    def peak_bytes(self, x_ND: Tensor, grad_ND: Tensor) -> int | None:
        """Return by how much a forward and backward pass raises the memory in use at its peak.

        Gradients of the weights are in it; weights, input and output gradient are not. On a CPU it
        is the process's resident memory: the first call alone tells, since later ones find memory
        that the first left behind. None where the system does not tell.
        """
        self.module.train()
        self.module.zero_grad(set_to_none=True)
        x_ND = x_ND.detach().requires_grad_()
        with self._prepared(x_ND):
            if x_ND.is_cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                self.run(x_ND, grad_ND)
                return torch.cuda.max_memory_allocated() - before
            if not STATUS.exists():
                return None
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            RESET_PEAK.write_text("5")
            resident = _of_process("VmRSS")
            self.run(x_ND, grad_ND)
            return _of_process("VmHWM") - resident

    def saved_bytes(self, x_ND: Tensor) -> int:
        """Return the bytes kept for backward: each storage once, weights left out."""
        self.module.train()
        known = {weight.untyped_storage().data_ptr() for weight in self.module.parameters()}
        # By reference: what a part of the graph saved that has gone since is not kept.
        kept: weakref.WeakSet[_Saved] = weakref.WeakSet()

        def pack(tensor: Tensor) -> _Saved:
            # Without its graph: an output would keep the node alive that saved it.
            saved = _Saved(tensor.detach())
            kept.add(saved)
            return saved

        x_ND = x_ND.detach().requires_grad_()
        saved_by_graph = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor)
        with self._prepared(x_ND), saved_by_graph:
            y_ND = self.module(x_ND)
        storages = {saved.tensor.untyped_storage() for saved in kept}
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        total = sum(size for place, size in sizes.items() if place not in known)
        del y_ND
        return total


@dataclass(eq=False)
class _Saved:
    """A tensor that a graph holds on to."""

    tensor: Tensor


def _of_process(name: str) -> int:
    """Return a size of this process in bytes, as Linux tells it."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def now(like: Tensor) -> float:
    """Return the time in seconds, after the tensor's device has come to rest."""
    if like.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def race(
    contenders: list[Contender],
    kinds: tuple[str, ...],
    draw: Callable[[], tuple[Tensor, Tensor]],
    *,
    seconds: float,
    fewest: int,
    most: int,
    warm_up: int = 2,
) -> None:
    """Call all contenders on one fresh batch a round, until the time is over.

    Their order is drawn anew in every round: who comes after whom finds another cache.

    Args:
        contenders: The first is what the others' slowness is told by.
        kinds: What to time, see `Contender.call`.
        draw: Returns a batch (N, D) and the output's gradient.
        seconds: When to stop, once there are ``fewest`` rounds.
        fewest: Rounds at least.
        most: Rounds at most.
        warm_up: Rounds before the first that counts.
    """
    orders = random.Random(0)
    began = time.perf_counter()
    for index in range(-warm_up, most):
        if index >= fewest and time.perf_counter() - began > seconds:
            return
        x_ND, grad_ND = draw()
        for contender in orders.sample(contenders, len(contenders)):
            if index >= FEWEST and (contender.stride == 0 or index % contender.stride):
                continue
            for kind in kinds:
                spent = contender.call(kind, x_ND, grad_ND)
                if index >= 0:
                    contender.seconds.setdefault(kind, {})[index] = spent
        if index == 0:
            pace = sum(contenders[0].seconds[kind][0] for kind in kinds)
            for contender in contenders:
                times = sum(contender.seconds[kind][0] for kind in kinds) / pace
                if contender not in contenders[:KEPT]:
                    contender.stride = 0 if times > HOPELESS else max(1, round(times / SLOW))


def quartiles(values: list[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def paired(of: Contender, over: Contender, kind: str) -> list[float]:
    """Return the quartiles of one's time over the other's in the same rounds."""
    mine, other = of.seconds[kind], over.seconds[kind]
    return quartiles([mine[index] / other[index] for index in mine if index in other])
