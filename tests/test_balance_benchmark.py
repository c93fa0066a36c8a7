"""The balance benchmark: every task under every policy, and what the peers do."""

import json

import pytest
import torch

from ecomoe import EcoMoE
from examples import balance_benchmark
from examples.policies import POLICIES, BiasedRouter, LossFree, SwitchLoss


def test_every_task_runs_under_every_policy_once(tmp_path, capsys):
    arguments = ["--scale", "smoke", "--seeds", "1", "--out", str(tmp_path)]
    balance_benchmark.main(arguments)
    path = tmp_path / "balance-smoke.json"
    runs = json.loads(path.read_text())["runs"]
    assert {(run["task"], run["policy"]) for run in runs} == {
        (task, policy) for task in ("heads", "vit", "text", "upcycle") for policy in POLICIES
    }
    for run in runs:
        assert ("dead" in run) == (run["policy"] != "dense")
    times = [run["seconds"] for run in runs]
    balance_benchmark.main(arguments)
    assert [run["seconds"] for run in json.loads(path.read_text())["runs"]] == times
    balance_benchmark.main(["--table", "--results", str(path)])
    assert "upcycle" in capsys.readouterr().out


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
