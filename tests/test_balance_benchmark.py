"""The balance benchmark: every task under every policy, and what the peers do."""

import json

import pytest
import torch

from ecomoe import EcoMoE
from examples import balance_benchmark
from examples.balance_table import promise, rows, told_over_training
from examples.policies import POLICIES, BiasedRouter, LossFree, SwitchLoss


def test_every_task_runs_under_every_policy_once(tmp_path, capsys, monkeypatch):
    arguments = ["--scale", "smoke", "--seeds", "1", "--out", str(tmp_path)]
    balance_benchmark.main(arguments)
    path = tmp_path / "balance-smoke.json"
    content = json.loads(path.read_text())
    assert content["command"] == (
        "python -m examples.balance_benchmark --scale smoke --seeds 1 --data DIR --data TEXT"
    )
    runs = content["runs"]
    assert {(run["task"], run["policy"]) for run in runs} == {
        (task, policy) for task in ("heads", "vit", "text", "upcycle") for policy in POLICIES
    }
    for run in runs:
        assert ("dead" in run) == (run["policy"] != "dense")
        if run["task"] == "heads" and "dead" in run:  # one layer
            living = 16 - run["dead"]["topk"]
            expected = run["information_per_living"] * living
            assert run["information"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    times = [run["seconds"] for run in runs]
    balance_benchmark.main(arguments)
    assert [run["seconds"] for run in json.loads(path.read_text())["runs"]] == times
    few = ["--tasks", "vit", "--policies", "bias", "none"]
    balance_benchmark.main([*arguments, *few, "--results", str(tmp_path / "few.json")])
    command = json.loads((tmp_path / "few.json").read_text())["command"]
    assert "--scale smoke --tasks vit --policies bias none --seeds 1" in command
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "100")
    balance_benchmark.main(["--table", "--results", str(path)])
    shown = capsys.readouterr().out
    assert "upcycle" in shown
    assert "…" not in shown
    balance_benchmark.main(["--table", *few, "--results", str(path)])
    shown = capsys.readouterr().out
    assert "vit" in shown
    assert "none" in shown
    assert "upcycle" not in shown
    assert "switch" not in shown


def test_runs_on_other_data_are_not_taken_for_these(tmp_path, capsys):
    arguments = ["--scale", "smoke", "--seeds", "1", "--tasks", "text", "--policies", "switch"]
    arguments += ["--out", str(tmp_path / "out")]
    balance_benchmark.main(arguments)
    text = tmp_path / "other.txt"
    text.write_text("another text, of its own words " * 1000)
    with pytest.raises(SystemExit):
        balance_benchmark.main([*arguments, "--data", str(text)])
    said = capsys.readouterr().err
    assert "Python standard library" in said
    assert "another --out" in said
    (tmp_path / "out" / "smoke" / "text-switch-0" / "result.json").write_text("{")
    with pytest.raises(SystemExit):
        balance_benchmark.main(arguments)
    assert "no whole JSON" in capsys.readouterr().err


def test_loss_free_bias_follows_the_load():
    torch.manual_seed(0)
    layer = EcoMoE(8, 8, tiers=(4,), strength=0.0, router="linear")
    policy = LossFree()
    policy.prepare(layer, total_steps=1)
    assert isinstance(layer.router, BiasedRouter)
    layer(torch.randn(64, 8))
    load_E = layer.router.load_E.clone()
    policy.after_step()
    expected = 0.001 * (load_E.mean() - load_E).sign()
    assert torch.allclose(layer.router.bias_E, expected)
    assert not layer.router.load_E.any()
    layer.eval()
    layer(torch.randn(64, 8))
    assert not layer.router.load_E.any()


def test_bias_changes_who_is_chosen_and_not_the_gates():
    router = BiasedRouter(4, num_experts=3, top_k=2)
    x = torch.randn(10, 4)
    router.eval()
    with torch.no_grad():
        router.bias_E[1] = 5.0
        routing = router(x, torch.ones(()))
    assert (routing.expert_ids_NK[:, 0] == 1).all()
    scores = routing.logits_NE.sigmoid().gather(-1, routing.expert_ids_NK)
    assert torch.allclose(routing.weights_NK, scores / scores.sum(-1, keepdim=True))


def test_switch_loss_is_least_when_even():
    layer = EcoMoE(8, 8, tiers=(4,), strength=0.0, router="linear")
    policy = SwitchLoss()
    policy.prepare(layer, total_steps=1)
    with torch.no_grad():
        layer.router.score.weight.zero_()
        layer.router.score.bias.zero_()
    layer(torch.randn(32, 8))
    assert policy.extra_loss().item() == pytest.approx(0.01, rel=1e-5)  # E * sum(f / E) = 1
    with torch.no_grad():
        layer.router.score.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    layer(torch.randn(32, 8))
    assert policy.extra_loss().item() > 0.019


