"""Converted models whose layers pass tokens several times: exactness, copies, loading, halting."""

import copy

import pytest
import torch
from test_convert_routers import converted, train

import ecomoe
from ecomoe.multihop import MultiHop, halting

transformers = pytest.importorskip("transformers")

from ecomoe.integrations.tiny import inputs_for, tiny_model  # noqa: E402


def hopping(model):
    return [module for module in model.modules() if isinstance(module, MultiHop)]


def test_every_layer_hops_and_the_summary_says_so(capsys):
    model = converted("cosine", hops=3, verbose=True)
    assert {module.hops for module in hopping(model)} == {3}
    assert len(hopping(model)) == sum(isinstance(m, ecomoe.EcoMoE) for m in model.modules())
    lines = capsys.readouterr().out.splitlines()
    assert "top_k=2, 3 hops, E=" in lines[1]
    once = converted("cosine", hops=1, verbose=True)
    assert not hopping(once)
    tripled, single = (
        float(text[-1].split()[-2]) for text in (lines, capsys.readouterr().out.splitlines())
    )
    assert tripled == pytest.approx(3 * single, rel=0.01)


@pytest.mark.parametrize("oracle", [None, "dense"])
def test_copies_are_the_dense_block_to_first_order(oracle):
    """Half the update, a quarter of the error."""
    errors = []
    for size in (0.02, 0.01):
        torch.manual_seed(0)
        model = tiny_model("gpt2").double().eval()
        block = model.h[0].mlp
        with torch.no_grad():
            block.c_proj.weight.mul_(size)
            block.c_proj.bias.mul_(size)
        x = torch.randn(50, block.c_fc.weight.shape[0]).double()
        want = block(x)
        settings = {} if oracle is None else {"oracle": oracle, "oracle_weight": 0.1}
        ecomoe.convert(model, hops=4, verbose=False, **settings)
        got = model.h[0].mlp(x)
        errors.append(((got - want).norm() / size).item())
        if oracle:
            twin = model.h[0].mlp.layer.dense
            torch.testing.assert_close(4 * twin(x), want)
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.05)


def test_comes_back_from_disk_and_from_a_copy(tmp_path):
    model = converted("hash", hops=2)
    inputs = inputs_for(model)
    want = model(**inputs).logits
    model.save_pretrained(tmp_path)
    other = ecomoe.from_pretrained(tmp_path)
    assert [module.hops for module in hopping(other)] == [2] * len(hopping(model))
    for same in (copy.deepcopy(model), other):
        assert torch.equal(same(**inputs).logits, want)


def test_a_model_of_timm_comes_back(tmp_path):
    timm = pytest.importorskip("timm")
    pytest.importorskip("safetensors")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    ecomoe.convert(model, tiers=(2, 2), hops=2, verbose=False).eval()
    x = torch.randn(2, 3, 32, 32)
    want = model(x)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert torch.equal(ecomoe.from_pretrained(tmp_path)(x), want)


@pytest.mark.parametrize("router", ["linear", "cosine", "hash"])
def test_trains(router):
    losses = train(converted(router, hops=3))
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("router", ["cosine", "hash"])
@pytest.mark.parametrize("halted", [False, True])
def test_generates_with_a_cache_as_without(router, halted):
    model = converted(router, hops=3)
    ids = inputs_for(model)["input_ids"][:, :4]
    settings = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    found = []
    for use_cache in (True, False):
        with halting(model, epsilon=0.02 if halted else 0.0) as saved:
            found.append(model.generate(ids, use_cache=use_cache, **settings))
        assert (saved.share > 0) == halted
    assert torch.equal(*found)


class TestChannelsFirst:
    @pytest.fixture
    def layer(self):
        timm = pytest.importorskip("timm")
        model = timm.create_model("convnext_atto", conv_mlp=True).double().eval()
        ecomoe.convert(model, layers=0, tiers=(2, 2), init="noise", hops=3, verbose=False)
        return hopping(model)[0]

    def test_hops_add_up(self, layer):
        x = torch.randn(2, layer.layer.d_model, 4, 4).double()
        total = 0
        for _ in range(3):
            total = total + layer.layer(x + total)
        torch.testing.assert_close(layer(x), total)

    def test_tokens_halt_by_their_own_features(self, layer):
        x = torch.randn(2, layer.layer.d_model, 4, 4).double()
        last = x.movedim(1, -1).reshape(32, -1)
        with halting(layer, epsilon=1e-2) as saved:
            y = layer(x)
        with halting(layer, epsilon=1e-2) as alone:
            rows = torch.cat([layer(row[None]) for row in last])
        torch.testing.assert_close(y.movedim(1, -1).reshape(32, -1), rows)
        assert saved.layers[""].tokens == alone.layers[""].tokens


@pytest.mark.parametrize("hops", [0, -1, 2.0, True, "3", None])
def test_a_wrong_number_of_hops(hops):
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match=r"hops=.* must be an int >= 1"):
        ecomoe.convert(model, hops=hops, verbose=False)


@pytest.mark.parametrize("model_type", ["bloom", "mpt"])
def test_blocks_that_cannot_hop_are_refused_and_left_alone(model_type):
    model = tiny_model(model_type)
    before = [type(module) for module in model.modules()]
    with pytest.raises(
        ValueError, match=r"hops=2 must be 1 for .* adds the residual itself.* leave hops out"
    ):
        ecomoe.convert(model, hops=2, verbose=False)
    assert [type(module) for module in model.modules()] == before
