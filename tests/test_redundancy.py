import copy
import itertools

import pytest
import torch
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import ecomoe
from ecomoe.ecology import redundancy
from ecomoe.ecology.redundancy import similarity_counts


def drawn(num_tokens, num_experts, features=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts, features, generator=generator)


def everywhere(outputs_MEF):
    return torch.ones(len(outputs_MEF), dtype=torch.bool)


def measured(outputs_MEF, valid_M=None):
    valid_M = everywhere(outputs_MEF) if valid_M is None else valid_M
    sums = similarity_counts(outputs_MEF, valid_M=valid_M)
    return {name: value.item() for name, value in sums.items() if "nearest" not in name}


def hsic(first_MF, second_MF):
    """Song et al. 2012, the unbiased estimate, term by term in fp64."""
    num = len(first_MF)
    kernels = [x.double() @ x.double().T for x in (first_MF, second_MF)]
    for kernel in kernels:
        kernel.fill_diagonal_(0)
    first, second = kernels
    ones = torch.ones(num, dtype=torch.float64)
    trace = (first @ second).trace()
    sums = (ones @ first @ ones) * (ones @ second @ ones) / ((num - 1) * (num - 2))
    cross = 2 / (num - 2) * (ones @ first @ second @ ones)
    return (trace + sums - cross) / (num * (num - 3))


def mean_of_pairs(outputs_MEF, of_pair):
    experts = outputs_MEF.unbind(1)
    found = [of_pair(a, b) for a, b in itertools.combinations(experts, 2)]
    return torch.stack(found).mean().item()


def cka(a, b):
    return hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt()


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 12), st.integers(2, 5), st.integers(0, 99))
def test_measures_equal_a_loop_over_pairs(num_tokens, num_experts, seed):
    outputs_MEF = drawn(num_tokens, num_experts, seed=seed) + 3
    found = measured(outputs_MEF)
    cosine = mean_of_pairs(outputs_MEF, lambda a, b: F.cosine_similarity(a, b, dim=-1).mean())
    assert found["cosine"] / found["compared"] == pytest.approx(cosine, abs=1e-5)
    assert found["cka"] == pytest.approx(mean_of_pairs(outputs_MEF, cka), abs=2e-4)
    assert (found["compared"], found["aligned"]) == (num_tokens, 1)


def test_padding_and_broken_tokens_are_left_out():
    outputs_MEF = drawn(12, 3)
    valid_M = torch.arange(12) % 4 > 0
    broken_MEF = outputs_MEF.clone()
    broken_MEF[0] = torch.nan
    broken_MEF[1, 2, 0] = torch.inf
    valid_M[1] = True
    kept = [m for m in range(12) if m % 4 and m != 1]
    assert measured(broken_MEF, valid_M) == pytest.approx(measured(outputs_MEF[kept]), abs=1e-5)


def test_equal_experts_are_redundant_and_unrelated_ones_are_not():
    one_MF = drawn(32, 1)
    assert measured(one_MF.expand(-1, 4, -1))["cosine"] == pytest.approx(32, rel=1e-5)
    assert measured(one_MF.expand(-1, 4, -1))["cka"] == pytest.approx(1, rel=1e-5)
    many = [measured(drawn(32, 8, features=256, seed=s)) for s in range(20)]
    # The usual CKA of 32 tokens in 256 features is above 0.8 for outputs that share nothing.
    assert abs(sum(found["cka"] for found in many) / 20) < 0.01
    assert abs(sum(found["cosine"] for found in many) / 20 / 32) < 0.01


def test_cka_knows_no_axes_and_cosine_no_scale():
    outputs_MEF = drawn(16, 2)
    twin_MF, _ = torch.linalg.qr(drawn(6, 1)[:, 0])
    turned_MEF = torch.stack([outputs_MEF[:, 0], outputs_MEF[:, 0] @ twin_MF + 5], dim=1)
    assert measured(turned_MEF)["cka"] == pytest.approx(1, abs=1e-4)
    scaled_MEF = torch.stack([outputs_MEF[:, 0], 7 * outputs_MEF[:, 0]], dim=1)
    assert measured(scaled_MEF)["cosine"] == pytest.approx(16, rel=1e-5)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(5, 1), (3, 4), (0, 4)])
def test_too_little_to_compare(num_tokens, num_experts):
    found = measured(drawn(num_tokens, num_experts))
    assert (found["aligned"], found["cka"]) == (0, 0)
    assert found["compared"] == (num_tokens if num_experts > 1 else 0)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.moe = ecomoe.EcoMoE(8, 16, tiers=(3, 2), **options)

    def forward(self, x, attention_mask=None):
        return self.moe(x)


def evaluated(model, *batches, **inputs):
    model.eval()
    with torch.no_grad(), ecomoe.Monitor(model, view="off") as monitor:
        for x in batches:
            model(x, **inputs)
        return monitor.report("eval").to_dict()["layers"]


def test_record_is_of_the_first_batch_of_an_evaluation():
    model, x = Model(), torch.randn(4, 9, 8)
    (layer,) = evaluated(model, x, torch.randn(50, 8))
    rows = torch.arange(redundancy.NUM_PROBES) * 36 // redundancy.NUM_PROBES
    with torch.no_grad():
        expected = measured(model.moe.experts.all_outputs(x.view(-1, 8)[rows]))
    assert layer["redundancy"]["probes"] == expected["compared"] == redundancy.NUM_PROBES
    assert layer["redundancy"]["cosine"] == pytest.approx(expected["cosine"] / 32, rel=1e-5)
    assert layer["redundancy"]["cka"] == pytest.approx(expected["cka"], rel=1e-5)


