import json

import pytest
import torch
from torch import nn

import ecomoe
from ecomoe import cli
from ecomoe.ecology.sinks import read_records


@pytest.fixture
def run(tmp_path):
    """The file of a short run: four records of training, one of evaluation."""
    torch.manual_seed(0)
    model = nn.Sequential(ecomoe.EcoMoE(8, 16, tiers=(2, 2)), nn.Linear(8, 3))
    path = tmp_path / "run.jsonl"
    with ecomoe.Monitor(model, log=path, every=1) as monitor:
        for _ in range(4):
            model(torch.randn(500, 8))
            monitor.step()
        model.eval()
        with torch.no_grad():
            outputs = model(torch.randn(500, 8))
        monitor.evaluate(outputs=outputs, targets=torch.randint(0, 3, (500,)))
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
    path = tmp_path / "report.html"
    assert cli.main(["report", str(run), "--html", str(path)]) == 0
    assert "wrote" in capsys.readouterr().err
    assert path.stat().st_size > 1_000_000  # the plots' script is inside


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere.jsonl"], "No such file"),
        (["compare", "{run}"], "give at least two"),
        (["compare", "{run}", "{run}"], "named twice"),
        (["report", "{run}", "--phase", "generate"], "phase='generate'"),
    ],
)
def test_errors_are_told_in_one_line(run, capsys, arguments, message):
    assert cli.main([argument.format(run=run) for argument in arguments]) == 1
    told = capsys.readouterr().err
    assert told.startswith("ecomoe: ")
    assert message in told
    assert told.count("\n") == 1


def test_unknown_command():
    with pytest.raises(SystemExit):
        cli.main(["paint"])
