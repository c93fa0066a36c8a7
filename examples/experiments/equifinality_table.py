"""Tables and verdicts of the equifinality paper's experiments. Pure functions on the JSON.

A verdict follows from the numbers by the rules in `verdicts`. The margin is 3 % of the perplexity
of cosine 1x12, as the paper's 1 of about 34 is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from ecomoe.ecology.seeds import MeanEquivalence, compare_conditions, mean_equivalence
from examples.experiments.analysis import spread
from examples.experiments.claims import Verdict
from examples.experiments.measure import Record
from examples.experiments.records import SMOKE, SMOKE_SAID
from examples.experiments.topologies import DEEP, DEPTH_PAIRS, FIVE, WIDE

MARGIN = 0.03
GRACEFUL = 0.065  # 2.2 of the paper's 34
NEGLIGIBLE = 0.01  # of the perplexity, for halting
Rows = list[tuple[str, ...]]


def groups(content: Record) -> dict[str, list[Record]]:
    """Return the runs by variant, in the order in which they were run."""
    found: dict[str, list[Record]] = {}
    for run in content["runs"]:
        found.setdefault(run["name"], []).append(run)
    return found


def perplexities(content: Record) -> dict[str, list[float]]:
    """Return the perplexity of each seed, by variant."""
    return {name: [run["perplexity"] for run in runs] for name, runs in groups(content).items()}


def margin_of(content: Record, margin: float | None = None) -> float:
    """Return the margin in perplexity."""
    return MARGIN * spread(perplexities(content)[WIDE]).mean if margin is None else margin


def variant_rows(content: Record) -> Rows:
    """Return routing parameters, operations and perplexity of each variant."""
    rows = []
    base = spread(perplexities(content)[WIDE]).mean
    for name, runs in groups(content).items():
        found = spread([run["perplexity"] for run in runs])
        rows.append(
            (
                name,
                f"{runs[0]['parameters']:,}",
                f"{runs[0]['routing_parameters']:,}",
                f"{runs[0]['flops']:,}",
                f"{found.mean:.3f}" + (f" ± {found.sd:.2g}" if found.count > 1 else ""),
                f"{found.mean / base - 1:+.1%}",
                f"{sum(run['dead'] for run in runs) / len(runs):.0f}",
            )
        )
    return rows


VARIANT_HEADINGS = (
    "variant", "parameters", "routing parameters", "active FLOPs", "PPL", "to 1x12", "DEAD"
)  # fmt: skip


def pair_rows(content: Record, margin: float | None = None) -> Rows:
    """Return the equivalence test of every pair of variants."""
    margin = margin_of(content, margin)
    rows = []
    for pair in compare_conditions(_tested(content), margin=margin)["pairs"]:
        low, high = pair["interval"]
        word = "equivalent" if pair["equivalent"] else "undecided"
        rows.append(
            (
                *pair["conditions"],
                f"{pair['difference']:+.3f}",
                f"{low:+.3f} to {high:+.3f}",
                f"{pair['p']:.2g}",
                f"{pair['power']:.0%}",
                "different" if pair["different"] else word,
            )
        )
    return rows


PAIR_HEADINGS = ("first", "second", "difference", "90 %", "p", "power", "verdict")


def _tested(content: Record) -> dict[str, list[float]]:
    return {name: values for name, values in perplexities(content).items() if len(values) > 1}


def hop_rows(content: Record) -> Rows:
    """Return what hops do, and what halting a quarter of the operations costs."""
    rows = []
    for name, runs in groups(content).items():
        if "hops" not in runs[0]:
            continue
        means = {key: _mean([run["hops"][key] for run in runs]) for key in runs[0]["hops"]}
        goal, cost = "", ""
        if "halting" in runs[0]:
            saved = _mean([run["halting"]["at_goal"]["saved"] for run in runs])
            goal, cost = f"{saved:.1%}", f"{_mean([halting_cost(run) for run in runs]):+.2%}"
        rows.append(
            (
                name,
                f"{means['collinearity']:.3f}",
                f"{means['collinearity_last']:.3f}",
                f"{means['diversity']:.3f}",
                f"{means['displacement']:.3f}",
                goal,
                cost,
            )
        )
    return rows


HOP_HEADINGS = (
    "variant", "cos(1st, 2nd)", "cos(1st, last)", "diversity", "displacement", "FLOPs saved",
    "PPL then",
)  # fmt: skip


def halting_cost(run: Record, point: Record | None = None) -> float:
    """Return the relative rise in perplexity at a point of halting, by default the goal's."""
    point = point or run["halting"]["at_goal"]
    return math.expm1(point["loss"] - run["halting"]["loss"])


