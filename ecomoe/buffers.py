"""Memory for large gradients on the CPU that is not handed back to the operating system.

glibc gives a block of 32 MiB or more back as soon as it is freed, and smaller ones once some of
them are free at the end of its heap. So the stacked experts' gradients and what lies between their
products, freed and made anew in each step, cost one page fault per 4 KiB: as much time as the
products that fill them, where tokens are few. Here such a block is kept for the next of its size.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
import weakref

import torch
from torch import Tensor

# Keeping smaller ones takes longer than it saves.
LARGE = 4 * 2**20


class Blocks:
    """Freed blocks of memory, each used by one tensor at a time.

    A block comes back when the last tensor on its storage is gone. Before memory is asked of the
    system, as much that is free goes back to it: what is held never exceeds what was once in use.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entered where the collector frees a tensor inside
        self._free: list[mmap.mmap] = []

    def empty(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a contiguous CPU tensor of undefined content, which has at least one element."""
        num_elements = math.prod(shape)
        block = self._take(num_elements * dtype.itemsize)
        view = (ctypes.c_char * len(block)).from_buffer(block)
        # The storage holds the view, and nothing else does: both end together.
        finalizer = weakref.finalize(view, self._give, block)
        finalizer.atexit = False  # whoever computes at exit shall not get what is in use
        return torch.frombuffer(view, dtype=dtype, count=num_elements).view(shape)

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            for index in reversed(range(len(self._free))):
                if len(self._free[index]) == size:
                    return self._free.pop(index)
            returned = 0
            while self._free and returned < size:
                returned += len(self._free.pop(0))
        return _pages(size)

    def _give(self, block: mmap.mmap) -> None:
        with self._lock:
            self._free.append(block)

    def forget_lock(self) -> None:
        """Make a new lock: in a forked process, a thread that is not there may hold the old one."""
        self._lock = threading.RLock()

    def clear(self) -> None:
        """Give all free blocks back to the system."""
        with self._lock:
            self._free.clear()


def _pages(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    # Private: a forked process must not write into its parent's gradients.
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


_BLOCKS = Blocks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_BLOCKS.forget_lock)


def empty(like: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return an uninitialised contiguous tensor of ``like``'s dtype and device."""
    if not _is_large(like, shape):
        return like.new_empty(shape)
    return _BLOCKS.empty(shape, like.dtype)


def zeros(like: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return a contiguous tensor of zeros in ``like``'s dtype and device.

    A large one is made of fresh pages, which are zeros without anybody writing them.
    """
    if not _is_large(like, shape):
        return like.new_zeros(shape)
    size = math.prod(shape)
    pages = _pages(size * like.itemsize)
    return torch.frombuffer(pages, dtype=like.dtype, count=size).view(shape)


def _is_large(like: Tensor, shape: torch.Size | tuple[int, ...]) -> bool:
    plain = type(like) in (Tensor, torch.nn.Parameter) and like.is_cpu
    return plain and math.prod(shape) * like.itemsize >= LARGE


def empty_cache() -> None:
    """Give the memory that is kept for large tensors, and not in use, back to the system."""
    _BLOCKS.clear()
