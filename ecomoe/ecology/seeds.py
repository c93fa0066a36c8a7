"""Conditions side by side, each of them run with several seeds: are they equivalent?

`ecomoe.ecology.compare` tests two runs against each other, whose error is that of finitely many
test samples. Here the error is that between seeds, so that the answer is about conditions. The
tests need scipy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from ecomoe.ecology.compare import check_bounds, summarise


@dataclass(frozen=True)
class MeanEquivalence:
    """What two one-sided Welch tests say of two means, in the values' own unit.

    Attributes:
        difference: First mean minus second.
        interval: The interval of the difference at confidence 1 - 2 * alpha.
        p: The larger of the two p-values; below alpha the means are equivalent.
        equivalent: Whether the interval lies within the margin.
        different: Whether the interval lies beyond the margin.
        power: Chance that such a test finds equivalence where the means are equal, at the spread
            that was seen. Where it is small, "not equivalent" says nothing.
    """

    difference: float
    interval: tuple[float, float]
    p: float
    equivalent: bool
    different: bool
    power: float


def mean_equivalence(
    first: Sequence[float], second: Sequence[float], *, margin: float, alpha: float = 0.05
) -> MeanEquivalence:
    """Test whether the means of two conditions differ by less than a margin (TOST).

    Two one-sided tests (Schuirmann 1987) with Welch's error and degrees of freedom, since seeds of
    different conditions need not spread alike. The power is that of the noncentral t distribution.

    Args:
        first: A value a seed; at least two seeds.
        second: Those of the other condition.
        margin: The difference that would matter, > 0, in the values' unit.
        alpha: Error rate, in (0, 0.5).

    Raises:
        ValueError: An argument breaks its rule.

    Example:
        >>> seeds = [33.9, 34.1, 34.0], [34.3, 34.6, 34.5]
        >>> [mean_equivalence(*seeds, margin=m).equivalent for m in (1.0, 0.5)]
        [True, False]
    """
    values_of_both = [_seeds("first", first), _seeds("second", second)]
    check_bounds(margin=margin, alpha=alpha)
    from scipy import stats

    # Exact sums: equal values must have no variance, and not that of their rounding.
    one, other = (statistics.mean(values) for values in values_of_both)
    difference = one - other
    parts = [statistics.variance(values) / len(values) for values in values_of_both]
    error = math.sqrt(sum(parts))
    if error == 0:
        same = abs(difference) < margin
        there = (difference, difference)
        different = abs(difference) > margin
        return MeanEquivalence(difference, there, 0.0 if same else 1.0, same, different, 1.0)
    # Of shares of the sum, whose squares do not underflow.
    freedom = 1 / sum(
        (part / sum(parts)) ** 2 / (len(values) - 1)
        for part, values in zip(parts, values_of_both, strict=True)
    )
    p = max(
        float(stats.t.sf((difference + margin) / error, freedom)),
        float(stats.t.cdf((difference - margin) / error, freedom)),
    )
    bound = float(stats.t.isf(alpha, freedom))
    reach = margin / error
    power = float(stats.nct.cdf(-bound, freedom, -reach) - stats.nct.cdf(bound, freedom, reach))
    if math.isnan(power):
        # scipy gives up on a reach of millions of errors and more, which is a matter of yes or no.
        power = float(reach > bound)
    low, high = difference - bound * error, difference + bound * error
    return MeanEquivalence(
        difference=difference,
        interval=(low, high),
        p=p,
        equivalent=p < alpha,
        different=low > margin or high < -margin,
        power=max(power, 0.0),
    )


def compare_conditions(
    conditions: Mapping[str, Sequence[float]], *, margin: float, alpha: float = 0.05
) -> dict[str, Any]:
    """Test every pair of conditions.

    That *all* pairs are equivalent needs no correction for their number: each must pass by itself.
    That some pair is may be chance.

    Args:
        conditions: A value a seed, by name of the condition.
        margin: The difference that would matter, in the values' unit.
        alpha: Error rate of each test.

    Returns:
        ``means`` by name, ``pairs``: the two names and the `MeanEquivalence`'s entries, and
        ``equivalent``: how many pairs are.

    Raises:
        ValueError: No mapping, less than two conditions, or one with fewer than two seeds.
    """
    if not isinstance(conditions, Mapping):
        raise ValueError(
            f"conditions={conditions!r} must map each condition's name to its seeds' values; pass "
            "e.g. {'wide': [3.1, 3.2], 'deep': [3.0, 3.3]}"
        )
    if len(conditions) < 2:
        raise ValueError(f"{len(conditions)} condition to compare; give at least two")
    conditions = {name: _seeds(name, values) for name, values in conditions.items()}
    pairs = []
    for first, second in combinations(conditions, 2):
        tested = mean_equivalence(conditions[first], conditions[second], margin=margin, alpha=alpha)
        pairs.append({"conditions": [first, second], **asdict(tested)})
    return {
        "means": {name: statistics.mean(values) for name, values in conditions.items()},
        "seeds": {name: len(values) for name, values in conditions.items()},
        "pairs": pairs,
        "equivalent": sum(pair["equivalent"] for pair in pairs),
        "margin": margin,
        "alpha": alpha,
    }


def _seeds(name: str, values: Sequence[float]) -> list[float]:
    """Return the values as plain floats, or say what is wrong with them."""
    try:
        usable = len(values) >= 2 and all(math.isfinite(value) for value in values)
    except TypeError:
        usable = False
    if not usable:
        raise ValueError(
            f"{name}={values!r} must be finite values of two seeds or more; run more seeds, or "
            "leave the condition out"
        )
    return [float(value) for value in values]


def values_of(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], metric: str
) -> dict[str, list[float]]:
    """Return the last value of a metric of each run, by condition.

    Args:
        runs: By condition, the records of each seed's run.
        metric: ``"accuracy"`` or ``"loss"``.

    Raises:
        ValueError: A run does not have it.
    """
    found: dict[str, list[float]] = {}
    for name, seeds in runs.items():
        values = [summarise(records)[metric] for records in seeds]
        if None in values:
            raise ValueError(
                f"condition {name!r} has a run without {metric}; call "
                "Monitor.evaluate(outputs=..., targets=...) in it, or choose another metric"
            )
        found[name] = values
    return found