def depth_tests(content: Record) -> dict[str, list[tuple[float, MeanEquivalence]]]:
    """Test wide against deep at each evaluation: percent of the training, loss of wide minus deep.

    Losses are in nats, and the margin is the same share of the perplexity as elsewhere.
    """
    found = groups(content)
    return {
        label: [
            (
                records[0][0][0],
                mean_equivalence(
                    *([loss for _, loss in part] for part in records), margin=math.log1p(MARGIN)
                ),
            )
            for records in zip(
                *(zip(*(run["history"] for run in found[name]), strict=True) for name in pair),
                strict=True,
            )
        ]
        for label, pair in DEPTH_PAIRS.items()
        if all(name in found for name in pair)
    }


def depth_rows(content: Record) -> Rows:
    """Return by how much deep is better than wide as the training goes on."""
    return [
        (
            label,
            f"{percent:.0f} %",
            f"{t.difference:+.3f}",
            f"{t.interval[0]:+.3f} to {t.interval[1]:+.3f}",
        )
        for label, tests in depth_tests(content).items()
        for percent, t in tests
    ]


DEPTH_HEADINGS = ("experts", "of the training", "wide minus deep, nats", "90 %")


def last_gain(run: Record) -> float:
    """Return the share by which the perplexity fell in the last two fifths of the training.

    In the last fifth alone the learning rate is so low that little changes at any length.
    """
    before = [loss for percent, loss in run["history"] if percent <= 60][-1]
    return -math.expm1(run["history"][-1][1] - before)


def alignment_rows(content: Record) -> Rows:
    """Return how alike the experts of different seeds are."""
    return [
        (name, *(f"{found[key]:.3f}" for key in _ALIGNMENT))
        for name, found in content["alignment"].items()
    ]


_ALIGNMENT = ("jaccard", "jaccard_chance", "cosine", "cosine_chance")
ALIGNMENT_HEADINGS = ("variant", "Jaccard", "by chance", "W_up cosine", "by chance")


def _parts(content: Record, margin: float | None) -> Iterator[tuple[str, Sequence[str], Rows]]:
    within = margin_of(content, margin)
    smoke = content["equifinality"] == SMOKE
    yield (
        f"Variants. {SMOKE_SAID}" if smoke else "Variants",
        VARIANT_HEADINGS,
        variant_rows(content),
    )
    if content["seeds"] > 1 and not smoke:
        title = (
            f"Every pair, equivalent within {within:.3f} PPL (TOST, alpha 0.05), different where "
            "the 90 % interval lies beyond that"
        )
        yield title, PAIR_HEADINGS, pair_rows(content, margin)
        yield "Depth over the training", DEPTH_HEADINGS, depth_rows(content)
    yield "Hops", HOP_HEADINGS, hop_rows(content)
    if content["alignment"]:
        yield "Experts of different seeds", ALIGNMENT_HEADINGS, alignment_rows(content)


def tables(content: Record, *, margin: float | None = None) -> Iterator[Table]:
    """Yield the tables for a terminal, the verdicts last."""
    for title, headings, rows in _parts(content, margin):
        table = Table(title=title)
        for heading in headings:
            table.add_column(heading)
        for row in rows:
            table.add_row(*row)
        yield table
    decided = verdicts(content)
    if decided:
        table = Table(title="The paper's claims")
        for heading in ("claim", "verdict", "what we measured"):
            table.add_column(heading)
        for claim, verdict in decided:
            table.add_row(claim, verdict.word, verdict.why)
        yield table


# --- verdicts -----------------------------------------------------------------------------------


def verdicts(content: Record) -> list[tuple[str, Verdict]]:
    """Return the paper's claims with what the numbers say of them.

    None with less than two seeds, and none of runs that are too short to say anything.
    """
    if content["seeds"] < 2 or content["equifinality"] == SMOKE:
        return []
    depth = ("The advantage of depth is one of underfitting", _depth(content))
    if not set(FIVE) <= groups(content).keys():
        return [depth]
    tested = compare_conditions(_tested(content), margin=margin_of(content))
    pairs = {frozenset(pair["conditions"]): pair for pair in tested["pairs"]}
    means = tested["means"]
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
    names = ("hash 1x12", "random 1x12", "top-1")
    costs = {name: means[name] / means[WIDE] - 1 for name in names}
    why = ", ".join(f"{name} {cost:+.1%}" for name, cost in costs.items()) + " to cosine 1x12."
    intervals = [_toward(pairs, name, WIDE) for name in names]
    most = GRACEFUL * means[WIDE]
    if all(high < most for _, high in intervals):
        return Verdict("reproduced", why)
    why += " Their 90 % intervals leave it open." if all(low < most for low, _ in intervals) else ""
    return Verdict("refuted" if any(low > most for low, _ in intervals) else "out of reach", why)


