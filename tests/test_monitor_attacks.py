"""The monitor under kills, interrupts, copies and long runs."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from patches import batches, make
from torch import nn
from torch.nn import functional as F

import ecomoe
from ecomoe.ecology.recorder import MIN_RECORDS, Recorder
from ecomoe.ecology.sinks import read_runs
from ecomoe.ecology.taxonomy import Thresholds

KILLED_STEPS = 60


def hooks_of(model):
    found = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    return found


def learn(model, optimizer, x, y):
    loss = F.cross_entropy(model(x), y) + ecomoe.aux_loss(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def judge(model, monitor, x, y):
    model.eval()
    with torch.no_grad():
        monitor.evaluate(outputs=model(x), targets=y)
    model.train()


def train_for_ever(model, optimizer, log, *, until):
    given = {"optimizer": optimizer, "total_steps": 10**6, "every": 1, "log": log, "view": "off"}
    with ecomoe.Monitor(model, **given) as monitor:
        # Again, long after: Python drops what is raised within a weak reference's callback.
        signal.setitimer(signal.ITIMER_REAL, until, 5.0)
        while True:
            for x, y in batches(2):
                learn(model, optimizer, x, y)
                judge(model, monitor, x, y)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such timer")
# An interrupt between the opening of a file and its `with` leaves it to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_interrupts_anywhere_leave_no_hook_and_a_readable_log(tmp_path):
    draw = random.Random(0)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(12):
            log = tmp_path / f"{number}.jsonl"
            model, optimizer = make()
            with pytest.raises(KeyboardInterrupt):
                train_for_ever(model, optimizer, log, until=0.05 + 0.15 * draw.random())
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert not hooks_of(model)
            assert not optimizer._optimizer_step_post_hooks
            for run in read_runs(log):
                steps = [r["step"] for r in run.records if r["phase"] == "train"]
                # The last report, on closing, may be of a step that had one.
                assert sorted(set(steps)) == list(range(steps[0], steps[0] + len(set(steps))))
                assert len(steps) - len(set(steps)) <= 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


TRAINER = """
import json, os, pathlib, signal, sys, threading, time
sys.path[:0] = sys.argv[3:]
import torch
import ecomoe
from patches import batches, make
from test_monitor_attacks import KILLED_STEPS, judge, learn

torch.set_num_threads(1)
folder, delay = pathlib.Path(sys.argv[1]), float(sys.argv[2])
model, optimizer = make()
monitor = ecomoe.Monitor(
    model, optimizer=optimizer, total_steps=KILLED_STEPS, every=3, log=folder / "run.jsonl",
    view="off", token_buckets=4,
)
saved = folder / "saved.pt"
if saved.exists():
    state = torch.load(saved)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    monitor.load_state_dict(json.loads(state["monitor"]))
if delay:
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
data = list(batches(KILLED_STEPS))
for step in range(monitor.step_count, KILLED_STEPS):
    learn(model, optimizer, *data[step])
    if step % 4 == 3:
        judge(model, monitor, *data[0])
    if step % 5 == 4:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"monitor": json.dumps(monitor.state_dict())}, folder / "new.pt")
        os.replace(folder / "new.pt", saved)
    if delay:
        time.sleep(0.02)
