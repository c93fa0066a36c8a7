"""The rules of the E paper's claims, on results made up for them."""

import pytest

from examples.experiments.claims import CLAIMS, FIRST_VERSION
from examples.experiments.verdicts import runs_of

RULES = {claim.label: claim.judge for claim in CLAIMS}


def run(name="", *, seed=0, e=0.545, dead=(0, 0), relative=None, top1=0.4, **given):
    """Return a run of one layer, dead at its end as many experts as given by basis."""
    tiers = given.pop("tiers", (8, 4, 4))
    history = given.pop("history", [(100, dead[0])])
    bases = ("top1", "topk")
    layer = {
        "num_experts": sum(tiers),
        "dead_relative": dict(zip(bases, dead if relative is None else relative, strict=True)),
        "pure": 0,
        "specialisation": 0.0,
    }
    return {
        "name": name,
        "seed": seed,
        "scale": "small",
        "setting": {
            "name": name,
            "control": {"e": e},
            "tiers": tiers,
            "warmup": 0.0,
            "rate": 1.0,
            "data": "cifar10",
        }
        | given,
        "final": {
            "dead": dict(zip(bases, dead, strict=True)),
            "layers": [layer],
            "top1": top1,
            "top2": top1,
            "loss": 1.0,
        },
        "history": [{"percent": percent, "dead": {"top1": count}} for percent, count in history],
    }


def results(**runs):
    return {
        (key := name.replace("_", "-")): {"experiment": key, "runs": found}
        for name, found in runs.items()
    }


def test_a_layer_in_other_tiers_is_the_same_network():
    tiered, flat = (run(name, tiers=tiers) for name, tiers in (("t", (8, 8)), ("f", (16,))))
    other = run("t", tiers=(8, 8), seed=1)
    assert runs_of(results(per_epoch=[tiered, flat, other]), "per-epoch") == [tiered, other]
    wide = run("t", tiers=(16, 16))
    assert runs_of(results(tiny_32=[tiered, wide]), "tiny-32") == [tiered, wide]


def test_the_guarantee_names_its_experiments_and_leaves_the_packages_defaults_out():
    shared = run("E=0.545", data="tinyimagenet", dead=(1, 0))
    found = results(
        predicts_collapse=[run("sample 8", e=1.43, dead=(12, 3)), run("sample 9", e=0.2)],
        tiny=[shared],
        tiny_high_e=[shared, run("E=1", e=1.0)],
        e_order=[run("E=0.545", strength=None, dead=(16, 16))],
    )
    verdict = RULES["1a"](found)
    assert verdict.word == "refuted"
    assert "predicts-collapse 1 of 1, tiny 1 of 1, tiny-high-e 0 of 1." in verdict.why
    assert "2 end with dead experts on top1 and 1 on topk" in verdict.why
    assert "At worst 12 of 16 (predicts-collapse, sample 8, E = 1.43)" in verdict.why
    assert RULES["1a"](results(tiny=[run()])).word == "reproduced"


@pytest.mark.parametrize(
    ("absolute", "relative", "word"),
    [((0, 0), (0, 0), "reproduced"), ((2, 0), (0, 0), "qualified"), ((2, 1), (0, 1), "refuted")],
)
def test_the_promise_counts_by_both_thresholds(absolute, relative, word):
    runs = [run("a"), run("b", tiers=(16, 8, 8), dead=absolute, relative=relative)]
    verdict = RULES["1e"](results(promise=runs))
    assert verdict.word == word
    assert "relative to the number of experts (1 % of 16, 0.5 % of 32) 0 end" in verdict.why
    if absolute[0]:
        assert "absolute 1 % 1 end with dead experts on top1 (at worst 2" in verdict.why
        assert "of 32 experts a layer" in verdict.why


