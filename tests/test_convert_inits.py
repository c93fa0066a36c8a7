"""What experts start from."""

import pytest
import torch
from dense import Block, jittered, relative_error
from torch import nn

import ecomoe
from ecomoe.upcycle import copied_features

timm = pytest.importorskip("timm")

from timm.layers.mlp import ConvMlp, Mlp, SwiGLU  # noqa: E402

# A model of 16 experts sums the same products in another order; 1e-5 is the bound.
RTOL = 1e-5


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


def test_experts_drawn_anew_differ_by_the_amount():
    """As those of `EcoMoE(spread=...)` do, in weights and biases."""
    for amount in (0.0, 0.1):
        dense, layer = converted("random", init_amount=amount)
        for name in ("weight", "bias"):
            drawn = getattr(layer.experts.up_proj, name).reshape(16, -1)
            want = getattr(dense.fc1, name).std().item()
            assert drawn.std(1).mean().item() == pytest.approx(want, rel=0.3)
            # The deviation among 16 around their mean.
            apart = (drawn - drawn.mean(0)).square().sum(0).div(15).mean().sqrt().item()
            assert apart == pytest.approx(amount * want, rel=0.15, abs=1e-6)


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
