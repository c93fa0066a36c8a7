"""The race of a sparse model against its dense twin: fair, resumable, told."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ecomoe import EcoMoE
from examples import race
from examples.data import Images, Text

PLAN = replace(race.PLANS["gpt"], steps=6, sparse_steps=4, batch=2, d_model=16, layers=2, experts=4)


@pytest.fixture
def text():
    data = torch.randint(256, (4000,), generator=torch.Generator().manual_seed(0))
    return Text("made up", data[:3000], data[3000:])


@pytest.fixture
def task(text, monkeypatch):
    monkeypatch.setattr(race, "CONTEXT", 8)
    return race.TextTask(text, PLAN)


def never():
    return False


def losses(found):
    return {name: [point["loss"] for point in found[name]] for name in race.NAMES}


def test_a_race_that_was_cut_off_goes_on_as_if_it_had_not_been(task, tmp_path):
    whole = race.race(task, 0, until=never, state=tmp_path / "whole.pt")
    calls = iter([False] * 5 + [True])
    state = tmp_path / "cut.pt"
    assert race.race(task, 0, until=lambda: next(calls), state=state) is None
    assert state.exists()
    resumed = race.race(task, 0, until=never, state=state)
    assert losses(resumed) == losses(whole)
    assert not state.exists()


def test_both_take_their_own_number_of_steps_to_the_end_of_their_schedules(task, tmp_path):
    found = race.race(task, 1, until=never, state=tmp_path / "s.pt")
    assert found["result"]["dense"]["step"] == 6
    assert found["result"]["ecomoe"]["step"] == 4


def test_the_twins_have_equal_active_weights_and_equal_shared_ones(task):
    for top_k in (1, 2):
        plan = replace(PLAN, top_k=top_k, convert={})
        dense = race.TextTask(task.text, plan).build()
        sparse = race.sparse_twin(dense, plan)
        layers = [module for module in sparse.modules() if isinstance(module, EcoMoE)]
        assert [layer.top_k * layer.d_hidden for layer in layers] == [4 * 16] * 2
        shared = dict(sparse.named_parameters())
        for name, weight in dense.named_parameters():
            if "mlp" not in name:
                assert torch.equal(weight, shared[name])


def test_the_learning_rate_warms_up_and_comes_down(task):
    racer = race.Racer(task.build(), task, steps=100)
    shares = [racer._share_of_rate(step) for step in range(101)]
    assert max(shares) == shares[4] == 1.0
    assert shares[0] == pytest.approx(0.2)
    assert shares[100] == pytest.approx(0.02)


def curve(*points):
    return [
        {"step": step, "seconds": float(seconds), "loss": loss} for step, seconds, loss in points
    ]


def test_outcome_says_when_the_sparse_model_was_as_good():
    dense = curve((5, 50, 3.0), (10, 100, 2.0))
    sparse = curve((5, 60, 2.5), (8, 90, 2.0), (10, 120, 1.5))
    found = race.outcome({"dense": dense, "ecomoe": sparse}, step_over_dense=1.2)
    assert found["reached"] == 0.9
    found = race.outcome({"dense": sparse, "ecomoe": dense}, step_over_dense=1.2)
    assert found["reached"] is None


def test_seconds_are_those_of_the_races_own_steps(task, tmp_path, monkeypatch):
    """Experts that starve cost more than fresh ones do; evaluations are nobody's time."""
    spent = {False: iter([1, 2, 2, 2, 2, 2]), True: iter([1, 4, 6, 8])}
    now = 0.0
    loss = task.loss

    def timed(model, batch):
        nonlocal now
        sparse = any(isinstance(module, EcoMoE) for module in model.modules())
        now += next(spent[sparse]) if model.training else 1000
        return loss(model, batch)

    monkeypatch.setattr(task, "loss", timed)
    monkeypatch.setattr(race, "time", SimpleNamespace(perf_counter=lambda: now))
    found = race.race(task, 0, until=never, state=tmp_path / "s.pt")
    assert [point["seconds"] for point in found["ecomoe"]] == [1, 5, 11, 19]
    assert found["result"]["dense"]["seconds"] == 11
    assert found["result"]["step_over_dense"] == 5 / 2


def test_command_writes_results_and_refuses_other_sizes(tmp_path, monkeypatch, capsys):
    source = tmp_path / "text.txt"
    source.write_bytes(bytes(range(256)) * 100)
    out = tmp_path / "race.json"
    sizes = ["--steps", "2", "--sparse-steps", "2", "--d-model", "16", "--layers", "2"]
    sizes += ["--batch", "2", "--threads", "1", "--seeds", "1", "--data", str(source)]
    monkeypatch.setattr(race, "CONTEXT", 8)
    race.main(["gpt", *sizes, "--out", str(out)])
    content = json.loads(out.read_text())
    assert content["runs"]["0"]["result"]["dense"]["step"] == 2
    assert "seed 0: dense" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        race.main(["gpt", *sizes, "--experts", "8", "--out", str(out)])
    assert "holds a race of other sizes" in capsys.readouterr().err


def test_images_race_too(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(40, 1, 8, 8, generator=generator)
    labels = torch.randint(4, (40,), generator=generator)
    images = Images("made up", (pixels, labels), (pixels, labels), list("abcd"))
    plan = replace(race.PLANS["vit"], steps=2, sparse_steps=2, batch=4, d_model=16, layers=2)
    found = race.race(race.ImageTask(images, plan), 0, until=never, state=tmp_path / "s.pt")
    assert found["result"]["step_over_dense"] > 0
