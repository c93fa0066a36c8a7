"""The rules on who lives and dies, and why. Pure functions on results."""

from __future__ import annotations

from examples.experiments.analysis import spread
from examples.experiments.complexity import critical_e, fit_said
from examples.experiments.figures import (
    by_condition,
    general,
    predictions,
    revival,
    revived_experts,
    scores,
    worst_dead,
)
from examples.experiments.measure import Record
from examples.experiments.verdicts import Results, Verdict, absent, dead, runs_of

HEALTHY_E = 0.5
BASES = ("top1", "topk")
# Every vision run of 16 experts by the paper's losses at strength 1, but for ortho and the warm-up.
GUARANTEED = (
    *("predicts-collapse", "low-e", "phase-map", "tiny", "tiny-high-e"),
    *("four-tiers-tiny", "four-tiers-cifar100", "class-count"),
)
SWEEPS = ("ortho-cifar100", "ortho-cifar10", "ortho-wikitext2")
# Vision at the paper's weights, where the number of classes differs.
BY_CLASSES = (
    *("low-e", "tiny", "tiny-high-e", "tiny-32", "phase-map"),
    *("four-tiers-tiny", "flat-tiny", "four-tiers-cifar100", "flat-cifar100"),
)


def mean_dead(runs: list[Record]) -> float:
    """Return the mean number of experts dead at the end on top1."""
    return spread([float(dead(run)) for run in runs]).mean


def guarantee(found: Results) -> Verdict:
    """Judge 1a: no expert dies at E >= 0.5."""
    runs = runs_of(found, *GUARANTEED)
    high = [run for run in runs if run["setting"]["control"]["e"] >= HEALTHY_E]
    if not high:
        return Verdict("not yet run", "no run at E >= 0.5")
    counts = {basis: sum(dead(run, basis) > 0 for run in high) for basis in BASES}
    worst = max(high, key=dead)
    source = ""
    parts = []
    left = high
    for name in GUARANTEED:
        known = {id(run) for run in found[name]["runs"]} if name in found else set()
        own = [run for run in left if id(run) in known]
        left = [run for run in left if id(run) not in known]
        if own:
            parts.append(f"{name} {sum(dead(run) > 0 for run in own)} of {len(own)}")
        if any(run is worst for run in own):
            source = f"{name}, {worst['name']}, E = {worst['setting']['control']['e']:.2f}"
    why = (
        f"of {len(high)} runs at E >= 0.5 (vision, 16 experts, the paper's losses at strength 1; "
        "in predicts-collapse at random T, H, O and B, elsewhere at weights of the paper's kind), "
        f"{counts['top1']} end with dead experts on top1 and {counts['topk']} on topk. On top1: "
        f"{', '.join(parts)}."
    )
    if any(counts.values()):
        return Verdict("refuted", f"{why} At worst {dead(worst)} of 16 ({source}).")
    return Verdict("reproduced", why)


def low_e(found: Results) -> Verdict:
    """Judge 4.4: E = 0.30 costs experts and accuracy."""
    runs = found["low-e"]["runs"]
    values = sorted({run["setting"]["control"]["e"] for run in runs})
    if len(values) < 2:
        return Verdict("not yet run", "two values of E are needed.")
    groups = [
        {run["seed"]: run for run in runs if run["setting"]["control"]["e"] == e}
        for e in (values[0], values[-1])
    ]
    lost, kept = (mean_dead(list(group.values())) for group in groups)
    worst = [spread([worst_dead(run) for run in group.values()]).mean for group in groups]
    shares = [[general(run)["top-1 %"] for run in group.values()] for group in groups]
    gap = spread(
        [
            general(run)["top-1 %"] - general(groups[0][seed])["top-1 %"]
            for seed, run in groups[1].items()
            if seed in groups[0]
        ]
    )
    low, high = gap.interval or (-float("inf"), float("inf"))
    within = f" [{low:+.2f}, {high:+.2f}]" if gap.interval else ""
    why = (
        f"mean DEAD top1 {lost:.1f} at E = {values[0]:.3g} and {kept:.1f} at {values[-1]:.3g} (the "
        f"paper: 2 and 0), at worst on the way {worst[0]:.1f} and {worst[1]:.1f}; top-1 "
        f"{spread(shares[0]).mean:.1f} and {spread(shares[1]).mean:.1f} %, {gap.mean:+.2f}{within} "
        "points (the paper: +2.9)."
    )
    more_dead, less_accurate = lost > kept + 0.5, low > 0
    if kept > lost + 0.5 or high < 0:
        return Verdict("refuted", why)
    if more_dead or less_accurate:
        return Verdict("reproduced" if more_dead and less_accurate else "qualified", why)
    return absent(runs, why)


