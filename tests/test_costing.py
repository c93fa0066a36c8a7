"""`ecomoe cost`: what it reads, prints and refuses."""

import json
import math

import pytest

from ecomoe import cost_model as cost
from ecomoe import costing
from ecomoe.cli import main
from ecomoe.cost_model import LayerShape
from ecomoe.device_cost import held_whole, on_devices
from ecomoe.machines import FITTED, Host

GIVEN = ["--gflops", "180", "--gbytes", "10", "--fresh-gbytes", "5"]
GIVEN += ["--launch", "4", "--product", "6"]


def test_command_prints_the_model(capsys):
    sizes = ["--d-model", "512", "--d-hidden", "1024", "--dtype", "fp32"]
    assert main(["cost", *sizes, *GIVEN, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    layer = LayerShape(512, 1024, num_experts=16)
    machine = Host(180e9, 10e9, 5e9, 4e-6, 6e-6, block_passes=3.0, fitted=FITTED)
    assert found["over_dense"]["training"] == cost.over_dense(layer, tokens=4096, machine=machine)
    rows = [(row["experts"], row["devices"]) for row in found["spread"]]
    assert rows == [(e, p) for e in (16, 64, 512, 4096) for p in (8, 64, 1024)]


def test_command_reads_a_configuration(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"n_embd": 768, "n_layer": 12, "n_inner": None}))
    assert main(["cost", "--config", str(config), "--experts", "8", *GIVEN, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["layers"], found["layer"]["d_hidden"]) == (12, 3072)
    one = on_devices(LayerShape(768, 3072, num_experts=8, itemsize=2), tokens=4096, devices=8)
    assert found["spread"][0]["sent"] == 12 * one.sent


def test_command_prints_text(capsys):
    sizes = ["--d-model", "64", "--d-hidden", "64", "--spread", "64", "--devices", "8"]
    assert main(["cost", *sizes, *GIVEN, "--device-tflops", "100", "--outside", "25"]) == 0
    text = capsys.readouterr().out
    assert "over the dense block: " in text
    assert "as given, else H100" in text


def test_command_says_what_is_missing(capsys):
    assert main(["cost", "--d-model", "64", *GIVEN]) == 1
    assert "--d-hidden is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds no JSON object"),
        ("{", "holds no JSON object"),
        ('{"n_embd": 64, "n_layer": 3.5}', "layers=3.5 must be an int >= 1"),
        ('{"n_embd": 64, "n_layer": -2}', "layers=-2 must be an int >= 1"),
        ('{"n_embd": 64, "shared_intermediate_size": -2}', "shared_hidden=-2 must be an int >= 0"),
    ],
)
def test_command_refuses_a_configuration(text, message, tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(text)
    assert main(["cost", "--config", str(config), *GIVEN]) == 1
    assert message in capsys.readouterr().err


def test_command_says_which_configuration_is_missing(tmp_path, capsys):
    assert main(["cost", "--config", str(tmp_path / "config.json"), *GIVEN]) == 1
    told = capsys.readouterr().err
    assert "config.json' does not exist" in told
    assert "Monitor" not in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.json"], "--config 'nowhere.json' does not exist; give a model's"),
        (["--config", "."], "config.json' does not exist; give a model's config.json, or its fo"),
        (["--config", "broken"], "--config 'broken' holds no JSON object"),
        (["--config", "list"], "--config 'list' holds no JSON object; give a model's"),
    ],
)
def test_command_says_what_configuration_it_wants(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").write_text("{")
    (tmp_path / "list").write_text("[]")
    assert main(["cost", *arguments, *GIVEN]) == 1
    assert message in capsys.readouterr().err


def test_command_says_how_several_numbers_are_given(capsys):
    for option in ("--devices", "--spread"):
        with pytest.raises(SystemExit):
            main(["cost", "--d-model", "64", "--d-hidden", "64", option, "1,1024"])
        assert f"put spaces between several: {option} " in capsys.readouterr().err


def test_experts_that_do_not_spread_evenly_are_told(capsys):
    sizes = ["--d-model", "64", "--d-hidden", "64", "--experts", "160", "--devices", "8", "64"]
    assert main(["cost", *sizes, *GIVEN]) == 0
    text = capsys.readouterr().out
    assert "160 experts do not spread evenly over 64 devices; --devices takes divisors" in text
    assert main(["cost", *sizes, *GIVEN, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found["spread"][0][name] for name in ("experts", "devices")] == [160, 8]
    assert found["uneven"] == [[160, 64]]


def test_command_reads_a_sparse_configuration(tmp_path, capsys):
    # DeepSeek-V3's, as published: 58 of 61 layers are sparse, and one expert more is shared.
    config = {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "hidden_act": "silu",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["cost", "--config", str(tmp_path), *GIVEN]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {"d_hidden": 2048, "num_experts": 256, "top_k": 8, "gated": True}
    assert {name: found["layer"][name] for name in expected} == expected
    assert found["layers"] == 58
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "58 x layer of 256 experts, top-8, 7168 -> 2048 -> 7168, gated, beside shared experts of "
        "2048; 4,096 tokens a step\n3 x dense layer besides, 7168 -> 18432 -> 7168\n"
    )
    assert main([*command, "--no-gated", "--layers", "2", "--shared", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["layer"]["gated"], found["layers"], found["dense_layers"]) == (False, 2, 0)
    assert found["layer"]["shared_hidden"] == 0


def test_shared_experts_and_dense_layers_are_costed(tmp_path, capsys):
    config = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5}
    config |= {"moe_intermediate_size": 32, "num_experts": 16, "first_k_dense_replace": 2}
    config |= {"shared_expert_intermediate_size": 48, "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["cost", "--config", str(tmp_path), "--spread", "16", "--devices", "8", *GIVEN]
    assert main([*command, "--router", "linear", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    shared, dense, expert = 3 * 64 * 48, 3 * 64 * 96, 3 * 64 * 32
    assert found["parameters"] == 16 * expert + shared + 64 * 16
    assert found["dense_parameters"] == 2 * expert + shared
    (row,) = found["spread"]
    assert row["parameters"] == 3 * found["parameters"] + 2 * dense
    sizes = {"num_experts": 16, "gated": True, "itemsize": 2, "router_hidden": 0}
    layer = LayerShape(64, 32, **sizes, shared_hidden=48)
    block = LayerShape(64, 96, num_experts=1, top_k=1, gated=True, itemsize=2, router_hidden=0)
    one, other = (
        on_devices(layer, tokens=4096, devices=8),
        held_whole(block, tokens=4096, devices=8),
    )
    for name in ("memory", "reduced", "compute", "optimizer", "communication"):
        assert row[name] == pytest.approx(3 * getattr(one, name) + 2 * getattr(other, name)), name
    twins = 3 * one.dense_seconds + 2 * other.seconds
    assert row["over_dense"] == pytest.approx((3 * one.seconds + 2 * other.seconds) / twins)
    experts = LayerShape(64, 32, **sizes)
    alone = cost.experts_work(experts, tokens=4096)
    assert found["work"]["experts"]["flops"] == alone.flops
    assert found["work"]["shared experts"]["flops"] == 3 * 2 * 4096 * shared
    assert found["work"]["a dense layer"]["flops"] == 3 * 2 * 4096 * dense


def test_a_published_model_has_the_weights_that_are_costed(tmp_path, capsys):
    # DeepSeek-V3: 671 billion in all, of which attention has 11 and the embeddings 2.
    config = {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048}
    config |= {"n_routed_experts": 256, "n_shared_experts": 1, "num_hidden_layers": 61}
    config |= {"first_k_dense_replace": 3, "hidden_act": "silu", "num_experts_per_tok": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["cost", "--config", str(tmp_path), "--spread", "256", "--devices", "8", *GIVEN]
    assert main([*command, "--router", "linear", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["spread"]
    assert row["parameters"] == pytest.approx((671 - 11 - 2) * 1e9, rel=0.01)


def test_machine_is_measured_where_it_is_not_given():
    costing_machine = costing.read_machine(_options("--dtype", "fp32", "--gbytes", "7"))
    assert costing_machine.bytes_per_second == 7e9
    assert isinstance(costing_machine, Host)
    # Whatever else the machine is doing meanwhile: no bound is a matter of time.
    assert 0 < costing_machine.flops_per_second < 1e15
    assert 0 < costing_machine.seconds_per_launch < math.inf
    assert 0 < costing_machine.fresh_bytes_per_second < math.inf


def _options(*arguments):
    import argparse

    parser = argparse.ArgumentParser()
    costing.add_arguments(parser)
    return parser.parse_args(arguments)
