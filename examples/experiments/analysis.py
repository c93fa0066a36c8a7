"""Statistics over runs: intervals, ranking quality, equivalence. Pure functions on numbers."""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

Interval = tuple[float, float]


class Spread(NamedTuple):
    """Mean of a few runs with its spread.

    Attributes:
        mean: Their mean.
        sd: Sample standard deviation; 0 for one run.
        count: How many.
    """

    mean: float
    sd: float
    count: int

    @property
    def interval(self) -> Interval | None:
        """95 % interval of the mean by Student's t; ``None`` for a single run."""
        if self.count < 2:
            return None
        half = float(stats.t.ppf(0.975, self.count - 1)) * self.sd / math.sqrt(self.count)
        return self.mean - half, self.mean + half


def spread(values: Sequence[float]) -> Spread:
    """Return mean, standard deviation and count.

    >>> spread([1.0, 3.0])
    Spread(mean=2.0, sd=1.4142135623730951, count=2)
    """
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return Spread(mean, math.sqrt(squares / max(len(values) - 1, 1)), len(values))


def auc(scores: Sequence[float], outcomes: Sequence[bool]) -> float | None:
    """Return the chance that a true outcome scores above a false one, ties half; in [0, 1].

    ``None`` where there is only one kind of outcome.

    >>> auc([1, 2, 3], [False, True, True])
    1.0
    """
    positive = [s for s, outcome in zip(scores, outcomes, strict=True) if outcome]
    negative = sorted(s for s, outcome in zip(scores, outcomes, strict=True) if not outcome)
    if not positive or not negative:
        return None
    wins = sum(bisect_left(negative, p) + bisect_right(negative, p) for p in positive)
    return wins / (2 * len(positive) * len(negative))


def bootstrap_auc(
    scores: Sequence[float], outcomes: Sequence[bool], *, draws: int = 2000, seed: int = 0
) -> Interval | None:
    """Return the 95 % percentile interval of `auc` over resampled runs."""
    draw = random.Random(seed)
    values = []
    for _ in range(draws):
        rows = draw.choices(range(len(scores)), k=len(scores))
        value = auc([scores[row] for row in rows], [outcomes[row] for row in rows])
        if value is not None:
            values.append(value)
    return percentiles(values)


def bootstrap_difference(
    one: Sequence[float],
    other: Sequence[float],
    outcomes: Sequence[bool],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Return the 95 % interval of the difference of two AUCs on the same resampled runs."""
    draw = random.Random(seed)
    values = []
    for _ in range(draws):
        rows = draw.choices(range(len(one)), k=len(one))
        kept = [outcomes[row] for row in rows]
        first, second = auc([one[r] for r in rows], kept), auc([other[r] for r in rows], kept)
        if first is not None and second is not None:
            values.append(first - second)
    return percentiles(values)


def percentiles(values: Sequence[float]) -> Interval | None:
    """Return the 2.5th and 97.5th percentile, or ``None`` of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.025 * last)], ordered[round(0.975 * last)]


def equivalence(
    one: Sequence[float], other: Sequence[float], *, margin: float, one_sided: bool = False
) -> float | None:
    """Return the p-value of two one-sided Welch tests for ``|mean difference| < margin`` (TOST).

    Args:
        one: Values of one condition.
        other: Values of the other.
        margin: In the values' unit, > 0.
        one_sided: Whether only ``mean(one) - mean(other) < margin`` is tested (not worse, where
            lower is better).

    Returns:
        ``None`` with fewer than two values on a side, or no spread at all.
    """
    if len(one) < 2 or len(other) < 2:
        return None
    first, second = spread(one), spread(other)
    parts = first.sd**2 / first.count, second.sd**2 / second.count
    error = math.sqrt(sum(parts))
    if error == 0:
        return None
    freedom = sum(parts) ** 2 / (
        parts[0] ** 2 / (first.count - 1) + parts[1] ** 2 / (second.count - 1)
    )
    difference = first.mean - second.mean
    above = float(stats.t.cdf((difference - margin) / error, freedom))
    below = float(stats.t.sf((difference + margin) / error, freedom))
    return above if one_sided else max(above, below)


def paired_not_worse(
    one: Sequence[float], other: Sequence[float], *, margin: float
) -> tuple[float, float] | None:
    """Test ``mean(one - other) < margin`` on pairs, lower being better.

    Runs of one seed share data, its order and much of the initial state, so their difference varies
    less than either.

    Args:
        one: Values of one condition.
        other: Values of the other, of the same seeds in the same order.
        margin: In the values' unit, > 0.

    Returns:
        The one-sided p-value and the upper end of the one-sided 95 % interval of the mean
        difference; ``None`` with fewer than two pairs, or no spread at all.
    """
    gap = spread([a - b for a, b in zip(one, other, strict=True)])
    error = gap.sd / math.sqrt(gap.count)
    if gap.count < 2 or error == 0:
        return None
    freedom = gap.count - 1
    p = float(stats.t.cdf((gap.mean - margin) / error, freedom))
    return p, gap.mean + float(stats.t.ppf(0.95, freedom)) * error
