"""Which f(C) fits the E at which deaths begin? Pure functions on numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Fit(NamedTuple):
    """How well ``critical E = scale * f(C)`` holds.

    Attributes:
        name: Of f.
        scale: Its factor.
        exponent: Of the power law; ``None`` for the others.
        error: Root mean square of ``log(critical E) - log(fit)``.
    """

    name: str
    scale: float
    exponent: float | None
    error: float


def critical_e(deaths: Mapping[int, Mapping[float, float]]) -> dict[int, float | None]:
    """Return for each number of classes the E at which deaths begin.

    Halfway (in the logarithm) between the lowest E from which on no expert dies and the next lower
    one; ``None`` where experts die even at the highest E, or at no E.

    Args:
        deaths: By number of classes, mean dead experts by E.

    >>> critical_e({10: {0.1: 3.0, 0.4: 0.0, 1.0: 0.0}})
    {10: 0.2}
    """
    found: dict[int, float | None] = {}
    for count, by_e in deaths.items():
        values = sorted(by_e)
        dying = [e for e in values if by_e[e] >= 0.5]
        above = [e for e in values if e > max(dying, default=0.0)]
        found[count] = round(math.sqrt(max(dying) * min(above)), 12) if dying and above else None
    return found


def fits(critical: Mapping[int, float]) -> list[Fit]:
    """Return the fits of log C, square root of C, a constant, and a free power, best first."""
    logs = {count: math.log(e) for count, e in critical.items()}
    forms: dict[str, Callable[[int], float]] = {
        "log C": math.log,
        "sqrt C": math.sqrt,
        "constant": lambda count: 1.0,
    }
    results = [_scaled(name, form, logs) for name, form in forms.items()]
    if len(logs) >= 3:
        xs = [math.log(count) for count in logs]
        centre, middle = sum(xs) / len(xs), sum(logs.values()) / len(logs)
        slope = sum((x - centre) * (y - middle) for x, y in zip(xs, logs.values(), strict=True))
        exponent = slope / sum((x - centre) ** 2 for x in xs)
        power = _scaled("a power of C", lambda count: count**exponent, logs)
        results.append(power._replace(exponent=exponent))
    return sorted(results, key=lambda fit: fit.error)


def _scaled(name: str, form: Callable[[int], float], logs: Mapping[int, float]) -> Fit:
    gaps = [y - math.log(form(count)) for count, y in logs.items()]
    shift = sum(gaps) / len(gaps)
    error = math.sqrt(sum((gap - shift) ** 2 for gap in gaps) / len(gaps))
    return Fit(name, math.exp(shift), None, error)


def fit_said(critical: Mapping[int, float | None]) -> str:
    """Return the critical E by classes and what fits it, in one sentence or two."""
    known = {count: e for count, e in critical.items() if e is not None}
    if len(known) < 3:
        return (
            f"An E at which deaths begin was found for {len(known)} of {len(critical)} class "
            "counts, too few to fit f(C)."
        )
    shown = ", ".join(f"{count}: {e:.2g}" for count, e in known.items())
    errors = "; ".join(
        f"{fit.name}{'' if fit.exponent is None else f' (exponent {fit.exponent:.2f})'} "
        f"{fit.error:.2f}"
        for fit in fits(known)
    )
    return f"E at which deaths begin, by classes: {shown}. Error in log E of each f(C): {errors}."
