"""What a monitor keeps: logs that go on, checkpoints, copies."""

import copy
import json
import pickle

import pytest
import torch
from patches import batches, make
from torch import nn

import ecomoe
from ecomoe.ecology.sinks import read_records


def test_resuming_keeps_the_records_of_earlier_runs(tmp_path):
    log = tmp_path / "run.jsonl"

    def run(monitor, model, num):
        for x, _ in batches(num):
            model(x)
            monitor.step()
            yield monitor.state_dict()

    model, _ = make()
    for num in (5, 5):
        monitor = ecomoe.Monitor(model, log=log, every=1)
        states = list(run(monitor, model, num))
        monitor.close()
    monitor = ecomoe.Monitor(model, log=log, every=1)
    monitor.load_state_dict(states[2])
    monitor.close()
    assert [record["step"] for record in read_records(log)] == [1, 2, 3, 4, 5, 1, 2, 3]
    assert len(monitor._recorder.records) == 3


EVENT = {"kind": "death", "step": 1, "phase": "eval"}
LOG = {"run": "a", "start": 0, "end": 0, "check": 0}


def with_layer(state, **parts):
    layer = state["watch"]["sums"]["moe"] | parts
    return state | {"watch": state["watch"] | {"sums": {"moe": layer}}}


@pytest.mark.parametrize(
    "broken",
    [
        lambda s: {},
        lambda s: None,
        lambda s: s | {"step": "3"},
        lambda s: {key: s[key] for key in ("step", "watch")},
        lambda s: s | {"history": {}},
        lambda s: s | {"history": s["history"] | {"events": [{}]}},
        lambda s: s | {"history": s["history"] | {"events": [EVENT | {"colour": 1}]}},
        lambda s: s | {"history": s["history"] | {"trajectory": [{"step": 1}]}},
        lambda s: s | {"history": s["history"] | {"latest": {"train": {}}}},
        lambda s: s | {"history": s["history"] | {"log": LOG | {"run": 5}}},
        lambda s: s | {"watch": {}},
        lambda s: s | {"watch": s["watch"] | {"outcomes": [1.0]}},
        lambda s: s | {"watch": s["watch"] | {"outcomes": [1.0, 2.0, [3.0]]}},
        lambda s: s | {"watch": s["watch"] | {"num_classes": "3"}},
        lambda s: with_layer(s, tiers=[4]),
        lambda s: with_layer(s, sums={"train": []}),
        lambda s: with_layer(s, sums={"sleep": {}}),
        lambda s: with_layer(s, sums={"train": {"colour": 1}}),
        lambda s: with_layer(s, sums={"eval": {"top1": [1, 2, 3]}}),
        lambda s: with_layer(s, sums={"eval": {"flow": [1, 2]}}),
        lambda s: with_layer(s, sums={"train": {"entropy": "1"}}),
        lambda s: with_layer(s, nearest=[1, 2, 3, 4]),
        lambda s: with_layer(s, nearest=[[1], [2], [3], [0]]),
        lambda s: with_layer(s, choices=[1.0, [[0, 1]] * 65]),
        lambda s: s | {"watch": s["watch"] | {"rank": None}},
        lambda s: with_layer(s, labels={"colour": []}),
        lambda s: with_layer(s, labels={"class": [[1, 2]]}),
        lambda s: with_layer(s, labels={"class": [1, 2, 3, 4]}),
        lambda s: with_layer(s, labels={"class": 4}),
        lambda s: with_layer(s, choices=3),
        lambda s: with_layer(s, choices=["x", 5]),
        lambda s: with_layer(s, choices=[1.0, "ab"]),
    ],
)
def test_broken_states_change_nothing(broken):
    model, _ = make()
    with ecomoe.Monitor(model) as monitor:
        model(torch.randn(2, 5, 6))
        monitor.step()
        state = monitor.state_dict()
        with pytest.raises(ValueError, match="state"):
            monitor.load_state_dict(broken(copy.deepcopy(state)))
        assert monitor.state_dict() == state


