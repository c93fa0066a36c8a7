"""Measure the two machine constants that the cost model asks for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ecomoe.cost_model import Machine

ROUNDS = 7
PRODUCT = 1024
COPIED = 2**26  # bytes, beyond every cache


def measure_machine(
    *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Machine:
    """Return what this machine reaches: matrix products, and copies into fresh memory.

    Gradients are written to memory that the step allocates, so the copy allocates too. Takes about
    a second. A busy machine is measured as it is.

    Args:
        dtype: Of the products; the copy is counted in bytes.
        device: Where to measure.
    """
    rows = torch.randn(2 * PRODUCT, PRODUCT, device=device).to(dtype)
    columns = torch.randn(PRODUCT, 2 * PRODUCT, device=device).to(dtype)
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    product = _seconds(lambda: rows @ columns)
    copied = _seconds(source.clone)
    flops = 2.0 * rows.shape[0] * rows.shape[1] * columns.shape[1]
    return Machine(flops / product, 2.0 * COPIED / copied)


def _seconds(call: Callable[[], torch.Tensor]) -> float:
    """Return the median time of a call."""
    spent = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        result = call()
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])
