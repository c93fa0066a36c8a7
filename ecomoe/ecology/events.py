"""What happened between two reports: deaths and revivals of experts.

A pure step, ``(memory, record) -> (events, memory)``. The memory is plain data, so that it can be
saved with a checkpoint and the history of a resumed run equals that of an uninterrupted one.

An event needs evidence, not one low count: since an expert was last seen on the side where it was,
its tokens are pooled over reports until their interval leaves the threshold behind.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ecomoe.ecology.statistics import BASES, wilson_interval
from ecomoe.ecology.taxonomy import Thresholds

Memory = dict[str, Any]

ADVICE = {
    "death": "raise balance_weight or target_e, or look whether this layer needs fewer experts",
    "revival": "nothing to do: balance pressure has brought it back",
}


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to an expert, a tier, a layer or the run.

    Attributes:
        kind: Its name, such as ``"death"``.
        step: Optimizer step of the report that shows it.
        phase: ``"train"``, ``"eval"`` or ``"generate"``: in which traffic.
        layer: Name of the layer.
        expert: Id of the expert, ``None`` for a tier, a layer or the run.
        basis: ``"top1"`` or ``"topk"``, or ``None`` where usage does not matter.
        evidence: The numbers it rests on.
        advice: What to do about it.
    """

    kind: str
    step: int
    phase: str
    layer: str | None = None
    expert: int | None = None
    basis: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """Say it in one line."""
        who = [self.layer or "run"]
        if self.expert is not None:
            who.append(f"expert {self.expert}")
        if self.basis is not None:
            who.append(self.basis)
        numbers = ", ".join(f"{key} {_short(value)}" for key, value in self.evidence.items())
        return f"{self.step} {self.phase} {' '.join(who)}: {self.kind} ({numbers})"


def detect(
    memory: Memory, record: Mapping[str, Any], *, thresholds: Thresholds
) -> tuple[list[Event], Memory]:
    """Return the events that a new record shows, and the memory to compare the next one with.

    Args:
        memory: What the last call returned; ``{}`` at the start.
        record: A report's record, as `Report.to_dict` gives it.
        thresholds: Unscaled.
    """
    memory = copy.deepcopy(memory)
    events: list[Event] = []
    of_phase = memory.setdefault(record["phase"], {})
    for layer in record["layers"]:
        of_layer = of_phase.setdefault(layer["name"], {})
        for basis in BASES:
            lives = of_layer.setdefault(basis, [_newborn() for _ in range(layer["num_experts"])])
            events += _deaths_and_revivals(lives, record, layer, basis, thresholds)
    return events, memory


def _newborn() -> Memory:
    # `hits` of `tokens` went to the expert since its usage crossed to the other side.
    return {"dead": False, "since": None, "hits": 0.0, "tokens": 0.0}


def _deaths_and_revivals(
    lives: list[Memory],
    record: Mapping[str, Any],
    layer: Mapping[str, Any],
    basis: str,
    thresholds: Thresholds,
) -> list[Event]:
    bounds = thresholds.scaled(layer["num_experts"])
    counts: Sequence[float] = layer["counts"][basis]
    total = sum(counts)
    events = []
    for expert, (life, count) in enumerate(zip(lives, counts, strict=True)):
        usage = count / total if total else 0.0
        revived_from = bounds.revival_ratio * bounds.dead_usage
        turning = usage >= revived_from if life["dead"] else usage < bounds.dead_usage
        if not turning or not total:
            life["hits"] = life["tokens"] = 0.0
            continue
        life["hits"] += count
        life["tokens"] += total
        low, high = wilson_interval(life["hits"], life["tokens"], z=bounds.event_z)
        turned = low > bounds.dead_usage if life["dead"] else high < bounds.dead_usage
        if not turned:
            continue
        kind = "revival" if life["dead"] else "death"
        evidence = {
            "usage": life["hits"] / life["tokens"],
            "interval": [low, high],
            "threshold": bounds.dead_usage,
            "tokens": int(life["tokens"]),
            "dead": layer["dead"][basis],
        }
        if kind == "revival":
            evidence["steps_dead"] = record["step"] - life["since"]
        life.update(dead=not life["dead"], since=record["step"], hits=0.0, tokens=0.0)
        events.append(
            Event(
                kind=kind,
                step=record["step"],
                phase=record["phase"],
                layer=layer["name"],
                expert=expert,
                basis=basis,
                evidence=evidence,
                advice=ADVICE[kind],
            )
        )
    return events


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)
