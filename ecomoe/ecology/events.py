"""What happened between two reports: deaths, revivals, lockdown, collapses, contradictions.

A pure step, ``(memory, record) -> (events, memory)``. The memory is plain data, so that it can be
saved with a checkpoint and the history of a resumed run equals that of an uninterrupted one.

An event needs evidence, not one low count. Most of them watch a share of tokens that falls below a
bound or comes back above a higher one: since the share crossed the bound, its tokens are pooled
over reports until their binomial interval leaves the bound behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ecomoe.ecology.statistics import BASES, wilson_interval
from ecomoe.ecology.taxonomy import Thresholds

Memory = dict[str, Any]
Record = Mapping[str, Any]

ADVICE = {
    "death": "raise balance_weight or target_e, or look whether this layer needs fewer experts",
    "revival": "nothing to do: the expert takes tokens again",
    "tier_collapse": "look whether the task needs this tier; a recovery may follow by itself",
    "tier_recovery": "nothing to do: the tier takes tokens again",
    "router_collapse": "raise balance_weight, lower the router's learning rate, or restart earlier",
    "router_recovery": "nothing to do: the router spreads its tokens again",
    "lockdown": "exploration no longer changes choices: raise temperature or entropy_weight early",
    "release": "nothing to do: exploration changes choices again",
    "nonfinite": "stop and look for the first NaN: lower the learning rate, keep the router fp32",
    "contradiction": "trust what is observed, not E; see the layers' categories",
    "overfitting": "stop, regularise or add data; the ecology may be healthy all the same",
}


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to an expert, a tier, a layer or the run.

    Attributes:
        kind: Its name, a key of `ADVICE`.
        step: Optimizer step of the report that shows it.
        phase: ``"train"``, ``"eval"`` or ``"generate"``: in which traffic.
        layer: Name of the layer.
        expert: Id of the expert, where it is about one.
        tier: The tier, where it is about one.
        basis: ``"top1"`` or ``"topk"``, or ``None`` where usage does not matter.
        evidence: The numbers it rests on.
        advice: What to do about it.
    """

    kind: str
    step: int
    phase: str
    layer: str | None = None
    expert: int | None = None
    tier: int | None = None
    basis: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {each.name: copied(getattr(self, each.name)) for each in fields(self)}

    def __str__(self) -> str:
        """Say it in one line."""
        who = [self.layer or "run"]
        who += [f"expert {self.expert}"] if self.expert is not None else []
        who += [f"tier {self.tier}"] if self.tier is not None else []
        if self.basis is not None:
            who.append(self.basis)
        numbers = ", ".join(f"{key} {_short(value)}" for key, value in self.evidence.items())
        return f"{self.step} {self.phase} {' '.join(who)}: {self.kind} ({numbers})"


def copied(value: Any) -> Any:
    """Return a copy of plain data; `copy.deepcopy` takes ten times as long."""
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [copied(item) for item in value]
    return value


def advice_lines(events: Sequence[Record]) -> Iterator[str]:
    """Yield what to do about each kind among some events, in the order that they come in."""
    told = {event["kind"]: event.get("advice") for event in events}
    yield from (f"{kind}: {advice}" for kind, advice in told.items() if advice)


def detect(memory: Memory, record: Record, *, thresholds: Thresholds) -> tuple[list[Event], Memory]:
    """Return the events that a new record shows, and the memory to compare the next one with.

    Args:
        memory: What the last call returned; ``{}`` at the start.
        record: A report's record, as `Report.to_dict` gives it.
        thresholds: Unscaled.
    """
    memory = copied(memory)
    of_phase = memory.setdefault(record["phase"], {"layers": {}})
    events: list[Event] = []
    for layer in record["layers"]:
        of_layer = of_phase["layers"].setdefault(layer["name"], {"shares": {}, "nonfinite": False})
        events += _share_events(of_layer["shares"], record, layer, thresholds)
        events += _nonfinite_events(of_layer, record, layer)
    events += _contradictions(of_phase, record)
    events += _overfitting(of_phase, record, thresholds)
    return events, memory


@dataclass(frozen=True)
class _Share:
    """A watched share: it enters a state below ``enter``, and leaves it from ``leave`` on."""

    entering: str
    leaving: str
    hits: float
    total: float
    enter: float
    leave: float
    where: Mapping[str, Any]
    evidence: Mapping[str, Any]

    @property
    def key(self) -> str:
        return ":".join([self.entering, *(str(value) for value in self.where.values())])