def ranking(found: Results) -> Verdict:
    """Judge 1b: E ranks outcomes, and better than its parts."""
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
        values = [(scores(run)[best["name"]], dead(run)) for run in content["runs"]]
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


def revives(found: Results) -> Verdict:
    """Judge 3: dead experts revive, by the balance loss."""
    if "revival" not in found:
        ever, back = map(sum, zip(*map(revived_experts, runs_of(found, "tiny")), strict=True))
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


def overfitting(found: Results) -> Verdict:
    """Judge 5: what overfits may be healthy."""
    parts, decoupled = [], []
    for run in runs_of(found, "wikitext103", "wikitext2"):
        losses = [record["loss"] for record in run["history"]]
        rise = losses[-1] / min(losses) - 1
        parts.append(f"test loss ends {100 * rise:.1f} % above its minimum, DEAD {dead(run)}")
        decoupled.append((rise > 0.05, dead(run) == 0))
    why = "; ".join(parts) + "."
    if not any(overfit for overfit, _ in decoupled):
        return Verdict("out of reach", f"{why} Nothing overfits in so short a training.")
    whole = all(healthy for overfit, healthy in decoupled if overfit)
    return Verdict("reproduced" if whole else "refuted", why)


def thirty_two(found: Results) -> Verdict:
    """Judge 4b: 32 experts lose more."""
    runs = [r for r in runs_of(found, "tiny-32") if sum(r["setting"]["tiers"]) == 32]
    few = [r for r in runs_of(found, "tiny-32") if sum(r["setting"]["tiers"]) == 16]
    absolute = spread([float(dead(run)) for run in runs]).mean
    relative = spread([general(run)["relative top1"] for run in runs]).mean
    base = spread([float(dead(run)) for run in few]).mean
    why = (
        f"mean DEAD top1 with 32 experts: {absolute:.1f} by the absolute 1 %, {relative:.1f} by a "
        f"threshold relative to 1/32; with 16 experts {base:.1f}."
    )
    if relative > 2 * base + 1:
        return Verdict("reproduced", why)
    word = "qualified" if absolute > 2 * base + 1 else "refuted"
    return Verdict(word, why)


def cross_modal(found: Results) -> Verdict:
    """Judge 2: no expert dies in language."""
    runs = runs_of(found, "wikitext2", "wikitext103")
    counts = [(dead(run), dead(run, "topk")) for run in runs]
    word = "reproduced" if not any(map(any, counts)) else "refuted"
    layers = len(runs[0]["final"]["layers"])
    shown = ", ".join(f"{top1}/{topk}" for top1, topk in counts)
    return Verdict(word, f"DEAD top1/topk over {layers} layers by run: {shown}.")


def _deaths_by_class(runs: list[Record]) -> dict[int, dict[float, float]]:
    """Return mean deaths in 16 experts, by a relative threshold: by classes, by E."""
    counts: dict[int, dict[float, list[float]]] = {}
    for run in runs:
        layer = run["final"]["layers"][0]
        by_e = counts.setdefault(run["data"]["classes"], {})
        by_e.setdefault(run["setting"]["control"]["e"], []).append(
            16 * layer["dead_relative"]["top1"] / layer["num_experts"]
        )
    return {
        classes: {e: spread(values).mean for e, values in sorted(by_e.items())}
        for classes, by_e in sorted(counts.items())
    }


