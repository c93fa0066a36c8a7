"""Conversion of dense blocks: exactness, what goes into a layer, choice of layers, what is said."""

import inspect

import pytest
import torch
from dense import Block, gpt2, jittered, relative_error, vit
from torch import nn

import ecomoe
from ecomoe.upcycle import DEFAULT_AMOUNTS

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from timm.layers.mlp import ConvMlp, GluMlp, Mlp, SwiGLU  # noqa: E402

# A model of 16 experts sums the same products in another order, which 1e-5 leaves room for.
RTOL = 1e-5


FFNS = {
    "Mlp": lambda: Mlp(32, 64),
    "Mlp without biases": lambda: Mlp(32, 64, bias=False),
    "Mlp with one bias": lambda: Mlp(32, 64, bias=(True, False)),
    "Mlp with norm": lambda: Mlp(32, 64, norm_layer=nn.LayerNorm),
    "Mlp of uneven widths": lambda: Mlp(32, 51, act_layer=nn.SiLU),
    "GluMlp": lambda: GluMlp(32, 64),
    "GluMlp, gate first": lambda: GluMlp(32, 64, act_layer=nn.SiLU, gate_last=False),
    "GluMlp with norm": lambda: GluMlp(32, 64, norm_layer=nn.LayerNorm),
    "SwiGLU": lambda: SwiGLU(32, 64),
    "SwiGLU with norm": lambda: SwiGLU(32, 64, norm_layer=nn.LayerNorm),
}
IMAGE_FFNS = {
    "Mlp of convolutions": lambda: Mlp(32, 64, use_conv=True),
    "GluMlp of convolutions": lambda: GluMlp(32, 64, use_conv=True),
    "ConvMlp": lambda: ConvMlp(32, 64),
    "ConvMlp with norm": lambda: ConvMlp(32, 64, norm_layer=nn.BatchNorm2d),
    "ConvMlp with LayerNorm2d": lambda: ConvMlp(32, 64, norm_layer=timm.layers.LayerNorm2d),
}
CASES = {
    **{name: (make, (2, 7, 32)) for name, make in FFNS.items()},
    **{name: (make, (2, 32, 3, 5)) for name, make in IMAGE_FFNS.items()},
}


@pytest.mark.parametrize("top_k", [1, 2, 16])
@pytest.mark.parametrize("case", CASES)
def test_upcycling_changes_nothing(case, top_k):
    make, shape = CASES[case]
    torch.manual_seed(0)
    model = jittered(Block(make, depth=2)).eval()
    x = torch.randn(shape)
    want = model(x)
    assert ecomoe.convert(model, top_k=top_k, verbose=False) is model
    got = model(x)
    assert isinstance(model.blocks[1]["mlp"], ecomoe.EcoMoE)
    assert got.shape == want.shape
    assert got.stride() == want.stride()
    assert relative_error(got, want) < RTOL


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_the_input_as_before(case):
    make, shape = CASES[case]
    torch.manual_seed(0)
    model = jittered(Block(make)).eval()
    x = torch.randn(shape, requires_grad=True)
    (want,) = torch.autograd.grad(model(x).square().sum(), x)
    ecomoe.convert(model, verbose=False)
    (got,) = torch.autograd.grad(model(x).square().sum(), x)
    assert relative_error(got, want) < 10 * RTOL  # the router's own path adds rounding


def test_output_features_may_differ_from_the_input():
    torch.manual_seed(0)
    mlp = jittered(Mlp(32, 64, 48))
    model = nn.Sequential(mlp).eval()
    x = torch.randn(3, 32)
    want = model(x)
    assert relative_error(ecomoe.convert(model, verbose=False)(x), want) < RTOL


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_mode_are_kept(dtype):
    for training in (True, False):
        model = vit(drop_rate=0.0).to(dtype).train(training)
        ecomoe.convert(model, verbose=False)
        layer = model.blocks[0].mlp
        assert layer.training is training
        assert all(module.training is training for module in layer.modules())
        assert layer.experts.up_proj.weight.dtype == dtype
        assert layer.router.score.weight.dtype == torch.promote_types(dtype, torch.float32)
        assert model(torch.randn(1, 3, 16, 16, dtype=dtype)).dtype == dtype


def test_vit_and_gpt2_compute_what_they_did():
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 9))
    for model, call in (
        (vit(), lambda m: m(torch.ones(2, 3, 16, 16).cumsum(-1))),
        (gpt2(), lambda m: m(ids).logits),
    ):
        jittered(model).eval()
        want = call(model)
        ecomoe.convert(model, verbose=False)
        assert sum(isinstance(m, ecomoe.EcoMoE) for m in model.modules()) == 3
        assert relative_error(call(model), want) < RTOL


def test_dropout_goes_into_the_layer():
    model = vit(proj_drop_rate=0.25)
    ecomoe.convert(model, verbose=False)
    assert model.blocks[0].mlp.experts.dropout == 0.25
    assert model.blocks[0].mlp.output_dropout == 0.25
    text = ecomoe.convert(gpt2(resid_pdrop=0.2), verbose=False)
    assert text.transformer.h[0].mlp.experts.dropout == 0.0
    assert text.transformer.h[0].mlp.output_dropout == 0.2


def test_output_dropout_hits_the_share_it_names():
    layer = ecomoe.convert(gpt2(resid_pdrop=0.2), verbose=False).transformer.h[0].mlp
    y = layer(torch.randn(500, 32))
    assert (y == 0).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert not (layer.eval()(torch.randn(500, 32)) == 0).any()


