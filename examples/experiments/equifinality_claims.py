"""The equifinality paper's claims and the rules that decide them. Pure functions on the JSON."""

from __future__ import annotations

from typing import Any

from ecomoe.ecology.seeds import compare_conditions
from examples.experiments.equifinality_figures import (
    MARGIN,
    depth_tests,
    groups,
    halting_cost,
    last_gain,
    margin_of,
    mean,
    tested,
)
from examples.experiments.measure import Record
from examples.experiments.records import SMOKE
from examples.experiments.topologies import DEEP, FIVE, WIDE
from examples.experiments.verdicts import Verdict

GRACEFUL = 0.065  # 2.2 of the paper's 34
NEGLIGIBLE = 0.01  # of the perplexity, for halting


def verdicts(content: Record) -> list[tuple[str, Verdict]]:
    """Return the paper's claims with what the numbers say of them.

    None with less than two seeds, and none of runs that are too short to say anything.
    """
    if content["seeds"] < 2 or content["equifinality"] == SMOKE:
        return []
    depth = ("The advantage of depth is one of underfitting", _depth(content))
    if not set(FIVE) <= groups(content).keys():
        return [depth]
    found = compare_conditions(tested(content), margin=margin_of(content))
    pairs = {frozenset(pair["conditions"]): pair for pair in found["pairs"]}
    means = found["means"]
    of_quality = {
        "Five cosine topologies are equivalent": _equifinal(pairs),
        "A linear router is better, and iso-parameter cosine closes most of it": _gap(pairs, means),
        "Hash, random-fixed and top-1 degrade gracefully (3 to 6.5 %)": _graceful(pairs, means),
        "A learned scalar replaces several hops": _scalar(pairs),
        "MoE beats dense at equal FLOPs, not at equal parameters": _dense(pairs, means),
    }
    gain = max(last_gain(run) for run in content["runs"])
    return [
        *((claim, _of_trained(verdict, gain)) for claim, verdict in of_quality.items()),
        depth,
        ("Updates of hops are collinear (0.805)", _collinear(content)),
        ("Halting saves 25 % of MoE FLOPs at +0.12 % PPL", _halting(content)),
        ("Experts' roles overlap across seeds, their weights do not", _roles(content)),
    ]


def _of_trained(verdict: Verdict, gain: float) -> Verdict:
    """Take a comparison of models that still learn for what it is."""
    if gain <= MARGIN or verdict.word == "out of reach":
        return verdict
    word = "out of reach" if verdict.word == "refuted" else "qualified"
    return Verdict(
        word,
        f"{verdict.why} So far: the last two fifths of the training bring up to {gain:.1%} of "
        "perplexity, which is no convergence.",
    )


def _word(pair: Record) -> str:
    word = "equivalent" if pair["equivalent"] else "undecided"
    return "different" if pair["different"] else word


def _equifinal(pairs: Any) -> Verdict:
    five = [pair for names, pair in pairs.items() if names <= set(FIVE)]
    words = [_word(pair) for pair in five]
    widest = max(abs(pair["difference"]) for pair in five)
    power = min(pair["power"] for pair in five)
    why = (
        f"{words.count('equivalent')} of {len(five)} pairs equivalent, {words.count('different')} "
        f"different, {words.count('undecided')} undecided; largest difference {widest:.2f} PPL, "
        f"least power {power:.0%}."
    )
    if words.count("equivalent") == len(five):
        return Verdict("reproduced", why)
    return Verdict("refuted" if "different" in words else "out of reach", why)


def _gap(pairs: Any, means: dict[str, float]) -> Verdict:
    linear, iso, cosine = means["linear 1x12"], means["cosine iso 1x12"], means[WIDE]
    low, high = _toward(pairs, WIDE, "linear 1x12")
    why = f"linear {linear:.2f}, iso-parameter cosine {iso:.2f}, cosine {cosine:.2f}; "
    if low <= 0 <= high:
        return Verdict("out of reach", why + "linear and cosine are not told apart by these seeds.")
    if linear > cosine:
        return Verdict("refuted", why + "linear is worse.")
    closed = (cosine - iso) / (cosine - linear)
    why += f"{closed:.0%} of the gap closed (the paper: 67 %)."
    return Verdict("reproduced" if closed > 0.5 else "qualified" if closed > 0 else "refuted", why)


def _toward(pairs: Any, first: str, second: str) -> tuple[float, float]:
    """Return the 90 % interval of the first's perplexity minus the second's."""
    pair = pairs[frozenset((first, second))]
    low, high = pair["interval"]
    return (low, high) if pair["conditions"] == [first, second] else (-high, -low)


