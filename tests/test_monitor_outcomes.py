"""What a monitor tells of predictions: accuracy by expert, specialisation, intervals."""

import pytest
import torch
from patches import batches, make, watched
from scipy import stats
from torch import nn
from torch.nn import functional as F

import ecomoe
from ecomoe.ecology.sinks import read_records


def test_accuracy_is_that_of_the_tokens_first_choice():
    model, _ = make()
    model.eval()
    (x, y) = next(batches())
    with torch.no_grad(), ecomoe.Monitor(model) as monitor:
        outputs = model(x)
        monitor.evaluate(outputs=outputs, targets=y)
        monitor.evaluate(outputs=outputs, targets=y)  # the second time changes nothing
        routing = model.moe.router(model.embed(x).view(-1, 8), model.moe.temperature)
        report = monitor.report().to_dict()
    first_N = routing.expert_ids_NK[:, 0]
    correct_N = (outputs.argmax(-1) == y).repeat_interleave(5)
    layer = report["layers"][0]
    # The router was called once more by hand, which the tap counts but does not judge.
    assert layer["num_tokens"] == 80
    for expert in range(4):
        mine = correct_N[first_N == expert]
        assert layer["judged"][expert] == len(mine)
        expected = mine.double().mean().item() if len(mine) else None
        assert layer["accuracy"][expert] == pytest.approx(expected, rel=1e-5)
    correct = (outputs.argmax(-1) == y).double().mean().item()
    loss = F.cross_entropy(outputs, y).item()
    low, high = report["interval"]["accuracy"]
    assert low <= correct <= high
    assert report["metrics"] == {
        "accuracy": correct,
        "judged": 8,
        "loss": pytest.approx(loss),
    }


def test_experts_with_heads_are_judged_by_their_own_prediction():
    model, _ = make(num_classes=3)
    model.eval()
    (x, y) = next(batches())
    with torch.no_grad(), ecomoe.Monitor(model) as monitor:
        monitor.evaluate(outputs=model(x), targets=y)
        layer = monitor.report().to_dict()["layers"][0]
        tokens_ND = model.embed(x).view(-1, 8)
        ids_NK = model.moe.router(tokens_ND, model.moe.temperature).expert_ids_NK
        own_NEF = model.moe.experts.all_outputs(tokens_ND)
    first_N = ids_NK[:, 0]
    right_N = own_NEF[torch.arange(40), first_N].argmax(-1) == y.repeat_interleave(5)
    for expert in range(4):
        mine = right_N[first_N == expert]
        expected = mine.double().mean().item() if len(mine) else None
        assert layer["accuracy"][expert] == pytest.approx(expected, rel=1e-5)


def test_tokens_that_fit_no_prediction_get_no_accuracy():
    model, _ = make()
    model.eval()
    monitor = ecomoe.Monitor(model)
    model(torch.randn(3, 5, 6))
    with pytest.warns(
        UserWarning, match=r"7 predictions do not fit .* call evaluate after each.*shift=True"
    ):
        monitor.evaluate(outputs=torch.randn(7, 3), targets=torch.zeros(7).long())
    assert monitor.report().to_dict()["layers"][0]["accuracy"] is None
    monitor.close()


@pytest.mark.parametrize("num", [4, 24, 40])
def test_outputs_of_another_pass_are_not_counted_by_expert(num):
    model, _ = make()
    model.eval()
    with torch.no_grad(), ecomoe.Monitor(model) as monitor:
        for x, _ in batches(5):
            model(x)  # eight samples of five tokens
        with pytest.warns(UserWarning, match=f"{num} predictions do not fit"):
            monitor.evaluate(outputs=torch.randn(num, 3), targets=torch.zeros(num).long())
        report = monitor.report().to_dict()
    assert report["layers"][0]["accuracy"] is None
    assert report["metrics"]["judged"] == num


def test_nan_predictions_are_judged_wrong(tmp_path):
    model, _ = make()
    model.eval()
    log = tmp_path / "run.jsonl"
    with torch.no_grad(), ecomoe.Monitor(model, log=log) as monitor:
        model(torch.randn(4, 5, 6))
        monitor.evaluate(
            outputs=torch.full((4, 3), float("nan")), targets=torch.tensor([0, 0, -1, 255])
        )
        report = monitor.report().to_dict()
    assert report["metrics"] == {"accuracy": 0, "loss": None, "judged": 2}
    assert report["interval"] == {"accuracy": [0, 0.658]}
    (record,) = read_records(log)
    assert record["metrics"]["loss"] is None


