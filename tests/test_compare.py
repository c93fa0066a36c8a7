import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from ecomoe.ecology.compare import compare, distance, equivalence, summarise

# Table 15: accuracy and tier usage of three seeds, on 10,000 test samples.
SEEDS = {
    "A": (0.4768, [0.451, 0.182, 0.091, 0.276]),
    "B": (0.4786, [0.164, 0.162, 0.213, 0.461]),
    "C": (0.4700, [0.326, 0.347, 0.128, 0.199]),
}
SHARE = st.floats(0.01, 0.99)


def records(
    accuracy,
    usage,
    *,
    judged=10_000,
    phase="eval",
    dead=(0,),
    events=(),
    name="moe",
    num_experts=16,
):
    return [
        {
            "step": step,
            "phase": phase,
            "metrics": {"accuracy": accuracy, "loss": 1.0, "judged": judged},
            "num_experts": num_experts,
            "dead": {"top1": number, "topk": 0},
            "events": list(events),
            "layers": [
                {
                    "name": name,
                    "num_experts": num_experts,
                    "top_k": 2,
                    "tier": {"usage": {"top1": usage}},
                }
            ],
        }
        for step, number in enumerate(dead)
    ]


def test_seeds_of_the_paper_are_multi_stable():
    runs = {name: records(*values) for name, values in SEEDS.items()}
    found = compare(runs, margin=0.025)
    assert [pair["verdict"] for pair in found["pairs"]] == ["multi-stable"] * 3
    assert [pair["runs"] for pair in found["pairs"]] == [["A", "B"], ["A", "C"], ["B", "C"]]


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        ((0.48, [0.45, 0.18, 0.09, 0.28]), "same"),
        ((0.60, [0.45, 0.18, 0.09, 0.28]), "different accuracy"),
        ((0.49, [0.1, 0.1, 0.4, 0.4]), "undecided"),
        ((None, [0.1, 0.1, 0.4, 0.4]), "undecided"),
        ((0.4768, [0.5, 0.5]), "undecided"),
    ],
)
def test_verdicts(second, verdict):
    (pair,) = compare({"a": records(*SEEDS["A"]), "b": records(*second)}, margin=0.02)["pairs"]
    assert pair["verdict"] == verdict


@pytest.mark.parametrize(
    ("options", "unlike", "verdict"),
    [
        ({}, [], "same"),
        ({"judged": 5000}, ["number of judged predictions: 10000 and 5000"], "unlike tasks"),
        ({"phase": "train"}, ["kind of traffic: eval and train"], "unlike tasks"),
        ({"num_experts": 32}, ["experts of layers: moe 16 and moe 32"], "same"),
        (
            {"name": "ffn"},
            [
                "experts of layers: moe 16, ffn - and moe -, ffn 16",
                "top_k of layers: moe 2, ffn - and moe -, ffn 2",
            ],
            "undecided",
        ),
        ({"dead": (0, 0)}, ["steps: 0 and 1"], "same"),
    ],
)
def test_what_is_unlike_is_told(options, unlike, verdict):
    runs = {"a": records(*SEEDS["A"]), "b": records(*SEEDS["A"], **options)}
    (pair,) = compare(runs, margin=0.02)["pairs"]
    assert pair["unlike"] == unlike
    assert pair["verdict"] == verdict
    assert (pair["accuracy"] is None) == (verdict == "unlike tasks")


@settings(max_examples=200)
@given(SHARE, SHARE, st.integers(50, 10_000), st.integers(50, 10_000), st.floats(0.005, 0.3))
def test_equivalence_is_two_one_sided_tests(first, second, num_first, num_second, margin):
    found = equivalence(first, second, num_first=num_first, num_second=num_second, margin=margin)
    error = (found.interval[1] - found.difference) / stats.norm.ppf(0.95)
    lower = stats.norm.sf((first - second + margin) / error)
    upper = stats.norm.cdf((first - second - margin) / error)
    assert found.p == pytest.approx(max(lower, upper), abs=1e-9)
    plain = math.sqrt(first * (1 - first) / num_first + second * (1 - second) / num_second)
    assert error == pytest.approx(plain, rel=1.0)
    assume(abs(found.p - 0.05) > 1e-9)
    inside = -margin < found.interval[0] and found.interval[1] < margin
    assert found.equivalent == inside
    assert not (found.equivalent and found.different)


@settings(max_examples=200)
@given(SHARE, SHARE)
def test_equivalence_is_symmetric(first, second):
    one = equivalence(first, second, num_first=500, num_second=700)
    other = equivalence(second, first, num_first=700, num_second=500)
    assert one.p == pytest.approx(other.p)
    assert one.difference == -other.difference


def test_few_samples_never_show_equality():
    assert not equivalence(0.5, 0.5, num_first=20, num_second=20, margin=0.05).equivalent


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=2, max_size=6))
def test_distance_is_a_metric(pairs):
    sums = [sum(column) for column in zip(*pairs, strict=True)]
    assume(all(sums))
    first, second = (
        [n / s for n in c] for c, s in zip(zip(*pairs, strict=True), sums, strict=True)
    )
    assert distance(first, first) == 0
    assert 0 <= distance(first, second) == distance(second, first) <= 1 + 1e-12


def test_summary_takes_the_peak_and_the_revivals():
    revival = {"kind": "revival", "basis": "top1"}
    found = summarise(records(0.5, [1.0], dead=(4, 12, 8), events=[revival]))
    assert (found["dead_peak"], found["revivals"], found["dead"]["top1"]) == (12, 3, 8)
    mixed = records(0.1, [1.0], phase="train", dead=(9,)) + records(0.5, [1.0])
    assert summarise(mixed)["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": 1.2}, "first=1.2 must be a share"),
        ({"num_second": 0}, "num_second=0 must be > 0"),
        ({"first": "0.5"}, "first='0.5' must be a share"),
        ({"num_first": None}, "num_first=None must be a finite number"),
        ({"num_first": float("inf")}, "num_first=inf must be a finite number"),
        ({"margin": 0}, "margin=0 must be > 0"),
        ({"margin": "1"}, "margin='1' must be a finite number"),
        ({"alpha": "0.1"}, "alpha='0.1' must be in"),
        ({"alpha": 0.5}, "alpha=0.5 must be in"),
    ],
)
def test_wrong_arguments(arguments, message):
    given_ = {"first": 0.5, "second": 0.5, "num_first": 10, "num_second": 10} | arguments
    with pytest.raises(ValueError, match=message):
        equivalence(given_.pop("first"), given_.pop("second"), **given_)


def test_a_tiny_alpha_asks_for_a_wide_interval():
    low, high = equivalence(0.5, 0.5, num_first=100, num_second=100, alpha=1e-20).interval
    assert -1.0 < low < -0.5
    assert high == -low


def test_wrong_runs():
    with pytest.raises(ValueError, match="1 run to compare; give at least two"):
        compare({"a": records(*SEEDS["A"])})
    with pytest.raises(ValueError, match="the run has no records"):
        compare({"a": [], "b": []})
    with pytest.raises(ValueError, match="compare runs of the same architecture"):
        distance([1.0], [0.5, 0.5])
