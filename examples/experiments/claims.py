"""The paper's claims and the rules by which results decide them. Pure functions on results."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from examples.experiments.analysis import spread
from examples.experiments.complexity import critical_e, fit_said
from examples.experiments.figures import (
    by_condition,
    flow,
    general,
    predictions,
    revival,
    revived_experts,
    scan,
    scores,
    tier_usage,
    trained,
    window,
)
from examples.experiments.measure import Record

Results = dict[str, Record]
HEALTHY_E = 0.5
# Vision at the paper's weights, where the number of classes differs.
BY_CLASSES = (
    *("low-e", "tiny", "tiny-high-e", "tiny-32", "phase-map"),
    *("four-tiers-tiny", "flat-tiny", "four-tiers-cifar100", "flat-cifar100"),
)


class Verdict(NamedTuple):
    """A word and its reason, in figures."""

    word: str
    why: str


class Claim(NamedTuple):
    """A claim, the experiments that bear on it, and the rule that decides it.

    The rule sees at least one of the experiments.
    """

    label: str
    text: str
    needs: tuple[str, ...]
    judge: Callable[[Results], Verdict]


def missing(claim: Claim, found: Results) -> list[str]:
    """Return the experiments a claim needs and has no results of."""
    return [name for name in claim.needs if name not in found]


def _runs(found: Results, *names: str) -> list[Record]:
    """Return the runs of experiments, each once where experiments share it."""
    runs = {}
    for name in names:
        for run in found[name]["runs"] if name in found else ():
            setting = {key: value for key, value in run["setting"].items() if key != "name"}
            runs.setdefault(repr((setting, run["scale"], run["seed"])), run)
    return list(runs.values())


def _absent(runs: list[Record], why: str) -> Verdict:
    """Judge a phenomenon that did not appear: smaller data and models may be why."""
    if all(run["scale"] == "paper" for run in runs):
        return Verdict("refuted", why)
    return Verdict("out of reach", f"{why} It does not appear on the stand-in data at this scale.")


def _dead(run: Record, basis: str = "top1") -> int:
    return int(run["final"]["dead"][basis])


def _guarantee(found: Results) -> Verdict:
    runs = _runs(found, "predicts-collapse", "e-order", "low-e", "tiny", "tiny-high-e")
    high = [run for run in runs if run["setting"]["control"]["e"] >= HEALTHY_E]
    if not high:
        return Verdict("not yet run", "no run at E >= 0.5")
    counts = {basis: sum(_dead(run, basis) > 0 for run in high) for basis in ("top1", "topk")}
    word = "refuted" if any(counts.values()) else "reproduced"
    worst = max(_dead(run) for run in high)
    return Verdict(
        word,
        f"of {len(high)} runs at E >= 0.5, {counts['top1']} end with dead experts on top1 "
        f"(at worst {worst} of 16) and {counts['topk']} on topk.",
    )


def _ranking(found: Results) -> Verdict:
    content = found["predicts-collapse"]
    rows = {row["name"]: row for row in predictions(content)}
    own = rows["E"]
    if own["auc"] is None:
        return Verdict("out of reach", "all runs ended alike.")
    others = [row for name, row in rows.items() if name != "E"]
    best = max(others, key=lambda row: abs(row["auc"] - 0.5))
    low, high = own["interval"]
    why = (
        f"{len(content['runs'])} random settings: AUC of E for survival {own['auc']:.2f} "
        f"[{low:.2f}, {high:.2f}]; of {best['name']} alone {best['auc']:.2f} "
        f"[{best['interval'][0]:.2f}, {best['interval'][1]:.2f}]."
    )
    if best["auc"] > 0.5:
        values = [(scores(run)[best["name"]], _dead(run)) for run in content["runs"]]
        lost = max(value for value, dead in values if dead)
        kept = min(value for value, dead in values if not dead)
        why += (
            f" Above {best['name']} = {lost:.2g} no run lost an expert; below {kept:.2g} all did."
        )
    if low <= 0.5:
        return Verdict("refuted", f"{why} E ranks outcomes no better than chance.")
    if abs(best["auc"] - 0.5) > own["auc"] - 0.5:
        return Verdict("qualified", f"{why} E predicts, but less well than {best['name']}.")
    return Verdict("reproduced", why)


def _cross_modal(found: Results) -> Verdict:
    runs = _runs(found, "wikitext2", "wikitext103")
    dead = [(_dead(run), _dead(run, "topk")) for run in runs]
    word = "reproduced" if not any(map(any, dead)) else "refuted"
    layers = len(runs[0]["final"]["layers"])
    counts = ", ".join(f"{top1}/{topk}" for top1, topk in dead)
    return Verdict(word, f"DEAD top1/topk over {layers} layers by run: {counts}.")


def _revival(found: Results) -> Verdict:
    if "revival" not in found:
        ever, back = map(sum, zip(*map(revived_experts, _runs(found, "tiny")), strict=True))
        word = "reproduced" if back else "refuted" if ever else "out of reach"
        return Verdict(word, f"of {ever} experts dead after the warm-up, {back} end alive.")
    parts, with_balance, without = [], [], []
    for name, runs in by_condition(found["revival"]).items():
        delays = [revival(run)["revived after, % of training"] for run in runs]
        back = [delay for delay in delays if delay != float("inf")]
        slowest = f", at most {max(back):.0f} % of training after release" if back else ""
        parts.append(f"{name}: {len(back)} of {len(delays)} revived{slowest}")
        control, strength = runs[0]["setting"]["control"], runs[0]["setting"]["strength"]
        balanced = control["balance_weight"] > 0 and strength != 0  # None is the layer's own
        (with_balance if balanced else without).extend(d in back for d in delays)
    why = "; ".join(parts) + "."
    if not all(with_balance):
        return Verdict("refuted" if not any(with_balance) else "qualified", why)
    if any(without):
        return Verdict("qualified", f"{why} Revival needs no balance loss here.")
    return Verdict("reproduced", why)


def _complexity(found: Results) -> Verdict:
    names = ("class-count",) if "class-count" in found else BY_CLASSES
    deaths: dict[int, dict[float, list[float]]] = {}
    for run in _runs(found, *names):
        layer = run["final"]["layers"][0]
        by_e = deaths.setdefault(run["data"]["classes"], {})
        e = run["setting"]["control"]["e"]
        by_e.setdefault(e, []).append(16 * layer["dead_relative"]["top1"] / layer["num_experts"])
    healthy = {
        count: [value for e, values in by_e.items() if e >= HEALTHY_E for value in values]
        for count, by_e in sorted(deaths.items())
    }
    healthy = {count: values for count, values in healthy.items() if values}
    shown = ", ".join(f"{count}: {spread(v).mean:.1f} ({len(v)})" for count, v in healthy.items())
    why = (
        "mean DEAD top1 in 16 experts, by a threshold relative to their number, at E >= 0.5, by "
        f"classes (runs): {shown}."
    )
    if len(healthy) < 2:
        return Verdict("not yet run", f"{why} More class counts are needed.")
    if names == ("class-count",):
        means = {
            count: {e: spread(values).mean for e, values in sorted(by_e.items())}
            for count, by_e in sorted(deaths.items())
        }
        critical = critical_e(means)
        why += " " + fit_said(critical)
    few, many = healthy[min(healthy)], healthy[max(healthy)]
    if spread(many).mean > spread(few).mean + 0.5:
        if names == ("class-count",) and not any(critical.values()):
            why += " More classes bring more deaths, but no higher E is seen to end them."
            return Verdict("qualified", why)
        return Verdict("reproduced", why)
    if names == ("class-count",):
        return Verdict("refuted", f"{why} More classes do not mean more deaths here.")
    return _absent(_runs(found, *names), why)


def _overfitting(found: Results) -> Verdict:
    parts, decoupled = [], []
    for run in _runs(found, "wikitext103", "wikitext2"):
        losses = [record["loss"] for record in run["history"]]
        rise = losses[-1] / min(losses) - 1
        parts.append(f"test loss ends {100 * rise:.1f} % above its minimum, DEAD {_dead(run)}")
        decoupled.append((rise > 0.05, _dead(run) == 0))
    why = "; ".join(parts) + "."
    if not any(overfit for overfit, _ in decoupled):
        return Verdict("out of reach", f"{why} Nothing overfits in so short a training.")
    whole = all(healthy for overfit, healthy in decoupled if overfit)
    return Verdict("reproduced" if whole else "refuted", why)


def _ortho(found: Results) -> Verdict:
    parts, toxic = [], []
    for name in ("ortho-cifar100", "ortho-cifar10", "ortho-wikitext2", "e-x-ortho"):
        if name not in found:
            continue
        groups = by_condition(found[name])
        deaths = {
            key: spread([float(_dead(run)) for run in runs]).mean for key, runs in groups.items()
        }
        parts.append(f"{name}: " + ", ".join(f"{key} {mean:.1f}" for key, mean in deaths.items()))
        values = list(deaths.values())
        toxic.append(max(values[1:], default=values[0]) > values[0] + 1)
    why = "mean DEAD top1, " + "; ".join(parts) + "."
    if all(toxic):
        return Verdict("refuted", f"{why} Ortho is toxic in every one.")
    return Verdict("reproduced", why)


def _tier_collapse(found: Results) -> Verdict:
    runs = [r for r in _runs(found, "tiny", "tier-flow", "tiny-high-e") if len(tier_usage(r)) == 3]
    usages = [tier_usage(run)[1] for run in runs]
    why = "middle tier's share by run: " + ", ".join(f"{usage:.0f} %" for usage in usages) + "."
    if all(usage < 10 for usage in usages):
        return Verdict("reproduced", why)
    why += " Its experts are 25 % of all."
    if all(usage >= 10 for usage in usages):
        return _absent(runs, why)
    return Verdict("qualified", why)


def _temperature(found: Results) -> Verdict:
    runs = _runs(found, "temperature-scan")
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
    runs = _runs(found, "tier-flow")
    figures = [flow(run) for run in runs]
    shares = ", ".join(f"{f['T0 self %']:.0f} %" for f in figures)
    lifts = [f["T0 self lift"] for f in figures if "T0 self lift" in f]
    shown = ", ".join(f"{lift:.2f}" for lift in lifts)
    why = f"T0 self-loop {shares} of tokens; over independence {shown}."
    if all(lift <= 1.1 for lift in lifts):
        return _absent(runs, f"{why} The loop is no larger than the tier's usage makes it.")
    return Verdict("qualified", why)


def _depth(found: Results) -> Verdict:
    runs = _runs(found, "four-tiers-tiny", "four-tiers-cifar100")
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
    return Verdict("qualified", why) if any(cycles) else _absent(runs, why)


def _multistable(found: Results) -> Verdict:
    runs = _runs(found, "four-tiers-tiny")
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
    return Verdict("qualified", why) if widest > 10 else _absent(runs, why)


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
            "reproduced",
            f"{why} Equal by construction: tiers are labels here, as in the paper's description, "
            "so a flat and a tiered layer of one seed are the same network; a gap between them, "
            "such as the paper's 1.48 points on CIFAR-100, is then noise between runs.",
        )
    return Verdict("reproduced" if max(gaps) < 1 else "qualified", why)


def _stability(found: Results) -> Verdict:
    figures = [window(run) for run in _runs(found, "per-epoch")]
    sd = max(f["top-1 sd, points"] for f in figures)
    drift = max(f["last minus mean, points"] for f in figures)
    tier = max(f["tier usage range, points"] for f in figures)
    why = (
        f"over the last tenth of {len(figures)} runs: sd of top-1 at most {sd:.2f} points, the "
        f"last value within {drift:.2f} of the mean, tier usage within {tier:.1f} points."
    )
    return Verdict("reproduced" if sd < 0.5 and tier < 2 else "qualified", why)


def _thirty_two(found: Results) -> Verdict:
    runs = [r for r in _runs(found, "tiny-32") if sum(r["setting"]["tiers"]) == 32]
    few = [r for r in _runs(found, "tiny-32") if sum(r["setting"]["tiers"]) == 16]
    absolute = spread([float(_dead(run)) for run in runs]).mean
    relative = spread([general(run)["relative top1"] for run in runs]).mean
    base = spread([float(_dead(run)) for run in few]).mean
    why = (
        f"mean DEAD top1 with 32 experts: {absolute:.1f} by the absolute 1 %, {relative:.1f} by a "
        f"threshold relative to 1/32; with 16 experts {base:.1f}."
    )
    if relative > 2 * base + 1:
        return Verdict("reproduced", why)
    word = "qualified" if absolute > 2 * base + 1 else "refuted"
    return Verdict(word, why)


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
        ("living", lambda run: 16.0 - _dead(run)),
        ("PURE_CORE", lambda run: general(run)["PURE"]),
    ):
        means = [spread([count(run) for run in runs]).mean for runs in groups.values()]
        falls.append(any(after < before for before, after in pairwise(means)))
        shown = ", ".join(f"{key} {m:.1f}" for key, m in zip(groups, means, strict=True))
        parts.append(f"mean {name}: {shown}")
    word = {0: "reproduced", 1: "qualified", 2: "refuted"}[sum(falls)]
    return Verdict(word, "; ".join(parts) + ".")


def _promise(found: Results) -> Verdict:
    runs = _runs(found, "promise")
    dead = [
        {
            basis: sum(layer["dead_relative"][basis] for layer in run["final"]["layers"])
            for basis in ("top1", "topk")
        }
        for run in runs
    ]
    broken = {basis: sum(entry[basis] > 0 for entry in dead) for basis in ("top1", "topk")}
    worst = max(entry["top1"] for entry in dead)
    why = (
        f"of {len(runs)} runs, {broken['top1']} end with dead experts on top1 (at worst {worst} in "
        f"all layers together) and {broken['topk']} on topk."
    )
    rates = {
        run["setting"]["rate"] for run, entry in zip(runs, dead, strict=True) if any(entry.values())
    }
    if rates:
        why += f" Learning rates of those: x {', x '.join(f'{rate:g}' for rate in sorted(rates))}."
    return Verdict("refuted" if any(broken.values()) else "reproduced", why)


def _warmup(found: Results) -> Verdict:
    groups = by_condition(found["no-warmup"])
    deaths = {k: spread([float(_dead(r)) for r in runs]).mean for k, runs in groups.items()}
    why = "mean DEAD top1: " + ", ".join(f"{key} {value:.1f}" for key, value in deaths.items())
    return Verdict("reproduced" if not any(deaths.values()) else "qualified", why + ".")


CLAIMS = (
    Claim(
        "1a",
        "E >= 0.5 alone guarantees that no expert dies",
        ("predicts-collapse", "e-order", "low-e", "tiny"),
        _guarantee,
    ),
    Claim("1b", "E predicts collapse (better than its parts)", ("predicts-collapse",), _ranking),
    Claim("1c", "PURE_CORE rises with E (4.1)", ("phase-map",), _gradient),
    Claim(
        "1d",
        "Living and PURE_CORE experts do not fall as E rises (with the package's defaults, where E "
        "sets the usage floor)",
        ("e-order",),
        _order,
    ),
    Claim("1e", "1a with the package's defaults, over tiers and rates", ("promise",), _promise),
    Claim("2", "The same in language: DEAD = 0", ("wikitext2", "wikitext103"), _cross_modal),
    Claim("3", "Dead experts revive, by the balance loss", ("revival", "tiny"), _revival),
    Claim("4", "More classes raise the critical E", ("class-count", *BY_CLASSES), _complexity),
    Claim("4b", "32 experts backfire (4.6)", ("tiny-32",), _thirty_two),
    Claim("5", "Overfitting is decoupled from ecology", ("wikitext103", "wikitext2"), _overfitting),
    Claim(
        "6",
        "Ortho is not toxic everywhere",
        ("ortho-cifar100", "ortho-cifar10", "ortho-wikitext2", "e-x-ortho"),
        _ortho,
    ),
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
    Claim("4.9", "Warm-up is optional", ("no-warmup",), _warmup),
)

# The six findings of the paper's first version (its abstract), as claims above.
FIRST_VERSION = (
    ("Dead experts can resuscitate, by balance loss", "3"),
    ("Ortho toxicity depends on the data set", "6"),
    ("Task complexity shifts the critical E", "4"),
    ("Overfitting is decoupled from the experts' health", "5"),
    ("Three tiers collapse into two", "7"),
    ("The ecology is invariant to temperature, over a range of 50", "8"),
)
