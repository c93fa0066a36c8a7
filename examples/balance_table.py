"""What the balance benchmark reports of its runs."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any, NamedTuple

from rich.table import Table

from examples.experiments.analysis import paired_not_worse, spread
from examples.experiments.measure import Record

MARGIN = 0.01


def summary(history: list[Record]) -> Record:
    """Return the figures of the table from a run's records; ``None`` where there are no experts."""
    last, layers = history[-1], history[-1]["layers"]
    found: Record = {"loss": last["loss"], "top1": last["top1"]}
    if not layers:
        return found
    living = [layer["num_experts"] - layer["dead"]["topk"] for layer in layers]
    overlaps = [layer["redundancy"] for layer in layers if layer["redundancy"] is not None]
    return found | {
        "dead": last["dead"],
        "dead_by_layer": [layer["dead"] for layer in layers],
        "worst": {
            basis: max(record["dead"][basis] for record in history) for basis in ("top1", "topk")
        },
        "max_violation": max(layer["max_violation"]["topk"] for layer in layers),
        **told(layers),
        "information_per_living": mean(
            layer["information"] / alive for layer, alive in zip(layers, living, strict=True)
        ),
        "redundancy": sum(overlaps) / len(overlaps) if overlaps else None,
    }


def told(layers: list[Record]) -> Record:
    """Return what experts tell of the label, means over layers."""
    names = ("information", "specialisation", "information_of_living") if layers else ()
    return {name: mean(layer[name] for layer in layers) for name in names}


TITLE = "Mean over seeds ± sd; DEAD is summed over layers, worst of four evaluations"
# Heading, key in a run's summary, and form.
FIGURES = (
    ("loss", "loss", "{:.4f}"),
    ("top-1", "top1", "{:.1%}"),
    ("DEAD top1", "dead.top1", "{:.1f}"),
    ("DEAD topk", "dead.topk", "{:.1f}"),
    ("worst top1", "worst.top1", "{:.1f}"),
    ("worst topk", "worst.topk", "{:.1f}"),
    ("max-vio", "max_violation", "{:.2f}"),
    ("nats", "information", "{:.3f}"),
    ("NMI", "specialisation", "{:.3f}"),
    ("nats of a living expert", "information_of_living", "{:.3f}"),
    ("nats / living", "information_per_living", "{:.4f}"),
    ("redundancy", "redundancy", "{:.2f}"),
    ("seconds", "seconds", "{:.0f}"),
)
HEADINGS = ("task", "policy", "seeds", "loss against the best other", *(f[0] for f in FIGURES))


def rows(runs: list[Record]) -> Iterator[list[str]]:
    """Yield the cells of each task and policy, as `HEADINGS` names them."""
    for task, groups in _cells(runs).items():
        for name, group in groups.items():
            figures = [_mean(group, key, form) for _, key, form in FIGURES]
            yield [task, name, str(len(group)), _not_worse(name, groups), *figures]


def _cells(runs: list[Record]) -> dict[str, dict[str, list[Record]]]:
    """Return the runs by task and policy."""
    cells: dict[str, dict[str, list[Record]]] = {}
    for run in runs:
        cells.setdefault(run["task"], {}).setdefault(run["policy"], []).append(run)
    return cells


def tables(runs: list[Record]) -> Iterator[Table]:
    """Yield each task's comparison, a policy a column: a terminal is narrower than all figures."""
    found = list(rows(runs))
    for task in dict.fromkeys(cells[0] for cells in found):
        own = [cells for cells in found if cells[0] == task]
        shown = Table(title=task, caption=TITLE)
        for heading in (HEADINGS[1], *(cells[1] for cells in own)):
            shown.add_column(heading)
        for index, heading in enumerate(HEADINGS[2:], start=2):
            shown.add_row(heading, *(cells[index] for cells in own))
        yield shown


def _mean(group: list[Record], key: str, form: str) -> str:
    values = []
    for entry in group:
        value: Any = entry
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            values.append(value)
    if not values:
        return ""
    found = spread(values)
    return form.format(found.mean) + (f" ± {form.format(found.sd)}" if found.count > 1 else "")


class Comparison(NamedTuple):
    """A policy's loss against the best other one's, in percent of its value.

    Attributes:
        best: The other.
        gap: Of the means.
        p: Of being worse by a hundredth or more, one-sided; ``None`` where nothing can be tested.
        interval: 90 %, of which either end is that of a one-sided 95 % interval.
    """

    best: str
    gap: float
    p: float | None
    interval: tuple[float, float] | None


def compared(name: str, cells: dict[str, list[Record]]) -> Comparison | None:
    """Test a policy's loss against the best other one's, seed by seed, within 1 % of its value."""
    losses = {other: {run["seed"]: run["loss"] for run in group} for other, group in cells.items()}
    own = losses.pop(name)
    if not losses:
        return None
    best = min(losses, key=lambda other: spread(list(losses[other].values())).mean)
    seeds = [seed for seed in own if seed in losses[best]]
    mine, theirs = ([of[seed] for seed in seeds] for of in (own, losses[best]))
    level = spread(theirs).mean
    found = paired_not_worse(mine, theirs, margin=MARGIN * level)
    gap = 100 * (spread(mine).mean / level - 1)
    if found is None:
        return Comparison(best, gap, None, None)
    upper = 100 * found[1] / level
    return Comparison(best, gap, found[0], (2 * gap - upper, upper))


