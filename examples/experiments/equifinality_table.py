"""Tables and pages of the equifinality paper's experiments. Pure functions on the JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from ecomoe.ecology.seeds import compare_conditions
from examples.experiments.analysis import spread
from examples.experiments.equifinality_claims import verdicts
from examples.experiments.equifinality_figures import (
    MARGIN,
    depth_tests,
    groups,
    halting_cost,
    last_gain,
    margin_of,
    mean,
    perplexities,
    tested,
)
from examples.experiments.measure import Record
from examples.experiments.records import SMOKE, SMOKE_SAID
from examples.experiments.topologies import WIDE

Rows = list[tuple[str, ...]]


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
    for pair in compare_conditions(tested(content), margin=margin)["pairs"]:
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


def hop_rows(content: Record) -> Rows:
    """Return what hops do, and what halting a quarter of the operations costs."""
    rows = []
    for name, runs in groups(content).items():
        if "hops" not in runs[0]:
            continue
        means = {key: mean([run["hops"][key] for run in runs]) for key in runs[0]["hops"]}
        goal, cost = "", ""
        if "halting" in runs[0]:
            saved = mean([run["halting"]["at_goal"]["saved"] for run in runs])
            goal, cost = f"{saved:.1%}", f"{mean([halting_cost(run) for run in runs]):+.2%}"
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


# --- pages --------------------------------------------------------------------------------------


def section(content: Record) -> str:
    """Return the part of docs/evidence.md on this paper."""
    size = content["size"]
    title, converged = "", ""
    if content["equifinality"] == "convergence":
        gain = max(last_gain(run) for run in content["runs"])
        title = ", to convergence" if gain <= MARGIN else ", in a longer training"
        converged = (
            f" The last two fifths of this training still bring up to {gain:.1%} of perplexity: it "
            "has not converged."
            if gain > MARGIN
            else ""
        )
    lines = [
        f"## The equifinality paper (arXiv:2604.14419){title}\n",
        f"`{content['equifinality']}`: {size['layers']} layers of width {size['width']} with "
        f"{2 * size['width']} rank-1 experts each, {content['steps']} steps of {size['batch']} x "
        f"{size['context']} tokens; {content['data']}; {content['seeds']} seeds. The paper trains "
        "76 to 84 M parameters for 50,000 steps." + converged,
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
