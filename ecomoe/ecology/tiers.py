"""The ecology between tiers: who is used, where second choices go, who gets the hard samples.

Axes: E experts, T tiers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ecomoe.ecology.statistics import load_entropy, shares


def tier_sums(values: Sequence[float], tiers: Sequence[int]) -> list[float]:
    """Return the sum over the experts of each tier.

    >>> tier_sums([1, 2, 3, 4], (2, 1, 1))
    [3, 3, 4]

    Raises:
        ValueError: The tiers do not add up to the number of experts.
    """
    if sum(tiers) != len(values):
        raise ValueError(
            f"tiers={tuple(tiers)} sum to {sum(tiers)} for {len(values)} experts; "
            "give the experts of each tier"
        )
    sums, start = [], 0
    for size in tiers:
        sums.append(sum(values[start : start + size]))
        start += size
    return sums


def flow_lift(flow_TT: Sequence[Sequence[float]]) -> list[list[float | None]]:
    """Return each cell of the flow over what independence of row and column would give, (T, T).

    The diagonal is the self-loop lift: above 1, tokens circulate within their tier; a big tier has
    a big self-loop by size alone, with a lift of 1 (section 4.10 reports the raw share).

    Args:
        flow_TT: Tokens by the tier of their first (row) and second choice (column).
    """
    total = sum(map(sum, flow_TT))
    rows = [sum(row) for row in flow_TT]
    columns = [sum(column) for column in zip(*flow_TT, strict=True)]
    return [
        [
            cell * total / (rows[i] * columns[j]) if rows[i] and columns[j] else None
            for j, cell in enumerate(row)
        ]
        for i, row in enumerate(flow_TT)
    ]


def effective_depth(tier_counts: Sequence[float], *, deep_share: float = 0.10) -> dict[str, float]:
    """Return how many tiers are in use, by two measures (section 4.12).

    Args:
        tier_counts: Tokens of each tier.
        deep_share: Usage above which a tier is in use.

    Returns:
        ``tiers_above``, the tiers whose usage exceeds ``deep_share``, and ``perplexity``, the
        exponential of the entropy of usage over tiers: 1 for one tier, T for an even spread.

    >>> {k: round(v, 2) for k, v in effective_depth([45.1, 18.2, 9.1, 27.5]).items()}
    {'tiers_above': 3, 'perplexity': 3.46}
    """
    usage = shares(tier_counts)
    return {
        "tiers_above": sum(share > deep_share for share in usage),
        "perplexity": math.exp(load_entropy(tier_counts)) if any(usage) else 0.0,
    }


def hard_gradient(hard_shares: Sequence[float | None]) -> float | None:
    """Return the first tier's share of hard samples over the last's (section 4.10).

    The paper finds 1.2 to 1.6. ``None`` with one tier, or where a share is unknown or 0.
    """
    first, last = hard_shares[0], hard_shares[-1]
    if len(hard_shares) < 2 or first is None or not last:
        return None
    return first / last