def _not_worse(name: str, cells: dict[str, list[Record]]) -> str:
    found = compared(name, cells)
    if found is None:
        return ""
    gap = f"{found.gap:+.1f} % vs {found.best}"
    if found.p is None or found.interval is None:
        return gap
    return f"{gap} (95 %: < {found.interval[1]:+.1f} %), p={found.p:.2g}"


# What tells of the label: key, form, and how it is said. NMI divides by the mean of both entropies:
# where few experts share the tokens it is higher at equal nats. The mean over living experts counts
# a rare niche as much as an expert of many tokens; weighed by tokens it is the first figure.
TOLD = (
    ("information", "{:.3f} nats", "routing tells"),
    ("specialisation", "{:.3f}", "routing tells (NMI)"),
    ("information_of_living", "{:.3f} nats", "a living expert tells"),
)


# What each is, in words for a reader who has not seen the code.
TASKS_SAID = {
    "heads": "one layer of experts as the classifier behind a small convolutional network, images",
    "vit": "a small vision transformer with experts in the place of every FFN, images",
    "text": "a small byte-level GPT with experts in the place of every FFN, text",
    "upcycle": "a byte-level GPT-2 that was trained dense on Python source, converted to experts "
    "and trained on the text",
}
POLICIES_SAID = {
    "ecomoe": "the package's defaults",
    "switch": "a linear router and the Switch Transformer's auxiliary loss, weight 0.01",
    "bias": "balancing without a loss: a bias on each expert's sigmoid score that moves by 0.001 a "
    "step towards an even load",
    "none": "a linear router and nothing that balances",
    "dense": "no experts, but one FFN of as many active FLOPs",
}


def glossary(runs: list[Record]) -> str:
    """Say what the tasks and policies of some runs are."""
    return "\n".join(
        f"{what}: {'; '.join(f'`{name}`, {said[name]}' for name in names)}."
        for what, key, said in (
            ("Tasks", "task", TASKS_SAID),
            ("Policies", "policy", POLICIES_SAID),
        )
        if (names := dict.fromkeys(run[key] for run in runs))
    )


def losses(runs: list[Record], name: str = "ecomoe") -> str:
    """Say on which tasks a policy's loss is not worse than the best other's."""
    said, held = [], 0
    for task, cells in _cells(runs).items():
        found = compared(name, cells) if name in cells else None
        if found is None or found.p is None or found.interval is None:
            continue
        held += found.p < 0.05
        low, high = found.interval
        word = "worse" if low > 0 else "better" if high < 0 else "not told apart"
        said.append(
            f"{task} {found.gap:+.1f} % against {found.best} ({word}; 90 % {low:+.1f} to "
            f"{high:+.1f}; p = {found.p:.2g})"
        )
    if not said:
        return ""
    return (
        f"The loss of `{name}` is worse than the best other policy's by less than "
        f"{100 * MARGIN:.0f} %, if at all, on {held} of {len(said)} tasks: {'; '.join(said)}."
    )


def promise(runs: list[Record]) -> str:
    """Say in a few sentences whether the package's defaults keep what they promise."""
    own = [run for run in runs if run["policy"] == "ecomoe"]
    kept = sum(not any(run["dead"].values()) for run in own)
    said = [
        f"`ecomoe` ends with DEAD = 0 on both bases, in every layer, in {kept} of {len(own)} runs."
    ]
    for task in dict.fromkeys(run["task"] for run in own):
        for key, form, what in TOLD:
            ours, theirs = (
                {
                    run["seed"]: run[key]
                    for run in runs
                    if (run["task"], run["policy"]) == (task, name) and key in run
                }
                for name in ("ecomoe", "none")
            )
            if ours and theirs:
                said.append(f"{task}: {what} {_told(ours, theirs, form)}.")
    return " ".join(said)


def told_over_training(runs: list[Record]) -> str:
    """Say what a living expert tells at each evaluation, beside no balancing."""
    said = []
    for task, cells in _cells(runs).items():
        figures = []
        for name in ("ecomoe", "none"):
            by_percent: dict[float, list[float]] = {}
            for run in cells.get(name, ()):
                for record in run.get("history", ()):
                    told_now = record["information_of_living"]
                    by_percent.setdefault(record["percent"], []).append(told_now)
            percents = ", ".join(f"{percent:.0f}" for percent in by_percent)
            figures.append(", ".join(f"{mean(values):.3f}" for values in by_percent.values()))
        if all(figures):
            steps = cells["ecomoe"][0]["steps"]
            said.append(
                f"{task} at {percents} % of {steps} steps: {figures[0]}; without balancing "
                f"{figures[1]}"
            )
    return f"What a living expert tells as it is trained, nats: {'. '.join(said)}." if said else ""


def _told(ours: dict[int, float], theirs: dict[int, float], form: str) -> str:
    """Say whose routing tells more of the label, from values by seed."""
    mine, other = (spread(list(values.values())).mean for values in (ours, theirs))
    text = (
        f"{'more' if mine > other else 'less'} of the label than without balancing "
        f"({form.format(mine)} against {form.format(other)}"
    )
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    within = spread(pairs).interval if pairs else None
    if within is not None:
        text += f"; difference {within[0]:+.3f} to {within[1]:+.3f}"
    return text + ")"