def test_few_tokens_and_padding_count_once_and_not_at_all():
    (layer,) = evaluated(Model(), torch.randn(2, 5, 8))
    assert layer["redundancy"]["probes"] == 10
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    (layer,) = evaluated(Model(), torch.randn(2, 5, 8), attention_mask=mask)
    assert layer["redundancy"]["probes"] == 5


def test_training_has_no_redundancy_and_draws_nothing():
    model, x = Model(dropout=0.5), torch.randn(20, 8)
    with ecomoe.Monitor(model, view="off") as monitor:
        model(x)
        assert monitor.report("train").to_dict()["layers"][0]["redundancy"] is None
        model.eval()
        model.moe.experts.train()  # whose dropout would move the global generator
        before = torch.random.get_rng_state()
        twin = copy.deepcopy(model)
        model(x)
        drawn_watched = torch.random.get_rng_state()
        torch.random.set_rng_state(before)
        twin(x)
        assert torch.equal(torch.random.get_rng_state(), drawn_watched)
        assert monitor.report("eval").to_dict()["layers"][0]["redundancy"] is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_stacked_experts_of_transformers_are_compared(family):
    model = tiny_model(family).eval()
    ids = torch.randint(3, 60, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        with ecomoe.Monitor(model, view="off") as monitor:
            found = model(input_ids=ids).last_hidden_state
            layers = monitor.report("eval").to_dict()["layers"]
    assert torch.equal(found, expected)
    for layer in layers:
        assert layer["verified"]
        assert layer["redundancy"]["probes"] == 14
        assert -1 <= layer["redundancy"]["cosine"] < 0.9


@pytest.mark.filterwarnings("ignore")
def test_equal_experts_of_transformers_are_redundant():
    model = tiny_model("mixtral").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.copy_(parameter[:1].expand_as(parameter).clone())
    with torch.no_grad(), ecomoe.Monitor(model, view="off") as monitor:
        model(input_ids=torch.randint(3, 60, (2, 7)))
        layer = monitor.report("eval").to_dict()["layers"][0]
    assert layer["redundancy"]["cosine"] == pytest.approx(1, abs=1e-4)
    assert layer["redundancy"]["cka"] == pytest.approx(1, abs=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_experts_that_do_not_add_up_are_not_compared(monkeypatch):
    model = tiny_model("mixtral").eval()
    kind = type(model.layers[0].mlp.experts)
    forward = kind.forward
    # Gates that do not multiply the outputs: asked one by one the experts would say another thing.
    monkeypatch.setattr(
        kind, "forward", lambda self, x, ids, gates: forward(self, x, ids, gates**3)
    )
    with torch.no_grad(), ecomoe.Monitor(model, view="off") as monitor:
        model(input_ids=torch.randint(3, 60, (2, 7)))
        layer = monitor.report("eval").to_dict()["layers"][0]
    assert layer["redundancy"] is None
    assert layer["num_tokens"] == 14


@pytest.mark.filterwarnings("ignore")
def test_experts_that_cannot_be_asked_do_no_harm(monkeypatch):
    model = tiny_model("mixtral").eval()
    kind = type(model.layers[0].mlp.experts)
    forward = kind.forward

    def touchy(self, x, ids, gates):
        if ids.shape[1] == 1:
            raise RuntimeError("one expert a token is not my way")
        return forward(self, x, ids, gates)

    monkeypatch.setattr(kind, "forward", touchy)
    with torch.no_grad(), ecomoe.Monitor(model, view="off") as monitor:
        model(input_ids=torch.randint(3, 60, (2, 7)))
        layers = monitor.report("eval").to_dict()["layers"]
    assert [layer["redundancy"] for layer in layers] == [None] * 3
    assert all(layer["verified"] for layer in layers)


def test_names_the_experts_that_could_stand_in_for_each_other():
    layer = ecomoe.EcoMoE(8, 16, tiers=(2, 2), top_k=1, spread=1.0)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter[3] = parameter[1]
    with ecomoe.Monitor(layer, total_steps=1) as monitor:
        layer.eval()(torch.randn(64, 8))
        record = monitor.report().to_dict()["layers"][0]["redundancy"]
    assert record["nearest"][1] == 3
    assert record["nearest"][3] == 1
    assert record["nearest_cosine"][1] == pytest.approx(1.0)
    assert max(record["nearest_cosine"][0], record["nearest_cosine"][2]) < 0.9


def test_one_expert_has_no_nearest_and_many_have():
    for num_experts in (1, 300):
        layer = ecomoe.EcoMoE(8, 2, tiers=(num_experts,), top_k=1)
        x = torch.randn(64, 8)
        with ecomoe.Monitor(layer, total_steps=1) as monitor:
            layer.eval()(x)
            record = monitor.report().to_dict()["layers"][0]["redundancy"]
        if num_experts == 1:
            assert record is None
            continue
        with torch.no_grad():
            units_MEF = F.normalize(layer.experts.all_outputs(x[::2]), dim=-1)
        alike_EE = torch.einsum("mef,mgf->eg", units_MEF, units_MEF) / 32
        highest = alike_EE.fill_diagonal_(-1).max(1)
        assert record["nearest_cosine"] == pytest.approx(highest.values.tolist(), abs=1e-4)
        found = alike_EE[torch.arange(num_experts), torch.tensor(record["nearest"])]
        assert found.tolist() == pytest.approx(highest.values.tolist(), abs=1e-4)
