import multiprocessing
import subprocess
import sys
import threading

import pytest
import torch

from ecomoe.workers import Pool, share_out


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run(units, costs):
    """Return what was done: unit, thread, and threads for operators."""
    done = []

    def work(queue):
        for unit in queue:
            done.append((unit, threading.current_thread().name, torch.get_num_threads()))

    share_out(work, units, costs)
    return done


def test_every_unit_once_and_the_settings_as_before():
    done = run(list(range(50)), [1.0] * 50)
    assert sorted(unit for unit, _, _ in done) == list(range(50))
    assert {threads for _, _, threads in done} == {1}
    assert torch.get_num_threads() == 2
    found = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found == [2]


def test_what_would_hold_up_a_worker_is_done_on_all_cores():
    done = run(["small", "large", "tiny"], [2.0, 9.0, 1.0])
    assert done[0] == ("large", threading.current_thread().name, 2)
    assert {unit for unit, _, _ in done} == {"small", "large", "tiny"}


def test_one_thread_or_one_unit_needs_no_workers():
    here = threading.current_thread().name
    assert run(["a"], [1.0]) == [("a", here, 2)]
    assert run([], []) == []
    torch.set_num_threads(1)
    assert {name for _, name, _ in run(["a", "b"], [1.0, 1.0])} == {here}


def test_an_error_reaches_the_caller_and_the_workers_live_on():
    def work(queue):
        for unit in queue:
            if unit == 3:
                raise RuntimeError("unit 3")

    with pytest.raises(RuntimeError, match="unit 3"):
        share_out(work, list(range(8)), [1.0] * 8)
    assert len(run(list(range(8)), [1.0] * 8)) == 8


@pytest.mark.parametrize("inference", [False, True])
def test_modes_hold_for_the_workers(inference):
    weight = torch.ones(3, requires_grad=True)
    with torch.inference_mode(inference):
        out = torch.zeros(8, 3)

        def work(queue):
            for unit in queue:
                torch.mul(weight, unit, out=out[unit])

        with torch.no_grad():
            share_out(work, list(range(8)), [1.0] * 8)
    assert torch.equal(out.sum(1), 3.0 * torch.arange(8))


def _child(connection):
    connection.send(sorted(unit for unit, _, _ in run(list(range(8)), [1.0] * 8)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork():
    run(list(range(8)), [1.0] * 8)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(there,))
    process.start()
    assert here.poll(30), "the child waits for threads that it does not have"
    assert here.recv() == list(range(8))
    process.join()


_LATE = """
import atexit, threading
import torch
import ecomoe

torch.set_num_threads(2)
layer = ecomoe.EcoMoE(8, 16).eval()
main = threading.main_thread()


def train(when):
    layer(torch.randn(64, 8)).square().sum().backward()
    print(when, flush=True)


def outlive():
    main.join()
    train("thread")


atexit.register(train, "exit")
if {warm}:
    train("main")
threading.Thread(target=outlive).start()
"""


@pytest.mark.parametrize("warm", [False, True])
def test_after_the_main_thread_has_ended(warm):
    command = [sys.executable, "-W", "error", "-c", _LATE.format(warm=warm)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.split() == ["main"] * warm + ["thread", "exit"]


def test_where_no_thread_can_be_started(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("ecomoe.workers._POOL", Pool())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert sorted(unit for unit, _, _ in run(list(range(8)), [1.0] * 8)) == list(range(8))
