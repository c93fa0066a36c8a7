import json

import pytest
import torch
from torch import nn

import ecomoe
from ecomoe.ecology.saturation import MAX_SNAPSHOTS, Choices, compare, overlap
from ecomoe.ecology.traffic import fingerprint, hashed


def run(*choices, start=0):
    memory, found = {}, []
    for step, (data, ids_MK) in enumerate(choices, start=start):
        overlaps, memory = compare(memory, {"moe": Choices(data, ids_MK)}, step=step)
        memory = json.loads(json.dumps(memory))
        found.append([(o["step"], o["overlap"]) for o in overlaps["moe"]])
    return found, memory


FIRST, HALF, OTHER = [[0, 1], [2, 300]], [[1, 5], [300, 4]], [[6, 7], [7, 6]]


def test_overlap_is_of_sets():
    assert run((1.5, FIRST), (1.5, HALF), (1.5, FIRST[:]))[0] == [
        [],
        [(0, 0.5)],
        [(0, 1.0), (1, 0.5)],
    ]


def test_other_data_are_not_compared_and_may_take_turns():
    found, _ = run((1.5, FIRST), (2.5, OTHER), (1.5, FIRST), (2.5, HALF))
    assert found == [[], [], [(0, 1.0)], [(1, 0.0)]]


def test_other_layers_sizes_are_not_compared():
    assert run((1.5, FIRST), (1.5, [[0], [2]]), (1.5, FIRST[:1]), (1.5, []))[0] == [[]] * 4


def test_rounding_of_a_fingerprint_is_no_change_of_data():
    assert run((1e6, FIRST), (1e6 * (1 + 1e-12), FIRST))[0][1] == [(0, 1.0)]


def test_memory_is_bounded_and_keeps_the_first():
    found, memory = run(*[(1.5, FIRST)] * 100)
    assert len(memory["moe"]) <= MAX_SNAPSHOTS
    assert found[-1][0] == (0, 1.0)
    assert found[-1][-1] == (98, 1.0)
    big = [list(range(8))] * 64
    _, memory = run(*[(1.5, big)] * 20)
    assert len(json.dumps(memory)) < 12_000


def test_compare_leaves_its_memory_alone():
    _, memory = run((1.5, FIRST))
    kept = repr(memory)
    compare(memory, {"moe": Choices(1.5, HALF)}, step=9)
    assert repr(memory) == kept


def test_chance_is_top_k_of_all():
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(4000, 10, generator=generator).topk(3).indices.tolist() for _ in range(2)]
    assert overlap(*drawn) == pytest.approx(0.3, abs=0.01)


def test_fingerprint_tells_data_apart():
    x = torch.randn(4, 30, 8)
    same = fingerprint({"x": x, "flag": True, "mask": None})
    assert torch.equal(same, fingerprint({"x": x.clone()}))
    for other in (x + 1e-3, x.flip(0), x[:3], torch.randn(4, 30, 8)):
        assert not torch.isclose(same, fingerprint({"x": other}), rtol=1e-9, atol=0)
    ids = torch.randint(0, 50_000, (8, 64))
    assert not torch.equal(fingerprint({"x": ids}), fingerprint({"x": ids.roll(1, 0)}))
    assert fingerprint({"x": torch.tensor([torch.nan, 1.0])}).isfinite()
    assert fingerprint({"x": "text"}) is None


def test_buckets_are_even():
    counts = hashed(torch.arange(50_257), num_buckets=64).bincount(minlength=64)
    assert counts.shape == (64,)
    assert counts.max() < 1.05 * counts.min()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.moe = ecomoe.EcoMoE(8, 16, tiers=(4, 4), top_k=2)

    def forward(self, x, attention_mask=None):
        return self.moe(x)


def evaluate(monitor, model, *batches, **inputs):
    model.eval()
    with torch.no_grad():
        for x in batches:
            model(x, **inputs)
    model.train()
    record = monitor.report("eval").to_dict()
    return record["layers"][0]["lockdown"]


def chosen(model, x):
    with torch.no_grad():
        return model.moe.router(x.reshape(-1, 8), model.moe.temperature).expert_ids_NK.tolist()


def disturb(model):
    with torch.no_grad():
        for parameter in model.moe.router.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def test_saturation_is_of_the_same_tokens_between_evaluations():
    model, x, y = Model(), torch.randn(5, 8, 8), torch.randn(5, 8, 8)
    with ecomoe.Monitor(model, view="off") as monitor:
        assert evaluate(monitor, model, x, y)["saturation"] is None
        assert evaluate(monitor, model, x, y)["saturation"] == 1.0
        before = chosen(model, x)
        disturb(model)
        monitor.step()
        found = evaluate(monitor, model, x)
        expected = overlap(before, chosen(model, x))
        assert 0 < expected < 1
        assert found["overlaps"] == [{"step": 0, "overlap": pytest.approx(expected)}] * 2
        assert found["saturation"] == pytest.approx(expected)
        assert evaluate(monitor, model, y)["saturation"] is None


def test_padding_is_not_compared():
    model, x = Model(), torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    with ecomoe.Monitor(model, view="off") as monitor:
        evaluate(monitor, model, x, attention_mask=mask)
        (snapshot,) = monitor.state_dict()["history"]["snapshots"]["moe"]
    assert snapshot["tokens"] == 4


def test_saturation_survives_resuming():
    def run(num, state=None, start=0):
        model, x = Model(), torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(3))
        with ecomoe.Monitor(model, view="off") as monitor:
            if state is not None:
                monitor.load_state_dict(json.loads(json.dumps(state)))
            for step in range(num):
                torch.manual_seed(step)
                disturb(model)
                monitor.step()
                if step >= start:
                    found = evaluate(monitor, model, x)
            return monitor.state_dict(), found

    state, _ = run(2)
    # The steps are done again from the start; the evaluations of before come from the state.
    state["step"] = 0
    resumed, found = run(4, state, start=2)
    whole, expected = run(4)
    assert len(found["overlaps"]) == 3
    assert found == expected
    assert resumed["history"]["snapshots"] == whole["history"]["snapshots"]
