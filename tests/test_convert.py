"""Conversion of dense blocks: exactness, choice of layers, inits, errors that change nothing."""

import inspect
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import ecomoe
from ecomoe.sites import find_blocks
from ecomoe.upcycle import copied_features

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from timm.layers.mlp import ConvMlp, GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU  # noqa: E402

# A model of 16 experts sums the same products in another order; 1e-5 is the bound.
RTOL = 1e-5


class Block(nn.Module):
    """A residual block around any FFN."""

    def __init__(self, mlp, depth=1):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"mlp": mlp()}) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = x + block["mlp"](x)
        return x


def vit(**kwargs):
    settings = dict(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    return timm.models.VisionTransformer(**{**settings, **kwargs})


def gpt2(**kwargs):
    settings = dict(n_layer=3, n_embd=32, n_head=2, vocab_size=64, n_positions=32)
    tokens = dict(bos_token_id=0, eos_token_id=0)
    config = transformers.GPT2Config(**{**settings, **tokens, **kwargs})
    return transformers.GPT2LMHeadModel(config)


def jittered(module):
    """Move every parameter off its initial value, so that zero biases hide no mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def relative_error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def snapshot(model):
    return {name: (id(module), module.training) for name, module in model.named_modules()}


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
    assert layers - ours == form | block
    own = {"model", "layers", "init", "init_amount", "expert_width", "verbose"}
    assert ours - layers == own


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


# Inits


def converted(init, **kwargs):
    torch.manual_seed(0)
    dense = jittered(Mlp(32, 64))
    layer = ecomoe.convert(nn.Sequential(dense), init=init, verbose=False, **kwargs)[0]
    return dense, layer


def test_noise_has_the_size_it_names():
    dense, layer = converted("noise", init_amount=0.1)
    noise = layer.experts.up_proj.weight - dense.fc1.weight
    assert (noise.std() / dense.fc1.weight.std()).item() == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(layer.experts.up_proj.bias[3], dense.fc1.bias)


def test_partial_redraws_whole_hidden_features():
    dense, layer = converted("partial", init_amount=0.25)
    for e in range(16):
        rows = (layer.experts.up_proj.weight[e] != dense.fc1.weight).all(1)
        columns = (layer.experts.down_proj.weight[e] != dense.fc2.weight).all(0)
        assert rows.sum() == 16
        assert torch.equal(rows, columns)
        assert torch.equal(rows, layer.experts.up_proj.bias[e] != dense.fc1.bias)
        kept = layer.experts.up_proj.weight[e][~rows]
        assert torch.equal(kept, dense.fc1.weight[~rows])
    fresh = layer.experts.up_proj.weight[0][layer.experts.up_proj.bias[0] != dense.fc1.bias]
    assert fresh.std().item() == pytest.approx(dense.fc1.weight.std().item(), rel=0.2)


def test_partial_redraws_gate_and_up_together():
    torch.manual_seed(0)
    dense = jittered(SwiGLU(32, 64))
    layer = ecomoe.convert(nn.Sequential(dense), init="partial", verbose=False)[0]
    gate, up = layer.experts.gate_up_proj.weight[0].chunk(2)
    changed = (gate != dense.fc1_g.weight).all(1)
    assert changed.sum() == 32
    assert torch.equal(changed, (up != dense.fc1_x.weight).all(1))


def test_random_forgets_the_block_and_upcycle_draws_no_expert():
    dense, layer = converted("random")
    assert not (layer.experts.up_proj.weight == dense.fc1.weight).any()
    drawn = layer.experts.up_proj.weight
    torch.testing.assert_close(drawn.std(), dense.fc1.weight.std(), rtol=0.05, atol=0.0)
    assert not torch.equal(drawn[0], drawn[1])
    _, layer = converted("upcycle")
    assert all(
        torch.equal(w, layer.experts.up_proj.weight[0]) for w in layer.experts.up_proj.weight
    )


@pytest.mark.parametrize("width", [1.5, 2, 3.25])
def test_wider_experts_compute_the_same(width):
    torch.manual_seed(0)
    for make in (lambda: Mlp(32, 64), lambda: SwiGLU(32, 64)):
        model = jittered(Block(make)).eval()
        x = torch.randn(2, 5, 32)
        want = model(x)
        ecomoe.convert(model, expert_width=width, verbose=False)
        assert model.blocks[0]["mlp"].d_hidden == width * 64
        assert relative_error(model(x), want) < RTOL


def test_narrow_experts_are_right_in_expectation():
    torch.manual_seed(0)
    for make in (lambda: Mlp(32, 64), lambda: SwiGLU(32, 64)):
        dense = jittered(make())
        x = torch.randn(6, 32)
        layer = ecomoe.convert(nn.Sequential(dense), expert_width=0.25, verbose=False)[0]
        assert layer.d_hidden == 16
        mean = layer.experts.all_outputs(x).mean(1)
        assert relative_error(mean, dense(x)) < RTOL


@pytest.mark.parametrize("width", [3, 7, 8, 20])
def test_copied_features_share_the_output_weight(width):
    features, factors = copied_features(8, d_hidden=8, width=width)
    total = torch.zeros(8, 8).scatter_add_(1, features, factors)
    if width >= 8:
        assert torch.allclose(total, torch.ones(8, 8))
    else:
        assert torch.allclose(total.mean(0), torch.ones(8))


@pytest.mark.parametrize("init", ["upcycle", "noise", "partial", "random"])
def test_after_a_depthwise_convolution_experts_are_linear(init):
    from timm.models.pvt_v2 import MlpWithDepthwiseConv

    torch.manual_seed(0)
    block = jittered(MlpWithDepthwiseConv(16, 32, drop=0.1)).eval()
    x = torch.randn(2, 12, 16)
    want = block(x, [3, 4])
    weight = block.fc2.weight
    ecomoe.convert(block, init=init, oracle="dense", oracle_weight=0.1, verbose=False)
    layer = block.fc2
    assert isinstance(layer, ecomoe.EcoMoE)
    if init == "upcycle":
        assert relative_error(block(x, [3, 4]), want) < RTOL
    elif init == "partial":
        kept = (layer.experts.head.weight == weight).all(1)
        assert (kept.sum(1) == 16).all()
    else:
        assert not (layer.experts.head.weight == weight).any()
    block.train()(x, [3, 4]).sum().backward()
    assert all(p.grad is not None for p in layer.experts.parameters())


def test_dense_oracle_compares_with_a_frozen_copy():
    torch.manual_seed(0)
    dense = jittered(Mlp(32, 64, norm_layer=nn.LayerNorm, drop=0.5))
    model = nn.Sequential(dense)
    ecomoe.convert(model, oracle="dense", oracle_weight=0.15, verbose=False)
    x = torch.randn(5, 32)
    assert relative_error(model[0].dense(x), dense.eval()(x)) < RTOL
    assert not any(p.requires_grad for p in model[0].dense.parameters())
    assert all(p.requires_grad for p in model[0].experts.parameters())
    model(x)
    assert ecomoe.aux_loss(model).isfinite()


def test_dense_oracle_stays_in_evaluation_mode():
    model = Block(lambda: ConvMlp(32, 64, norm_layer=nn.BatchNorm2d)).train()
    ecomoe.convert(model, oracle="dense", oracle_weight=0.15, verbose=False)
    dense = model.train().blocks[0]["mlp"].dense
    assert not any(module.training for module in dense.modules())


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
    matmuls = 2 * 32 * 64 + 32 * 128 + 128 * 4
    assert rows["FLOPs a token, these blocks"].endswith(f"{2 * matmuls / 1e3:.3g}k")


# Errors


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
