"""Figures of single runs and of experiments, for tables and verdicts. Pure functions on results."""

from __future__ import annotations

from examples.experiments.analysis import auc, bootstrap_auc, bootstrap_difference
from examples.experiments.measure import Record

PREDICTORS = ("E", "T", "H", "O", "B", "T*H", "O+B")


def by_condition(result: Record) -> dict[str, list[Record]]:
    """Return an experiment's runs by the name of their condition, in the order of the entry."""
    groups: dict[str, list[Record]] = {}
    for run in result["runs"]:
        groups.setdefault(run["name"], []).append(run)
    return groups


def trained(run: Record) -> list[Record]:
    """Return the records after the random warm-up, in which no router has been trained yet."""
    warm = 100 * run["setting"]["warmup"]
    return [record for record in run["history"] if record["percent"] > warm + 1e-6]


def worst_dead(run: Record, *, after: float | None = None) -> float:
    """Return the most dead experts (top1) of any evaluation after a share of the training.

    By default after the random warm-up.
    """
    begin = 100 * (run["setting"]["warmup"] if after is None else after)
    return float(max(r["dead"]["top1"] for r in run["history"] if r["percent"] > begin + 1e-6))


def general(run: Record) -> dict[str, float]:
    """Return the figures that every table shows; deaths are summed over layers."""
    final = run["final"]
    layers = final["layers"]
    found = {
        "top-1 %": 100 * final["top1"],
        "top-2 %": 100 * final["top2"],
        "loss": final["loss"],
        "DEAD top1": float(final["dead"]["top1"]),
        "DEAD topk": float(final["dead"]["topk"]),
        "worst top1": worst_dead(run),
        "PURE": float(sum(layer["pure"] for layer in layers)),
        "NMI": sum(layer["specialisation"] for layer in layers) / len(layers),
    }
    if any(layer["num_experts"] != 16 for layer in layers):
        found["relative top1"] = float(sum(layer["dead_relative"]["top1"] for layer in layers))
    return found


def tier_usage(run: Record) -> list[float]:
    """Return the final share of each tier, in percent, averaged over layers."""
    layers = run["final"]["layers"]
    tiers = zip(*(layer["tier_usage"] for layer in layers), strict=True)
    return [100 * sum(shares) / len(layers) for shares in tiers]


def tiers(run: Record) -> dict[str, float]:
    """Return usage by tier, and the lowest that any tier fell to after the warm-up."""
    found = {f"T{tier} %": usage for tier, usage in enumerate(tier_usage(run))}
    if len(found) > 1:
        lowest = min(
            share for r in trained(run) for layer in r["layers"] for share in layer["tier_usage"]
        )
        found["lowest tier %"] = 100 * lowest
        depth = [layer["depth"]["tiers_above"] for layer in run["final"]["layers"]]
        found["depth"] = sum(depth) / len(depth)
    return found


def flow(run: Record) -> dict[str, float]:
    """Return usage by tier, the first tier's self-loop and its lift, and the hard gradient."""
    layers = run["final"]["layers"]
    lifts = [layer["flow_lift"][0][0] for layer in layers if layer["flow_lift"][0][0] is not None]
    hard = [layer["hard_gradient"] for layer in layers if layer["hard_gradient"] is not None]
    found = tiers(run)
    found["T0 self %"] = 100 * sum(layer["flow"][0][0] for layer in layers) / len(layers)
    if lifts:
        found["T0 self lift"] = sum(lifts) / len(lifts)
    if hard:
        found["hard T0/last"] = sum(hard) / len(hard)
    return found


def scan(run: Record) -> dict[str, float]:
    """Return what the temperature of the gates changes in a trained model.

    Usage is compared with that at the first temperature: the largest change of any expert's share,
    in the first layer and in all later ones.
    """
    records = run["temperature_scan"]
    base = records[0]["layers"]

    def change(which: slice) -> float:
        return max(
            (
                abs(now - before)
                for record in records
                for layer, first in zip(record["layers"][which], base[which], strict=True)
                for now, before in zip(layer["usage"], first["usage"], strict=True)
            ),
            default=0.0,
        )

    shares = [record["top1"] for record in records]
    hard = [la["hard_gradient"] for r in records for la in r["layers"] if la["hard_gradient"]]
    found = {
        "first layer, change of usage %": 100 * change(slice(0, 1)),
        "top-1 % lowest": 100 * min(shares),
        "top-1 % highest": 100 * max(shares),
    }
    if len(base) > 1:
        found["later layers, change of usage %"] = 100 * change(slice(1, None))
    if hard:
        found["hard ratio lowest"], found["hard ratio highest"] = min(hard), max(hard)
    return found