def _graceful(pairs: Any, means: dict[str, float]) -> Verdict:
    """Each must be no better than cosine 1x12, or it degrades not at all, and little worse."""
    bound = GRACEFUL * means[WIDE]
    parts, words = [], {}
    for name in ("hash 1x12", "random 1x12", "top-1"):
        low, high = _toward(pairs, name, WIDE)
        if high < 0:
            words[name] = "better"
        elif low > bound:
            words[name] = "worse by more"
        elif high < bound:
            words[name] = "worse by less" if low > 0 else "at most so much worse"
        else:
            words[name] = "worse, by how much is open" if low > 0 else "open"
        cost, least, most = (
            100 * value / means[WIDE] for value in (means[name] - means[WIDE], low, high)
        )
        parts.append(f"{name} {cost:+.1f}% ({least:+.1f} to {most:+.1f}): {words[name]}")
    why = (
        f"to cosine 1x12, with 90 % intervals, by the bound of {100 * GRACEFUL:.1f} %: "
        f"{'; '.join(parts)}."
    )
    if any(word in ("better", "worse by more") for word in words.values()):
        return Verdict("refuted", why)
    unsure = [name for name, word in words.items() if "open" in word]
    if unsure:
        return Verdict("out of reach", f"{why} For {', '.join(unsure)} they leave it open.")
    return Verdict("reproduced", why)


def _collinear(content: Record) -> Verdict:
    runs = groups(content)[DEEP]
    values = [run["hops"]["collinearity"] for run in runs]
    why = f"cosine of the first two updates of 3x4: {', '.join(f'{v:.2f}' for v in values)}."
    return Verdict("reproduced" if min(values) > 0.5 else "refuted", why)


def _scalar(pairs: Any) -> Verdict:
    pair = pairs[frozenset(("1x12, learned scalar", DEEP))]
    low, high = _toward(pairs, "1x12, learned scalar", DEEP)
    why = f"1x12 with a scalar minus 3x4: {low:+.2f} to {high:+.2f} PPL ({_word(pair)})."
    if pair["equivalent"] or (pair["different"] and high < 0):
        return Verdict("reproduced", why)
    return Verdict("refuted" if pair["different"] else "out of reach", why)


def _halting(content: Record) -> Verdict:
    mlp, static = (groups(content).get(name, []) for name in (DEEP, "static 3x4"))
    costs = [halting_cost(run) for run in mlp]
    saved = mean([run["halting"]["at_goal"]["saved"] for run in mlp])
    why = f"{saved:.1%} saved for {', '.join(f'{cost:+.2%}' for cost in costs)} PPL"
    if static:
        why += f"; static experts {mean([halting_cost(run) for run in static]):+.2%}"
    return Verdict("reproduced" if max(costs) < NEGLIGIBLE else "refuted", why + ".")


def _depth(content: Record) -> Verdict:
    """Deep must be ahead for a while and no longer at the end, and the end must be one.

    Where it never is ahead there is no advantage whose nature could be asked about.
    """
    tests = depth_tests(content)
    why = "; ".join(
        f"{label} {found[0][1].difference:+.3f} nats at {found[0][0]:.0f} % of the training, "
        f"{found[-1][1].difference:+.3f} at its end"
        for label, found in tests.items()
    )
    *before, end = (test for _, test in tests["MLP experts"])
    ahead = sum(test.interval[0] > 0 for test in before)
    gains = [last_gain(run) for name in (WIDE, DEEP) for run in groups(content)[name]]
    behind = sum(test.interval[1] < 0 for test in before)
    at_end = "ahead" if end.interval[0] > 0 else "behind" if end.interval[1] < 0 else "level"
    why = (
        f"wide minus deep: {why}. With MLP experts deep is ahead at {ahead} and behind at {behind} "
        f"of {len(before)} evaluations before the end, and {at_end} there. The last two fifths "
        f"bring up to {max(gains):.1%} of perplexity"
    )
    converged = max(gains) <= MARGIN
    why += "." if converged else ", which is no convergence."
    if not ahead:
        absent = f"{why} No advantage of depth appears, whatever it would be due to."
        whole = content["equifinality"] == "paper" and converged
        return Verdict("refuted" if whole else "out of reach", absent)
    if not converged:
        return Verdict("out of reach", why)
    return Verdict("refuted" if end.interval[0] > 0 else "reproduced", why)


def _dense(pairs: Any, means: dict[str, float]) -> Verdict:
    flops = _toward(pairs, "dense, same FLOPs", WIDE)
    parameters = _toward(pairs, "dense, same parameters", WIDE)
    why = (
        f"minus cosine 1x12: same FLOPs {flops[0]:+.2f} to {flops[1]:+.2f} PPL, same parameters "
        f"{parameters[0]:+.2f} to {parameters[1]:+.2f}."
    )
    if flops[0] > 0 and parameters[1] < 0:
        return Verdict("reproduced", why)
    return Verdict("refuted" if flops[1] < 0 or parameters[0] > 0 else "out of reach", why)


def _roles(content: Record) -> Verdict:
    found = content["alignment"][WIDE]
    ratio = found["jaccard"] / found["jaccard_chance"]
    why = (
        f"best-match Jaccard {found['jaccard']:.3f}, {ratio:.1f} times chance; W_up cosine "
        f"{found['cosine']:.3f}, by chance {found['cosine_chance']:.3f} (cosine 1x12)."
    )
    overlap, alike = ratio > 1.5, found["cosine"] > 1.5 * found["cosine_chance"]
    return Verdict("reproduced" if overlap and not alike else "refuted", why)
