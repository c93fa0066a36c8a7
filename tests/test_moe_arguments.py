"""What the layer refuses, and how it says so: value, rule and remedy."""

import dataclasses
import inspect
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import ecomoe
from ecomoe import EcoMoE

DENSE = nn.Linear(6, 6)
NAN, INF = math.nan, math.inf

# (keywords that replace good ones, what the message must name: value, rule, remedy)
REFUSED = [
    ({"d_model": 0}, ["d_model=0", ">= 1", "pass"]),
    ({"d_model": 6.0}, ["d_model=6.0", "int", "pass"]),
    ({"d_hidden": -1}, ["d_hidden=-1", ">= 1", "pass"]),
    ({"d_hidden": None}, ["d_hidden=None", ">= 1", "pass"]),
    ({"d_hidden": True}, ["d_hidden=True", "int", "pass"]),
    ({"tiers": ()}, ["tiers=()", "non-empty", "(16,)"]),
    ({"tiers": (8, 0)}, ["tiers=(8, 0)", "positive", "pass"]),
    ({"tiers": (8, 2.0)}, ["tiers=(8, 2.0)", "ints", "pass"]),
    ({"tiers": 16}, ["tiers=16", "tuple", "(16,)"]),
    ({"tiers": "84"}, ["tiers='84'", "tuple", "pass"]),
    ({"top_k": 0}, ["top_k=0", ">= 1", "pass"]),
    ({"top_k": 5}, ["top_k=5", "<= num_experts=4", "lower top_k"]),
    ({"top_k": 1.0}, ["top_k=1.0", "int", "pass"]),
    ({"target_e": 0.0}, ["target_e=0.0", "> 0", "choose"]),
    ({"target_e": NAN}, ["target_e=nan", "finite", "choose"]),
    ({"target_e": INF}, ["target_e=inf", "finite", "choose"]),
    ({"target_e": "high"}, ["target_e='high'", "number", "choose"]),
    ({"oracle_weight": -0.1}, ["oracle_weight=-0.1", ">= 0", "0 switches it off"]),
    ({"balance_weight": NAN}, ["balance_weight=nan", "finite", "0 switches it off"]),
    ({"balance_weight": 0.0}, ["balance_weight=0.0", "must be > 0", "raise balance_weight"]),
    ({"ortho_weight": -1.0}, ["ortho_weight=-1.0", ">= 0", "change ortho_weight"]),
    ({"temperature": 0.0}, ["temperature=0.0", "> 0", "leave it out"]),
    ({"temperature": -3.0}, ["temperature=-3.0", "> 0", "leave it out"]),
    ({"entropy_weight": INF}, ["entropy_weight=inf", "finite", "leave it out"]),
    (
        {"temperature": 3.0, "entropy_weight": 0.5},
        ["temperature=3.0", "entropy_weight=0.5", "must give target_e=0.545", "leave one out"],
    ),
    ({"router": "softmax"}, ["router='softmax'", "one of mlp, linear", "pick"]),
    ({"router": None}, ["router=None", "one of mlp, linear", "pick"]),
    ({"activation": "tanh"}, ["activation='tanh'", "one of gelu", "pick"]),
    ({"activation": 3}, ["activation=3", "one of gelu", "pick"]),
    ({"gated": 1}, ["gated=1", "True or False", "pass a bool"]),
    ({"bias": "no"}, ["bias='no'", "True or False", "pass a bool"]),
    ({"dropout": 1.0}, ["dropout=1.0", "below 1", "change dropout"]),
    ({"dropout": True}, ["dropout=True", "number", "change dropout"]),
    ({"output_dropout": -0.1}, ["output_dropout=-0.1", ">= 0", "change output_dropout"]),
    ({"hidden_norm": 3}, ["hidden_norm=3", "module", "pass"]),
    ({"d_output": 0}, ["d_output=0", ">= 1", "pass"]),
    ({"d_output": 3, "num_classes": 3}, ["d_output=3", "num_classes=3", "leave one out"]),
    ({"oracle": "teacher"}, ["oracle='teacher'", "one of competence", "pick"]),
    ({"oracle": "prototype"}, ["oracle='prototype'", "oracle_weight=0", "oracle_weight > 0"]),
    (
        {"oracle": "competence", "oracle_weight": 1.0},
        ["oracle='competence'", "needs experts with heads", "num_classes"],
    ),
    ({"oracle": "dense", "oracle_weight": 1.0}, ["dense=None", "compares", "pass dense="]),
    ({"dense": DENSE}, ["dense is given", "does not read it", "set oracle='dense'"]),
    (
        {"dense": 3, "oracle": "dense", "oracle_weight": 1.0},
        ["dense=3", "module", "pass"],
    ),
    ({"divergence_weight": INF}, ["divergence_weight=inf", "finite", "change divergence_weight"]),
    ({"z_weight": "1"}, ["z_weight='1'", "number", "change z_weight"]),
    ({"strength": -1}, ["strength=-1", ">= 0", "change strength"]),
    ({"spread": -0.1}, ["spread=-0.1", "[0, 1]", "change spread"]),
    ({"spread": 1.5}, ["spread=1.5", "[0, 1]", "change spread"]),
    ({"spread": NAN}, ["spread=nan", "[0, 1]", "change spread"]),
    ({"spread": True}, ["spread=True", "[0, 1]", "change spread"]),
    ({"spread": "wide"}, ["spread='wide'", "[0, 1]", "change spread"]),
    ({"warmup_fraction": 1.0}, ["warmup_fraction=1.0", "below 1", "change warmup_fraction"]),
    ({"num_classes": 0}, ["num_classes=0", ">= 1", "pass"]),
    ({"dtype": torch.int32}, ["dtype=torch.int32", "floating", "pass"]),
    ({"dtype": "bf16"}, ["dtype=bf16", "floating", "pass"]),
    ({"dtype": torch.float8_e4m3fn}, ["dtype=torch.float8_e4m3fn", "16 bits", "pass"]),
    (
        {"router_options": {"d_space": 8}},
        ["'d_space'", "router='linear' takes no options", "leave out"],
    ),
    ({"device": "abacus"}, ["device='abacus'", "name a device", "pass"]),
    ({"strength": 1e308}, ["strength=1e+308", "finite", "change strength"]),
    ({"z_weight": 10**400}, ["z_weight=1000", "finite", "change z_weight"]),
    ({"target_e": 1e308}, ["target_e=1e+308", "finite", "choose"]),
    ({"activation": torch.nn.GELU}, ["activation=", "must be one of", "pick"]),
    (
        {"d_hidden": None, "num_classes": 3, "gated": True},
        ["gated=True", "no effect", "leave them out"],
    ),
]


