"""What is read from the experiments' results: statistics, fits, and the rules of verdicts."""

import math

import pytest
import torch

from ecomoe import EcoMoE
from examples.experiments.analysis import (
    auc,
    bootstrap_auc,
    equivalence,
    paired_not_worse,
    spread,
)
from examples.experiments.claims import CLAIMS
from examples.experiments.complexity import critical_e, fit_said, fits
from examples.experiments.figures import revival
from examples.experiments.measure import evaluate, expert_information, mutual_information


def test_what_a_living_expert_tells():
    told = torch.tensor([[1000.0, 0, 0, 0], [0, 1000, 0, 0], [500, 500, 1000, 1000]])
    expected = math.log(5000 / 1500) - 3 / 2000
    assert expert_information(told, [True, True, False]) == pytest.approx(expected)
    assert expert_information(told, [False] * 3) == 0.0
    # Rare experts tell nothing by chance: 20 tokens of 50 labels.
    drawn = torch.multinomial(torch.ones(50), 20 * 500, replacement=True).view(500, 20)
    counts = torch.zeros(500, 50).scatter_add_(1, drawn, torch.ones(500, 20))
    assert expert_information(counts, [True] * 500) < 0.2


def test_patches_of_one_image_are_not_as_many_witnesses():
    """400 images of 16 patches each, all of which go to an expert drawn without a look at them."""
    torch.manual_seed(0)
    labels_N = torch.randint(10, (400,)).repeat_interleave(16)
    experts_N = torch.randint(8, (400,)).repeat_interleave(16)
    joint_EC = torch.bincount(experts_N * 10 + labels_N, minlength=80).view(8, 10).float()
    effective_E = joint_EC.sum(1) / 16
    assert mutual_information(joint_EC)[0] > 0.05
    found = mutual_information(joint_EC, effective_E=effective_E, samples=400)[0]
    assert found < 0.04
    each = expert_information(joint_EC, [True] * 8, effective_E=effective_E)
    assert each < 0.04 < expert_information(joint_EC, [True] * 8)


def test_a_batch_without_samples_changes_no_count():
    layer = EcoMoE(8, 8, tiers=(4,))
    full = (torch.randn(6, 8), torch.arange(6) % 3)
    empty = (torch.randn(0, 8), torch.zeros(0, dtype=torch.int64))
    alone, both = (evaluate(layer, batches, labels=8) for batches in ([full], [empty, full]))
    assert alone["layers"] == both["layers"]


def test_mutual_information_of_independent_and_of_equal_variables():
    assert mutual_information(torch.ones(4, 4) * 1000)[1] < 1e-3
    assert mutual_information(torch.eye(4) * 1000)[1] > 0.99
    assert mutual_information(torch.tensor([[5.0, 5.0]])) == (0.0, 0.0)


def test_auc_and_its_interval():
    scores, outcomes = [0.1, 0.4, 0.35, 0.8], [False, False, True, True]
    assert auc(scores, outcomes) == 0.75
    assert auc([1, 1], [True, False]) == 0.5
    assert auc([1, 2], [True, True]) is None
    low, high = bootstrap_auc(scores * 10, outcomes * 10)
    assert 0.5 < low < 0.75 < high <= 1


def test_spread_and_equivalence():
    one, other = [1.00, 1.01, 0.99], [1.00, 1.02, 1.01]
    assert spread(one).mean == pytest.approx(1.0)
    assert spread([1.0]).interval is None
    assert equivalence(one, other, margin=0.1) < 0.01
    assert equivalence(one, [2.0, 2.1, 2.2], margin=0.1) > 0.9
    assert equivalence([1.0], other, margin=0.1) is None
    # Far better is not equivalent, but it is not worse either.
    assert equivalence(one, [2.0, 2.1, 2.2], margin=0.1, one_sided=True) < 0.01


def test_pairs_see_what_spread_between_seeds_hides():
    one, other = [1.0, 2.0, 3.0], [1.01, 1.99, 3.0]
    p, upper = paired_not_worse(one, other, margin=0.05)
    assert p < 0.01
    assert upper < 0.05
    assert equivalence(one, other, margin=0.05, one_sided=True) > 0.4
    # By hand: differences 0.2, 0.3, 0.4, so t = (0.3 - 0.05) / (0.1 / sqrt 3) = 4.33 at 2 degrees.
    p, upper = paired_not_worse([1.2, 1.3, 1.4], [1.0, 1.0, 1.0], margin=0.05)
    assert p == pytest.approx(0.9753, abs=1e-3)
    assert upper == pytest.approx(0.3 + 2.920 * 0.1 / math.sqrt(3), abs=1e-3)
    assert paired_not_worse([1.0], [2.0], margin=0.1) is None


