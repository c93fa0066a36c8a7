"""The paper's claims and the rules by which results decide them. Pure functions on results."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from examples.experiments import survival
from examples.experiments.analysis import spread
from examples.experiments.figures import (
    by_condition,
    flow,
    general,
    scan,
    tier_usage,
    trained,
    window,
)
from examples.experiments.verdicts import Results, Verdict, absent, dead, runs_of


class Claim(NamedTuple):
    """A claim, the experiments that bear on it, and the rule that decides it.

    The rule sees at least one of the experiments that are needed, or of those taken instead.
    """

    label: str
    text: str
    needs: tuple[str, ...]
    judge: Callable[[Results], Verdict]
    instead: tuple[str, ...] = ()


def missing(claim: Claim, found: Results) -> list[str]:
    """Return the experiments a claim needs and has no results of."""
    return [name for name in claim.needs if name not in found]


def _tier_collapse(found: Results) -> Verdict:
    runs = [
        r for r in runs_of(found, "tiny", "tier-flow", "tiny-high-e") if len(tier_usage(r)) == 3
    ]
    usages = [tier_usage(run)[1] for run in runs]
    why = "middle tier's share by run: " + ", ".join(f"{usage:.0f} %" for usage in usages) + "."
    if all(usage < 10 for usage in usages):
        return Verdict("reproduced", why)
    why += " Its experts are 25 % of all."
    if all(usage >= 10 for usage in usages):
        return absent(runs, why)
    return Verdict("qualified", why)


def _temperature(found: Results) -> Verdict:
    runs = runs_of(found, "temperature-scan")
    first = max(scan(run)["first layer, change of usage %"] for run in runs)
    later = [
        scan(run)["later layers, change of usage %"]
        for run in runs
        if "later layers, change of usage %" in scan(run)
    ]
    why = f"first (or only) layer: usage changes by at most {first:.2g} points, by arithmetic."
    if not later:
        return Verdict("qualified", f"{why} Top-k ignores a positive T, so it says nothing else.")
    why += (
        f" Later layers, whose input passed through earlier gates: up to {max(later):.2g} points."
    )
    return Verdict("qualified" if max(later) > 0.1 else "reproduced", why)


def _lockdown(found: Results) -> Verdict:
    runs = runs_of(found, "tier-flow")
    figures = [flow(run) for run in runs]
    shares = ", ".join(f"{f['T0 self %']:.0f} %" for f in figures)
    lifts = [f["T0 self lift"] for f in figures if "T0 self lift" in f]
    shown = ", ".join(f"{lift:.2f}" for lift in lifts)
    why = f"T0 self-loop {shares} of tokens; over independence {shown}."
    if not lifts or spread(lifts).mean <= 1.1:
        return absent(runs, f"{why} The loop is no larger than the tier's usage makes it.")
    return Verdict("qualified", why)


def _depth(found: Results) -> Verdict:
    runs = runs_of(found, "four-tiers-tiny", "four-tiers-cifar100")
    lows = [min(s for r in trained(run) for s in r["layers"][0]["tier_usage"]) for run in runs]
    ends = [min(tier_usage(run)) for run in runs]
    shown = ", ".join(
        f"{100 * low:.0f} -> {end:.0f} %" for low, end in zip(lows, ends, strict=True)
    )
    cycles = [low < 0.02 and end > 5 for low, end in zip(lows, ends, strict=True)]
    why = f"lowest share of any tier after the warm-up -> the smallest tier's at the end: {shown}."
    if all(cycles):
        return Verdict("reproduced", why)
    why += f" A tier nearly died and came back in {sum(cycles)} of {len(runs)}."
    return Verdict("qualified", why) if any(cycles) else absent(runs, why)


def _multistable(found: Results) -> Verdict:
    runs = runs_of(found, "four-tiers-tiny")
    shares = spread([general(run)["top-1 %"] for run in runs])
    usages = [tier_usage(run) for run in runs]
    if len(runs) < 2:
        return Verdict("not yet run", "one seed shows no difference between seeds.")
    widest = max(max(tier) - min(tier) for tier in zip(*usages, strict=True))
    shown = "; ".join("/".join(f"{share:.0f}" for share in usage) for usage in usages)
    why = f"top-1 {shares.mean:.1f} ± {shares.sd:.1f} %; tiers by seed: {shown} %."
    if widest > 10 and shares.sd < 0.03 * shares.mean:
        return Verdict("reproduced", why)
    why += f" Tiers differ between seeds by at most {widest:.0f} points."
    return Verdict("qualified", why) if widest > 10 else absent(runs, why)


def _flat(found: Results) -> Verdict:
    parts, identical, gaps = [], [], []
    for name in ("flat-tiny", "flat-cifar100"):
        if name not in found:
            continue
        tiered, flat = by_condition(found[name]).values()
        pairs = [
            (general(a)["top-1 %"], general(b)["top-1 %"])
            for a, b in zip(tiered, flat, strict=False)
        ]
        identical.append(all(a == b for a, b in pairs))
        gaps += [abs(a - b) for a, b in pairs]
        parts.append(f"{name}: " + ", ".join(f"{a:.1f} and {b:.1f} %" for a, b in pairs))
    why = "; ".join(parts) + ", pair by seed."
    if all(identical):
        return Verdict(
            "qualified",
            f"{why} True by construction, which no run tests: tiers are labels here, as in the "
            "paper's description, so a flat and a tiered layer of one seed are the same network. "
            "Where they are so in the paper's code too, its gap of 1.48 points on CIFAR-100 is "
            "noise between runs.",
        )
    return Verdict("reproduced" if max(gaps) < 1 else "qualified", why)


def _stability(found: Results) -> Verdict:
    figures = [window(run) for run in runs_of(found, "per-epoch")]
    sd = max(f["top-1 sd, points"] for f in figures)
    drift = max(f["last minus mean, points"] for f in figures)
    tier = max(f["tier usage range, points"] for f in figures)
    again = len(found["per-epoch"]["runs"]) - len(figures)
    same = f" ({again} more are the same networks under other labels of tiers)" if again else ""
    why = (
        f"over the last tenth of {len(figures)} runs{same}: sd of top-1 at most {sd:.2f} points, "
        f"the last value within {drift:.2f} of the mean, tier usage within {tier:.2f} points."
    )
    # A range of 2 points is not below 2, though the shares' difference may round to less.
    return Verdict("reproduced" if sd < 0.5 and round(tier, 9) < 2 else "qualified", why)


def _gradient(found: Results) -> Verdict:
    groups = by_condition(found["phase-map"])
    pure = {key: spread([general(r)["PURE"] for r in runs]).mean for key, runs in groups.items()}
    core = list(pure.values())
    why = "mean PURE_CORE: " + ", ".join(f"{key} {value:.1f}" for key, value in pure.items()) + "."
    if max(core) < 1.0:
        return Verdict("out of reach", f"{why} Less than one of 16 at any E has no trend to show.")
    rises = core == sorted(core) and core[-1] > core[0]
    return Verdict("reproduced" if rises else "refuted", why)


def _order(found: Results) -> Verdict:
    groups = by_condition(found["e-order"])
    parts, falls = [], []
    for name, count in (
        ("living", lambda run: 16.0 - dead(run)),
        ("PURE_CORE", lambda run: general(run)["PURE"]),
    ):
        means = [spread([count(run) for run in runs]).mean for runs in groups.values()]
        falls.append(any(after < before for before, after in pairwise(means)))
        shown = ", ".join(f"{key} {m:.1f}" for key, m in zip(groups, means, strict=True))
        parts.append(f"mean {name}: {shown}")
    word = {0: "reproduced", 1: "qualified", 2: "refuted"}[sum(falls)]
    return Verdict(word, "; ".join(parts) + ".")


CLAIMS = (
    Claim(
        "1a",
        "E >= 0.5 alone guarantees that no expert dies",
        survival.GUARANTEED,
        survival.guarantee,
    ),
    Claim(
        "1b",
        "E predicts collapse (better than its parts)",
        ("predicts-collapse",),
        survival.ranking,
    ),
    Claim("1c", "PURE_CORE rises with E (4.1)", ("phase-map",), _gradient),
    Claim(
        "1d",
        "Living and PURE_CORE experts do not fall as E rises (with the package's defaults, where E "
        "sets the usage floor)",
        ("e-order",),
        _order,
    ),
    Claim(
        "1e",
        "No expert dies at E >= 0.5 with the package's defaults, over tiers and rates",
        ("promise",),
        survival.promise,
    ),
    Claim(
        "2", "The same in language: DEAD = 0", ("wikitext2", "wikitext103"), survival.cross_modal
    ),
    Claim(
        "3",
        "Dead experts revive, by the balance loss",
        ("revival",),
        survival.revives,
        instead=("tiny",),
    ),
    Claim(
        "4",
        "More classes raise the critical E",
        ("class-count",),
        survival.complexity,
        instead=survival.BY_CLASSES,
    ),
    Claim("4b", "32 experts backfire (4.6)", ("tiny-32",), survival.thirty_two),
    Claim(
        "5",
        "Overfitting is decoupled from ecology",
        ("wikitext103", "wikitext2"),
        survival.overfitting,
    ),
    Claim(
        "6",
        "Ortho is not toxic everywhere",
        ("ortho-cifar100", "ortho-cifar10", "ortho-wikitext2", "e-x-ortho"),
        survival.ortho,
    ),
    Claim("6b", "Ortho toxicity depends on the data set", survival.SWEEPS, survival.ortho_by_data),
    Claim("7", "Three tiers collapse to two", ("tiny", "tier-flow"), _tier_collapse),
    Claim("8", "Ecology is invariant to temperature", ("temperature-scan",), _temperature),
    Claim("9", "Lockdown by the T0 self-loop", ("tier-flow",), _lockdown),
    Claim(
        "10",
        "Depth emerges: a tier collapses and recovers",
        ("four-tiers-tiny", "four-tiers-cifar100"),
        _depth,
    ),
    Claim("11", "Equal accuracy by different tiers", ("four-tiers-tiny",), _multistable),
    Claim("12", "Hierarchy equals flat", ("flat-tiny", "flat-cifar100"), _flat),
    Claim("13", "Metrics are stable over the last epochs", ("per-epoch",), _stability),
    Claim("4.4", "E = 0.30 costs experts and accuracy", ("low-e",), survival.low_e),
    Claim("4.9", "Warm-up is optional", ("no-warmup",), survival.warmup),
)

# The six findings of the paper's first version (its abstract), as claims above.
FIRST_VERSION = (
    ("Dead experts can resuscitate, by balance loss", "3"),
    ("Ortho toxicity depends on the data set", "6b"),
    ("Task complexity shifts the critical E", "4"),
    ("Overfitting is decoupled from the experts' health", "5"),
    ("Three tiers collapse into two", "7"),
    ("The ecology is invariant to temperature, over a range of 50", "8"),
)
