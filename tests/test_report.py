import copy
import io
import json
import math
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from rich.console import Console
from rich.text import Text

from ecomoe import Control, EcoMoE, Monitor, Report
from ecomoe.ecology.events import Event, detect
from ecomoe.ecology.live import LiveView
from ecomoe.ecology.records import build_record, layer_record, prediction_record
from ecomoe.ecology.report import scalars, summary_line
from ecomoe.ecology.sinks import read_records
from ecomoe.ecology.statistics import Layout, routing_counts
from ecomoe.ecology.taxonomy import Thresholds

CONTROL = Control.from_target(0.545)


def make_layer(name, *, tiers=(2, 1, 1), num_tokens=200, dead=(), control=CONTROL):
    generator = torch.Generator().manual_seed(len(name))
    layout = Layout(sum(tiers), len(tiers))
    logits_NE = torch.randn(num_tokens, sum(tiers), generator=generator)
    logits_NE[:, list(dead)] = -100
    ids_NK = logits_NE.topk(2).indices
    tier_of_E = torch.tensor([t for t, size in enumerate(tiers) for _ in range(size)])
    parts = routing_counts(ids_NK, layout=layout, tier_of_E=tier_of_E)
    return layer_record(
        name,
        layout.pack(parts, like=torch.zeros((), dtype=torch.float64)),
        layout=layout,
        layer_tiers=tiers,
        top_k=2,
        thresholds=Thresholds(),
        control=control,
        extras={"temperature": 0.3, "aux.balance": 0.25},
    )


def make_record(*layers, step=100, metrics=None):
    return build_record(
        step=step, phase="eval", progress=0.5, layers=list(layers), metrics=metrics or {}
    )


def rendered(report, width=80):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(report)
    return console.file.getvalue()


def test_record_has_the_documented_shape():
    record = make_record(make_layer("h.0.mlp", dead=[3]))
    assert record["step"] == 100
    assert record["phase"] == "eval"
    assert record["control"]["e"] == pytest.approx(0.545)
    assert record["control"]["e_now"] == pytest.approx(CONTROL.e_at(1.0), rel=1e-5)
    assert record["control"]["predicted_phase"] == "healthy"
    assert record["dead"] == {"top1": 1, "topk": 1}
    assert record["events"] == []
    layer = record["layers"][0]
    assert layer["category"]["top1"] == ["CORE", "CORE", "CORE", "DEAD"]
    assert layer["counts"]["topk"][3] == 0
    assert sum(layer["usage"]["topk"]) == pytest.approx(1, abs=1e-5)
    assert layer["accuracy"] is None
    assert layer["tier"]["active"]["top1"] == [2, 1, 0]
    assert layer["tier"]["flow"][2] == [0, 0, 0]
    assert layer["auxiliary"] == {"balance": 0.25}


def test_record_is_plain_json():
    record = make_record(make_layer("a"), make_layer("b", control=None))
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_infinite_e_is_null():
    free = Control(temperature=1, entropy_weight=0.1, oracle_weight=0, balance_weight=0)
    record = make_record(make_layer("a", control=free))
    assert record["control"]["e"] is None
    assert "E inf nominal" in rendered(Report(record))
    assert "E(t) inf" in summary_line(record)


@pytest.mark.parametrize(
    ("e", "dead", "verdict"),
    [
        (0.545, {"top1": 0, "topk": 0}, "as predicted"),
        (0.545, {"top1": 2, "topk": 1}, "does NOT hold here"),
        (0.545, {"top1": 2, "topk": 0}, "holds on topk only, NOT on top1"),
        (0.1, {"top1": 2, "topk": 0}, "holds on top1 only, NOT on topk"),
        (0.1, {"top1": 0, "topk": 0}, "does NOT hold here"),
        (0.3, {"top1": 2, "topk": 2}, "as predicted"),
    ],
)
def test_prediction_is_set_beside_what_is_observed(e, dead, verdict):
    layer = make_layer("a", control=Control.from_target(e))
    assert verdict in prediction_record([layer], dead)["text"]


def test_mixed_predictions_are_told():
    layers = [make_layer("a"), make_layer("b", control=Control.from_target(0.1))]
    assert prediction_record(layers, {"top1": 0, "topk": 0})["phase"] == "mixed"


def test_report_reads_in_80_columns():
    layers = [make_layer(f"model.layers.{i}.feed_forward", tiers=(64, 32, 32)) for i in range(48)]
    layers[7] = make_layer("model.layers.7.feed_forward", tiers=(8, 4, 4), dead=[3])
    trajectory = [
        {"step": step, "phase": "eval", "dead": {"top1": dead, "topk": 0}}
        for step, dead in ((0, 4), (10, 12), (20, 8), (30, 4))
    ]
    text = rendered(Report(make_record(*layers), trajectory=trajectory))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 130
    assert "4 -> 4, peak 12 at step 10" in text
    assert "112 between the 8 least" in text
    for number in range(48):
        assert f"ers.{number}.feed_forward" in text


