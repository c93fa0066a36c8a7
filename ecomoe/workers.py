"""Threads that share the experts of a layer out among themselves, on a CPU.

An expert's products are too small to be split over cores well. Whole experts are not: each worker
takes the next expert when it is done with one, and computes it on cores of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Unit = TypeVar("Unit")

# More workers than these would wait for Python's lock on each other.
MAX_WORKERS = 8


class Pool:
    """Worker threads for a number of cores; made at first use, and again after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._num_threads = 0

    def run(self, job: Callable[[], None], *, num_workers: int, num_threads: int) -> None:
        """Run a job in so many workers at once, and raise what the first that failed raised."""
        futures: list[Future[None]] = []
        try:
            executor = self._executor_for(num_threads)
            futures += (executor.submit(job) for _ in range(num_workers))
        except RuntimeError:  # no thread can be had; none can once the main thread has ended
            job()
        for future in futures:
            future.result()

    def forget(self) -> None:
        """Leave the threads behind, which a forked process does not have."""
        self._lock = threading.Lock()
        self._executor = None

    def _executor_for(self, num_threads: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None or self._num_threads != num_threads:
                self._executor = _start(num_threads)
                self._num_threads = num_threads
            return self._executor


def _start(num_threads: int) -> ThreadPoolExecutor:
    num_workers = min(num_threads, MAX_WORKERS)
    ready = threading.Barrier(num_workers + 1)

    def begin() -> None:
        torch.get_num_threads()  # takes over the process's setting, once: before our own
        torch.set_num_threads(num_threads // num_workers)
        ready.wait()

    executor = ThreadPoolExecutor(num_workers, "ecomoe", initializer=begin)
    try:
        for _ in range(num_workers):
            executor.submit(int)
    except RuntimeError:
        ready.abort()
        raise
    ready.wait()
    # What a thread sets for itself, torch hands on to threads that start later: take that back.
    torch.set_num_threads(num_threads)
    return executor


_POOL = Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.forget)


def share_out(
    work: Callable[[Iterable[Unit]], None], units: Sequence[Unit], costs: Sequence[float]
) -> None:
    """Call ``work`` with units until all are done, in several threads where there are cores.

    A unit that is more than a worker's share of the cost is done first, on all cores. The others go
    to the workers, the most expensive first.
    """
    num_threads = torch.get_num_threads()
    share = sum(costs) / min(num_threads, MAX_WORKERS)
    if num_threads == 1 or len(units) < 2:
        work(units)
        return
    order = sorted(range(len(units)), key=lambda index: -costs[index])
    heavy = [index for index in order if costs[index] > share]
    if heavy:
        work([units[index] for index in heavy])
    rest = [units[index] for index in order[len(heavy) :]]
    if len(rest) < 2:
        work(rest)
        return
    queue = _Queue(rest)
    inference = torch.is_inference_mode_enabled()

    def job() -> None:
        # Modes belong to a thread: workers have to be told.
        with torch.inference_mode(inference), torch.no_grad():
            work(queue)

    num_workers = min(num_threads, MAX_WORKERS, len(rest))
    _POOL.run(job, num_workers=num_workers, num_threads=num_threads)


class _Queue(Iterator[Unit]):
    """An iterator that threads may share."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self._units = iter(units)
        self._lock = threading.Lock()

    def __next__(self) -> Unit:
        with self._lock:
            return next(self._units)