def complexity(found: Results) -> Verdict:
    """Judge 4: with more classes, experts live only from a higher E on."""
    if "class-count" not in found:
        return _complexity_at_healthy_e(runs_of(found, *BY_CLASSES))
    runs = runs_of(found, "class-count")
    means = _deaths_by_class(runs)
    values = sorted({e for by_e in means.values() for e in by_e})
    shown = "; ".join(
        f"{classes}: {', '.join(f'{by_e[e]:.1f}' for e in values if e in by_e)}"
        for classes, by_e in means.items()
    )
    why = (
        "mean DEAD top1 in 16 experts, by a threshold relative to their number, at E = "
        f"{', '.join(f'{e:g}' for e in values)}, by classes: {shown}."
    )
    # Class counts are compared over the same values of E, below and above what is called healthy.
    means = {classes: by_e for classes, by_e in means.items() if list(by_e) == values}
    if len(means) < 2:
        return Verdict("not yet run", f"{why} More class counts at all of these are needed.")
    if not min(values) < HEALTHY_E <= max(values):
        return Verdict("not yet run", f"{why} E on both sides of {HEALTHY_E} is needed.")
    critical = critical_e(means)
    why += " " + fit_said(critical)
    known = [e for e in critical.values() if e is not None]
    if len(known) > 1:
        rises = known == sorted(known) and known[-1] > known[0]
        return Verdict("reproduced" if rises else "refuted", why)
    few, many = (list(means[classes].values()) for classes in (min(means), max(means)))
    if spread(many).mean <= spread(few).mean:
        return Verdict("refuted", f"{why} More classes do not mean more deaths here.")
    if critical[max(means)] is not None:
        return Verdict("qualified", f"{why} Of the others none was found.")
    # What no E ends may still become less as E rises, or be what a high E brings.
    most = [run for run in runs if run["data"]["classes"] == max(means)]
    by_seed = []
    for seed in sorted({run["seed"] for run in most}):
        (by_e,) = _deaths_by_class([run for run in most if run["seed"] == seed]).values()
        sides = [[n for e, n in by_e.items() if (e >= HEALTHY_E) is high] for high in (False, True)]
        if all(sides):
            by_seed.append([spread(side).mean for side in sides])
    shown = "; ".join(f"{low:.1f} and {high:.1f}" for low, high in by_seed)
    why += (
        f" With {max(means)} classes there die on average at E < {HEALTHY_E} and at E >= "
        f"{HEALTHY_E}, by seed: {shown}. No E that was tried ends the deaths"
    )
    if not by_seed:
        return Verdict("out of reach", f"{why}.")
    low, high = (spread(side).mean for side in zip(*by_seed, strict=True))
    if low > high:
        return Verdict("qualified", f"{why}, but they become fewer as it rises.")
    if len(by_seed) > 1 and all(high > low for low, high in by_seed):
        return Verdict("refuted", f"{why}: they come where it is high.")
    return Verdict("out of reach", f"{why}.")


def _complexity_at_healthy_e(runs: list[Record]) -> Verdict:
    """Judge 4 without runs made for it: do more experts die of more classes at E >= 0.5?"""
    healthy: dict[int, list[float]] = {}
    for run in runs:
        if run["setting"]["control"]["e"] >= HEALTHY_E:
            ((classes, by_e),) = _deaths_by_class([run]).items()
            healthy.setdefault(classes, []).extend(by_e.values())
    shown = ", ".join(f"{c}: {spread(v).mean:.1f} ({len(v)})" for c, v in sorted(healthy.items()))
    why = (
        "mean DEAD top1 in 16 experts, by a threshold relative to their number, at E >= "
        f"{HEALTHY_E}, by classes (runs): {shown}."
    )
    if len(healthy) < 2:
        return Verdict("not yet run", f"{why} More class counts are needed.")
    few, many = healthy[min(healthy)], healthy[max(healthy)]
    if spread(many).mean > spread(few).mean + 0.5:
        return Verdict("reproduced", why)
    return absent(runs, why)


def _toxic(content: Record) -> tuple[bool, str]:
    """Return whether any weight of ortho costs more than one expert, and deaths by weight."""
    deaths = {key: mean_dead(runs) for key, runs in by_condition(content).items()}
    values = list(deaths.values())
    shown = ", ".join(f"{key} {mean:.1f}" for key, mean in deaths.items())
    toxic = max(values[1:], default=values[0]) > values[0] + 1
    return toxic, f"{content['experiment']}: {shown}"