def test_classification_tells_specialisation_and_effective_e():
    model, _ = make()
    model.eval()
    (x, y) = next(batches())
    with torch.no_grad(), ecomoe.Monitor(model) as monitor:
        monitor.evaluate(outputs=model(x), targets=y)
        report = monitor.report().to_dict()
    assert 0 <= report["layers"][0]["specialisation"] <= 1
    assert report["control"]["e_eff"] == pytest.approx(model.moe.control.effective_e(3), rel=1e-5)


class LanguageModel(nn.Module):
    """Each token's vector is that of its id alone, so that the router knows the id."""

    def __init__(self, num_ids=6):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(num_ids, 8)
        self.moe = ecomoe.EcoMoE(8, 16, tiers=(2, 2))
        self.head = nn.Linear(8, num_ids)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.moe(self.embed(input_ids)))


def specialised(token_buckets=64, **given):
    model = LanguageModel().eval()
    ids = torch.randint(6, (20, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), ecomoe.Monitor(model, token_buckets=token_buckets) as monitor:
        outputs = model(ids)
        monitor.evaluate(outputs=outputs, targets=ids, **given)
        first = model.moe.router(model.embed(ids).view(-1, 8), model.moe.temperature)
        (layer,) = monitor.report().to_dict()["layers"]
    return layer, ids, first.expert_ids_NK[:, 0].view(ids.shape)


def entropy(values):
    return stats.entropy(values.reshape(-1).bincount().numpy())


def test_specialisation_by_token():
    layer, ids, first = specialised()
    # The id decides the expert, so what they share is all that the expert tells.
    expected = (entropy(first) / entropy(ids)) ** 0.5
    assert layer["specialisation_by"]["token"] == pytest.approx(expected, rel=1e-5)
    assert layer["specialisation_by"]["class"] == layer["specialisation"]
    assert layer["specialisation_by"]["domain"] is None
    assert specialised(token_buckets=0)[0]["specialisation_by"]["token"] is None


def test_specialisation_by_domain():
    _, _, first = specialised()
    layer, _, _ = specialised(domains=first.int())
    assert layer["specialisation_by"]["domain"] == pytest.approx(1)
    layer, _, _ = specialised(domains=torch.arange(20) % 2)
    assert 0 < layer["specialisation_by"]["domain"] < 0.01
    layer, _, _ = specialised(domains=first + 1000)  # of no domain that there is room for
    assert layer["specialisation_by"]["domain"] is None


def test_labels_are_forgotten_with_their_evaluation():
    model = LanguageModel().eval()
    with torch.no_grad(), ecomoe.Monitor(model, token_buckets=8) as monitor:
        for domains in (torch.arange(4) % 2, None):
            ids = torch.randint(6, (4, 9))
            monitor.evaluate(outputs=model(ids), targets=ids, domains=domains)
            (layer,) = monitor.report().to_dict()["layers"]
            assert (layer["specialisation_by"]["domain"] is None) == (domains is None)
            assert layer["specialisation_by"]["token"] > 0.5


def test_each_share_has_its_interval():
    _, monitor = watched(every=2)
    record = monitor.report("eval").to_dict()
    layer = record["layers"][0]
    low, high = record["interval"]["accuracy"]
    assert low <= record["metrics"]["accuracy"] <= high
    for holder in (layer, layer["tier"]):
        for basis in ("top1", "topk"):
            for share, bounds in zip(
                holder["usage"][basis], holder["interval"][basis], strict=True
            ):
                assert bounds[0] <= share <= bounds[1]
        for share, bounds in zip(holder["accuracy"], holder["interval"]["accuracy"], strict=True):
            assert (share is None) == (bounds is None)
            assert share is None or bounds[0] <= share <= bounds[1]
    low, high = layer["lockdown"]["interval"]
    assert low <= layer["lockdown"]["flip_rate"] <= high