def test_report_names_what_matters():
    events = [
        {
            "kind": "revival",
            "step": 100,
            "phase": "eval",
            "layer": "a",
            "expert": 3,
            "basis": "top1",
            "evidence": {"usage": 0.0512},
            "advice": "",
        }
    ]
    record = make_record(make_layer("a", dead=[3]), metrics={"accuracy": 0.9, "judged": 10})
    trajectory = [{"step": 100, "phase": "eval", "dead": record["dead"]}]
    report = Report(record, trajectory=trajectory, events=events)
    text = rendered(report)
    for part in (
        "DEAD 1 top1",
        "accuracy 90.0%",
        "E 0.545 nominal",
        "NOT hold",
        "1 revivals",
        "tiers 2:1:1",
        "DEAD",
        "100 eval a expert 3 top1: revival (usage 0.0512)",
    ):
        assert part in text, part
    assert str(report) == text


def test_report_is_a_copy():
    report = Report(make_record(make_layer("a")))
    report.to_dict()["layers"].clear()
    assert report.to_dict()["layers"]


def test_scalars_are_few_and_finite():
    record = make_record(*[make_layer(f"layer{i}") for i in range(30)])
    found = scalars(record, num_deaths=2, num_revivals=1, peak=5)
    assert 8 <= len(found) <= 12
    assert all(isinstance(v, float) and math.isfinite(v) for v in found.values())
    assert found["ecology/dead_peak"] == 5


@pytest.fixture
def page(tmp_path):
    records = [
        make_record(make_layer("a</script>", dead=[3]), metrics={"loss": 1.0}, step=step)
        for step in (10, 20)
    ]
    event = {"kind": "death", "step": 20, "phase": "eval", "layer": "a", "expert": 3}
    records[1]["events"] = [event | {"tier": None, "basis": "top1", "advice": "look <here>"}]
    path = tmp_path / "report.html"
    Report.from_records(records).to_html(path)
    return records, path.read_text(encoding="utf-8")


def test_html_holds_the_records_numbers(page):
    records, text = page
    data = text.split('<script type="application/json" id="records">')[1].split("</script>")[0]
    assert json.loads(data) == records
    heat = text.split('id="plot2"')[1].split("</script>")[0]
    usage = [record["layers"][0]["usage"]["top1"] for record in records]
    assert json.dumps([list(row) for row in zip(*usage, strict=True)]).replace(" ", "") in heat


