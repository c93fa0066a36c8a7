"""Measure the machine constants that the cost model asks for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ecomoe.cost_model import CPU_OPERATION, Machine

ROUNDS = 7
PRODUCT = 1024
ADDED = 2**26  # bytes, beyond the caches of a core


def measure_machine(
    *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Machine:
    """Return what this machine reaches: matrix products, and sums of two into fresh memory.

    Of the operations of a layer most read about two values for each that they write, and a step
    writes to memory that it allocates: so do the sums. Takes about a second. A busy machine is
    measured as it is. What an operation takes whatever its size is not measured but known.

    Args:
        dtype: Of the products; the sums are counted in bytes.
        device: Where to measure.
    """
    rows = torch.randn(2 * PRODUCT, PRODUCT, device=device).to(dtype)
    columns = torch.randn(PRODUCT, 2 * PRODUCT, device=device).to(dtype)
    source, other = torch.zeros(2, ADDED // 4, device=device)
    product = _seconds(lambda: rows @ columns)
    added = _seconds(lambda: torch.add(source, other))
    flops = 2.0 * rows.shape[0] * rows.shape[1] * columns.shape[1]
    operation = CPU_OPERATION if source.is_cpu else 0.0
    return Machine(flops / product, 3.0 * ADDED / added, operation)


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
