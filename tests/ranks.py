"""Processes that run functions as the ranks of one process group, started once for many tests."""

import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch import multiprocessing as mp

TIMEOUT_S = 120  # a rank that waits for another one in vain must not wait for ever


class Ranks:
    """``size`` processes on gloo. A failure ends them, and the next run starts fresh ones."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what ``function(*arguments)`` returns on each rank; it must be importable."""
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send((function, arguments))
            results, failures = [], []
            for rank, pipe in enumerate(self._pipes):
                # After one rank has failed the others may wait for it: do not wait for them.
                if not pipe.poll(1 if failures else TIMEOUT_S):
                    failures.append(f"rank {rank} did not answer")
                    continue
                failed, result = pipe.recv()
                (failures if failed else results).append(result)
        except EOFError:
            failures = ["a rank died"]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return results

    def _start(self) -> None:
        context = mp.get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.size, str(store)), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(pipe: Any, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            pipe.send((False, function(*arguments)))
        except Exception:
            pipe.send((True, f"rank {rank}: {traceback.format_exc()}"))
