"""Checks of arguments: each returns the value it accepts, or says value, rule and remedy.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Collection
from numbers import Real
from typing import Any

# Far beyond any sensible weight or temperature, and far within fp32, where products are taken.
LARGEST = 1e18


def number(
    name: str, value: object, *, low: float = 0.0, below: float = LARGEST, remedy: str = ""
) -> float:
    """Return a real number in ``[low, below)`` as a plain float; a bool is none.

    Raises:
        ValueError: It is no number, or out of range.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        # Compared before it is converted: an int may be beyond every float.
        real: Any = value
        if low <= real < below:
            return float(value)
    bound = "a finite number" if below == LARGEST else f"a number below {below:g}"
    top = f" (and below {LARGEST:g})" if below == LARGEST else ""
    raise ValueError(
        f"{name}={_shown(value)} must be {bound} and >= {low:g}{top}; {remedy or f'change {name}'}"
    )


def share(name: str, value: object) -> float:
    """Return a real number in [0, 1] as a plain float.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        real: Any = value
        if 0 <= real <= 1:
            return float(value)
    raise ValueError(f"{name}={_shown(value)} must be a number in [0, 1]; change {name}")


def size(name: str, value: object) -> int:
    """Return a number of features: an int from 1 on.

    Raises:
        ValueError: It is none.
    """
    if type(value) is int and value >= 1:
        return value
    raise ValueError(f"{name}={value!r} must be an int >= 1; pass the number of features")


def tier_sizes(tiers: object) -> tuple[int, ...]:
    """Return the experts of each tier: a non-empty tuple of ints from 1 on.

    Raises:
        ValueError: It is none.
    """
    sizes = tuple(tiers) if isinstance(tiers, (tuple, list)) else ()
    if sizes and all(type(tier) is int and tier > 0 for tier in sizes):
        return sizes
    raise ValueError(
        f"tiers={tiers!r} must be a non-empty tuple of positive ints; pass e.g. (8, 4, 4), or "
        "(16,) for a flat layer"
    )


def experts_per_token(top_k: object, *, num_experts: int) -> int:
    """Return ``top_k``: an int from 1 to the number of experts.

    Raises:
        ValueError: It is none.
    """
    if type(top_k) is not int or top_k < 1:
        raise ValueError(f"top_k={top_k!r} must be an int >= 1; pass the experts per token")
    if top_k > num_experts:
        raise ValueError(f"top_k={top_k} must be <= num_experts={num_experts}; lower top_k")
    return top_k


def flag(name: str, value: object) -> bool:
    """Return a bool.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool):
        return value
    raise ValueError(f"{name}={value!r} must be True or False; pass a bool")


def choice(name: str, value: object, choices: Collection[str]) -> str:
    """Return one of several names.

    Raises:
        ValueError: It is none of them.
    """
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}; pick one of these")


def _shown(value: object) -> str:
    """Return the value as a message shows it; an endless int would fill the screen."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