monitor.close()
print(json.dumps(monitor._recorder.state_dict()["events"]))
os._exit(0)
"""


@pytest.mark.slow
def test_killed_at_any_time_the_history_equals_the_uninterrupted_one(tmp_path):
    draw = random.Random(1)

    def run(folder, delay):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-W", "ignore", "-c", TRAINER, str(folder), str(delay)]
        paths = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
        done = subprocess.run([*command, *paths], stdout=subprocess.PIPE, text=True, check=False)
        return done.returncode, done.stdout

    code, events = run(tmp_path / "whole", 0)
    assert code == 0
    kills = 0
    for _ in range(20):
        code, resumed_events = run(tmp_path / "parts", 0.3 + draw.random())
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert code == 0
    assert kills >= 2
    assert json.loads(resumed_events) == json.loads(events)
    (whole,), (resumed,) = (read_runs(tmp_path / name / "run.jsonl") for name in ("whole", "parts"))
    assert resumed.records == whole.records


def tensors_alive():
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
    return len(tensors), sum(tensor.numel() for tensor in tensors)


@pytest.mark.slow
def test_two_thousand_steps_hold_no_more_than_a_few():
    model, optimizer = make()
    held = []
    with ecomoe.Monitor(model, optimizer=optimizer, total_steps=2000, every=10) as monitor:
        data = list(batches(2))
        for step in range(2000):
            learn(model, optimizer, *data[step % 2])
            if step % 100 == 99:
                judge(model, monitor, *data[0])
            if step % 500 == 99:
                monitor.report()
                held.append(tensors_alive())
        assert len(set(held)) == 1
        snapshots = monitor.state_dict()["history"]["snapshots"]["moe"]
        assert len(snapshots) <= 8


@pytest.mark.parametrize("num_experts", [4, 48 * 128])
def test_records_in_memory_are_bounded_by_their_size(num_experts):
    recorder = Recorder(thresholds=Thresholds())
    for step in range(2000):
        recorder.add(
            {
                "step": step, "phase": "train", "num_experts": num_experts, "layers": [],
                "dead": {"top1": 0, "topk": 0},
            }
        )  # fmt: skip
    kept = [record["step"] for record in recorder.records]
    assert MIN_RECORDS // 2 <= len(kept) <= (512 if num_experts == 4 else MIN_RECORDS)
    assert (kept[0], kept[-1]) == (0, 1999)


def test_a_forward_that_raises_takes_no_labels_along():
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make()[0]
            self.broken = False

        def forward(self, x):
            y = self.inner(x)
            if self.broken:
                raise RuntimeError("broken")
            return y

    model = Fragile().eval()
    with torch.no_grad(), ecomoe.Monitor(model, view="off") as monitor:
        for broken in (True, True, False):
            model.broken = broken
            x = torch.randn(4, 5, 6)
            try:
                outputs = model(x)
            except RuntimeError:
                assert not monitor._watch._traffic.inside
        monitor.evaluate(outputs=outputs, targets=torch.zeros(4).long())
        (layer,) = monitor.report("eval").to_dict()["layers"]
    assert layer["num_tokens"] == 60
    assert sum(layer["judged"]) == 20


def test_batches_without_tokens_count_for_nothing():
    model, _ = make()
    with ecomoe.Monitor(model, view="off", every=1) as monitor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "in 1 steps no layer")
            for num in (0, 2):
                model(torch.randn(num, 5, 6))
                monitor.step()
        model.eval()
        for num in (0, 2):
            outputs = model(torch.randn(num, 5, 6)).detach()
            monitor.evaluate(outputs=outputs, targets=torch.zeros(num).long())
        report = monitor.report("eval").to_dict()
    assert report["layers"][0]["num_tokens"] == 10
    assert report["metrics"]["judged"] == 2
    assert [(p["step"], p["phase"]) for p in report["trajectory"]] == [(2, "train"), (2, "eval")]


def test_nan_in_the_router_is_told_once_and_stays_json():
    model, _ = make()
    with ecomoe.Monitor(model, view="off", every=1) as monitor:
        for step in range(4):
            (x, _) = next(batches())
            model(x)
            monitor.step()
            if step == 1:
                with torch.no_grad():
                    next(iter(model.moe.router.parameters())).fill_(torch.nan)
        report = monitor.report("train").to_dict()
    json.dumps(report, allow_nan=False)
    assert report["layers"][0]["nonfinite"] == 40
    told = [(event.kind, event.step) for event in monitor.events if event.kind == "nonfinite"]
    assert told == [("nonfinite", 3)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_model_that_ran_compiled_before_is_told():
    torch.compiler.reset()
    model, _ = make()
    compiled = torch.compile(model, backend="eager")
    (x, _) = next(batches())
    for _ in range(3):  # the second call compiles once more
        compiled(x)
    with ecomoe.Monitor(model, view="off", every=2) as monitor:
        compiled(x)
        monitor.step()
        compiled(x)
        with pytest.warns(UserWarning, match=r"in 2 steps no layer .* torch\.compiler\.reset\(\)"):
            monitor.step()
        torch.compiler.reset()
        compiled(x)
        assert monitor.report("train").to_dict()["layers"][0]["num_tokens"] == 40
