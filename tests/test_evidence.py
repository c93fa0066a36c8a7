"""The page of evidence: it is what its command writes, and says how it is to be read."""

from pathlib import Path

from examples.experiments.__main__ import COMMITTED
from examples.experiments.claims import Claim
from examples.experiments.evidence import _counts, _verdict, evidence, write_evidence
from examples.experiments.verdicts import Verdict
from tests.test_claims import run

PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"


def test_the_page_is_what_the_committed_results_say(tmp_path):
    written = write_evidence(COMMITTED, tmp_path / "evidence.md").read_text()
    assert written == PAGE.read_text(), "run `python -m examples.experiments evidence`"


def content(name, runs, seeds=1):
    return {"experiment": name, "scale": "small", "seeds": seeds, "runs": runs}


def test_one_seed_is_said_of_the_experiments_that_the_rule_saw():
    claim = Claim("0", "", ("tiny", "low-e"), lambda found: Verdict("reproduced", "So."), ("e",))
    two, one = ([run(seed=seed) for seed in range(count)] for count in (2, 1))
    found = {name: content(name, two) for name in ("tiny", "low-e")}
    assert _verdict(claim, found).why == "So."
    assert _verdict(claim, found | {"low-e": content("low-e", one)}).why == "So. One seed: `low-e`."
    only = _verdict(claim, {"low-e": content("low-e", one), "e": content("e", two)}).why
    assert only == "So. One seed. Not yet run: `tiny`."
    # What is taken instead is taken only where nothing better is there.
    instead = _verdict(claim, {"e": content("e", two)}).why
    assert instead == "So. Not yet run: `tiny`, `low-e`."
    assert _verdict(claim, {}).word == "not yet run"


def test_missing_seeds_and_equal_rows_are_said():
    runs = [run("a"), run("b"), run("c"), run("a", seed=1), run("b", seed=1)]
    for index, found in enumerate(runs):
        found["history"] = [{"percent": 100, "loss": float(found["name"] == "c") + index // 3}]
    first, second = _counts(content("tiny", runs, seeds=2))
    assert first.endswith("asks for 2 seeds of each condition; so far there are only 1 of `c`.")
    assert second.startswith("`b` is `a` again, seed by seed")
    assert "these are 2 networks" in second
    assert _counts(content("tiny", runs[:3])) == [second.replace("2 networks", "1 networks")]


def test_no_seconds_on_a_page_of_a_machine_with_other_work():
    runs = [
        {"task": "text", "policy": policy, "seed": seed, "loss": loss + 0.001 * seed**2 * loss,
         "top1": 0.4, "dead": {"top1": 0, "topk": 0}, "seconds": 12345}
        for policy, loss in (("ecomoe", 1.002), ("switch", 1.0))
        for seed in range(3)
    ]  # fmt: skip
    page = evidence([], [{"command": "x", "images": "i", "text": "t", "runs": runs}])
    assert "12345" not in page
    assert "Policies: `ecomoe`, the package's defaults; `switch`, a linear router" in page
    assert "Tasks: `text`, a small byte-level GPT" in page
    assert "less than 1 %, if at all, on 1 of 1 tasks: text +0.2 % against switch (worse;" in page