def test_batch_norm_inside_learns_its_statistics():
    model = Block(lambda: ConvMlp(32, 64, norm_layer=nn.BatchNorm2d))
    twin = Block(lambda: ConvMlp(32, 64, norm_layer=nn.BatchNorm2d))
    twin.load_state_dict(model.state_dict())
    ecomoe.convert(model, verbose=False)
    x = torch.randn(2, 32, 4, 4)
    assert relative_error(model(x), twin(x)) < RTOL
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    torch.testing.assert_close(norm.running_mean, twin.blocks[0]["mlp"].norm.running_mean)


def test_frozen_blocks_stay_frozen():
    model = vit()
    model.blocks[0].requires_grad_(False)
    ecomoe.convert(model, verbose=False)
    frozen, free = model.blocks[0].mlp, model.blocks[1].mlp
    assert not any(p.requires_grad for p in frozen.experts.parameters())
    assert all(p.requires_grad for p in frozen.router.parameters())
    assert all(p.requires_grad for p in free.parameters())


def test_biases_that_alone_are_trained_are_so_in_the_experts():
    model = vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    ecomoe.convert(model, tiers=(2, 2), verbose=False)
    for name, parameter in model.blocks[0].mlp.experts.named_parameters():
        assert parameter.requires_grad == name.endswith("bias"), name


def test_meta_model_converts_and_takes_weights():
    with torch.device("meta"):
        model = vit()
    ecomoe.convert(model, verbose=False)
    assert all(p.is_meta for p in model.parameters())
    real = ecomoe.convert(vit(), verbose=False).eval()
    model.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval()(x), real(x))


def test_a_block_held_twice_is_replaced_in_both_places():
    shared = Mlp(32, 64)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    ecomoe.convert(model, verbose=False)
    assert model["a"][0] is model["b"][0]
    assert isinstance(model["a"][0], ecomoe.EcoMoE)


def test_a_subclass_with_its_own_forward_is_left_alone():
    class Doubled(Mlp):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(Mlp):
        pass

    model = nn.Sequential(Doubled(32, 64), Named(32, 64))
    ecomoe.convert(model, verbose=False)
    assert type(model[0]) is Doubled
    assert isinstance(model[1], ecomoe.EcoMoE)


def test_convert_spells_out_what_a_block_leaves_open():
    ours, layers = (
        set(inspect.signature(function).parameters) for function in (ecomoe.convert, ecomoe.EcoMoE)
    )
    form = {"d_model", "d_hidden", "d_output", "num_classes", "activation", "gated", "bias"}
    block = {"dropout", "output_dropout", "hidden_norm", "dense", "device", "dtype"}
    start = {"spread"}  # `init` says how experts start
    assert layers - ours == form | block | start
    own = {"model", "layers", "init", "init_amount", "expert_width", "hops", "verbose"}
    assert ours - layers == own


def test_convert_has_the_layers_defaults():
    ours, layers = (
        inspect.signature(function).parameters for function in (ecomoe.convert, ecomoe.EcoMoE)
    )
    shared = {name for name in ours if name in layers}
    assert {n: ours[n].default for n in shared} == {n: layers[n].default for n in shared}
    assert DEFAULT_AMOUNTS["random"] == layers["spread"].default


@pytest.mark.parametrize(
    ("layers", "want"),
    [
        (None, [0, 1, 2]),
        ("every other", [1]),
        (0, [0]),
        (-1, [2]),
        ([2, 0, -1], [0, 2]),
        ("blocks.*.mlp", [0, 1, 2]),
        ("blocks.1.*", [1]),
        (["blocks.0.*", -1], [0, 2]),
        (lambda name, module: name.endswith("1.mlp") and isinstance(module, Mlp), [1]),
    ],
)
def test_layers(layers, want):
    model = ecomoe.convert(vit(), layers=layers, verbose=False)
    assert [i for i, b in enumerate(model.blocks) if isinstance(b.mlp, ecomoe.EcoMoE)] == want


def test_the_rest_converts_later():
    model = ecomoe.convert(vit(), layers=0, verbose=False)
    ecomoe.convert(model, tiers=(4,), verbose=False)
    assert [b.mlp.num_experts for b in model.blocks] == [16, 4, 4]


# What it prints


def test_summary(capsys):
    ecomoe.convert(vit())
    out = capsys.readouterr().out
    assert "3 of 3 feed-forward blocks replaced (blocks.0.mlp ... blocks.2.mlp)" in out
    assert "E=0.545 (healthy)" in out
    dense = sum(p.numel() for p in vit().parameters())
    assert f"{dense / 1e3:.3g} k" in out
    ecomoe.convert(vit(), verbose=False)
    assert capsys.readouterr().out == ""


def test_active_parameters_and_flops_are_right(capsys):
    model = nn.Sequential(Mlp(32, 64))
    ecomoe.convert(model, tiers=(4,), top_k=1)
    layer = model[0]
    router = sum(p.numel() for p in layer.router.parameters())
    one = sum(p[0].numel() for p in layer.experts.parameters())
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:30].strip(): line[30:].replace(" ", "") for line in lines[3:]}
    assert rows["active for a token"].endswith(f"{(one + router) / 1e3:.3g}k")
    matmuls = 2 * 32 * 64 + 32 * 4
    assert rows["FLOPs a token, these blocks"].endswith(f"{2 * matmuls / 1e3:.3g}k")
