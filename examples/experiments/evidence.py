"""Write docs/evidence.md from the JSON results: each claim, what was run, and what it came to.

A verdict follows from the numbers by the rules below. A claim whose experiments have no results is
listed as not yet run, with the command that runs it.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from examples.balance_table import (
    HEADINGS,
    TITLE,
    glossary,
    losses,
    promise,
    rows,
    told_over_training,
)
from examples.experiments.claims import CLAIMS, FIRST_VERSION, Claim, missing
from examples.experiments.equifinality_table import section
from examples.experiments.figures import (
    PREDICTORS,
    SPECIAL,
    by_condition,
    general,
    predictions,
    scores,
)
from examples.experiments.measure import Record
from examples.experiments.records import SCALES, SMOKE
from examples.experiments.registry import EXPERIMENTS
from examples.experiments.report import plus_minus, read_results
from examples.experiments.runner import command
from examples.experiments.storage import read_json
from examples.experiments.survival import HEALTHY_E
from examples.experiments.verdicts import Results, Verdict

HEAD = """# Evidence

What this package's runs say about the claims of the E paper (arXiv:2605.06415). This page is
written by `python -m examples.experiments evidence` from the JSON files in
`examples/experiments/results`; nothing in it is written by hand.

DEAD is counted on both bases, `top1` (share of first choices) and `topk` (share of all slots),
under the paper's absolute threshold of 1 %, summed over layers, in every table and verdict that
names no other. By a threshold *relative* to the number of experts, a layer's expert is dead below
16 % / that number: 1 % of 16 experts, and 0.5 % of 32, whose even share is 3.1 %. Figures are means
over seeds ± sample standard deviation; intervals in brackets are 95 %, by bootstrap for AUCs and by
Student's t for means. H, O and B are taken as the paper prints them (`strength=1`), not at the
package's default strength, with the paper's router and without the package's usage floor, except
where the package's defaults are what is asked about; the balance loss is the package's
(`docs/architecture.md`), since the paper does not give its own exactly.

A verdict is *reproduced*, *qualified* (true with a condition that matters), *refuted*, *out of
reach* at this scale, or *not yet run*. At the scale of these runs the networks, the training and
the data are far smaller than the paper's; a verdict speaks of the mechanism, not of its numbers.
The accuracies that the paper reports (84.58 and 87.47 % on CIFAR-10, for example) have no verdict:
runs of this size cannot reach them. Where a claim is about a difference, the difference is judged.

