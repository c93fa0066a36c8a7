"""What a rule gives and what it is given. Pure functions on results."""

from __future__ import annotations

from typing import NamedTuple

from examples.experiments.measure import Record

Results = dict[str, Record]


class Verdict(NamedTuple):
    """A word and its reason, in figures."""

    word: str
    why: str


def runs_of(found: Results, *names: str) -> list[Record]:
    """Return the runs of experiments, each network once.

    Experiments share runs; and tiers are labels, so layers of one seed with as many experts are
    the same network in whatever tiers. The first counts.
    """
    runs = {}
    for name in names:
        for run in found[name]["runs"] if name in found else ():
            setting = {key: value for key, value in run["setting"].items() if key != "name"}
            setting["tiers"] = sum(setting.get("tiers", ()))
            runs.setdefault(repr((setting, run["scale"], run["seed"])), run)
    return list(runs.values())


def absent(runs: list[Record], why: str) -> Verdict:
    """Judge a phenomenon that did not appear: smaller data and models may be why."""
    if all(run["scale"] == "paper" for run in runs):
        return Verdict("refuted", why)
    return Verdict("out of reach", f"{why} It does not appear on the stand-in data at this scale.")


def dead(run: Record, basis: str = "top1") -> int:
    """Return how many experts are dead at the end, by the absolute 1 %, summed over layers."""
    return int(run["final"]["dead"][basis])
