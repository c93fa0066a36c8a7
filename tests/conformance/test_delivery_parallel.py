"""Over data-parallel ranks the auxiliary gradient is that of one big batch, too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from delivery import (
    CASES,
    DDP_MODES,
    LINEAR,
    Window,
    ratio,
    reference_gradient,
    relative_error,
    tiny_gpt2,
)

RANKS = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with what each optimizer step of `delivery.py`, run as two ranks on gloo, saw."""
    out = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).parents[2]
    environment = {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "HF_HUB_OFFLINE": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("delivery.py"), out],
            env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=180)
            assert rank.returncode == 0, output
    finally:
        for rank in ranks:
            rank.kill()
    return out


def free_port() -> int:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    return store.port


@pytest.mark.parametrize(
    "case", [*CASES, *(f"task, {mode}" for mode in [*DDP_MODES, "sharded"]), "explicit"]
)
def test_router_gradient_over_two_ranks(case, runs):
    first, second = (
        [Window(*window) for window in torch.load(runs / f"{case} {rank}.pt")] for rank in (0, 1)
    )
    assert [len(window.batches) for window in first] == [2] * (2 if case in CASES else 1)
    layer_arguments = CASES.get(case, LINEAR)
    num_experts = tiny_gpt2().transformer.h[0].mlp.num_experts
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours.gradient, theirs.gradient)
        both = Window(ours.progress, ours.batches + theirs.batches, ours.gradient)
        bound = num_experts / ours.batches[0].numel() if case == "balance" else 1e-5
        reference = reference_gradient(both, layer_arguments)
        assert ratio(ours.gradient, reference) == pytest.approx(1.0, abs=bound)
        assert relative_error(ours.gradient, reference) < bound