def _shares_of(layer: Record, thresholds: Thresholds) -> Iterator[_Share]:
    bounds = thresholds.scaled(layer["num_experts"])
    for basis in BASES:
        counts: Sequence[float] = layer["counts"][basis]
        total = sum(counts)
        for expert, count in enumerate(counts):
            yield _Share(
                "death",
                "revival",
                count,
                total,
                bounds.dead_usage,
                bounds.revival_ratio * bounds.dead_usage,
                {"basis": basis, "expert": expert},
                {"dead": layer["dead"][basis]},
            )
    counts, tiers = layer["counts"]["top1"], layer.get("tiers", [])
    if len(tiers) > 1:
        start = 0
        for tier, size in enumerate(tiers):
            hits = sum(counts[start : start + size])
            start += size
            yield _Share(
                "tier_collapse",
                "tier_recovery",
                hits,
                sum(counts),
                bounds.tier_collapse_share,
                bounds.tier_recovery_share,
                {"basis": "top1", "tier": tier},
                {},
            )
    counts, top_k = layer["counts"]["topk"], layer.get("top_k", 1)
    if layer["num_experts"] >= 2 * top_k + 2:
        # What the busiest K leave to all others.
        yield _Share(
            "router_collapse",
            "router_recovery",
            sum(sorted(counts)[:-top_k]),
            sum(counts),
            bounds.router_collapse_share,
            2 * bounds.router_collapse_share,
            {"basis": "topk"},
            {"experts": sorted(range(len(counts)), key=lambda e: -counts[e])[:top_k]},
        )
    lockdown = layer.get("lockdown", {})
    if lockdown.get("probes"):
        yield _Share(
            "lockdown",
            "release",
            lockdown["flips"],
            lockdown["probes"],
            bounds.lockdown_flip_rate,
            2 * bounds.lockdown_flip_rate,
            {},
            {
                "margin": lockdown["margin"],
                "self_loop_lift": layer["tier"]["self_loop_lift"],
                "saturation": lockdown.get("saturation"),
            },
        )


def _share_events(
    states: Memory, record: Record, layer: Record, thresholds: Thresholds
) -> Iterator[Event]:
    for share in _shares_of(layer, thresholds):
        state = states.setdefault(
            share.key, {"inside": False, "since": None, "hits": 0.0, "total": 0.0}
        )
        turned = _turn(state, share, z=thresholds.event_z)
        if turned is None:
            continue
        kind = share.leaving if state["inside"] else share.entering
        evidence = {**turned, "bound": share.enter, **share.evidence}
        if state["inside"]:
            evidence["steps"] = record["step"] - state["since"]
        state.update(inside=not state["inside"], since=record["step"], hits=0.0, total=0.0)
        yield _event(kind, record, layer=layer["name"], evidence=evidence, **share.where)


def _turn(state: Memory, share: _Share, *, z: float) -> dict[str, Any] | None:
    """Pool a report's tokens; return the evidence if they show that the share has turned."""
    point = share.hits / share.total if share.total else None
    inside = state["inside"]
    if point is None:
        return None
    if not (point >= share.leave if inside else point < share.enter):
        state["hits"] = state["total"] = 0.0
        return None
    state["hits"] += share.hits
    state["total"] += share.total
    low, high = wilson_interval(state["hits"], state["total"], z=z)
    if not (low > share.enter if inside else high < share.enter):
        return None
    return {
        "share": state["hits"] / state["total"],
        "interval": [low, high],
        "tokens": int(state["total"]),
    }


def _nonfinite_events(of_layer: Memory, record: Record, layer: Record) -> Iterator[Event]:
    broken = layer.get("nonfinite", 0)
    if broken and not of_layer["nonfinite"]:
        evidence = {"tokens": broken, "of": layer["num_tokens"]}
        yield _event("nonfinite", record, layer=layer["name"], evidence=evidence)
    of_layer["nonfinite"] = bool(broken)


def _contradictions(of_phase: Memory, record: Record) -> Iterator[Event]:
    """Compare the predicted phase with deaths that are beyond doubt."""
    prediction = record.get("prediction")
    if prediction is None or prediction["phase"] == "mixed":
        return
    progress = record.get("progress")
    for basis in BASES:
        dead = sum(
            state["inside"]
            for layer in of_phase["layers"].values()
            for key, state in layer["shares"].items()
            if key.startswith(f"death:{basis}:")
        )
        if prediction["phase"] == "healthy":
            contradicted = dead > 0
        else:
            # Death takes its time: that nobody died yet contradicts nothing in the first half.
            late = progress is not None and progress >= 0.5
            contradicted = late and dead == 0 and record["dead"][basis] == 0
        known = of_phase.setdefault("contradicted", {})
        if contradicted and not known.get(basis, False):
            evidence = {
                "predicted": prediction["phase"],
                "e": record["control"]["e"],
                "e_now": record["control"]["e_now"],
                "dead": dead,
            }
            yield _event("contradiction", record, basis=basis, evidence=evidence)
        known[basis] = contradicted


def _overfitting(of_phase: Memory, record: Record, thresholds: Thresholds) -> Iterator[Event]:
    loss = record.get("metrics", {}).get("loss")
    if record["phase"] != "eval" or loss is None:
        return
    state = of_phase.setdefault("overfitting", {"best": loss, "step": record["step"], "worse": 0})
    if loss <= state["best"]:
        state.update(best=loss, step=record["step"], worse=0)
        return
    state["worse"] += loss > state["best"] * (1 + thresholds.overfitting_rise)
    if state["worse"] == thresholds.overfitting_reports:
        evidence = {"loss": loss, "best": state["best"], "best_step": state["step"]}
        evidence |= {"dead": record["dead"]["top1"]}
        yield _event("overfitting", record, evidence=evidence)


def _event(kind: str, record: Record, **fields: Any) -> Event:
    return Event(
        kind=kind, step=record["step"], phase=record["phase"], advice=ADVICE[kind], **fields
    )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)