class TestOrtho:
    def sweep(self, *dead):
        return [run(f"ortho={index}", dead=(count, 0)) for index, count in enumerate(dead)]

    @pytest.mark.parametrize(
        ("here", "there", "everywhere", "by_data"),
        [
            ((0, 0), (0, 0), "reproduced", "out of reach"),
            ((0, 3), (0, 0), "reproduced", "reproduced"),
            ((0, 3), (4, 8), "refuted", "refuted"),
        ],
    )
    def test_not_everywhere_is_not_by_the_data(self, here, there, everywhere, by_data):
        found = results(ortho_cifar10=self.sweep(*here), ortho_wikitext2=self.sweep(*there))
        assert RULES["6"](found).word == everywhere
        assert RULES["6b"](found).word == by_data

    def test_one_set_says_nothing_of_sets(self):
        found = results(ortho_cifar10=self.sweep(0, 3))
        assert RULES["6b"](found).word == "not yet run"

    def test_the_finding_of_the_first_version_is_the_one_of_sets(self):
        assert ("Ortho toxicity depends on the data set", "6b") in FIRST_VERSION


class TestLowE:
    def judge(self, low, high):
        return RULES["4.4"](
            results(
                low_e=[
                    run(f"E={e}", e=e, seed=seed, dead=(dead, 0), top1=share + 0.001 * seed * e)
                    for seed in range(3)
                    for e, (dead, share) in ((0.3, low), (0.545, high))
                ]
            )
        )

    @pytest.mark.parametrize(
        ("low", "high", "word"),
        [
            ((2, 0.40), (0, 0.43), "reproduced"),
            ((2, 0.40), (0, 0.40), "qualified"),
            ((0, 0.40), (0, 0.43), "qualified"),
            ((0, 0.40), (0, 0.40), "out of reach"),
            ((0, 0.40), (2, 0.43), "refuted"),
            ((2, 0.43), (0, 0.40), "refuted"),
        ],
    )
    def test_experts_and_accuracy(self, low, high, word):
        assert self.judge(low, high).word == word

    def test_its_figures(self):
        why = self.judge((2, 0.40), (0, 0.43)).why
        assert "mean DEAD top1 2.0 at E = 0.3 and 0.0 at 0.545" in why
        # Differences of 3, 3.0245 and 3.049 points: 3.0245 -+ 4.303 * 0.0245 / sqrt(3).
        assert "+3.02 [+2.96, +3.09] points" in why


class TestWarmup:
    def judge(self, with_it, without):
        return RULES["4.9"](
            results(
                no_warmup=[
                    run("warm-up", warmup=0.15, dead=(with_it[-1], 0), history=times(with_it)),
                    run("no warm-up", dead=(without[-1], 0), history=times(without)),
                ]
            )
        )

    @pytest.mark.parametrize(
        ("with_it", "without", "word"),
        [
            ((14, 3, 0), (13, 2, 0), "reproduced"),
            ((14, 3, 1), (13, 2, 0), "qualified"),
            ((14, 3, 0), (13, 9, 0), "qualified"),
            ((14, 3, 0), (13, 2, 1), "refuted"),
        ],
    )
    def test_counts_the_worst_of_both_over_the_same_evaluations(self, with_it, without, word):
        verdict = self.judge(with_it, without)
        assert verdict.word == word
        assert "(at worst 14.0, after the first 15 % 3.0)" in verdict.why
        assert f"(at worst 13.0, after the first 15 % {without[1]}.0)" in verdict.why


def times(counts):
    return list(zip((1, 50, 100), counts, strict=True))


@pytest.mark.parametrize(("flat", "word"), [(0.3, "qualified"), (0.305, "reproduced")])
def test_equal_by_construction_is_no_measurement(flat, word):
    runs = [run("4:4:4:4", top1=0.3), run("flat", top1=flat)]
    assert RULES["12"](results(flat_tiny=runs)).word == word


@pytest.mark.parametrize(("low", "word"), [(0.28, "qualified"), (0.281, "reproduced")])
def test_stability_counts_a_network_once_and_two_points_as_two(low, word):
    def steady(name, usages):
        found = run(name, tiers=(8,) * len(usages[0]))
        found["setting"]["tiers"] = (16,) if len(usages[0]) == 1 else (8, 8)
        found["history"] = [
            {"percent": 95 + index, "top1": 0.4, "layers": [{"tier_usage": usage}]}
            for index, usage in enumerate(usages)
        ]
        return found

    runs = [steady("tiered", [[0.3, 0.5], [low, 0.5]]), steady("flat", [[1.0], [1.0]])]
    verdict = RULES["13"](results(per_epoch=runs))
    assert "over the last tenth of 1 runs (1 more are the same networks" in verdict.why
    assert verdict.word == word