def ortho(found: Results) -> Verdict:
    """Judge 6: there is a place where ortho is not toxic."""
    judged = [_toxic(found[name]) for name in (*SWEEPS, "e-x-ortho") if name in found]
    count = sum(toxic for toxic, _ in judged)
    why = (
        f"mean DEAD top1, {'; '.join(shown for _, shown in judged)}. More than one expert is lost "
        f"to ortho in {count} of {len(judged)}."
    )
    return Verdict("refuted" if count == len(judged) else "reproduced", why)


def ortho_by_data(found: Results) -> Verdict:
    """Judge 6b: ortho is toxic on some sets and not on others."""
    names = [name for name in SWEEPS if name in found]
    toxic = [name for name in names if _toxic(found[name])[0]]
    why = f"more than one expert is lost to ortho on {len(toxic)} of {len(names)} sets"
    if toxic:
        why += f" ({', '.join(toxic)})"
    if len(names) < 2:
        return Verdict("not yet run", f"{why}; two sets are needed.")
    if not toxic:
        return absent(runs_of(found, *names), f"{why}: nothing that could depend on the set.")
    return Verdict("refuted" if len(toxic) == len(names) else "reproduced", f"{why}.")


def promise(found: Results) -> Verdict:
    """Judge 1e: by the package's defaults no expert dies at E >= 0.5."""
    runs = runs_of(found, "promise")
    by_threshold = {
        "relative": [
            {
                basis: sum(layer["dead_relative"][basis] for layer in run["final"]["layers"])
                for basis in BASES
            }
            for run in runs
        ],
        "absolute": [{basis: dead(run, basis) for basis in BASES} for run in runs],
    }
    said, broken = {}, {}
    for threshold, counts in by_threshold.items():
        ends = {basis: sum(count[basis] > 0 for count in counts) for basis in BASES}
        broken[threshold] = any(ends.values())
        said[threshold] = f"{ends['top1']} end with dead experts on top1"
        if ends["top1"]:
            sizes = {
                sum(run["setting"]["tiers"])
                for run, count in zip(runs, counts, strict=True)
                if count["top1"]
            }
            worst = max(count["top1"] for count in counts)
            said[threshold] += (
                f" (at worst {worst} in all layers together; "
                f"of {' or '.join(map(str, sorted(sizes)))} experts a layer)"
            )
        said[threshold] += f" and {ends['topk']} on topk"
    why = (
        f"of {len(runs)} runs, by a threshold relative to the number of experts (1 % of 16, 0.5 % "
        f"of 32) {said['relative']}; by the absolute 1 % {said['absolute']}."
    )
    rates = sorted(
        {
            run["setting"]["rate"]
            for index, run in enumerate(runs)
            if any(any(counts[index].values()) for counts in by_threshold.values())
        }
    )
    if rates:
        why += f" Learning rates of those: x {', x '.join(f'{rate:g}' for rate in rates)}."
    if broken["relative"]:
        return Verdict("refuted", why)
    return Verdict("qualified" if broken["absolute"] else "reproduced", why)


def warmup(found: Results) -> Verdict:
    """Judge 4.9: no expert dies, with and without a random warm-up."""
    groups = by_condition(found["no-warmup"])
    deaths = {key: mean_dead(runs) for key, runs in groups.items()}
    # What random routing does to an untrained router is no outcome: both are seen after its end.
    begin = max(run["setting"]["warmup"] for runs in groups.values() for run in runs)
    worst = {
        key: [spread([worst_dead(r, after=share) for r in runs]).mean for share in (0.0, begin)]
        for key, runs in groups.items()
    }
    why = "mean DEAD top1: " + ", ".join(
        f"{key} {deaths[key]:.1f} (at worst {whole:.1f}, after the first {100 * begin:.0f} % "
        f"{later:.1f})"
        for key, (whole, later) in worst.items()
    )
    without = [key for key, runs in groups.items() if not runs[0]["setting"]["warmup"]]
    with_it = [key for key in groups if key not in without]
    if not without or not with_it:
        return Verdict("not yet run", f"{why}. Runs with and without are needed.")
    most = {
        name: (max(deaths[key] for key in keys), max(worst[key][1] for key in keys))
        for name, keys in (("with", with_it), ("without", without))
    }
    if most["without"][0] > most["with"][0] + 0.5:
        return Verdict("refuted", f"{why}.")
    whole = not any(deaths.values()) and most["without"][1] <= most["with"][1] + 1
    return Verdict("reproduced" if whole else "qualified", f"{why}.")