def _collinear(content: Record) -> Verdict:
    runs = groups(content)[DEEP]
    values = [run["hops"]["collinearity"] for run in runs]
    why = f"cosine of the first two updates of 3x4: {', '.join(f'{v:.2f}' for v in values)}."
    return Verdict("reproduced" if min(values) > 0.5 else "refuted", why)


def _scalar(pairs: Any) -> Verdict:
    pair = pairs[frozenset(("1x12, learned scalar", DEEP))]
    low, high = _toward(pairs, "1x12, learned scalar", DEEP)
    why = f"1x12 with a scalar minus 3x4: {low:+.2f} to {high:+.2f} PPL ({_word(pair)})."
    if pair["equivalent"] or high < 0:
        return Verdict("reproduced", why)
    return Verdict("refuted" if pair["different"] else "out of reach", why)


def _halting(content: Record) -> Verdict:
    mlp, static = (groups(content).get(name, []) for name in (DEEP, "static 3x4"))
    costs = [halting_cost(run) for run in mlp]
    saved = _mean([run["halting"]["at_goal"]["saved"] for run in mlp])
    why = f"{saved:.1%} saved for {', '.join(f'{cost:+.2%}' for cost in costs)} PPL"
    if static:
        why += f"; static experts {_mean([halting_cost(run) for run in static]):+.2%}"
    return Verdict("reproduced" if max(costs) < NEGLIGIBLE else "refuted", why + ".")


def _depth(content: Record) -> Verdict:
    """Deep must be ahead for a while and no longer at the end, and the end must be one."""
    tests = depth_tests(content)
    why = "; ".join(
        f"{label} {found[0][1].difference:+.3f} nats at {found[0][0]:.0f} % of the training, "
        f"{found[-1][1].difference:+.3f} at its end"
        for label, found in tests.items()
    )
    *before, end = (test for _, test in tests["MLP experts"])
    ahead = sum(test.interval[0] > 0 for test in before)
    gains = [last_gain(run) for name in (WIDE, DEEP) for run in groups(content)[name]]
    why = (
        f"wide minus deep: {why}. With MLP experts deep is ahead at {ahead} of {len(before)} "
        f"evaluations before. The last two fifths bring up to {max(gains):.1%} of perplexity"
    )
    if not ahead and end.interval[1] < 0:
        return Verdict("refuted", f"{why}.")
    if max(gains) > MARGIN:
        return Verdict("out of reach", f"{why}, which is no convergence.")
    if not ahead:
        return Verdict("out of reach", f"{why}.")
    return Verdict("refuted" if end.interval[0] > 0 else "reproduced", f"{why}.")


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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- pages --------------------------------------------------------------------------------------


def section(content: Record) -> str:
    """Return the part of docs/evidence.md on this paper."""
    size = content["size"]
    lines = [
        "## The equifinality paper (arXiv:2604.14419)"
        + (", to convergence\n" if content["equifinality"] == "convergence" else "\n"),
        f"`{content['equifinality']}`: {size['layers']} layers of width {size['width']} with "
        f"{2 * size['width']} rank-1 experts each, {content['steps']} steps of {size['batch']} x "
        f"{size['context']} tokens; {content['data']}; {content['seeds']} seeds. The paper trains "
        "76 to 84 M parameters for 50,000 steps.",
        f"\nThe auxiliary losses have strength {content['strength']:g} in every variant, less than "
        "the layer's default: the paper prints none, and what is compared is the topology, so "
        "they are to decide as little as they can. `--strength` sets another.",
        f"\n    {content['command']}\n",
    ]
    decided = verdicts(content)
    if decided:
        lines += ["| claim | verdict | what we measured |", "|---|---|---|"]
    lines += [f"| {claim} | **{found.word}** | {found.why} |" for claim, found in decided]
    for title, headings, rows in _parts(content, None):
        lines += [f"\n{title}:\n", "| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