def test_state_resumes_to_the_same_history(tmp_path):
    def run(log, stop=None, state=None, start=0):
        model, _ = make()
        monitor = ecomoe.Monitor(model, every=3, log=log)
        if state is not None:
            monitor.load_state_dict(json.loads(json.dumps(state)))
        for step, (x, _) in enumerate(batches(10)):
            if step < start:
                continue
            model(x)
            monitor.step()
            if step + 1 == stop:
                state = monitor.state_dict()
        monitor.close()
        return state, list(read_records(log))

    _, whole = run(tmp_path / "whole.jsonl")
    state, _ = run(tmp_path / "parts.jsonl", stop=5)
    _, resumed = run(tmp_path / "parts.jsonl", state=state, start=5)
    assert resumed == whole


def test_state_resumes_the_annealing():
    def run(num, state=None):
        model, optimizer = make()
        with ecomoe.Monitor(model, optimizer=optimizer, total_steps=40) as monitor:
            if state is not None:
                monitor.load_state_dict(json.loads(json.dumps(state)))
            for x, _ in batches(num):
                (model(x).sum() + ecomoe.aux_loss(model)).backward()
                optimizer.step()
            return monitor.state_dict(), monitor.schedule.step, model.moe.temperature.item()

    state, *_ = run(3)
    assert run(4, state)[1:] == run(7)[1:]
    model, optimizer = make()
    with ecomoe.Monitor(model, optimizer=optimizer, total_steps=9) as monitor:
        with pytest.raises(ValueError, match="total_steps=40, this schedule has 9"):
            monitor.load_state_dict(state)
        assert monitor.step_count == 0


def test_state_of_another_model_is_refused():
    monitor = ecomoe.Monitor(make()[0])
    with pytest.raises(ValueError, match=r"the state has layers \['moe'\], the model \['0.moe'\]"):
        ecomoe.Monitor(nn.Sequential(make()[0])).load_state_dict(monitor.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_monitored_model_and_monitor_can_be_copied_while_training(copied):
    model, optimizer = make()
    given = {"every": 3, "coactivation": "always", "thresholds": "relative"}
    with ecomoe.Monitor(model, optimizer=optimizer, total_steps=9, **given) as monitor:
        loss = model(torch.randn(2, 5, 6)).sum() + ecomoe.aux_loss(model)
        twin, other, also = copied(model), copied(monitor), copied(optimizer)
        loss.backward()
        optimizer.step()
        twin(torch.randn(2, 5, 6))
        also.step()
        assert monitor.step_count == 1
        assert monitor.report("train").to_dict()["layers"][0]["num_tokens"] == 10
        for name in (*given, "view", "token_buckets"):
            assert getattr(other, name) == getattr(monitor, name), name
        with pytest.raises(ValueError, match="no token was seen"):
            other.report()
        other.attach(twin)
        other.close()


def test_an_evaluation_not_reported_yet_survives_resuming(tmp_path):
    def run(log, steps, state=None):
        model, _ = make()
        model.eval()
        monitor = ecomoe.Monitor(model, log=log, token_buckets=4)
        if state is not None:
            monitor.load_state_dict(json.loads(json.dumps(state)))
            monitor.step()  # the step that the evaluation came before
        with torch.no_grad():
            for step in steps:
                x, y = list(batches(4))[step]
                monitor.evaluate(outputs=model(x), targets=y, domains=y + 1)
                if step % 2 and step != steps[-1]:
                    monitor.step()
        state = monitor.state_dict()
        monitor.close()
        return state, [{k: v for k, v in r.items() if k != "run"} for r in read_records(log)]

    _, whole = run(tmp_path / "whole.jsonl", range(4))
    state, _ = run(tmp_path / "parts.jsonl", range(2))
    _, resumed = run(tmp_path / "parts.jsonl", range(2, 4), state)
    assert [record["step"] for record in whole] == [0, 1]
    assert whole[0]["layers"][0]["redundancy"]["probes"] == 32
    assert whole[0]["layers"][0]["specialisation_by"]["domain"] is not None
    assert resumed == whole