@pytest.fixture
def measured_run(tmp_path):
    """A short run with everything measured: its log's records and its report."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 8), EcoMoE(8, 9, tiers=(2, 2))).eval()
    ids = torch.arange(60).view(6, 10) % 9
    log, path = tmp_path / "run.jsonl", tmp_path / "report.html"
    with torch.no_grad(), Monitor(model, log=log, token_buckets=8, view="off") as monitor:
        for _ in range(3):
            monitor.evaluate(outputs=model(ids), targets=ids % 8, domains=torch.arange(6) % 2)
            monitor.step()
            model[1].router.get_parameter(
                next(iter(dict(model[1].router.named_parameters())))
            ).neg_()
    monitor.report("eval").to_html(path)
    return list(read_records(log)), path


def test_html_shows_what_was_measured(measured_run):
    records, path = measured_run
    text = path.read_text(encoding="utf-8")
    data = text.split('<script type="application/json" id="records">')[1].split("</script>")[0]
    assert json.loads(data) == records
    layer = records[-1]["layers"][0]
    table = text.split("<h2>Redundancy, saturation, specialisation</h2>")[1].split("</table>")[0]
    by_kind = layer["specialisation_by"]
    for value in (*by_kind.values(), layer["redundancy"]["cosine"], layer["redundancy"]["cka"]):
        assert f"<td>{value:.3f}</td>" in table
    assert f"<td>{layer['lockdown']['saturation']:.3f}</td>" in table
    drawn = [record["layers"][0]["redundancy"]["cka"] for record in records]
    assert json.dumps(drawn).replace(" ", "") in text
    overlaps = [point["overlap"] for point in layer["lockdown"]["overlaps"]]
    assert json.dumps(overlaps).replace(" ", "") in text


def test_html_of_older_records_goes_without_what_they_lack(tmp_path):
    record = make_record(make_layer("a"))
    layer = record["layers"][0]
    for key in ("redundancy", "specialisation_by", "specialisation"):
        del layer[key]
    layer["lockdown"] = {k: layer["lockdown"][k] for k in ("probes", "flips", "flip_rate")}
    Report(record).to_html(tmp_path / "old.html")
    assert "Redundancy, saturation" not in (tmp_path / "old.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_html_opens_in_a_browser_without_an_error(measured_run, tmp_path):
    records, path = measured_run
    shown = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--disable-dev-shm-usage", "--enable-logging=stderr", "--virtual-time-budget=5000"),
            *(f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "CONSOLE" not in shown.stderr  # the browser's own complaints do not say that
    plots = path.read_text(encoding="utf-8").count("Plotly.newPlot(")
    assert shown.stdout.count('class="main-svg"') >= plots > 6
    data = shown.stdout.split('id="records">')[1].split("</script>")[0]
    assert json.loads(data) == records


def test_html_needs_no_network_and_escapes_names(page):
    _, text = page
    assert "<script src" not in text
    assert "look &lt;here&gt;" in text
    assert "a&lt;/script&gt;" in text


def test_report_from_records_prefers_evaluation():
    records = [make_record(make_layer("a"), step=step) for step in (1, 2)]
    records[1]["phase"] = "train"
    report = Report.from_records(records)
    assert report.to_dict()["step"] == 1
    assert [point["step"] for point in report.to_dict()["trajectory"]] == [1, 2]
    assert Report.from_records(records, phase="train").to_dict()["step"] == 2
    with pytest.raises(ValueError, match="phase='generate': no token was seen"):
        Report.from_records(records, phase="generate")


def console_of(*, terminal=True):
    return Console(width=80, height=24, file=io.StringIO(), force_terminal=terminal)


def long_event(step):
    return Event(
        kind="death", step=step, phase="eval", layer="model.layers.17.feed_forward.experts",
        expert=111, basis="topk", evidence={"usage": 0.0031, "low": 0.001, "high": 0.0095},
        advice="raise balance_weight",
    ).to_dict()  # fmt: skip


def test_live_view_fits_the_terminal():
    layers = [make_layer(f"model.layers.{i}.mlp", tiers=(64, 32, 32)) for i in range(48)]
    layers[30] = make_layer("model.layers.30.mlp", tiers=(64, 32, 32), dead=range(100))
    trajectory = [
        {"step": step, "phase": "eval", "dead": {"top1": step * 1000, "topk": 0}}
        for step in range(4)
    ]
    console = console_of()
    view = LiveView(console)
    for step in (1, 2):
        events = [long_event(number) for number in range(4 * step)]
        view.update(make_record(*layers, step=step), trajectory=trajectory, events=events)
    view.close()
    text = Text.from_ansi(console.file.getvalue()).plain
    frames = text.split("step 2 eval")
    assert len(frames) == 3  # drawn when it came, and left behind at the end
    assert len(frames[-1].splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 80
    assert "model.layers.30.mlp  100/100 of 128" in frames[-1]
    told = " ".join(frames[-1].split())
    assert "layers with at most" in told
    for event in events[-3:]:
        assert str(Event(**event)) in told
    assert "-> death: raise balance_weight" in told


def test_events_are_told_in_full():
    text = rendered(Report(make_record(make_layer("a")), events=[long_event(7), long_event(8)]))
    assert max(map(len, text.splitlines())) <= 80
    for step in (7, 8):
        assert f"- {Event(**long_event(step))}" in " ".join(text.split())
    assert text.count("-> death: raise balance_weight") == 1


def test_terminal_tells_redundancy_and_saturation():
    layers = [make_layer(name) for name in ("a", "b")]
    assert "Redundancy" not in rendered(Report(make_record(*layers)))
    for layer, value in zip(layers, (0.25, 0.75), strict=True):
        layer["redundancy"] = {"cosine": value}
        layer["lockdown"]["saturation"] = 1 - value
    text = rendered(Report(make_record(*layers)))
    assert "Redundancy, cosine of experts' outputs: 0.50, most 0.75 in b" in text
    assert "Saturation, choices kept since the last evaluation: 0.50, most 0.75 in a" in text
    view = LiveView(console := console_of())
    view.update(make_record(*layers), trajectory=[], events=[])
    view.close()
    assert "Redundancy" in console.file.getvalue()


def test_big_reports_are_copied_in_no_time():
    layers = [make_layer(f"model.layers.{i}.mlp", tiers=(64, 32, 32)) for i in range(24)]
    report = Report(make_record(*layers))
    _, memory = detect({}, report.to_dict(), thresholds=Thresholds())
    calls = Counter()
    tracer = lambda frame, event, _: calls.update([frame.f_code.co_filename])  # noqa: E731
    sys.setprofile(tracer)
    try:
        assert report.to_dict() == report.to_dict()
        detect(memory, report.to_dict(), thresholds=Thresholds())
    finally:
        sys.setprofile(None)
    assert copy.__file__ not in calls


def test_live_view_without_a_terminal_prints_lines():
    console = console_of(terminal=False)
    view = LiveView(console)
    for step in (1, 2):
        record = make_record(make_layer("a"), step=step)
        record["events"] = [long_event(step)] if step == 2 else []
        view.update(record, trajectory=[], events=record["events"])
    view.close()
    lines = console.file.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["step 1 eval", "step 2 eval"]
    told = " ".join(line.strip() for line in lines[2:])
    assert told == f"{Event(**long_event(2))} -> death: raise balance_weight"


def test_stability_over_the_last_reports():
    records = [make_record(make_layer(name), step=step) for step, name in enumerate("aaaaaaa")]
    assert Report.from_records(records).to_dict()["stability"] == {
        "reports": 5,
        "tier_usage": 0.0,
        "dead": 0,
    }
    records[-1]["layers"][0]["tier"]["usage"]["top1"][0] += 0.25
    assert Report.from_records(records).to_dict()["stability"]["tier_usage"] == 0.25
    assert Report(records[0]).to_dict()["stability"] is None
