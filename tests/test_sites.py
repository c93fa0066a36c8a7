"""Each form in which the two libraries hold a feed-forward block, converted exactly."""

import importlib

import pytest
import torch
from torch import nn

import ecomoe
from ecomoe.sites import Refused, class_rule, find_blocks, linear_map

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from ecomoe.integrations import census  # noqa: E402
from ecomoe.integrations.tiny import inputs_for, tiny_model  # noqa: E402


def local(module, name, *args, **kwargs):
    return lambda: getattr(importlib.import_module(f"timm.models.{module}"), name)(*args, **kwargs)


IMAGE, TOKENS, GRID = (2, 16, 4, 4), (2, 9, 16), (2, 4, 4, 16)

# Class, input shape, and how often the block's dropout, where it has one, is applied.
LOCAL = {
    "cpubone": (local("cpubone", "CPUBoneBlock", 16, proj_drop=0.0), IMAGE),
    "efficientformer": (local("efficientformer", "ConvMlpWithNorm", 16, 32), IMAGE),
    "efficientformer_v2": (local("efficientformer_v2", "ConvMlpWithNorm", 16, 32), IMAGE),
    "efficientformer_v2 mid": (
        local("efficientformer_v2", "ConvMlpWithNorm", 16, 32, mid_conv=True),
        IMAGE,
    ),
    "efficientvim": (local("efficientvim", "FFN", 16, 32), IMAGE),
    "efficientvit_msra": (local("efficientvit_msra", "ConvMlp", 16, 32), IMAGE),
    "fastvit": (local("fastvit", "ConvMlp", 16, 32), IMAGE),
    "gemma4_vit": (local("gemma4_vit", "Gemma4GatedMlp", 16, 32), TOKENS),
    "iformer": (local("iformer", "FFN", 16, layer_scale_init_value=0.5), IMAGE),
    "inception_next": (
        local("inception_next", "ConvMlp", 16, 32, norm_layer=nn.BatchNorm2d),
        IMAGE,
    ),
    "levit": (local("levit", "LevitMlp", 16, 32), TOKENS),
    "levit of convolutions": (local("levit", "LevitMlp", 16, 32, use_conv=True), IMAGE),
    "lowformer": (local("lowformer", "LowFormerBlock", 16), IMAGE),
    "rdnet": (
        local("rdnet", "BlockESE", 16, 32, 8, timm.layers.LayerNorm2d, nn.GELU),
        IMAGE,
    ),
    "repvit": (local("repvit", "RepVitMlp", 16, 32, nn.GELU), IMAGE),
    "shvit": (local("shvit", "FFN", 16, 32), IMAGE),
    "swiftformer": (local("swiftformer", "Mlp", 16, 32), IMAGE),
    "swiftformer encoder": (local("swiftformer", "ConvEncoder", 16, 32), IMAGE),
    "tiny_vit": (local("tiny_vit", "NormMlp", 16, 32), TOKENS),
    "visformer": (local("visformer", "SpatialMlp", 16, 32), IMAGE),
    "vitamin": (local("vitamin", "GeGluMlp", 16, 32), TOKENS),
}


def settled(make):
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": make()})
    census.unsettle(model, torch.Generator().manual_seed(0))
    return model.eval()


@pytest.mark.parametrize("case", LOCAL)
def test_model_local_blocks_of_timm(case):
    make, shape = LOCAL[case]
    model = settled(make)
    x = torch.randn(shape)
    want = model["block"](x)
    ecomoe.convert(model, tiers=(2, 2), verbose=False)
    got = model["block"](x)
    assert got.stride() == want.stride()
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
    model["block"].train()(x).sum().backward()
    (layer,) = (m for m in model.modules() if isinstance(m, ecomoe.EcoMoE))
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("case", LOCAL)
def test_training_statistics_stay_those_of_the_dense_block(case):
    """Batch norms around and inside the block see what they saw, dropout aside."""
    make, shape = LOCAL[case]
    x = torch.randn(shape)
    dense, sparse = settled(make).train(), settled(make).train()
    for model in (dense, sparse):
        for module in model.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
    ecomoe.convert(sparse, tiers=(2, 2), verbose=False)
    want, got = dense["block"](x), sparse["block"](x)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5


def with_dropout(case):
    return {
        "fastvit": local("fastvit", "ConvMlp", 16, 32, drop=0.25),
        "levit": local("levit", "LevitMlp", 16, 32, drop=0.25),
        "swiftformer": local("swiftformer", "Mlp", 16, 32, drop=0.25),
        "tiny_vit": local("tiny_vit", "NormMlp", 16, 32, drop=0.25),
        "vitamin": local("vitamin", "GeGluMlp", 16, 32, drop=0.25),
    }[case]


