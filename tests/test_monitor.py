import copy
import json
import pickle
from contextlib import suppress

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ecomoe
from ecomoe.ecology import transfer, watch
from ecomoe.ecology.sinks import read_records
from ecomoe.ecology.taxonomy import Thresholds
from ecomoe.ecology.traffic import known_of
from tests.benchmarks.monitor import bytes_held

STEPS = 12


class Classifier(nn.Module):
    def __init__(self, num_classes=None):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.moe = ecomoe.EcoMoE(8, 16, tiers=(2, 2), num_classes=num_classes)
        self.head = nn.Identity() if num_classes else nn.Linear(8, 3)

    def forward(self, x):
        """Patches (B, P, 6) to logits of the sample, their mean."""
        return self.head(self.moe(self.embed(x))).mean(1)


def batches(num=STEPS):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        x = torch.randn(8, 5, 6, generator=generator)
        yield x, x.sum((1, 2)).gt(0).long()


def make(**options):
    torch.manual_seed(0)
    model = Classifier(**options)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model, optimizer, monitor=None):
    for step, (x, y) in enumerate(batches()):
        loss = F.cross_entropy(model(x), y) + ecomoe.aux_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 4 == 3:
            model.eval()
            with torch.no_grad():
                for x, y in batches(2):
                    outputs = model(x)
                    if monitor is not None:
                        monitor.evaluate(outputs=outputs, targets=y)
            model.train()


def watched(**settings):
    model, optimizer = make()
    with ecomoe.Monitor(model, optimizer=optimizer, total_steps=STEPS, **settings) as monitor:
        train(model, optimizer, monitor)
    return model, monitor


def test_training_is_bit_equal_with_and_without():
    model, monitor = watched(every=2, token_buckets=8)
    drawn = torch.rand(3)
    # The evaluations in between have probed the experts and kept choices.
    layer = monitor.report("eval").to_dict()["layers"][0]
    assert layer["redundancy"]["probes"] == 32
    assert len(layer["lockdown"]["overlaps"]) == 2
    plain, optimizer = make()
    with ecomoe.schedule.Schedule(plain, total_steps=STEPS, optimizer=optimizer):
        train(plain, optimizer)
    assert torch.equal(torch.rand(3), drawn)
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


