"""Means of the auxiliary losses by name, for a log."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ecomoe.auxiliary import auxiliary_layers


class TermMeans:
    """Averages the auxiliary losses of a model's layers by name, for a log.

    Sums stay on the device; `compute` waits for it once. A layer called several times in one
    forward pass is represented by its last call. Nothing is reduced over ranks.

    Args:
        model: Any module that contains EcoMoE layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = list(auxiliary_layers(model))
        self._sums: dict[tuple[tuple[int, str], ...], tuple[Tensor, int]] = {}

    def add(self) -> None:
        """Count the losses of the last forward pass."""
        self.take()()

    def take(self) -> Callable[[], None]:
        """Return what counts the losses of the last forward pass, should they come to matter."""
        found = [
            ((index, name), term)
            for index, (_, _, slot) in enumerate(self._layers)
            for name, term in slot.terms.items()
        ]
        if not found:
            return lambda: None
        # One stack and one addition, however many layers there are.
        keys = tuple(key for key, _ in found)
        device = found[0][1].device
        values = torch.stack([term.to(device, torch.float32) for _, term in found])
        return partial(self._count, keys, values)

    def _count(self, keys: tuple[tuple[int, str], ...], values: Tensor) -> None:
        total, count = self._sums.get(keys, (torch.zeros_like(values), 0))
        self._sums[keys] = (total + values, count + 1)

    def compute(self) -> dict[str, float]:
        """Return the means since the last call by name, and start anew; empty if there are none.

        Each loss is averaged over layers and forward passes, before its weight. ``total`` is what
        was added to the task loss: weighted, summed over layers, averaged over forward passes.
        """
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        weighted, passes = 0.0, 0
        for keys, (values, count) in self._sums.items():
            passes += count
            for (index, name), value in zip(keys, values.tolist(), strict=True):
                layer: Any = self._layers[index][1]
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + count
                weighted += layer.term_weights()[name] * value
        self._sums.clear()
        means = {name: value / counts[name] for name, value in sums.items()}
        return {**means, "total": weighted / passes} if means else {}
