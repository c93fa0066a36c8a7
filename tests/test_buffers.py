import gc
import mmap
import multiprocessing
import subprocess
import sys
import threading

import pytest
import torch

from ecomoe import buffers
from ecomoe.buffers import LARGE, Blocks

SHAPE = (LARGE // 4, 1)


@pytest.fixture
def asked(monkeypatch):
    """Sizes that were asked of the system."""
    sizes = []

    def pages(size):
        sizes.append(size)
        return mmap.mmap(-1, size)

    monkeypatch.setattr(buffers, "_pages", pages)
    return sizes


class TestBlocks:
    def test_a_freed_block_is_used_again(self, asked):
        blocks = Blocks()
        first = blocks.empty((3, 5), torch.float32).fill_(1.0)
        address = first.data_ptr()
        view = first[1:]
        del first
        gc.collect()
        second = blocks.empty((3, 5), torch.float32)
        assert second.data_ptr() != address, "a view still needs the first"
        assert torch.equal(view, torch.ones(2, 5))
        del view
        gc.collect()
        assert blocks.empty((5, 3), torch.float32).data_ptr() == address
        assert asked == [60, 60]

    def test_never_more_than_was_in_use_at_once(self, asked):
        blocks = Blocks()
        for size in range(100, 200):
            blocks.empty((size,), torch.uint8)
        assert sum(len(block) for block in blocks._free) <= 199

    def test_clearing(self, asked):
        blocks = Blocks()
        blocks.empty((8,), torch.float64)
        blocks.clear()
        blocks.empty((8,), torch.float64)
        assert asked == [64, 64]


_AT_EXIT = """
import atexit, torch


def last():
    other = blocks.empty((8,), torch.float32)
    print(other.data_ptr() != mine.data_ptr())


atexit.register(last)
from ecomoe.buffers import Blocks

blocks = Blocks()
mine = blocks.empty((8,), torch.float32)
"""


def test_at_exit_too_a_block_is_one_tensor_s():
    command = [sys.executable, "-c", _AT_EXIT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr


def _child(connection):
    connection.send(buffers._BLOCKS.empty((3,), torch.float32).shape)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_a_thread_is_inside():
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with buffers._BLOCKS._lock:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    process = context.Process(target=_child, args=(there,))
    process.start()
    try:
        assert here.poll(30), "the child waits for a thread that it does not have"
        assert here.recv() == (3,)
    finally:
        leave.set()
        thread.join()
        process.kill()
        process.join()


class TestEmpty:
    def test_only_large_ones_on_a_cpu(self, asked):
        like = torch.zeros(1)
        buffers.empty_cache()
        assert buffers.empty(like, (3, 0)).shape == (3, 0)
        assert buffers.empty(like, (5,)).dtype == torch.float32
        assert buffers.empty(like.to("meta"), SHAPE).is_meta
        assert asked == []
        large = buffers.empty(like.bfloat16(), (2 * SHAPE[0],))
        assert large.is_contiguous()
        assert large.dtype == torch.bfloat16
        assert asked == [LARGE]

    def test_a_gradient_is_handed_on_and_comes_back(self, asked):
        class Copy(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                return buffers.empty(grad, grad.shape).copy_(grad)

        buffers.empty_cache()
        parameter = torch.nn.Parameter(torch.zeros(SHAPE))
        for _ in range(3):
            parameter.grad = None
            Copy.apply(parameter).sum().backward()
            assert parameter.grad.eq(1).all()
        assert asked == [LARGE]


def test_large_zeros_are_zeros_and_nobody_has_written_them():
    resource = pytest.importorskip("resource")
    like = torch.empty(0)
    shape = (3, buffers.LARGE // 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    zeros = buffers.zeros(like, shape)
    zeros[1, 5] = 1.0
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < zeros.nbytes / mmap.PAGESIZE / 4
    assert zeros.sum() == 1.0
    del zeros
    assert not buffers.zeros(like, shape).any()
    assert not buffers.zeros(like, (2, 3)).any()
