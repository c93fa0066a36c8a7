"""Runs side by side: is the accuracy the same, and is the ecology?

The paper finds seeds of equal accuracy whose tiers are used in entirely different ways, and calls
it multi-stable (section 4.14). "Equal" is a claim that needs a test of its own: a difference that
is not significant shows nothing. So equality is tested by two one-sided tests (TOST) against a
margin within which a difference does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from numbers import Real
from statistics import NormalDist
from typing import Any

from ecomoe import arguments

Record = Mapping[str, Any]

MULTI_STABLE_DISTANCE = 0.10
MAX_NAMED = 2


@dataclass(frozen=True)
class Equivalence:
    """What two one-sided tests say of two shares.

    Attributes:
        difference: First minus second.
        interval: The interval of the difference at confidence 1 - 2 * alpha.
        p: The larger of the two p-values; below alpha the shares are equivalent.
        equivalent: Whether the interval lies within the margin.
        different: Whether the interval lies beyond the margin.
    """

    difference: float
    interval: tuple[float, float]
    p: float
    equivalent: bool
    different: bool


def equivalence(
    first: float,
    second: float,
    *,
    num_first: float,
    num_second: float,
    margin: float = 0.01,
    alpha: float = 0.05,
) -> Equivalence:
    """Test whether two shares of independent trials differ by less than a margin.

    Args:
        first: A share, such as the accuracy of a run.
        second: Another.
        num_first: Trials behind the first.
        num_second: Trials behind the second.
        margin: The difference that would matter, > 0.
        alpha: Error rate, in (0, 0.5).

    Raises:
        ValueError: An argument breaks its rule.

    Example:
        Seeds A and B of the paper's Table 15, on 10,000 test samples: equal within 2 points, but
        not shown to be equal within half a point.

        >>> shares = dict(first=0.4768, second=0.4786, num_first=10_000, num_second=10_000)
        >>> [equivalence(**shares, margin=m).equivalent for m in (0.02, 0.005)]
        [True, False]
    """
    for name, share in (("first", first), ("second", second)):
        if not (isinstance(share, Real) and 0 <= share <= 1):
            raise ValueError(f"{name}={share!r} must be a share in [0, 1]; divide by the trials")
    for name, number in (("num_first", num_first), ("num_second", num_second)):
        if not arguments.number(name, number) > 0:
            raise ValueError(f"{name}={number!r} must be > 0; evaluate on some samples")
    check_bounds(margin=margin, alpha=alpha)
    # Agresti and Caffo's two added trials keep the error of shares near 0 and 1 from vanishing.
    error = math.sqrt(_variance(first, num_first) + _variance(second, num_second))
    difference = first - second
    normal = NormalDist()
    p = max(
        1 - normal.cdf((difference + margin) / error), normal.cdf((difference - margin) / error)
    )
    half = -normal.inv_cdf(alpha) * error
    low, high = difference - half, difference + half
    return Equivalence(
        difference=difference,
        interval=(low, high),
        p=p,
        equivalent=p < alpha,
        different=low > margin or high < -margin,
    )


def check_bounds(*, margin: object, alpha: object) -> None:
    """Refuse a margin and an error rate that no test can use.

    Raises:
        ValueError: One of them breaks its rule.
    """
    if not arguments.number("margin", margin) > 0:
        raise ValueError(f"margin={margin!r} must be > 0; no finite sample shows exact equality")
    if not (isinstance(alpha, Real) and 0 < float(alpha) < 0.5):
        raise ValueError(f"alpha={alpha!r} must be in (0, 0.5); 0.05 is usual")


def _variance(share: float, number: float) -> float:
    adjusted = (share * number + 1) / (number + 2)
    return adjusted * (1 - adjusted) / (number + 2)


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the total variation distance of two distributions, from 0 to 1.

    Seeds A and B of the paper's Table 15:

    >>> round(distance([0.451, 0.182, 0.091, 0.275], [0.164, 0.162, 0.213, 0.461]), 3)
    0.307

    Raises:
        ValueError: They have different lengths.
    """
    if len(first) != len(second):
        raise ValueError(
            f"distributions over {len(first)} and {len(second)} tiers cannot be compared; "
            "compare runs of the same architecture"
        )
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) / 2


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Return what stands for a run: its last record, its peak of DEAD experts and its revivals.

    Evaluation counts where there was any, else training.

    Raises:
        ValueError: There are no records.
    """
    if not records:
        raise ValueError("the run has no records; give the file that Monitor(log=...) wrote")
    phase = "eval" if any(record["phase"] == "eval" for record in records) else "train"
    mine = [record for record in records if record["phase"] == phase]
    last = mine[-1]
    events = [event for record in mine for event in record["events"]]
    return {
        "step": last["step"],
        "phase": phase,
        "accuracy": last["metrics"].get("accuracy"),
        "loss": last["metrics"].get("loss"),
        "judged": last["metrics"].get("judged"),
        "num_experts": last["num_experts"],
        "dead": last["dead"],
        "dead_peak": max(record["dead"]["top1"] for record in mine),
        "revivals": sum(e["kind"] == "revival" and e["basis"] == "top1" for e in events),
        "tiers": {layer["name"]: layer["tier"]["usage"]["top1"] for layer in last["layers"]},
        "experts": {layer["name"]: layer["num_experts"] for layer in last["layers"]},
        "top_k": {layer["name"]: layer["top_k"] for layer in last["layers"]},
        "metrics": sorted(last["metrics"]),
    }


def compare(
    runs: Mapping[str, Sequence[Record]], *, margin: float = 0.01, alpha: float = 0.05
) -> dict[str, Any]:
    """Set runs side by side, and each pair to the test.

    Args:
        runs: Records by name of the run.
        margin: Difference in accuracy that would matter, as a share.
        alpha: Error rate of the test.

    Returns:
        ``runs``, the summaries by name, and ``pairs``: the two names, the `Equivalence` of their
        accuracies (``None`` where one is unknown or the tasks are unlike), the ``distance`` of
        tier usage, averaged over layers (``None`` for other layers or tiers), what is ``unlike``
        in the two, in words, and a ``verdict``: "multi-stable" (equal accuracy, other tiers),
        "same" (equal in both), "different accuracy", "unlike tasks" (nothing can be said) or
        "undecided".

    Raises:
        ValueError: Less than two runs, or one without records.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run to compare; give at least two")
    summaries = {name: summarise(records) for name, records in runs.items()}
    pairs = []
    for first, second in combinations(summaries, 2):
        one, other = summaries[first], summaries[second]
        task = _unlike(one, other, _TASK)
        tested = None if task else _test(one, other, margin=margin, alpha=alpha)
        apart = _tier_distance(one["tiers"], other["tiers"])
        pairs.append(
            {
                "runs": [first, second],
                "accuracy": None if tested is None else asdict(tested),
                "distance": apart,
                "unlike": task + _unlike(one, other, _MODEL),
                "verdict": "unlike tasks" if task else _verdict(tested, apart),
            }
        )
    return {"runs": summaries, "pairs": pairs, "margin": margin, "alpha": alpha}


