import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import ecomoe
from ecomoe import cli
from ecomoe.ecology.events import Event
from ecomoe.ecology.sinks import JsonlSink, read_records


def write_run(path, *, tiers=(2, 2), steps=4, judged=500):
    torch.manual_seed(0)
    model = nn.Sequential(ecomoe.EcoMoE(8, 16, tiers=tiers), nn.Linear(8, 3))
    with ecomoe.Monitor(model, log=path, every=1) as monitor:
        for _ in range(steps):
            model(torch.randn(500, 8))
            monitor.step()
        model.eval()
        with torch.no_grad():
            outputs = model(torch.randn(500, 8))
        if judged:
            monitor.evaluate(outputs=outputs, targets=(torch.arange(500) % 3)[: len(outputs)])


@pytest.fixture
def run(tmp_path):
    """The file of a short run: four records of training, one of evaluation."""
    path = tmp_path / "run.jsonl"
    write_run(path)
    return path


def test_report(run, capsys):
    assert cli.main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert "step 4 eval: DEAD" in out
    assert max(map(len, out.splitlines())) <= 80
    assert cli.main(["report", str(run), "--phase", "train"]) == 0
    assert "step 4 train: DEAD" in capsys.readouterr().out


def test_report_as_json(run, capsys):
    assert cli.main(["report", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    last = list(read_records(run))[-1]
    assert {key: found[key] for key in last} == last
    assert len(found["trajectory"]) == 5


def test_report_as_html(run, tmp_path, capsys):
    path = tmp_path / "new" / "folder" / "report.html"
    assert cli.main(["report", str(run), "--html", str(path)]) == 0
    assert "wrote" in capsys.readouterr().err
    assert path.stat().st_size > 1_000_000  # the plots' script is inside


def test_report_shows_the_last_of_several_runs(run, capsys):
    write_run(run, steps=2)
    assert cli.main(["report", str(run), "--json"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert [point["step"] for point in shown["trajectory"]] == [1, 2, 2]
    assert err == f"{run} holds 2 runs; this is the last. {run}#1 is the first.\n"
    assert cli.main(["report", f"{run}#1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [point["step"] for point in json.loads(out)["trajectory"]] == [1, 2, 3, 4, 4]
    assert not err
    assert cli.main(["compare", f"{run}#1", f"{run}#2", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["runs"]) == {f"{run}#1", f"{run}#2"}


def test_file_whose_name_looks_like_a_run(run, capsys):
    odd = run.with_name("odd#7")
    odd.write_bytes(run.read_bytes())
    assert cli.main(["report", str(odd)]) == 0
    assert "step 4 eval" in capsys.readouterr().out


def test_watch_tells_events_in_full(tmp_path, capsys):
    event = Event(
        kind="death", step=3, phase="train", layer="model.layers.17.feed_forward.experts",
        expert=11, basis="topk", evidence={"usage": 0.0031, "low": 0.001, "high": 0.0095},
    )  # fmt: skip
    record = {
        "step": 3, "phase": "train", "control": None, "metrics": {}, "num_experts": 16,
        "dead": {"top1": 1, "topk": 1}, "layers": [], "events": [event.to_dict()],
    }  # fmt: skip
    sink = JsonlSink(tmp_path / "run.jsonl")
    sink.write(record)
    assert cli.main(["watch", str(sink.path), "--once"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"run {sink.run}, begun 20")
    assert max(map(len, lines)) <= 80
    assert " ".join(line.strip() for line in lines[2:]) == str(event)


def test_watch_follows_a_growing_file(run, capsys):
    lines = run.read_text().splitlines(keepends=True)
    run.write_text("".join(lines[:2]))

    def grow(seconds):
        if run.read_text() == "".join(lines):
            raise KeyboardInterrupt
        run.write_text("".join(lines))

    assert cli.main(["watch", str(run)], sleep=grow) == 130
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("step")] == [
        "step 1 train",
        "step 2 train",
        "step 3 train",
        "step 4 train",
        "step 4 eval",
    ]


def test_watch_once(run, capsys):
    assert cli.main(["watch", str(run), "--once"]) == 0
    assert capsys.readouterr().out.count("step ") == 5


def test_compare(run, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_bytes(run.read_bytes())
    assert cli.main(["compare", str(run), str(other), "--margin", "0.2"]) == 0
    assert "same (accuracy" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["compare", str(run), str(other), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["pairs"]) == 1


def test_compare_shows_of_long_paths_what_tells_them_apart(run, tmp_path, capsys):
    paths = [tmp_path / ("a-long-folder-" * 5) / f"run-{number}" / "log.jsonl" for number in (1, 2)]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text(run.read_text())
    assert cli.main(["compare", *map(str, paths)]) == 0
    shown = capsys.readouterr().out
    assert "run-1 and run-2: " in shown
    assert "a-long-folder" not in shown


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["x/a.jsonl", "x/b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["a.jsonl#1", "a.jsonl#2"], ["a.jsonl#1", "a.jsonl#2"]),
        (["x/log", "y/z/log"], ["x", "y/z"]),
        (["log", "x/log"], ["log", "x/log"]),
        (["x/log", "x/x/log"], ["log", "x/log"]),
        (["/a/b/log", "/a/c/d/log", "/a/c/log"], ["b", "c/d", "c"]),
    ],
)
def test_names_of_runs_stay_distinct(names, shown):
    assert list(cli._told_apart(names).values()) == shown


def test_compare_tells_what_is_unlike(run, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    write_run(other, tiers=(4, 2), steps=3)
    assert cli.main(["compare", str(run), str(other)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "unlike experts of layers: 0 4 and 0 6" in told
    assert "unlike steps: 4 and 3" in told
    assert "accuracy" in told
    unjudged = tmp_path / "unjudged.jsonl"
    write_run(unjudged, judged=0)
    assert cli.main(["compare", str(run), str(unjudged)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "unlike tasks (tiers" in told
    assert "unlike metrics: accuracy, judged, loss and none" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere.jsonl"], "'nowhere.jsonl' does not exist; give a file that Monitor("),
        (["report", "nowhere.jsonl#2"], "'nowhere.jsonl' does not exist"),
        (["watch", "nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
        (["compare", "{run}", "nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
        (["report", "{run}/.."], "Not a directory"),
        (["report", "."], "'.': Is a directory"),
        (["report", "{empty}"], "has no record; the first is written when"),
        (["report", "{run}#2"], "must name one of the 1 runs, #1 to #1"),
        (["report", "{run}", "--html", "{run}/report.html"], "Not a directory"),
        (["compare", "{run}"], "give at least two"),
        (["compare", "{run}", "{run}"], "named twice"),
        (["report", "{run}", "--phase", "generate"], "phase='generate'"),
    ],
)
def test_errors_are_told_in_one_line(run, capsys, arguments, message):
    empty = run.with_name("empty.jsonl")
    empty.touch()
    assert cli.main([argument.format(run=run, empty=empty) for argument in arguments]) == 1
    told = capsys.readouterr().err
    assert told.startswith("ecomoe: ")
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"step": 1}, "is no record"),
        ({"step": "1", "phase": "train"}, "is no record"),
        ({"step": 1, "phase": 7}, "is no record"),
        ({"run": ["x"]}, "is no record"),
        ({"step": 1, "phase": "train", "layers": None}, "is no record"),
        ({"step": 1, "phase": "train", "layers": [None]}, "is no record"),
        ({"step": 1, "phase": "train"}, "another version"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "command", [["report", "{file}"], ["watch", "--once", "{file}"], ["compare", "{file}", "{run}"]]
)
def test_records_that_lack_something_are_told_in_one_line(run, capsys, command, line, message):
    file = run.with_name("other.jsonl")
    file.write_text(json.dumps(line) + "\n")
    assert cli.main([argument.format(run=run, file=file) for argument in command]) == 1
    told = capsys.readouterr().err
    assert told.startswith("ecomoe: ")
    assert message in told
    assert told.count("\n") == 1


def test_nesting_without_end_is_told_in_one_line(run, capsys):
    run.write_text("[" * 100_000 + "\n")
    assert cli.main(["report", str(run)]) == 1
    assert "is not JSON" in capsys.readouterr().err


def test_a_run_without_its_begin_is_watched(run, capsys):
    run.write_text('{"run":"x"}\n')
    assert cli.main(["watch", "--once", str(run)]) == 0
    assert "run x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("report", ["by default eval where there was any, else train"]),
        ("compare", ["(0.01)", "(0.05)", "(accuracy)"]),
    ],
)
def test_help_says_the_defaults(command, defaults, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for default in defaults:
        assert default in told


def test_the_module_is_the_command(run):
    command = [sys.executable, "-m", "ecomoe", "report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 4 eval: DEAD" in done.stdout


def test_unknown_command():
    with pytest.raises(SystemExit):
        cli.main(["paint"])
