"""What conversion refuses, and that the model is then as it was."""

import sys

import pytest
import torch
from dense import Block, gpt2, snapshot, vit
from torch import nn
from torch.nn.utils import prune

import ecomoe
from ecomoe.integrations.tiny import tiny_model
from ecomoe.sites import find_blocks

timm = pytest.importorskip("timm")

from timm.layers.mlp import ConvMlp, GlobalResponseNormMlp, Mlp  # noqa: E402


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_e": 0.0}, "target_e"),
        ({"tiers": ()}, "tiers"),
        ({"tiers": (0, 2)}, "tiers"),
        ({"top_k": 17}, "top_k=17 must be <= num_experts=16"),
        ({"balance_weight": -1.0}, "balance_weight"),
        ({"oracle_weight": -1.0}, "oracle_weight"),
        ({"ortho_weight": -1.0}, "ortho_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"entropy_weight": -0.1}, "entropy_weight"),
        ({"divergence_weight": -1.0}, "divergence_weight"),
        ({"z_weight": float("nan")}, "z_weight"),
        ({"strength": -1.0}, "strength"),
        ({"warmup_fraction": 1.5}, "warmup_fraction"),
        ({"router": "best"}, "router='best' must be one of"),
        ({"oracle": "competence", "oracle_weight": 0.1}, "competence"),
        ({"init": "copy"}, "init='copy' must be one of upcycle, noise, partial, random"),
        ({"init": ["upcycle"]}, "init="),
        ({"init_amount": 0.1}, "init_amount=0.1 has no effect"),
        ({"init": "partial", "init_amount": 1.5}, "init_amount=1.5 must be a number from 0 to 1"),
        ({"init": "random", "init_amount": 1.5}, "init_amount=1.5 must be a number from 0 to 1"),
        ({"init": "noise", "init_amount": -1}, "init_amount=-1"),
        ({"expert_width": 0}, "expert_width=0"),
        ({"expert_width": float("inf")}, "expert_width=inf"),
        ({"expert_width": True}, "expert_width=True"),
        ({"expert_width": 1e9}, "expert_width=1000000000.0 must be .* at most 1000"),
        ({"init": "noise", "init_amount": 10**30}, "init_amount=10+ must be a number from 0"),
        ({"verbose": "no"}, "verbose='no' must be True or False"),
        ({"layers": {0: 1}}, "layers={0: 1} must be an index"),
        ({"layers": 3}, "layers=3 must be from -3 to 2"),
        ({"layers": [0, -4]}, "layers=-4 must be from -3 to 2"),
        ({"layers": "layers.*"}, "matches none .* which are blocks.0.mlp, blocks.1.mlp"),
        ({"layers": True}, "layers=True"),
        ({"layers": [1.5]}, "layers=1.5"),
        ({"layers": []}, "chooses none"),
        ({"layers": 1.5}, "layers=1.5"),
        ({"layers": lambda name, module: False}, "chooses none"),
    ],
    ids=lambda value: (
        "" if isinstance(value, dict) and callable(value.get("layers")) else str(value)
    ),
)
def test_wrong_arguments_change_nothing(arguments, message):
    model = vit()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        ecomoe.convert(model, **arguments)
    assert snapshot(model) == before


def test_no_model():
    with pytest.raises(ValueError, match=r"must be an nn\.Module"):
        ecomoe.convert("gpt2")


def test_nothing_to_replace_lists_what_there_is():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.TransformerEncoderLayer(8, 2))
    with pytest.raises(ValueError, match=r"2 Sequential.*1 TransformerEncoderLayer"):
        ecomoe.convert(model)
    with pytest.raises(ValueError, match="converted already \\(3 EcoMoE layers\\)"):
        ecomoe.convert(ecomoe.convert(vit(), verbose=False))


def test_global_response_norm_is_refused_by_name(capsys):
    alone = nn.Sequential(GlobalResponseNormMlp(8, 16))
    with pytest.raises(ValueError, match="0 refused, for its global response norm pools"):
        ecomoe.convert(alone)
    mixed = nn.Sequential(Mlp(8, 16), GlobalResponseNormMlp(8, 16))
    with pytest.raises(ValueError, match="means '1' too, and its global response norm"):
        ecomoe.convert(mixed, layers="*")
    ecomoe.convert(mixed)
    assert "1 refused, for its global response norm" in capsys.readouterr().out


def test_a_norm_over_the_image_is_refused_by_name():
    model = nn.Sequential(ConvMlp(8, 16, norm_layer=timm.layers.GroupNorm1))
    with pytest.raises(ValueError, match="its GroupNorm1 normalises hidden features over the"):
        ecomoe.convert(model)


def test_a_wrapped_linear_is_refused_by_name():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(8, 16)

        def forward(self, x):
            return self.base(x)

    mlp = Mlp(8, 16)
    mlp.fc1 = Wrapped()
    with pytest.raises(ValueError, match="its Wrapped is no plain linear map"):
        ecomoe.convert(nn.Sequential(mlp))


def test_quantised_weights_are_refused():
    model = vit()
    with torch.no_grad():
        for block in model.blocks:
            weight = block.mlp.fc1.weight
            block.mlp.fc1.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks.0.mlp has weights of dtype torch.int8"):
        ecomoe.convert(model)
    assert snapshot(model) == before


def test_a_norm_of_hidden_features_fixes_the_width():
    model = Block(lambda: Mlp(32, 64, norm_layer=nn.LayerNorm))
    with pytest.raises(ValueError, match=r"expert_width=0.5 must be 1 for blocks.0.mlp"):
        ecomoe.convert(model, expert_width=0.5)


def test_a_failure_while_replacing_is_undone(monkeypatch):
    model = vit()
    before = snapshot(model)
    calls = []

    def fail_at_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError

    monkeypatch.setattr(sys.modules["ecomoe.convert"], "fill_experts", fail_at_third)
    with pytest.raises(MemoryError):
        ecomoe.convert(model)
    assert snapshot(model) == before


def test_blocks_are_found_in_order():
    found, refused = find_blocks(gpt2())
    assert [block.name for block in found] == [f"transformer.h.{i}.mlp" for i in range(3)]
    assert not refused


@pytest.mark.parametrize(
    "attach",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
        lambda linear: linear.register_forward_hook(lambda *hooked: None),
    ],
)
def test_what_hangs_on_a_linear_map_is_not_lost_in_silence(attach):
    model = vit()
    attach(model.blocks[0].mlp.fc1)
    with pytest.raises(ValueError, match="remove them first"):
        ecomoe.convert(model, layers="blocks.0.mlp", verbose=False)


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_on_what_goes_are_refused_by_name(register):
    model = vit()
    before = snapshot(model)
    for place in ("blocks.1.mlp", "blocks.1.mlp.drop1"):
        handle = getattr(model.get_submodule(place), register)(lambda *hooked: None)
        with pytest.raises(ValueError, match=rf"{place} carries hooks.*register them on the conv"):
            ecomoe.convert(model, verbose=False)
        assert snapshot(model) == before
        handle.remove()
    model.blocks[1].register_forward_hook(lambda *hooked: None)  # it stays
    ecomoe.convert(model, verbose=False)


def test_hooks_on_parts_that_a_class_calls_one_by_one_are_refused_by_name():
    bert = tiny_model("bert")
    bert.encoder.layer[0].intermediate.register_forward_hook(lambda *hooked: None)
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\.intermediate carries hooks"):
        ecomoe.convert(bert, verbose=False)