class Waits(TorchDispatchMode):
    """Counts the operators that make the host wait for an accelerator."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
        self.count += func.overloadpacket.__name__ in waiting
        return func(*args, **(kwargs or {}))


def test_a_report_moves_sums_once_and_passes_never_wait(monkeypatch):
    transfers = []
    to_host = transfer._to_host
    monkeypatch.setattr(transfer, "_to_host", lambda *a: transfers.append(1) or to_host(*a))

    def run(monitor=None):
        torch.manual_seed(0)
        (x, y) = next(batches())
        with Waits() as waits:
            model(x)
            model.eval()
            with torch.no_grad():
                outputs = model(x)
                if monitor is not None:
                    monitor.evaluate(outputs=outputs, targets=y, domains=y)
            model.train()
        return waits.count

    model, _ = make()
    alone = run()
    with ecomoe.Monitor(model, every=1, view="off") as monitor:
        for report in range(1, 4):
            assert run(monitor) == alone
            monitor._cut(("train", "eval"))
            assert len(transfers) == report
        layer = monitor.report("eval").to_dict()["layers"][0]
    assert layer["redundancy"] is not None
    assert layer["lockdown"]["saturation"] == 1


def test_a_layer_holds_a_few_kib():
    training, evaluation, _ = bytes_held(16)
    assert training < 700
    assert evaluation < 4 * 1024
    # What training takes grows with the experts, not with their pairs.
    assert bytes_held(512)[0] < 32 * training


def test_pairs_are_counted_in_training_only_where_asked_for():
    found = {}
    for coactivation in ("eval", "always"):
        model, _ = make()
        with ecomoe.Monitor(model, view="off", coactivation=coactivation) as monitor:
            (x, _) = next(batches())
            model(x)
            model.eval()
            model(x)
            layers = [monitor.report(p).to_dict()["layers"][0] for p in ("train", "eval")]
            found[coactivation] = [layer["pairs"] for layer in layers]
    assert found["eval"][0] is None
    assert found["always"][0] == found["always"][1] == found["eval"][1] is not None


def test_schedule_follows_the_optimizer():
    model, monitor = watched()
    assert model.moe.temperature.item() == pytest.approx(0.3)
    assert monitor.step_count == STEPS
    assert monitor.report("train").to_dict()["control"]["e_now"] < 0.1


def test_records_come_every_so_often_and_after_each_evaluation(tmp_path):
    log = tmp_path / "run.jsonl"
    _, monitor = watched(every=5, log=log)
    records = list(read_records(log))
    found = [(r["step"], r["phase"]) for r in records]
    assert found == [
        (4, "eval"),
        (5, "train"),
        (8, "eval"),
        (10, "train"),
        (12, "train"),
        (12, "eval"),
    ]
    for made in records:
        layer = made["layers"][0]
        assert (
            layer["num_tokens"]
            == {"train": {12: 2}.get(made["step"], 5), "eval": 2}[made["phase"]] * 40
        )
        assert (layer["accuracy"] is None) == (made["phase"] == "train")
    report = monitor.report().to_dict()
    assert {key: report[key] for key in records[-1]} == records[-1]
    assert [p["step"] for p in report["trajectory"]] == [r["step"] for r in records]


def test_accuracy_is_that_of_the_tokens_first_choice():
    model, _ = make()
    model.eval()
    (x, y) = next(batches())
    with torch.no_grad(), ecomoe.Monitor(model) as monitor:
        outputs = model(x)
        monitor.evaluate(outputs=outputs, targets=y)
        monitor.evaluate(outputs=outputs, targets=y)  # the second time changes nothing
        routing = model.moe.router(model.embed(x).view(-1, 8), model.moe.temperature)
        report = monitor.report().to_dict()
    first_N = routing.expert_ids_NK[:, 0]
    correct_N = (outputs.argmax(-1) == y).repeat_interleave(5)
    layer = report["layers"][0]
    # The router was called once more by hand, which the tap counts but does not judge.
    assert layer["num_tokens"] == 80
    for expert in range(4):
        mine = correct_N[first_N == expert]
        assert layer["judged"][expert] == len(mine)
        expected = mine.double().mean().item() if len(mine) else None
        assert layer["accuracy"][expert] == pytest.approx(expected, rel=1e-5)
    correct = (outputs.argmax(-1) == y).double().mean().item()
    loss = F.cross_entropy(outputs, y).item()
    low, high = report["interval"]["accuracy"]
    assert low <= correct <= high
    assert report["metrics"] == {
        "accuracy": correct,
        "judged": 8,
        "loss": pytest.approx(loss),
    }


def test_experts_with_heads_are_judged_by_their_own_prediction():
    model, _ = make(num_classes=3)
    model.eval()
    (x, y) = next(batches())
    with torch.no_grad(), ecomoe.Monitor(model) as monitor:
        monitor.evaluate(outputs=model(x), targets=y)
        layer = monitor.report().to_dict()["layers"][0]
        tokens_ND = model.embed(x).view(-1, 8)
        ids_NK = model.moe.router(tokens_ND, model.moe.temperature).expert_ids_NK
        own_NEF = model.moe.experts.all_outputs(tokens_ND)
    first_N = ids_NK[:, 0]
    right_N = own_NEF[torch.arange(40), first_N].argmax(-1) == y.repeat_interleave(5)
    for expert in range(4):
        mine = right_N[first_N == expert]
        expected = mine.double().mean().item() if len(mine) else None
        assert layer["accuracy"][expert] == pytest.approx(expected, rel=1e-5)


def test_tokens_that_fit_no_prediction_get_no_accuracy():
    model, _ = make()
    model.eval()
    monitor = ecomoe.Monitor(model)
    model(torch.randn(3, 5, 6))
    with pytest.warns(
        UserWarning, match=r"7 predictions do not fit .* call evaluate after each.*shift=True"
    ):
        monitor.evaluate(outputs=torch.randn(7, 3), targets=torch.zeros(7).long())
    assert monitor.report().to_dict()["layers"][0]["accuracy"] is None
    monitor.close()


@pytest.mark.parametrize("num", [4, 24, 40])
def test_outputs_of_another_pass_are_not_counted_by_expert(num):
    model, _ = make()
    model.eval()
    with torch.no_grad(), ecomoe.Monitor(model) as monitor:
        for x, _ in batches(5):
            model(x)  # eight samples of five tokens
        with pytest.warns(UserWarning, match=f"{num} predictions do not fit"):
            monitor.evaluate(outputs=torch.randn(num, 3), targets=torch.zeros(num).long())
        report = monitor.report().to_dict()
    assert report["layers"][0]["accuracy"] is None
    assert report["metrics"]["judged"] == num


def test_nan_predictions_are_judged_wrong(tmp_path):
    model, _ = make()
    model.eval()
    log = tmp_path / "run.jsonl"
    with torch.no_grad(), ecomoe.Monitor(model, log=log) as monitor:
        model(torch.randn(4, 5, 6))
        monitor.evaluate(
            outputs=torch.full((4, 3), float("nan")), targets=torch.tensor([0, 0, -1, 255])
        )
        report = monitor.report().to_dict()
    assert report["metrics"] == {"accuracy": 0, "loss": None, "judged": 2}
    assert report["interval"] == {"accuracy": [0, 0.658]}
    (record,) = read_records(log)
    assert record["metrics"]["loss"] is None


def test_settings_of_numpy_are_recorded(tmp_path):
    log = tmp_path / "run.jsonl"
    layer = ecomoe.EcoMoE(8, 16, tiers=(2, 2), target_e=np.float32(0.5))
    with ecomoe.Monitor(layer, log=log):
        layer(torch.randn(3, 8))
    (record,) = read_records(log)
    assert record["control"]["e"] == 0.5


def test_error_of_the_monitor_is_told_once_and_training_goes_on(monkeypatch):
    reference, _ = watched()

    def fail(*args, **kwargs):
        raise ArithmeticError("broken tap")

    monkeypatch.setattr(watch.taps.LayerTap, "observe", fail)
    with pytest.warns(UserWarning, match="training goes on: ArithmeticError: broken tap") as told:
        model, monitor = watched()
    assert len(told) == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"^no token was seen yet"):
        monitor.report()


def test_full_disk_stops_the_log_alone(monkeypatch, tmp_path):
    _, expected = watched(every=1)

    def fail(self, record):
        raise OSError("no space left")

    monkeypatch.setattr("ecomoe.ecology.sinks.JsonlSink.write", fail)
    with pytest.warns(UserWarning, match="watching goes on: OSError: no space left") as told:
        _, monitor = watched(every=1, log=tmp_path / "run.jsonl")
    assert len(told) == 1
    assert monitor.report("train").to_dict() == expected.report("train").to_dict()


def test_removed_folder_stops_the_log_alone(tmp_path):
    model, _ = make()
    folder = tmp_path / "runs"
    with ecomoe.Monitor(model, log=folder / "run.jsonl") as monitor:
        (folder / "run.jsonl").unlink(missing_ok=True)
        folder.rmdir()
        model(torch.randn(2, 5, 6))
        with pytest.warns(UserWarning, match="its records wait for the next report"):
            monitor.report()
        model(torch.randn(2, 5, 6))
        assert monitor.report().to_dict()["layers"][0]["num_tokens"] == 10
        folder.mkdir()
        model(torch.randn(3, 5, 6))
    sizes = [r["layers"][0]["num_tokens"] for r in read_records(folder / "run.jsonl")]
    assert sizes == [10, 10, 15]


@pytest.mark.parametrize(
    "log", [5, b"..", "", "/", "a\0b", "/dev/full", __file__ + "/run.jsonl", __file__], ids=repr
)
def test_wrong_logs_change_nothing(log):
    model, optimizer = make()
    model.moe.set_progress(0.2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="log="):
        ecomoe.Monitor(model, optimizer=optimizer, total_steps=3, log=log)
    with pytest.raises(ValueError, match="log="):
        ecomoe.Monitor(log=log)
    assert not model._forward_hooks
    assert not optimizer._optimizer_step_post_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_step_that_the_optimizer_counts_is_refused():
    model, optimizer = make()
    with ecomoe.Monitor(model, optimizer=optimizer, total_steps=9) as monitor:
        with pytest.raises(ValueError, match=r"step\(\) must not be called .* leave the call out"):
            monitor.step()
        assert monitor.step_count == 0


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


def test_event_handler_may_stop_the_run():
    model, optimizer = make()

    class Stop(Exception):
        pass

    def stop(event):
        raise Stop(str(event))

    with torch.no_grad():
        for parameter in model.moe.router.parameters():
            parameter.zero_()
    # Zero logits: all first choices fall on one expert, so the others are dead.
    with ecomoe.Monitor(model, optimizer=optimizer, every=1, on_event=stop):
        model(torch.randn(100, 100, 6))
        with pytest.raises(Stop, match=r"train moe expert \d top1: death"):
            optimizer.step()


@pytest.mark.parametrize("by_hand", [False, True])
def test_event_handler_that_raises_loses_no_step_and_no_event(by_hand):
    model, optimizer = make()
    with torch.no_grad():
        for parameter in model.moe.router.parameters():
            parameter.zero_()
    seen = []

    def fail(event):
        seen.append(event)
        raise ConnectionError("nobody to page")

    given = {} if by_hand else {"optimizer": optimizer}
    with ecomoe.Monitor(model, total_steps=3, every=1, on_event=fail, **given) as monitor:
        for step in range(1, 4):
            model.eval()
            model(torch.randn(100, 100, 6))
            model.train()
            model(torch.randn(100, 100, 6))
            with suppress(ConnectionError):
                monitor.step() if by_hand else optimizer.step()
            assert monitor.step_count == step
        with suppress(ConnectionError):
            monitor.report()
        assert model.moe.temperature.item() == pytest.approx(0.3)
        assert len(seen) == len(monitor.events) > 1


def test_masks_on_another_device_are_brought_along():
    model, _ = make()
    with ecomoe.Monitor(model) as monitor:
        traffic = monitor._watch._traffic
        traffic.masks = {"": torch.ones(3, dtype=torch.bool)}
        traffic.buckets = {"": torch.ones(3, dtype=torch.int64)}
        meta = torch.device("meta")
        for known in (traffic.masks, traffic.buckets):
            assert known_of(known, 3, device=meta).device == meta


def test_step_by_hand():
    model, _ = make()
    with ecomoe.Monitor(model, total_steps=10, every=2) as monitor:
        for _ in range(4):
            model(torch.randn(2, 5, 6))
            monitor.step()
        assert len(monitor.report().to_dict()["trajectory"]) == 2
        assert model.moe.temperature.item() == pytest.approx(0.3)


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


def test_evaluations_carry_the_progress_of_their_step(tmp_path):
    watched(log=tmp_path / "run.jsonl", every=4)
    for record in read_records(tmp_path / "run.jsonl"):
        assert record["progress"] == pytest.approx(record["step"] / STEPS, rel=1e-5)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every=0 must be an int >= 1"),
        ({"every": 1.5}, "every=1.5 must be"),
        ({"thresholds": "strict"}, "thresholds='strict' must be"),
        ({"on_event": "page me"}, "on_event='page me' must be callable"),
        ({"coactivation": "train"}, "coactivation='train' must be one of eval, always"),
        ({"view": "film"}, "view='film' must be one of"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"token_buckets": 300}, "token_buckets=300 must be an int from 0 to 256; pass 64"),
        ({"token_buckets": True}, "token_buckets=True must be"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ecomoe.Monitor(make()[0], **settings)


def test_wrong_models():
    with pytest.raises(ValueError, match="no mixture-of-experts layer to watch; convert it first"):
        ecomoe.Monitor(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model=str must be an nn\.Module"):
        ecomoe.Monitor("gpt2")
    with pytest.raises(ValueError, match="no effect without a model"):
        ecomoe.Monitor(total_steps=3)
    with pytest.raises(ValueError, match="total_steps=-1 must be an int >= 1"):
        ecomoe.Monitor(total_steps=-1)
    monitor = ecomoe.Monitor(make()[0])
    with pytest.raises(ValueError, match=r"already watches a model; call close\(\) first"):
        monitor.attach(make()[0])


def test_layers_that_come_after_attaching_are_told():
    model = nn.Sequential(make()[0], nn.Linear(3, 3))
    with ecomoe.Monitor(model, view="off") as monitor:
        model[1] = nn.Linear(3, 3)  # which is no layer to watch
        model(torch.randn(2, 5, 6))
        monitor.report()
        model[0].moe = ecomoe.EcoMoE(8, 16, tiers=(2, 2))
        model.append(ecomoe.EcoMoE(3, 4, tiers=(2, 2)))
        model(torch.randn(2, 5, 6))
        with pytest.warns(UserWarning, match=r"layers 0\.moe, 2 came into the model after") as told:
            monitor.report()
        monitor.report()  # is told once
    assert len(told) == 1


def test_own_thresholds_are_used():
    model, _ = make()
    with ecomoe.Monitor(model, thresholds=Thresholds(core_usage=1, dead_usage=1)) as monitor:
        model(torch.randn(2, 5, 6))
        assert monitor.report().to_dict()["dead"] == {"top1": 4, "topk": 4}


def test_classification_tells_specialisation_and_effective_e():
    model, _ = make()
    model.eval()
    (x, y) = next(batches())
    with torch.no_grad(), ecomoe.Monitor(model) as monitor:
        monitor.evaluate(outputs=model(x), targets=y)
        report = monitor.report().to_dict()
    assert 0 <= report["layers"][0]["specialisation"] <= 1
    assert report["control"]["e_eff"] == pytest.approx(model.moe.control.effective_e(3), rel=1e-5)


class LanguageModel(nn.Module):
    """Each token's vector is that of its id alone, so that the router knows the id."""

    def __init__(self, num_ids=6):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(num_ids, 8)
        self.moe = ecomoe.EcoMoE(8, 16, tiers=(2, 2))
        self.head = nn.Linear(8, num_ids)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.moe(self.embed(input_ids)))