@pytest.mark.parametrize("case", ["fastvit", "levit", "swiftformer", "tiny_vit", "vitamin"])
def test_dropout_is_applied_once_where_it_was(case):
    model = nn.ModuleDict({"block": with_dropout(case)()})
    ecomoe.convert(model, tiers=(2, 2), verbose=False)
    (layer,) = (m for m in model.modules() if isinstance(m, ecomoe.EcoMoE))
    assert layer.experts.dropout == 0.25
    assert layer.output_dropout == (0.0 if case == "levit" else 0.25)
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p and m.training]


def test_dropout_that_cannot_move_is_refused():
    model = nn.ModuleDict({"block": local("efficientformer", "ConvMlpWithNorm", 16, drop=0.1)()})
    with pytest.raises(ValueError, match=r"dropout of 0.1 follows a norm of the output"):
        ecomoe.convert(model)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (local("visformer", "SpatialMlp", 16, 32, spatial_conv=True), "spans several pixels"),
        (
            local("gemma4_vit", "Gemma4GatedMlp", 16, 32, use_clipped_linears=True),
            "clamp their inputs",
        ),
        (local("csatv2", "Block", 16), "global response norm"),
        (local("vision_transformer", "ParallelScalingBlock", 16, 2), "attention and feed-forward"),
    ],
)
def test_refused_by_name(make, reason):
    with pytest.raises(ValueError, match=reason):
        ecomoe.convert(nn.ModuleDict({"block": make()}))


# transformers: one family of each form.
FORMS = {
    "audio-spectrogram-transformer": "spectra",
    "bert": "split",
    "bloom": "adds the residual",
    "cpmant": "gate in a module of its own",
    "ctrl": "a sequence",
    "dinov2": "two names",
    "falcon": "a linear map of its own",
    "funnel": "dropout as a module, inline",
    "gpt_neo": "GPT-2's names on nn.Linear",
    "lilt": "two blocks a layer",
    "modernbert": "packed gate",
    "mpt": "adds the residual, no biases",
    "openai-gpt": "Conv1D",
    "phi3": "packed gate first",
    "prophetnet": "dropouts as numbers",
    "roberta-prelayernorm": "a norm of the input",
    "segformer": "after a depthwise convolution",
    "swiftformer": "convolutions, a norm of the input",
    "timesformer": "split, with a dropout inside",
    "wav2vec2": "dropouts as modules",
    "xlnet": "one dropout twice",
}


@pytest.mark.parametrize("model_type", FORMS)
def test_forms_in_transformers(model_type):
    entry = census.check_family(census.Entry(model_type, ""))
    assert entry.error == ""
    assert entry.reached > 0
    assert entry.difference < 1e-5


def test_inline_dropout_moves_into_the_experts():
    model = tiny_model("bart", activation_dropout=0.2)
    ecomoe.convert(model, tiers=(2, 2), verbose=False)
    layer = model.encoder.layers[0]
    assert layer.fc1.experts.dropout == 0.2
    assert layer.activation_dropout == 0.0
    assert isinstance(layer.fc2, nn.Identity)


def test_a_function_replaced_by_an_identity_comes_back_after_a_failure(monkeypatch):
    model = tiny_model("bart")
    act = nn.functional.relu
    for layer in (*model.encoder.layers, *model.decoder.layers):
        del layer.activation_fn
        layer.activation_fn = act
    module = importlib.import_module("ecomoe.convert")
    fill, calls = module.fill_experts, []

    def fail_later(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise MemoryError
        return fill(*args, **kwargs)

    monkeypatch.setattr(module, "fill_experts", fail_later)
    with pytest.raises(MemoryError):
        ecomoe.convert(model, verbose=False)
    assert model.encoder.layers[0].activation_fn is act
    assert isinstance(model.encoder.layers[0].fc1, nn.Linear)
    model(**inputs_for(model))


def test_experts_a_model_has_already_are_left_alone():
    model = tiny_model(
        "deepseek_v3", num_hidden_layers=4, n_routed_experts=4, first_k_dense_replace=1
    )
    names = [block.name for block in find_blocks(model)[0]]
    assert names == ["layers.0.mlp"]


def test_class_rule_goes_by_the_longest_name_that_fits():
    rules = {"layers.mlp.Mlp": lambda m: None}
    assert class_rule(rules, timm.layers.Mlp(4), root="timm") is rules["layers.mlp.Mlp"]
    assert class_rule(rules, timm.layers.Mlp(4), root="transformers") is None
    assert class_rule(rules, nn.Linear(2, 2), root="timm") is None


@pytest.mark.parametrize(
    "linear",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Conv2d(4, 4, 1, stride=2),
        nn.Bilinear(2, 2, 2),
    ],
)
def test_linear_map_takes_no_other(linear):
    with pytest.raises(Refused, match="is no plain linear map"):
        linear_map(linear)