*Worst* is the most dead experts of any evaluation after the random warm-up. Runs are kept in
`--out` and go on there where they were cut off; `DIR` is a folder of images, `TEXT` a text file,
and what stands in for either where none is given is named.
"""


def write_evidence(results: Path, to: Path) -> Path:
    """Write the page from the results of a folder."""
    benchmarks = [read_json(path) for path in sorted(results.glob("balance-*.json"))]
    equifinality = [read_json(path) for path in sorted(results.glob("equifinality-*.json"))]
    page = evidence(read_results(results), benchmarks)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text("\n".join([page, *map(section, equifinality)]))
    return to


def evidence(contents: list[Record], benchmarks: list[Record]) -> str:
    """Return the page.

    Args:
        contents: Results of experiments.
        benchmarks: Results of the balance benchmark.
    """
    # Of one experiment at several scales, the largest counts.
    ranks = list(reversed(SCALES))
    contents = sorted(contents, key=lambda content: ranks.index(content["scale"]))
    found: Results = {content["experiment"]: content for content in contents}
    found = {name: found[name] for name in EXPERIMENTS if name in found}
    parts = [
        HEAD,
        _scales(list(found.values())),
        _older(found),
        "## Verdicts\n",
        _verdicts(found),
        "## What was run\n",
    ]
    parts += [_section(content) for content in found.values()]
    parts += [_benchmark(content) for content in benchmarks]
    parts.append(_not_run(found, benchmarks))
    return "\n".join(parts).rstrip() + "\n"


def _scales(contents: list[Record]) -> str:
    lines = []
    for name in dict.fromkeys(content["scale"] for content in contents):
        scale = SCALES[name]
        lines.append(
            f"`{name}`: WideResNet-{scale.depth}-{scale.widen} with {scale.features} features on "
            f"images of at most {scale.image_pixels} pixels a side, {scale.epochs['vision']} "
            f"epochs in batches of {scale.batch['vision']}; transformer of {scale.layers} layers, "
            f"width {scale.width}, {scale.epochs['language']} epochs in batches of "
            f"{scale.batch['language']} x {scale.context} tokens; learning rates "
            f"{scale.encoder_lr:g} (encoder; the paper's is 1e-4) and {scale.expert_lr:g} "
            "(experts, router). Sets with more classes than the images have are the same images, "
            "each class split by k-means over coarse pixels.\n"
        )
    return "\n".join(lines)


def _older(found: Results) -> str:
    names = []
    for name, content in found.items():
        old = sum("spread" not in run["setting"] for run in content["runs"])
        part = f" ({old} of {len(content['runs'])})" if old < len(content["runs"]) else ""
        if old:
            names.append(f"`{name}`{part}")
    if not names:
        return ""
    return (
        f"The runs of {', '.join(names)} were made by an earlier version of the package, in which "
        "experts could not start alike (what `spread` sets; the settings in their JSON files lack "
        "it). It computed the same formulas with other roundings, so the same command now gives "
        "other figures of the same kind, as another seed would.\n"
    )


def _verdicts(found: Results) -> str:
    lines = ["| | claim | verdict | what we measured |", "|---|---|---|---|"]
    words = {}
    for claim in CLAIMS:
        verdict = _verdict(claim, found)
        words[claim.label] = verdict.word
        lines.append(f"| {claim.label} | {claim.text} | **{verdict.word}** | {verdict.why} |")
    lines.append("\nThe six findings of the paper's first version:\n")
    lines += ["| finding | verdict | as |", "|---|---|---|"]
    lines += [f"| {text} | **{words[label]}** | {label} |" for text, label in FIRST_VERSION]
    return "\n".join(lines) + "\n"


def _verdict(claim: Claim, found: Results) -> Verdict:
    smoke = any(name in found for name in claim.needs + claim.instead)
    found = {name: content for name, content in found.items() if content["scale"] != SMOKE}
    lacking = missing(claim, found)
    used = [name for name in claim.needs if name in found]
    used = used or [name for name in claim.instead if name in found]
    if not used:
        why = ", ".join(f"`{name}`" for name in lacking)
        only = f" at `{SMOKE}` only, which shows no more than that the code runs"
        return Verdict("not yet run", why + (only if smoke else ""))
    word, why = claim.judge(found)
    single = [f"`{name}`" for name in used if _seeds(found[name]) == 1]
    if single:
        why += " One seed." if len(single) == len(used) else f" One seed: {', '.join(single)}."
    if lacking:
        why += f" Not yet run: {', '.join(f'`{name}`' for name in lacking)}."
    return Verdict(word, why)


def _seeds(content: Record) -> int:
    # Random settings are replicates of each other: there the seed is not what varies.
    if content["experiment"] == "predicts-collapse":
        return len(content["runs"])
    return len({run["seed"] for run in content["runs"]})


def _section(content: Record) -> str:
    name = content["experiment"]
    lines = [f"### {name}: {content['title']}\n"]
    said = "The paper" if content["paper"] else "Asked"
    lines.append(f"{said} (section {content['section']}): {content['claim']}.")
    if content["note"]:
        lines.append(content["note"])
    groups = by_condition(content)
    planned = len(EXPERIMENTS[name].settings)
    done = "" if len(groups) >= planned else f" {len(groups)} of {planned} conditions are done."
    first = content["runs"][0]
    lines.append(
        f"{len(content['runs'])} runs of {first['steps']} steps or as many as the set gives; "
        f"data: {', '.join(dict.fromkeys(run['data']['name'] for run in content['runs']))}.{done}"
    )
    lines += _counts(content)
    lines.append(f"\n    {content['command']}\n")
    if name == "predicts-collapse":
        lines.append(_predictions(content))
        return "\n".join(lines)
    special = SPECIAL.get(name, lambda run: {})
    rows = {key: [general(run) | special(run) for run in runs] for key, runs in groups.items()}
    columns = list(dict.fromkeys(key for row in rows.values() for f in row for key in f))
    lines.append("| condition | seeds | " + " | ".join(columns) + " |")
    lines.append("|---" * (len(columns) + 2) + "|")
    for key, figures in rows.items():
        cells = [plus_minus([f[column] for f in figures if column in f]) for column in columns]
        lines.append(f"| {key} | {len(figures)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _counts(content: Record) -> list[str]:
    """Say which conditions have fewer seeds than the command asks for, and which are one run."""
    groups = by_condition(content)
    lines = []
    few = {key: len(runs) for key, runs in groups.items() if len(runs) < content["seeds"]}
    if few:
        shown = ", ".join(f"{count} of `{key}`" for key, count in few.items())
        lines.append(
            f"The command asks for {content['seeds']} seeds of each condition; so far there are "
            f"only {shown}."
        )
    tracks = {
        key: [(run["seed"], [record["loss"] for record in run["history"]]) for run in runs]
        for key, runs in groups.items()
    }
    for key, other in combinations(tracks, 2):
        if tracks[key] == tracks[other]:
            lines.append(
                f"`{other}` is `{key}` again, seed by seed: tiers are labels, so these are "
                f"{len(tracks[key])} networks, each in both rows."
            )
    return lines


def _predictions(content: Record) -> str:
    lines = []
    for basis in ("top1", "topk"):
        runs = content["runs"]
        alive = sum(run["final"]["dead"][basis] == 0 for run in runs)
        lines.append(f"DEAD {basis} = 0 at the end of {alive} of {len(runs)} runs.\n")
        lines.append("| predictor | AUC | 95 % | E's AUC minus this one's, 95 % |")
        lines.append("|---|---|---|---|")
        for row in predictions(content, basis=basis):
            if row["auc"] is None:
                lines.append(f"| {row['name']} | one outcome only | | |")
                continue
            low, high = row["interval"]
            behind = "" if row["name"] == "E" else "{:+.2f} to {:+.2f}".format(*row["behind"])
            lines.append(
                f"| {row['name']} | {row['auc']:.2f} | {low:.2f} to {high:.2f} | {behind} |"
            )
        lines.append("")
    fatal = [run for run in content["runs"] if _healthy(run) and run["final"]["dead"]["top1"]]
    if fatal:
        lines += ["Runs at E >= 0.5 that end with dead experts:\n"]
        lines += ["| run | " + " | ".join(PREDICTORS) + " | DEAD top1 | DEAD topk |"]
        lines += ["|---" * (len(PREDICTORS) + 3) + "|"]
        for run in sorted(fatal, key=lambda run: -run["final"]["dead"]["top1"]):
            values = " | ".join(f"{scores(run)[name]:.3g}" for name in PREDICTORS)
            counts = run["final"]["dead"]
            lines.append(f"| {run['name']} | {values} | {counts['top1']} | {counts['topk']} |")
        lines.append("")
    return "\n".join(lines)


def _healthy(run: Record) -> bool:
    return bool(run["setting"]["control"]["e"] >= HEALTHY_E)


def _benchmark(content: Record) -> str:
    runs = content["runs"]
    # Other work on the machine decides how long a run takes.
    kept = [index for index, heading in enumerate(HEADINGS) if heading != "seconds"]
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    of = "" if len(tasks) > 1 else f": {tasks[0]}"
    lines = [
        f"## Balance benchmark{of}\n",
        glossary(runs) + "\n",
        f"{TITLE}. Loss is cross-entropy on test data, nats; it is tested for being worse than the "
        "best other policy's by less than 1 % of it (the upper of the two one-sided tests, "
        "paired by seed; below p = 0.05 it is not worse). Images: "
        f"{content['images']}; text: {content['text']}.",
        f"\n    {content['command']}\n",
        *(f"{said}\n" for said in (losses(runs), promise(runs), told_over_training(runs)) if said),
        "Intervals are 95 %, by Student's t over seeds. Weighed by its tokens, what living experts "
        "tell adds up to what the routing tells; *a living expert* is the unweighed mean over "
        "experts that live on both bases, in which a rare niche counts as much as an expert of "
        "many tokens. What chance tells is subtracted; an image's patches count for as many as "
        "would be independent. *nats / living* rises as fewer live: what a model knows of the "
        "label, at most the labels' entropy, is shared out among them.\n",
        "| " + " | ".join(HEADINGS[index] for index in kept) + " |",
        "|---" * len(kept) + "|",
    ]
    lines += ["| " + " | ".join(cells[index] for index in kept) + " |" for cells in rows(runs)]
    return "\n".join(lines) + "\n"


def _not_run(found: Results, benchmarks: list[Record]) -> str:
    lacking = [entry for name, entry in EXPERIMENTS.items() if name not in found]
    if not lacking and benchmarks:
        return ""
    lines = ["## Not yet run\n", "| experiment | command |", "|---|---|"]
    for entry in lacking:
        lines.append(f"| {entry.title} | `{command(entry, '--scale small')}` |")
    if not benchmarks:
        benchmark = "python -m examples.balance_benchmark --seeds 3 --data DIR --data TEXT"
        lines.append(f"| Balance benchmark | `{benchmark}` |")
    return "\n".join(lines) + "\n"