@pytest.mark.parametrize(("wrong", "named"), REFUSED, ids=[str(wrong) for wrong, _ in REFUSED])
def test_constructor_refuses(wrong, named):
    trainable = [parameter.requires_grad for parameter in DENSE.parameters()]
    arguments = {"d_model": 6, "d_hidden": 5, "tiers": (3, 1)} | wrong
    with pytest.raises(ValueError, match=re.escape(named[0])) as error:
        EcoMoE(**arguments)
    for part in named:
        assert part in str(error.value)
    # Before anything was changed: the dense block is not frozen yet.
    assert [parameter.requires_grad for parameter in DENSE.parameters()] == trainable


def test_every_parameter_of_the_constructor_is_refused_at_least_once():
    tried = {name for wrong, _ in REFUSED for name in wrong}
    assert tried == set(inspect.signature(EcoMoE).parameters)


def test_numpy_scalars_become_plain_numbers():
    layer = EcoMoE(
        6,
        5,
        tiers=(3, 1),
        target_e=np.float32(0.5),
        strength=np.float32(0.25),
        z_weight=np.int64(1),
    )
    for value in (*dataclasses.astuple(layer.control), layer.strength, layer.z_weight):
        assert type(value) is float


class TestForward:
    @pytest.mark.parametrize("x", [None, [[1.0] * 6], np.zeros((2, 6))])
    def test_no_tensor(self, x):
        with pytest.raises(ValueError, match=r"x is a .*, not a tensor; pass"):
            EcoMoE(6, 5, tiers=(3, 1))(x)

    @pytest.mark.parametrize("shape", [(), (5,), (3, 7), (2, 6, 3), (0,)])
    def test_a_wrong_width(self, shape):
        layer = EcoMoE(6, 5, tiers=(3, 1))
        with pytest.raises(ValueError, match=re.escape(f"{shape}")) as error:
            layer(torch.zeros(shape))
        assert "d_model=6" in str(error.value)
        assert "move the channels last" in str(error.value)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
    def test_another_dtype_than_the_experts(self, dtype):
        layer = EcoMoE(6, 5, tiers=(3, 1))
        with pytest.raises(ValueError, match=f"x has dtype {dtype}, .* torch.float32") as error:
            layer(torch.zeros(3, 6, dtype=dtype))
        assert "cast" in str(error.value)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_no_floating_dtype_under_autocast(self, dtype):
        layer = EcoMoE(6, 5, tiers=(3, 1))
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(ValueError, match=f"x has dtype {dtype}"),
        ):
            layer(torch.zeros(3, 6, dtype=dtype))

    def test_competence_without_targets(self):
        layer = EcoMoE(6, None, num_classes=3, tiers=(3, 1), oracle_weight=0.5)
        with pytest.raises(ValueError, match=r"targets=None.*targets=labels"):
            layer(torch.zeros(4, 6))
        assert layer.eval()(torch.zeros(4, 6)).shape == (4, 3)

    @pytest.mark.parametrize("targets", [torch.zeros(3).long(), torch.zeros(2, 3).long()])
    def test_competence_with_too_few_or_many_targets(self, targets):
        layer = EcoMoE(6, None, num_classes=3, tiers=(3, 1), oracle_weight=0.5)
        with pytest.raises(
            ValueError, match=rf"targets has {targets.numel()} entries for 4 tokens"
        ):
            layer(torch.zeros(4, 6), targets=targets)

    def test_a_teacher_of_the_wrong_shape(self):
        layer = EcoMoE(6, 5, tiers=(3, 1), oracle=lambda x_ND: x_ND, oracle_weight=0.5)
        with pytest.raises(ValueError, match=re.escape("shape (7, 6)")) as error:
            layer(torch.zeros(7, 6))
        assert "(7, 4)" in str(error.value)

    def test_a_model_without_layers_has_no_auxiliary_loss(self):
        with pytest.raises(ValueError, match=r"model=Linear holds no EcoMoE layer.*convert"):
            ecomoe.aux_loss(nn.Linear(2, 2))

    @pytest.mark.parametrize("progress", [-0.1, math.nan, "half"])
    def test_progress(self, progress):
        layer = EcoMoE(6, 5, tiers=(3, 1))
        before = layer.temperature.clone()
        with pytest.raises(ValueError, match=r"progress=.*must be a number >= 0"):
            layer.set_progress(progress)
        assert torch.equal(layer.temperature, before)


def test_sizes_and_settings_show_when_printed():
    shown = repr(EcoMoE(6, 5, tiers=(3, 1), target_e=0.545))
    for part in ("tiers=(3, 1)", "top_k=2", "E=0.545", "4 x (6 -> 5)", "num_experts=4"):
        assert part in shown
