"""Conditions of several seeds: TOST against scipy and simulation, and the command."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from ecomoe.cli import main
from ecomoe.ecology.seeds import compare_conditions, mean_equivalence

FIRST, SECOND = [33.9, 34.1, 34.0], [34.3, 34.6, 34.5]


class TestOnePair:
    @pytest.mark.parametrize("margin", [0.3, 0.6, 1.0])
    def test_it_is_two_welch_tests(self, margin):
        tested = mean_equivalence(FIRST, SECOND, margin=margin)
        above = stats.ttest_ind(
            np.add(FIRST, margin), SECOND, equal_var=False, alternative="greater"
        )
        below = stats.ttest_ind(
            np.subtract(FIRST, margin), SECOND, equal_var=False, alternative="less"
        )
        assert tested.p == pytest.approx(max(above.pvalue, below.pvalue))
        interval = stats.ttest_ind(FIRST, SECOND, equal_var=False).confidence_interval(0.90)
        assert tested.interval == pytest.approx(tuple(interval))
        inside = -margin < interval.low and interval.high < margin
        assert tested.equivalent == inside

    def test_order_turns_the_sign_alone(self):
        one = mean_equivalence(FIRST, SECOND, margin=1.0)
        other = mean_equivalence(SECOND, FIRST, margin=1.0)
        assert other.difference == pytest.approx(-one.difference)
        assert other.p == pytest.approx(one.p)
        assert other.power == pytest.approx(one.power)

    @pytest.mark.parametrize("margin", [1.0, 1.5, 2.5])
    @pytest.mark.parametrize("seeds", [3, 5])
    def test_power_is_the_chance_to_find_equivalence(self, margin, seeds):
        """At a true difference of 0 and a known spread; both sides spread alike."""
        values = np.array([-1.0, 0.0, 1.0] if seeds == 3 else [-1.2, -0.6, 0.0, 0.6, 1.2])
        values /= values.std(ddof=1)
        claimed = mean_equivalence(list(values), list(values), margin=margin).power
        draws = np.random.default_rng(0).normal(size=(20_000, 2, seeds))
        means, variances = draws.mean(-1), draws.var(-1, ddof=1) / seeds
        error = np.sqrt(variances.sum(-1))
        freedom = variances.sum(-1) ** 2 / (variances**2 / (seeds - 1)).sum(-1)
        reach = stats.t.ppf(0.95, freedom) * error
        found = (abs(means[:, 0] - means[:, 1]) + reach < margin).mean()
        # Welch's freedom varies from draw to draw and is below 2 (n - 1): a little less is found.
        assert found == pytest.approx(claimed, abs=0.12)

    def test_false_claims_are_as_rare_as_alpha_says(self):
        rng = np.random.default_rng(0)
        claims = 0
        for _ in range(1500):
            one, other = rng.normal(size=5), rng.normal(loc=2.0, size=5)
            claims += mean_equivalence(list(one), list(other), margin=2.0).equivalent
        assert claims / 1500 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1500)

    def test_far_apart_is_different_and_in_between_is_neither(self):
        far = mean_equivalence(FIRST, [40.0, 40.1, 40.2], margin=1.0)
        assert far.different
        assert not far.equivalent
        vague = mean_equivalence([30.0, 38.0], [31.0, 36.0], margin=1.0)
        assert not vague.different
        assert not vague.equivalent
        assert vague.power < 0.2

    def test_no_spread_at_all(self):
        same = mean_equivalence([1.0, 1.0], [1.5, 1.5], margin=1.0)
        assert (same.equivalent, same.p) == (True, 0.0)
        other = mean_equivalence([1.0, 1.0], [3.0, 3.0], margin=1.0)
        assert (other.equivalent, other.different) == (False, True)

    @pytest.mark.parametrize("value", [0.1, 3.3])
    @pytest.mark.parametrize("away", [0.0, 1e-12, 1e-90])
    def test_next_to_no_spread(self, value, away):
        """Whose sums round, and whose reach is beyond what scipy's noncentral t can tell."""
        tested = mean_equivalence([value] * 2 + [value + away], [value] * 3, margin=0.1)
        assert (tested.equivalent, tested.different, tested.power) == (True, False, 1.0)
        small = mean_equivalence([away, 2 * away], [away, 3 * away], margin=0.1)
        assert (small.equivalent, small.power) == (True, 1.0)

    def test_values_of_numpy_give_plain_numbers(self):
        tested = mean_equivalence(np.array(FIRST), np.array(SECOND), margin=1.0)
        assert tested == mean_equivalence(FIRST, SECOND, margin=1.0)
        assert type(tested.difference) is float
        assert type(tested.different) is bool

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"first": [1.0, None]}, "must be finite values of two seeds"),
            ({"first": [1.0, "2"]}, "must be finite values of two seeds"),
            ({"first": 1.0}, "first=1.0 must be finite values of two seeds"),
            ({"margin": "0.1"}, "margin='0.1' must be a finite number"),
            ({"margin": math.inf}, "margin=inf must be a finite number"),
            ({"alpha": "0.1"}, "alpha='0.1' must be in"),
            ({"alpha": None}, "alpha=None must be in"),
            ({"first": [1.0]}, "must be finite values of two seeds"),
            ({"second": [1.0, math.nan]}, "must be finite values of two seeds"),
            ({"margin": 0.0}, "margin=0.0 must be > 0"),
            ({"alpha": 0.5}, "alpha=0.5 must be in"),
        ],
    )
    def test_wrong_arguments(self, change, message):
        arguments = {"first": FIRST, "second": SECOND, "margin": 1.0} | change
        with pytest.raises(ValueError, match=message):
            mean_equivalence(arguments.pop("first"), arguments.pop("second"), **arguments)


