"""From usage and accuracy to the categories of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias

from ecomoe.ecology.statistics import wilson_interval

Category: TypeAlias = Literal[
    "PURE_CORE", "BROAD_CORE", "WEAK_CORE", "CORE", "EDGE", "NOISE", "FRINGE", "DEAD"
]
CATEGORIES: tuple[Category, ...] = (
    "PURE_CORE",
    "BROAD_CORE",
    "WEAK_CORE",
    "CORE",
    "EDGE",
    "NOISE",
    "FRINGE",
    "DEAD",
)
REFERENCE_EXPERTS = 16


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Every bound that turns a measurement into a word.

    The defaults of the first group are the paper's (sections 3.3, 4.10 and 4.12), those of the
    second are this package's.

    Attributes:
        core_usage: Usage from which an expert is a core one.
        dead_usage: Usage below which it is DEAD.
        pure_accuracy: Accuracy from which a core expert is pure.
        broad_accuracy: Accuracy from which it is broad, below which weak.
        edge_accuracy: Accuracy from which a less used expert is EDGE, below which NOISE.
        easy_confidence: Confidence above which a sample is easy.
        hard_confidence: Confidence below which it is hard.
        deep_share: Usage above which a tier counts towards the effective depth.
        relative: Whether the two usages scale with 16 / num_experts, so that an expert of 128 is
            not called DEAD for being one of many.
        interval_z: Half width of reported intervals, standard deviations; 1.96 for 95 %.
        event_z: The same for events, which are tested for every expert at every report.
        revival_ratio: Usage over ``dead_usage`` at which a dead expert has come back.
        tier_collapse_share: Usage below which a tier has collapsed.
        tier_recovery_share: Usage from which a collapsed tier has recovered.
        router_collapse_share: Share of the slots that reaches any but the K busiest experts, below
            which the router has collapsed; it recovers at twice that.
        lockdown_flip_rate: Share of tokens whose experts flip under noise, below which the router
            is locked; it is released at twice that.
        overfitting_rise: Relative rise of the evaluation loss over its best that counts as worse.
        overfitting_reports: Evaluations worse than that, since the best, that make an onset.
    """

    core_usage: float = 0.03
    dead_usage: float = 0.01
    pure_accuracy: float = 0.50
    broad_accuracy: float = 0.30
    edge_accuracy: float = 0.25
    easy_confidence: float = 0.7
    hard_confidence: float = 0.4
    deep_share: float = 0.10
    relative: bool = False
    interval_z: float = 1.96
    event_z: float = 4.0
    revival_ratio: float = 1.25
    tier_collapse_share: float = 0.03
    tier_recovery_share: float = 0.05
    router_collapse_share: float = 0.05
    lockdown_flip_rate: float = 0.05
    overfitting_rise: float = 0.02
    overfitting_reports: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "relative":
                continue
            unbounded = ("interval_z", "event_z", "revival_ratio", "overfitting_reports")
            high = None if field.name in unbounded else 1.0
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not value >= 0 or (high is not None and value > high):
                rule = "a share in [0, 1]" if high else "a number >= 0"
                raise ValueError(f"{field.name}={value!r} must be {rule}; change {field.name}")
        if self.dead_usage > self.core_usage:
            raise ValueError(
                f"dead_usage={self.dead_usage} must be <= core_usage={self.core_usage}; lower it"
            )
        if self.tier_collapse_share > self.tier_recovery_share:
            raise ValueError(
                f"tier_collapse_share={self.tier_collapse_share} must be <= "
                f"tier_recovery_share={self.tier_recovery_share}; lower it"
            )
        if self.broad_accuracy > self.pure_accuracy:
            raise ValueError(
                f"broad_accuracy={self.broad_accuracy} must be <= "
                f"pure_accuracy={self.pure_accuracy}; lower it"
            )
        if self.hard_confidence > self.easy_confidence:
            raise ValueError(
                f"hard_confidence={self.hard_confidence} must be <= "
                f"easy_confidence={self.easy_confidence}; lower it"
            )

    @classmethod
    def named(cls, thresholds: str | Thresholds) -> Thresholds:
        """Return the thresholds called ``"paper"`` or ``"relative"``, or those given.

        Raises:
            ValueError: Another name, or another type.
        """
        if isinstance(thresholds, Thresholds):
            return thresholds
        if thresholds not in ("paper", "relative"):
            raise ValueError(
                f"thresholds={thresholds!r} must be 'paper', 'relative' or a Thresholds; "
                "pick one of these"
            )
        return cls(relative=thresholds == "relative")

    def scaled(self, num_experts: int) -> Thresholds:
        """Return the thresholds that hold for a layer of ``num_experts``.

        >>> Thresholds(relative=True).scaled(32).dead_usage
        0.005
        >>> Thresholds().scaled(32).dead_usage
        0.01
        """
        if not self.relative:
            return self
        factor = REFERENCE_EXPERTS / num_experts
        return replace(
            self,
            core_usage=min(1.0, self.core_usage * factor),
            dead_usage=min(1.0, self.dead_usage * factor),
            relative=False,
        )


def category_of(usage: float, accuracy: float | None, thresholds: Thresholds) -> Category:
    """Return an expert's category (section 3.3), by thresholds scaled for its layer.

    Without an accuracy the paper's categories cannot be told apart: the expert is then ``CORE`` or
    ``FRINGE`` by its usage alone. DEAD needs no accuracy.

    >>> category_of(0.05, 0.6, Thresholds()), category_of(0.02, 0.1, Thresholds())
    ('PURE_CORE', 'NOISE')
    >>> category_of(0.05, None, Thresholds()), category_of(0.002, None, Thresholds())
    ('CORE', 'DEAD')
    """
    if usage < thresholds.dead_usage:
        return "DEAD"
    if usage < thresholds.core_usage:
        if accuracy is None:
            return "FRINGE"
        return "EDGE" if accuracy >= thresholds.edge_accuracy else "NOISE"
    if accuracy is None:
        return "CORE"
    if accuracy >= thresholds.pure_accuracy:
        return "PURE_CORE"
    return "BROAD_CORE" if accuracy >= thresholds.broad_accuracy else "WEAK_CORE"


def categories_of(
    counts: Sequence[float],
    *,
    total: float,
    accuracies: Sequence[float | None] | None,
    thresholds: Thresholds,
) -> list[Category]:
    """Return the category of each expert of a layer.

    Args:
        counts: Tokens (or slots) of each expert.
        total: Tokens (or slots) in all.
        accuracies: By expert, ``None`` where unknown.
        thresholds: Unscaled; they are scaled by the number of experts here.
    """
    scaled = thresholds.scaled(len(counts))
    known = accuracies if accuracies is not None else [None] * len(counts)
    return [
        category_of(count / total if total else 0.0, accuracy, scaled)
        for count, accuracy in zip(counts, known, strict=True)
    ]


def uncertain_experts(
    counts: Sequence[float], *, total: float, thresholds: Thresholds
) -> list[int]:
    """Return the experts whose usage band may be another: a bound lies in their interval.

    Args:
        counts: Tokens (or slots) of each expert.
        total: Tokens (or slots) in all.
        thresholds: Unscaled.
    """
    scaled = thresholds.scaled(len(counts))
    uncertain = []
    for expert, count in enumerate(counts):
        low, high = wilson_interval(count, total, z=scaled.interval_z)
        if any(low < bound <= high for bound in (scaled.dead_usage, scaled.core_usage)):
            uncertain.append(expert)
    return uncertain