# What makes a difference of two accuracies meaningless, and what may rather be its cause.
_TASK = {
    "phase": "kind of traffic",
    "metrics": "metrics",
    "judged": "number of judged predictions",
}
_MODEL = {"experts": "experts of layers", "top_k": "top_k of layers", "step": "steps"}


def _unlike(first: Record, second: Record, names: Mapping[str, str]) -> list[str]:
    """Return in which of the named respects two runs differ, in words."""
    found = []
    for key, name in names.items():
        one, other = first[key], second[key]
        if one == other:
            continue
        if isinstance(one, dict):
            layers = [layer for layer in {**one, **other} if one.get(layer) != other.get(layer)]
            one, other = (
                ", ".join(f"{layer} {run.get(layer, '-')}" for layer in layers[:MAX_NAMED])
                for run in (one, other)
            )
            name += f" (in {len(layers)} of them)" if len(layers) > MAX_NAMED else ""
        elif isinstance(one, list):
            one, other = (", ".join(values) or "none" for values in (one, other))
        found.append(f"{name}: {one} and {other}")
    return found


def _test(first: Record, second: Record, *, margin: float, alpha: float) -> Equivalence | None:
    if first["accuracy"] is None or second["accuracy"] is None:
        return None
    return equivalence(
        first["accuracy"],
        second["accuracy"],
        num_first=first["judged"],
        num_second=second["judged"],
        margin=margin,
        alpha=alpha,
    )


def _tier_distance(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]
) -> float | None:
    if set(first) != set(second) or any(len(first[n]) != len(second[n]) for n in first):
        return None
    return sum(distance(first[name], second[name]) for name in first) / len(first)


def _verdict(tested: Equivalence | None, apart: float | None) -> str:
    if tested is not None and tested.different:
        return "different accuracy"
    if tested is None or not tested.equivalent or apart is None:
        return "undecided"
    return "multi-stable" if apart > MULTI_STABLE_DISTANCE else "same"
