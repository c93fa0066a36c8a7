"""Measure the machine constants that the cost model asks for.

Axes: N rows, D features, H hidden features.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ecomoe.machines import BLOCK_PASSES, Host, Machine

ROUNDS = 7
SIZES = 1024, 512, 2048  # N, D, H of the products
ADDED = 2**26  # bytes, beyond the caches of a core, and more than glibc keeps once it is freed
SMALL = 64
SMALL_ROUNDS = 300


def measure_machine(
    *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Machine:
    """Return what this machine reaches; a `Host` where it is a CPU.

    Of products, those of a training step: ``x W^T``, ``g W`` and ``g^T x``, the last of which takes
    twice as long in 16 bits. Of memory, sums of two tensors: most operations of a layer read about
    two values for each that they write. Into fresh memory they take longer by what the system
    takes to supply it. Takes a second or two. A busy machine is measured as it is.

    Args:
        dtype: Of the products; the sums are counted in bytes.
        device: Where to measure.
    """
    rows, features, hidden = SIZES
    x_ND = torch.randn(rows, features, device=device).to(dtype)
    weight_HD = torch.randn(hidden, features, device=device).to(dtype)
    grad_NH = torch.randn(rows, hidden, device=device).to(dtype)
    products = (
        lambda: x_ND @ weight_HD.T,
        lambda: grad_NH @ weight_HD,
        lambda: grad_NH.T @ x_ND,
    )
    rate = 3 * 2.0 * rows * features * hidden / sum(_seconds(product) for product in products)
    source, other, kept = torch.zeros(3, ADDED // 4, device=device)
    into_kept = _seconds(lambda: torch.add(source, other, out=kept))
    bandwidth = 3.0 * ADDED / into_kept
    if not source.is_cpu:
        return Machine(rate, bandwidth)
    # The least of some: where pages have to be found first, the supply is a tenth of that.
    fresh = _seconds(lambda: torch.add(source, other), of=min)
    supplied = fresh - into_kept
    small = torch.randn(SMALL, SMALL)
    small_as = small.to(dtype)
    return Host(
        rate,
        bandwidth,
        fresh_bytes_per_second=ADDED / supplied if supplied > 0.0 else math.inf,
        seconds_per_launch=_seconds(lambda: small @ small, rounds=SMALL_ROUNDS),
        seconds_per_product=_seconds(lambda: small_as @ small_as, rounds=SMALL_ROUNDS),
        block_passes=BLOCK_PASSES.get(dtype.itemsize, 1.0),
    )


def _seconds(
    call: Callable[[], Tensor],
    *,
    rounds: int = ROUNDS,
    of: Callable[[list[float]], float] = statistics.median,
) -> float:
    """Return the median time of a call, or what else is asked for of all of its times."""
    spent = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        result = call()
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
        spent.append(time.perf_counter() - began)
    return of(spent[1:])
