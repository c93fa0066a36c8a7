"""The benchmark's commands: what they measure, where they keep it, what they refuse."""

import json

import pytest
import torch

from ecomoe.machines import Host
from tests.benchmarks import fit, gpu, layer, models, page, race_page, shapes
from tests.benchmarks.results import RESULTS

CONSTANTS = fit.constants_of(Host(1e11, 1e10, 5e9, 5e-6, 6e-6))
ONE_TOKEN = "n1-d192-e16-k2-f384-plain-fp32-balanced"


def run_layer(path, *arguments):
    return layer.main(
        ["--out", str(path), "--per-shape", "0", "--rounds", "2", "--most", "2", *arguments]
    )


@pytest.fixture
def measured(monkeypatch, record, tmp_path):
    """Measure one shape into a file, what is timed replaced by a record."""
    monkeypatch.setattr(layer, "measure", lambda shape, **_: {**record, "shape": vars(shape)})
    monkeypatch.setattr(layer, "constants", lambda dtype, device: CONSTANTS)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    path = tmp_path / "bench.json"
    run_layer(path, "--shape", ONE_TOKEN)
    return path


def test_what_is_measured_is_told_with_units_and_not_again(measured, capsys):
    capsys.readouterr()
    run_layer(measured, "--shape", ONE_TOKEN, "--again")
    printed = capsys.readouterr().out.splitlines()
    assert "`routed` is ecomoe with its routing decided beforehand" in printed[0]
    assert printed[1].startswith(f"{ONE_TOKEN}: dense ")
    assert " ms; times that: ecomoe " in printed[1]
    assert printed[-1] == f"wrote 1 shapes to {measured}"
    before = measured.read_text()
    run_layer(measured, "--shape", ONE_TOKEN)
    assert capsys.readouterr().out == (
        f"nothing to measure: all 1 are in {measured}; --again measures them anew\n"
    )
    assert measured.read_text() == before


def test_a_shape_that_is_none_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_layer(tmp_path / "bench.json", "--shape", "nosuch")
    assert "--shape nosuch must be part of the name" in capsys.readouterr().err
    assert not (tmp_path / "bench.json").exists()


@pytest.mark.parametrize(("key", "value"), [("processor", "Another"), ("torch", "1.0")])
def test_results_of_two_machines_are_not_mixed(measured, capsys, key, value):
    content = json.loads(measured.read_text())
    content["machine"][key] = value
    measured.write_text(json.dumps(content))
    for arguments in ([], ["--again"]):
        with pytest.raises(SystemExit):
            run_layer(measured, "--shape", ONE_TOKEN, *arguments)
        error = capsys.readouterr().err
        assert f"{key} {value}, here " in error
        assert "--out runs/bench.json" in error
    assert json.loads(measured.read_text()) == content


def test_an_absent_package_is_no_other_version(measured):
    content = json.loads(measured.read_text())
    content["machine"] |= {"st-moe-pytorch": None, "transformers": None, "date": "2020-01-01"}
    measured.write_text(json.dumps(content))
    run_layer(measured, "--shape", ONE_TOKEN, "--again")
    found = json.loads(measured.read_text())["machine"]
    assert found["transformers"] is not None
    assert found["date"] > "2020-01-01"


def test_lists_are_printed_and_nothing_is_measured(monkeypatch, capsys, tmp_path):
    for module in (layer, models):
        monkeypatch.setattr(module, "measure", lambda *_, **__: pytest.fail("measured"))
    layer.main(["--list"])
    assert capsys.readouterr().out.split() == [shape.name for shape in shapes.quick()]
    gpu.main(["--list", "--full"])
    assert capsys.readouterr().out.split() == [shape.name for shape in shapes.grid()]
    models.main(["--list", "--quick", "--dtype", "bf16"])
    assert capsys.readouterr().out.split() == ["gpt2-small-4-layers-bf16", "vit-tiny-4-layers-bf16"]


def test_help_of_the_gpu_needs_none(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--help"])
    assert ended.value.code == 0
    assert "--shape" in capsys.readouterr().out


def test_make_bench_measures_apart_from_the_committed_results():
    text = (RESULTS.parents[2] / "Makefile").read_text()
    commands = [line for line in text.splitlines() if "tests.benchmarks" in line]
    assert len(commands) == 3
    assert all("$(BENCH)" in line for line in commands)
    assert "BENCH := runs/" in text


def test_recomputation_is_measured_apart_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layer, "constants", lambda dtype, device: CONSTANTS)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    path = tmp_path / "bench.json"
    run_layer(path, "--shape", ONE_TOKEN, "--recompute")
    results = json.loads(path.read_text())
    assert "layers" not in results
    contenders = results["recomputed"][ONE_TOKEN]["contenders"]
    assert set(contenders) == {"dense", "ecomoe", "routed", "recomputed"}
    # One token's 192 features of 4 bytes, and what a checkpoint keeps to draw as before.
    kept = contenders["recomputed"]["saved_bytes"]
    assert 192 * 4 <= kept < contenders["ecomoe"]["saved_bytes"]
    capsys.readouterr()
    run_layer(path, "--shape", ONE_TOKEN, "--recompute")
    assert "nothing to measure" in capsys.readouterr().out
    text = page._recomputed(results["recomputed"])
    assert text.startswith("## Recomputation")
    assert f"| {kept / 1e6:,.2f} |" in text
    assert page._recomputed({}) == ""


def test_a_race_says_how_far_off_and_what_its_time_is_spent_on(record):
    plan = {"title": "ViT", "steps": 150, "learning_rate": 0.001, "d_model": 128}
    plan["convert"] = {"layers": "every other"}
    ends = {"dense": {"loss": 1.0}, "ecomoe": {"loss": 1.25}}
    runs = {
        str(seed): {"seed": seed, "result": {**ends, "reached": at}}
        for seed, at in enumerate((0.9, 1.02, None))
    }
    race = {"plan": plan, "runs": runs}
    assert race_page.how_far_off(race) == (
        "1 of 3 seeds are won; seed 1 is there 2% of the twin's time late; "
        "seed 2 ends +0.250 nats from the twin's last loss"
    )
    assert race_page.command("vit", race) == (
        "python -m examples.race vit --data SOURCE --seeds 3 --steps 150 --learning-rate 0.001 "
        '--d-model 128 --convert \'{"layers": "every other"}\''
    )
    seconds = {"forward": 0.3, "backward": 0.5, "optimizer": 0.2, "step": 1.0}
    model = {"model": "vit-tiny", "layers": 4, "dtype": "fp32"}
    model["dense"] = {"seconds": {part: [each] * 3 for part, each in seconds.items()}}
    model["ecomoe"] = {"seconds": {part: [1.5 * each] * 3 for part, each in seconds.items()}}
    near = json.loads(json.dumps(record))
    near["shape"] = vars(shapes.LARGE)
    near["schedule_seconds"] = 0.0
    near["contenders"]["ecomoe"]["both"]["over_dense"] = [1.5] * 3
    near["contenders"]["routed"]["both"]["over_ecomoe"] = [0.8] * 3
    text = race_page.spent_on("vit", race, {"models": {"one": model}, "layers": {"near": near}})
    assert "a step takes 500 ms beyond its twin's 1,000: the optimizer" in text
    assert "weights, 100 ms; forward and backward 400 ms. In the layer alone (4,096 tokens" in text
    assert "losses take 30% of the dense block's time on top" in text
    assert "weights +20% of it" in text
    assert race_page.spent_on("vit", race, {"layers": {}}) == ""