class TestClaim4:
    judge = staticmethod(next(claim.judge for claim in CLAIMS if claim.label == "4"))

    def run(self, classes, num_experts, dead, e=1.0):
        layer = {"num_experts": num_experts, "dead_relative": {"top1": dead}}
        return {
            "data": {"classes": classes},
            "setting": {"name": "", "control": {"e": e}, "of": [classes, num_experts]},
            "final": {"layers": [layer]},
            "scale": "small",
            "seed": 0,
        }

    def test_sees_every_number_of_experts_by_a_relative_threshold(self):
        found = {"low-e": {"runs": [self.run(10, 16, 0), self.run(10, 16, 9, e=0.3)]}}
        found |= {"tiny-32": {"runs": [self.run(80, 32, 8), self.run(80, 16, 2)]}}
        verdict = self.judge(found)
        assert "10: 0.0 (1), 80: 3.0 (2)" in verdict.why
        assert verdict.word == "reproduced"

    def swept(self, at_low_e, at_high_e, seeds=1):
        runs = [
            self.run(classes, 16, dead, e=e) | {"seed": seed}
            for seed in range(seeds)
            for classes in (2, 80)
            for e, dead in (
                (0.1, at_low_e if classes > 2 else 0),
                (1.0, at_high_e if classes > 2 else 0),
            )
        ]
        return self.judge({"class-count": {"runs": runs}})

    @pytest.mark.parametrize(
        ("at_low_e", "at_high_e", "word"),
        [(9, 2, "qualified"), (9, 0, "qualified"), (0, 3, "out of reach"), (0, 0, "refuted")],
    )
    def test_needs_an_e_at_which_deaths_begin(self, at_low_e, at_high_e, word):
        assert self.swept(at_low_e, at_high_e).word == word

    def test_deaths_that_a_high_e_brings_refute_it_in_every_one_of_some_seeds(self):
        verdict = self.swept(0, 3, seeds=2)
        assert verdict.word == "refuted"
        assert "by seed: 0.0 and 3.0; 0.0 and 3.0" in verdict.why
        assert "at E = 0.1, 1, by classes: 2: 0.0, 0.0; 80: 0.0, 3.0." in verdict.why

    def test_compares_class_counts_at_the_same_values_of_e(self):
        runs = [self.run(2, 16, 2 * (e < 1), e=e) for e in (0.1, 1.0)] + [
            self.run(80, 16, 9, e=0.1)
        ]
        assert self.judge({"class-count": {"runs": runs}}).word == "not yet run"
        runs.append(self.run(80, 16, 9, e=1.0))
        assert self.judge({"class-count": {"runs": runs}}).word == "out of reach"
        low = [run for run in runs if run["setting"]["control"]["e"] < 1]
        assert self.judge({"class-count": {"runs": low}}).word == "not yet run"

    def test_a_critical_e_that_rises_reproduces_it(self):
        def runs(dying):
            return [
                self.run(classes, 16, 4 if e <= last else 0, e=e)
                for classes, last in dying.items()
                for e in (0.1, 0.2, 0.4, 0.8)
            ]

        rising = {"class-count": {"runs": runs({2: 0.1, 10: 0.2, 80: 0.4})}}
        assert self.judge(rising).word == "reproduced"
        falling = {"class-count": {"runs": runs({2: 0.4, 10: 0.2, 80: 0.1})}}
        assert self.judge(falling).word == "refuted"


def test_fit_of_complexity_finds_the_form_it_was_made_of():
    counts = (2, 5, 10, 40, 100)
    by_root = fits({count: 0.05 * math.sqrt(count) for count in counts})
    assert {by_root[0].name, by_root[1].name} == {"sqrt C", "a power of C"}
    assert by_root[0].error < 1e-9
    by_log = fits({count: 0.05 * math.log(count) for count in counts})
    assert by_log[0].name == "log C"
    assert by_log[0].scale == pytest.approx(0.05)


def test_critical_e_is_unknown_where_all_or_none_die():
    found = critical_e({2: {0.1: 0.0, 1.0: 0.0}, 10: {0.1: 4.0, 1.0: 2.0}})
    assert found == {2: None, 10: None}
    assert "too few" in fit_said(found)
    # One lucky run below a deadly E is no threshold.
    assert critical_e({5: {0.1: 0.0, 0.2: 3.0, 0.8: 0.0}})[5] == pytest.approx(0.4)


def test_a_revival_that_does_not_last_is_none():
    def run(*usages):
        history = [
            {"percent": 40 + 10 * index, "layers": [{"usage": [usage]}]}
            for index, usage in enumerate(usages)
        ]
        events = [{"kind": "revival", "expert": 0, "step": 60, "basis": "top1"}]
        setting = {"forced_death": (0.3, 0.5)}
        return {"setting": setting, "history": history, "events": events, "steps": 100}

    lasting = revival(run(0.0, 0.0, 0.02, 0.0, 0.02, 0.05))
    assert lasting["revived after, % of training"] == 30
    assert lasting["revival reported by the monitor"] == 1
    assert revival(run(0.0, 0.0, 0.02, 0.0))["revived after, % of training"] == float("inf")


@pytest.mark.parametrize(
    ("pure", "word"),
    [((0, 0, 1, 0), "out of reach"), ((1, 2, 2, 4), "reproduced"), ((4, 2, 2, 1), "refuted")],
)
def test_claim_1c_needs_pure_experts_for_a_trend(pure, word, monkeypatch):
    monkeypatch.setattr("examples.experiments.claims.general", lambda run: {"PURE": run["pure"]})
    runs = [
        # Two seeds a condition: of one expert in one seed no trend is read.
        {"name": f"E={index}", "pure": count if seed or count > 1 else 0}
        for index, count in enumerate(map(float, pure))
        for seed in (0, 1)
    ]
    judge = next(claim.judge for claim in CLAIMS if claim.label == "1c")
    assert judge({"phase-map": {"runs": runs}}).word == word
