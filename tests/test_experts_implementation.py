"""Experts computed by transformers' back ends instead of the layer itself."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ecomoe

transformers = pytest.importorskip("transformers")

HERE = ["grouped_mm", "batched_mm"]  # those that need no GPU
VARIANTS = [
    {"gated": gated, "bias": bias, "activation": activation}
    for gated, activation in ((False, "gelu_tanh"), (True, "silu"))
    for bias in (False, True)
]


def make_layer(**options):
    torch.manual_seed(0)
    return ecomoe.EcoMoE(16, 24, tiers=(2, 2), spread=1.0, **options)


def gradients(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + ecomoe.aux_loss(layer)
    found = torch.autograd.grad(loss, [x, *layer.parameters()])
    return y.detach(), found


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("name", HERE)
def test_values_and_gradients_are_the_layers_own(name, options):
    layer, x = make_layer(**options), torch.randn(3, 7, 16)
    y, own = gradients(layer, x)
    assert ecomoe.set_experts_implementation(layer, name) == 1
    delegated_y, delegated = gradients(layer, x)
    torch.testing.assert_close(delegated_y, y)
    for found, expected in zip(delegated, own, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def calls(monkeypatch):
    """Return the calls of a back end that is registered for the test."""
    from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

    seen = []

    def counted(self, hidden_states, top_k_index, top_k_weights):
        seen.append(hidden_states)
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)

    monkeypatch.setitem(ExpertsInterface._global_mapping, "counted", counted)
    return seen


def test_a_back_end_of_the_users_own(calls):
    layer = make_layer()
    ecomoe.set_experts_implementation(layer, "counted")
    layer(torch.randn(5, 16))
    assert [x.shape for x in calls] == [(5, 16)]
    ecomoe.set_experts_implementation(layer, None)
    layer(torch.randn(5, 16))
    assert len(calls) == 1


def test_the_layer_computes_what_a_back_end_cannot(calls):
    layer = make_layer(dropout=0.5)
    ecomoe.set_experts_implementation(layer, "counted")
    layer(torch.randn(5, 16))  # dropout in training
    layer.eval()
    layer(torch.randn(0, 16))
    seen = []
    hook = layer.experts.register_forward_hook(lambda module, args, y_SF: seen.append(y_SF.shape))
    layer(torch.randn(5, 16))
    hook.remove()
    assert not calls
    assert seen == [(10, 16)]
    layer(torch.randn(5, 16))
    assert len(calls) == 1


def test_under_autocast(calls):
    layer, x = make_layer(gated=True, activation="silu"), torch.randn(9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        ecomoe.set_experts_implementation(layer, "counted")
        delegated = layer(x)
    assert delegated.dtype == y.dtype
    assert calls[0].dtype == torch.bfloat16
    torch.testing.assert_close(delegated, y, rtol=2e-2, atol=2e-2)


def test_in_one_graph():
    layer = make_layer(gated=True, activation="silu").to(torch.bfloat16).eval()
    x = torch.randn(9, 16).to(torch.bfloat16)
    ecomoe.set_experts_implementation(layer, "batched_mm")
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, layer(x), rtol=2e-2, atol=2e-2)


def test_copies_keep_it_and_weights_do_not(calls):
    layer = make_layer()
    names = set(layer.state_dict())
    ecomoe.set_experts_implementation(layer, "counted")
    assert set(layer.state_dict()) == names
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        calls.clear()
        twin(torch.randn(5, 16))
        assert len(calls) == 1


def test_every_layer_of_a_converted_model(calls):
    from language import make_model

    model = make_model()
    assert ecomoe.set_experts_implementation(model, "counted") == 2
    model(input_ids=torch.arange(8)[None])
    assert len(calls) == 2


class Recorded:
    """Stands for the sonic-moe kernel: computes what its arguments say, from their layout alone."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, scores, tokens, ids, w1, b1, w2, b2, *, E, activation_type, **rest):
        self.seen.append({"activation": activation_type, "experts": E, **rest})
        y = torch.zeros_like(x)
        for slot, (token, expert) in enumerate(zip(tokens.tolist(), ids.tolist(), strict=True)):
            pre = w1[:, :, expert] @ x[token] + b1[expert]
            gate, up = pre.chunk(2)
            out = w2[:, :, expert] @ (nn.functional.silu(gate) * up) + b2[expert]
            y = y.index_add(0, tokens[slot : slot + 1], (scores[slot] * out)[None])
        return y, None