def window(run: Record) -> dict[str, float]:
    """Return how much the last ten hundredths of a run vary (section 4.15)."""
    last = [record for record in run["history"] if record["percent"] > 90.4]
    shares = [100 * record["top1"] for record in last]
    mean = sum(shares) / len(shares)
    sd = (sum((share - mean) ** 2 for share in shares) / max(len(shares) - 1, 1)) ** 0.5
    tier_range = max(
        max(values) - min(values)
        for layers in zip(*(record["layers"] for record in last), strict=True)
        for values in zip(*(layer["tier_usage"] for layer in layers), strict=True)
    )
    return {
        "top-1 sd, points": sd,
        "top-1 range, points": max(shares) - min(shares),
        "last minus mean, points": abs(shares[-1] - mean),
        "tier usage range, points": 100 * tier_range,
    }


def revival(run: Record) -> dict[str, float]:
    """Return how long a forced death outlasted its release, in hundredths of the training.

    It is over at the first report from which on the expert has 1 % of first choices at every one;
    ``inf`` where it is dead at the end.
    """
    _, release = run["setting"]["forced_death"]
    usages = [(r["percent"], r["layers"][0]["usage"][0]) for r in run["history"]]
    held = [usage for percent, usage in usages if percent <= 100 * release + 1e-6]
    after = [(p, usage) for p, usage in usages if p > 100 * release + 1e-6]
    alive = float("inf")
    for percent, usage in reversed(after):
        if usage < 0.01:
            break
        alive = percent
    reported = [
        event["kind"] == "revival"
        and event["expert"] == 0
        and event["basis"] == "top1"
        and event["step"] >= release * run["steps"]
        for event in run["events"]
    ]
    return {
        "usage when released %": 100 * held[-1],
        "revived after, % of training": alive - 100 * release,
        "its usage at the end %": 100 * usages[-1][1],
        "revival reported by the monitor": float(any(reported)),
    }


SPECIAL = {
    "tiny": tiers,
    "four-tiers-tiny": tiers,
    "four-tiers-cifar100": tiers,
    "flat-tiny": tiers,
    "flat-cifar100": tiers,
    "tier-flow": flow,
    "temperature-scan": scan,
    "per-epoch": window,
    "revival": revival,
}


def revived_experts(run: Record) -> tuple[int, int]:
    """Return how many experts were dead (top1) at some report after the warm-up, and how many of
    these are alive at the end, summed over layers.
    """
    records = trained(run)
    ever = back = 0
    for layers in zip(*(record["layers"] for record in records), strict=True):
        for usages in zip(*(layer["usage"] for layer in layers), strict=True):
            if min(usages) < 0.01:
                ever += 1
                back += usages[-1] >= 0.01
    return ever, back


def scores(run: Record) -> dict[str, float]:
    """Return what might predict a run's outcome."""
    control = run["setting"]["control"]
    t, h = control["temperature"], control["entropy_weight"]
    o, b = control["oracle_weight"], control["balance_weight"]
    return {"E": control["e"], "T": t, "H": h, "O": o, "B": b, "T*H": t * h, "O+B": o + b}


def predictions(result: Record, *, basis: str = "top1") -> list[Record]:
    """Return each predictor's AUC for survival (DEAD = 0 at the end), with its 95 % interval.

    An AUC below one half means that smaller values survive. ``behind`` is the interval of E's AUC
    minus the predictor's.
    """
    runs = result["runs"]
    alive = [run["final"]["dead"][basis] == 0 for run in runs]
    columns = {name: [scores(run)[name] for run in runs] for name in PREDICTORS}
    return [
        {
            "name": name,
            "auc": auc(values, alive),
            "interval": bootstrap_auc(values, alive),
            "behind": bootstrap_difference(columns["E"], values, alive),
        }
        for name, values in columns.items()
    ]
