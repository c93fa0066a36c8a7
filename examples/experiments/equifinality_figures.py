"""Figures of the equifinality paper's experiments. Pure functions on the JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ecomoe.ecology.seeds import MeanEquivalence, mean_equivalence
from examples.experiments.analysis import spread
from examples.experiments.measure import Record
from examples.experiments.topologies import DEPTH_PAIRS, WIDE

# Of the perplexity of cosine 1x12, as the paper's 1 of about 34 is.
MARGIN = 0.03


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


def tested(content: Record) -> dict[str, list[float]]:
    """Return the perplexities of variants that have more than one seed."""
    return {name: values for name, values in perplexities(content).items() if len(values) > 1}


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


def last_gain(run: Record) -> float:
    """Return the share by which the perplexity fell in the last two fifths of the training.

    In the last fifth alone the learning rate is so low that little changes at any length.
    """
    before = [loss for percent, loss in run["history"] if percent <= 60][-1]
    return -math.expm1(run["history"][-1][1] - before)


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)