def specialised(token_buckets=64, **given):
    model = LanguageModel().eval()
    ids = torch.randint(6, (20, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), ecomoe.Monitor(model, token_buckets=token_buckets) as monitor:
        outputs = model(ids)
        monitor.evaluate(outputs=outputs, targets=ids, **given)
        first = model.moe.router(model.embed(ids).view(-1, 8), model.moe.temperature)
        (layer,) = monitor.report().to_dict()["layers"]
    return layer, ids, first.expert_ids_NK[:, 0].view(ids.shape)


def entropy(values):
    return stats.entropy(values.reshape(-1).bincount().numpy())


def test_specialisation_by_token():
    layer, ids, first = specialised()
    # The id decides the expert, so what they share is all that the expert tells.
    expected = (entropy(first) / entropy(ids)) ** 0.5
    assert layer["specialisation_by"]["token"] == pytest.approx(expected, rel=1e-5)
    assert layer["specialisation_by"]["class"] == layer["specialisation"]
    assert layer["specialisation_by"]["domain"] is None
    assert specialised(token_buckets=0)[0]["specialisation_by"]["token"] is None


def test_specialisation_by_domain():
    _, _, first = specialised()
    layer, _, _ = specialised(domains=first.int())
    assert layer["specialisation_by"]["domain"] == pytest.approx(1)
    layer, _, _ = specialised(domains=torch.arange(20) % 2)
    assert 0 < layer["specialisation_by"]["domain"] < 0.01
    layer, _, _ = specialised(domains=first + 1000)  # of no domain that there is room for
    assert layer["specialisation_by"]["domain"] is None


def test_labels_are_forgotten_with_their_evaluation():
    model = LanguageModel().eval()
    with torch.no_grad(), ecomoe.Monitor(model, token_buckets=8) as monitor:
        for domains in (torch.arange(4) % 2, None):
            ids = torch.randint(6, (4, 9))
            monitor.evaluate(outputs=model(ids), targets=ids, domains=domains)
            (layer,) = monitor.report().to_dict()["layers"]
            assert (layer["specialisation_by"]["domain"] is None) == (domains is None)
            assert layer["specialisation_by"]["token"] > 0.5


def test_each_share_has_its_interval():
    _, monitor = watched(every=2)
    record = monitor.report("eval").to_dict()
    layer = record["layers"][0]
    low, high = record["interval"]["accuracy"]
    assert low <= record["metrics"]["accuracy"] <= high
    for holder in (layer, layer["tier"]):
        for basis in ("top1", "topk"):
            for share, bounds in zip(
                holder["usage"][basis], holder["interval"][basis], strict=True
            ):
                assert bounds[0] <= share <= bounds[1]
        for share, bounds in zip(holder["accuracy"], holder["interval"]["accuracy"], strict=True):
            assert (share is None) == (bounds is None)
            assert share is None or bounds[0] <= share <= bounds[1]
    low, high = layer["lockdown"]["interval"]
    assert low <= layer["lockdown"]["flip_rate"] <= high


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