def test_all_pairs():
    found = compare_conditions({"a": FIRST, "b": SECOND, "c": [40.0, 40.1]}, margin=1.0)
    assert [pair["conditions"] for pair in found["pairs"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert found["equivalent"] == 1
    assert found["seeds"] == {"a": 3, "b": 3, "c": 2}
    with pytest.raises(ValueError, match="1 condition to compare"):
        compare_conditions({"a": FIRST}, margin=1.0)


@pytest.mark.parametrize("conditions", [[FIRST, SECOND], [], "ab", None])
def test_conditions_without_names_are_refused(conditions):
    with pytest.raises(ValueError, match=r"conditions=.* must map each condition's name.* pass"):
        compare_conditions(conditions, margin=1.0)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    import torch

    import ecomoe

    folder = tmp_path_factory.mktemp("logs")
    for index in range(4):
        torch.manual_seed(index)
        layer = ecomoe.EcoMoE(4, num_classes=3, tiers=(2,)).eval()
        with ecomoe.Monitor(layer, log=folder / f"{index}.jsonl", view="off") as monitor:
            x, targets = torch.randn(50, 4), torch.randint(3, (50,))
            monitor.evaluate(outputs=layer(x), targets=targets)
            monitor.report("eval")
    return folder


def test_the_command_groups_runs_by_condition(logs, capsys):
    runs = [f"{'ab'[index // 2]}={logs / f'{index}.jsonl'}" for index in range(4)]
    settings = ["--seeds", "--metric", "loss", "--margin", "5"]
    assert main(["compare", *settings, *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seeds"] == {"a": 2, "b": 2}
    assert found["pairs"][0]["conditions"] == ["a", "b"]
    assert main(["compare", *settings, *runs]) == 0
    said = capsys.readouterr().out
    assert "a: loss" in said
    assert "power" in said


def test_the_command_says_what_is_wrong(logs, capsys):
    assert main(["compare", "--seeds", str(logs / "0.jsonl"), f"b={logs / '1.jsonl'}"]) == 1
    assert "must be CONDITION=FILE with --seeds" in capsys.readouterr().err
    assert main(["compare", "--seeds", f"a={logs / '0.jsonl'}", f"b={logs / '1.jsonl'}"]) == 1
    said = capsys.readouterr().err
    assert "a=[" in said  # the condition's own name
    assert "two seeds or more" in said