def finished(policy, seed, *, loss=1.0, dead=(0, 0), information=0.2):
    return {
        "task": "text",
        "policy": policy,
        "seed": seed,
        "loss": loss,
        "dead": dict(zip(("top1", "topk"), dead, strict=True)),
        "information": 2 * information,
        "specialisation": information,
        "information_of_living": 3 - information,
    }


def test_promise_is_broken_by_one_dead_expert_on_one_basis():
    runs = [finished("ecomoe", 0), finished("ecomoe", 1, dead=(1, 0)), finished("switch", 0)]
    said = promise([*runs, finished("none", 0, dead=(9, 9), information=0.3)])
    assert "in 1 of 2 runs" in said
    assert "routing tells less of the label than without balancing (0.400 nats against" in said
    assert "routing tells (NMI) less of the label than without balancing (0.200 against" in said
    assert "a living expert tells more of the label than" in said
    assert "2.800 nats against" in said


def test_what_routing_tells_has_an_interval_over_seeds():
    runs = [
        finished(policy, seed, information=information)
        for policy, values in {"ecomoe": (0.2, 0.3, 0.4), "none": (0.1, 0.25, 0.25)}.items()
        for seed, information in enumerate(values)
    ]
    said = promise(runs)
    # Differences of 0.1, 0.05 and 0.15: 0.1 -+ 4.303 * 0.05 / sqrt(3).
    assert "(NMI) more of the label than without balancing (0.300 against 0.200; " in said
    assert "difference -0.024 to +0.224)" in said


def test_what_a_living_expert_tells_is_said_for_each_evaluation():
    def at(values):
        return [
            {"percent": percent, "information_of_living": told}
            for percent, told in zip((50.0, 100.0), values, strict=True)
        ]

    runs = [
        finished("ecomoe", 0) | {"steps": 80, "history": at((0.1, 0.3))},
        finished("ecomoe", 1) | {"steps": 80, "history": at((0.3, 0.4))},
        finished("none", 0) | {"steps": 80, "history": at((0.1, 0.2))},
    ]
    said = told_over_training(runs)
    assert "text at 50, 100 % of 80 steps: 0.200, 0.350; without balancing 0.100, 0.200." in said
    assert told_over_training(runs[:2]) == ""


def test_losses_are_compared_with_the_best_other_policys_seed_by_seed():
    # Seeds differ by far more than policies.
    losses = {"ecomoe": (1.001, 2.001, 3.003), "switch": (1.0, 2.0, 3.0), "bias": (5.0, 5.0, 5.0)}
    runs = [
        finished(policy, seed, loss=loss)
        for policy, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    own = next(cells for cells in rows(runs) if cells[1] == "ecomoe")
    assert own[3].startswith("+0.1 % vs switch")
    assert float(own[3].split("p=")[1]) < 0.01


def test_seeds_of_all_tasks_and_of_one():
    assert balance_benchmark.count_seeds(["2", "heads=4"], balance_benchmark.TASKS) == {
        "heads": 4,
        "vit": 2,
        "text": 2,
        "upcycle": 2,
    }
    assert balance_benchmark.count_seeds(["vit=1"], balance_benchmark.TASKS)["heads"] == 3


def test_seeds_of_one_task_go_before_those_of_all_in_any_order():
    counts = balance_benchmark.count_seeds(["heads=4", "2"], balance_benchmark.TASKS)
    assert (counts["heads"], counts["vit"]) == (4, 2)


def test_steps_of_one_task():
    count = balance_benchmark.count_by_task
    assert count("--steps", ["vit=200"], {"vit": 800, "text": 400}) == {"vit": 200, "text": 400}
    with pytest.raises(ValueError, match=r"--steps nobody=2 must be .* tasks are vit, text"):
        count("--steps", ["nobody=2"], {"vit": 800, "text": 400})


@pytest.mark.parametrize("wrong", ["0", "-1", "two", "heads=0", "nobody=2", "heads=", "=3"])
def test_seeds_that_are_no_counts(wrong, capsys):
    with pytest.raises(SystemExit):
        balance_benchmark.main(["--seeds", wrong])
    assert f"--seeds {wrong} must be" in capsys.readouterr().err


def test_seeds_of_a_task_that_does_not_run(capsys):
    with pytest.raises(SystemExit):
        balance_benchmark.main(["--tasks", "heads", "--seeds", "vit=2"])
    assert "--seeds vit=2 must be" in capsys.readouterr().err


def test_a_task_may_have_more_seeds(tmp_path):
    arguments = ["--scale", "smoke", "--tasks", "heads", "upcycle", "--policies", "none"]
    balance_benchmark.main([*arguments, "--seeds", "1", "heads=2", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "balance-smoke.json").read_text())
    assert [(run["task"], run["seed"]) for run in content["runs"]] == [
        ("heads", 0),
        ("upcycle", 0),
        ("heads", 1),
    ]
    assert content["command"].endswith("--seeds 1 heads=2 --data DIR --data TEXT")
