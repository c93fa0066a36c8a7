"""The monitor around a training: sums, records, schedule, events, and what it refuses."""

import copy
from contextlib import suppress

import numpy as np
import pytest
import torch
from patches import STEPS, batches, make, train, watched
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ecomoe
from ecomoe.ecology import transfer, watch
from ecomoe.ecology.sinks import read_records
from ecomoe.ecology.taxonomy import Thresholds
from ecomoe.ecology.traffic import known_of
from tests.benchmarks.monitor import bytes_held


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


def test_evaluations_carry_the_progress_of_their_step(tmp_path):
    watched(log=tmp_path / "run.jsonl", every=4)
    for record in read_records(tmp_path / "run.jsonl"):
        assert record["progress"] == pytest.approx(record["step"] / STEPS, rel=1e-5)


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