def test_what_sonicmoe_is_given(monkeypatch):
    from transformers.integrations import sonicmoe

    kernel = Recorded()
    bundle = SimpleNamespace(
        activation_type_enum=SimpleNamespace(SWIGLU="swiglu"), moe_general_routing_inputs=kernel
    )
    monkeypatch.setattr(sonicmoe, "is_sonicmoe_loadable", lambda raise_error=False: True)
    monkeypatch.setattr(sonicmoe, "load_sonicmoe_kernel", lambda: bundle)
    layer, x = make_layer(gated=True, activation="silu"), torch.randn(6, 16)
    y, own = gradients(layer, x)
    ecomoe.set_experts_implementation(layer, "sonicmoe")
    delegated_y, delegated = gradients(layer, x)
    torch.testing.assert_close(delegated_y, y)
    for found, expected in zip(delegated, own, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (seen,) = kernel.seen
    assert seen["activation"] == "swiglu"
    assert seen["experts"] == 4
    assert seen["concat_layout"] is True
    assert seen["is_inference_mode_enabled"] is False


def test_deepgemm_computes_where_no_gradient_is_asked_for(monkeypatch):
    from transformers.integrations import deepgemm, moe

    used = []

    def forward(self, hidden_states, top_k_index, top_k_weights):
        used.append(torch.is_grad_enabled())
        return moe.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)

    monkeypatch.setattr(deepgemm, "is_deepgemm_loadable", lambda raise_error=False: True)
    monkeypatch.setitem(moe.ExpertsInterface._global_mapping, "deepgemm", forward)
    layer, x = make_layer(), torch.randn(6, 16)
    ecomoe.set_experts_implementation(layer, "deepgemm")
    y = layer(x)
    (y.sum() + ecomoe.aux_loss(layer)).backward()
    assert not used
    assert layer.experts.up_proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y.detach())
    assert used == [False]


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({}, "eager", "must be None or one of .*grouped_mm"),
        ({}, "deepgemm_megamoe", "must be None or one of"),
        ({}, "sonicmoe", "cannot be loaded here: .*; pass None"),
        ({}, "deepgemm", "cannot be loaded here: .*; pass None"),
        ({"hidden_norm": nn.LayerNorm(24)}, "grouped_mm", "have a norm .* pass None"),
    ],
)
def test_errors_leave_the_layer_as_it_was(options, name, message):
    layer = make_layer(**options)
    with pytest.raises(ValueError, match=message):
        ecomoe.set_experts_implementation(layer, name)
    assert layer.experts.delegate is None


def test_one_layer_that_does_not_fit_leaves_all_as_they_were(monkeypatch):
    from transformers.integrations import sonicmoe

    monkeypatch.setattr(sonicmoe, "is_sonicmoe_loadable", lambda raise_error=False: True)
    model = nn.Sequential(make_layer(gated=True, activation="silu"), make_layer())
    with pytest.raises(ValueError, match=r"experts of 1 have gated=False .* pass another name"):
        ecomoe.set_experts_implementation(model, "sonicmoe")
    assert model[0].experts.delegate is None


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "gpt2", ecomoe.EcoMoE(8, num_classes=3)])
def test_a_model_without_feed_forward_experts(model):
    with pytest.raises(ValueError, match="holds no EcoMoE layer with feed-forward experts"):
        ecomoe.set_experts_implementation(model, "grouped_mm")
