"""Write ``docs/benchmarks.md`` from the results: ``python -m tests.benchmarks.page``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ecomoe.machines import Machine
from tests.benchmarks import race_page
from tests.benchmarks.aims import (
    LOSSLESS,
    OURS,
    Records,
    best_peer,
    described,
    monitor_verdict,
    race_verdicts,
    router_share,
    verdicts,
)
from tests.benchmarks.cost_page import cost_model, setting
from tests.benchmarks.fit import machines_of, predicted
from tests.benchmarks.misses import missed_shapes
from tests.benchmarks.plots import curves, ratios
from tests.benchmarks.results import RESULTS
from tests.benchmarks.shapes import Shape

DOCS = Path(__file__).parents[2] / "docs"
BY_HAND = "## Monitor"  # what follows this heading is not written here, and kept


def page(results: dict[str, Any], races: dict[str, Any], by_hand: str = "") -> str:
    """Return the page as Markdown, but for what is written by hand, which one aim is read from."""
    machine, records = results["machine"], results["layers"]
    machines = machines_of(results)
    parts = [
        "# Benchmarks",
        "Written by `python -m tests.benchmarks.page` from `tests/benchmarks/results/`, but for "
        "the part on the monitor.",
        _setting(machine, machines),
        "## The aims",
        "Times are forward + backward of the whole layer, router and losses included, over the "
        "dense FFN of equal active FLOPs unless a line says otherwise. Peers are blocks without "
        "auxiliary losses; `grouped_mm` beside a figure is transformers' Mixtral block in the same "
        "rounds, over dense as well.",
        _table(
            ("aim", "measured", "", "why missed"),
            (
                (
                    each.aim,
                    each.measured,
                    {True: "met", False: "**missed**", None: "not measured"}[each.met],
                    each.reason,
                )
                for each in [
                    *verdicts(records, machines),
                    monitor_verdict(by_hand),
                    *race_verdicts(races),
                ]
            ),
        ),
        _missed(records, machines),
        "## Every shape",
        "Medians of paired ratios, their quartiles in brackets. *Peer* is the fastest of "
        "transformers' Mixtral block with `grouped_mm`, `eager` and `batched_mm`, which drop no "
        "token; plain shapes hold plain experts in the same block. *ours / peer* below 1 means "
        "that this package is faster. *Model* is what the cost model predicts of forward + "
        "backward over dense. *Saved* is kept for backward, *peak* is by how much a first forward "
        "and backward pass raises the resident memory, gradients of all experts included; both "
        "over the dense twin's. *Router* is the share of router and losses in forward + backward: "
        "below 0 where the noise of the two timings whose difference it is exceeds it.",
        _layers(records, machines),
        "![Time over the dense FFN](benchmarks.svg)",
        _left_out(records),
        _compiled(records),
        _recomputed(results.get("recomputed", {})),
        "## The cost model",
        cost_model(records, machines),
    ]
    if results.get("models"):
        parts += ["## Whole training steps", _models(results["models"])]
    if races:
        parts += ["## The race", *_races(races, results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(machine: dict[str, Any], machines: dict[str, Machine]) -> str:
    versions = ", ".join(
        f"{name} {machine[name]}"
        for name in ("python", "torch", "transformers", "st-moe-pytorch")
        if machine.get(name)
    )
    return (
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; "
        f"{machine.get('gpu', 'no GPU')}. {versions}. {machine['date']}. {setting(machines)}"
        "\n\nOn another machine `make bench` measures the shapes of the aims into "
        "`runs/bench.json` and writes such a page, `runs/benchmarks.md`; results of two machines "
        "are never mixed. This page's are of `python -m tests.benchmarks.layer` and `python -m "
        "tests.benchmarks.models --quick`: `layer --full --list` prints the names of shapes, "
        "`--shape NAME --again` measures one anew, `--full` the whole grid, `--compiled` compiled "
        "forms too; `python -m tests.benchmarks.gpu` measures on a GPU."
        "\n\nEach round draws a new batch and a new routing, which all contenders get in an "
        "order drawn for the round: row counts are new in every step, as in training. Gradients "
        "are None before each step."
    )


def _missed(records: Records, machines: dict[str, Machine]) -> str:
    rows = list(missed_shapes(records, machines))
    if not rows:
        return ""
    return (
        "### Missed shapes\n\nEach shape that misses one of the aims, and what its time goes into. "
        "*Must move* is what each operation has to read and write once, with what it takes at the "
        "rate of memory above.\n\n" + _table(("shape", "missed", "reason"), rows)
    )


def _layers(records: Records, machines: dict[str, Machine]) -> str:
    rows = []
    for record in records.values():
        shape = Shape(**record["shape"])
        ours, dense = record["contenders"][OURS], record["contenders"]["dense"]
        cells = [described(shape), _ms(dense["both"]["seconds"][1])]
        for kind in ("forward", "both"):
            cells.append(_spread(ours[kind]["over_dense"]))
        for kind in ("forward", "both"):
            best = best_peer(record, kind)
            cells.append("-" if best is None else f"{best[1]:.2f} ({best[0]})")
        st_moe = record["contenders"].get("st_moe")
        cells += [
            "-" if st_moe is None else f"{st_moe['both']['over_dense'][1]:.2f}",
            f"{predicted(shape, machines[shape.dtype]):.2f}",
            f"{ours['saved_bytes'] / dense['saved_bytes']:.2f}",
            f"{ours['peak_bytes'] / dense['peak_bytes']:.2f}" if dense["peak_bytes"] else "-",
            f"{router_share(record):.1%}",
            str(ours["both"]["rounds"]),
        ]
        rows.append(cells)
    heads = (
        "shape", "dense", "forward / dense", "both / dense", "forward: ours / peer",
        "both: ours / peer", "st-moe / dense", "model", "saved", "peak", "router", "rounds",
    )  # fmt: skip
    return _table(heads, rows)


def _left_out(records: Records) -> str:
    reasons: dict[tuple[str, str], int] = {}
    for record in records.values():
        absent = (name for name in (*LOSSLESS, "st_moe") if name not in record["contenders"])
        not_asked = dict.fromkeys(absent, "not asked for (`--only`)")
        for name, reason in (not_asked | record["left_out"]).items():
            reasons[name, reason] = reasons.get((name, reason), 0) + 1
    lines = [
        f"- `{name}` at {count} of {len(records)} shapes: {reason}"
        for (name, reason), count in sorted(reasons.items())
    ]
    if not lines:
        return ""
    note = (
        "st-moe-pytorch drops the tokens over an expert's capacity and so does less work. "
        "Contenders over 12 times slower than dense are timed in three rounds alone.\n\nLeft out:"
    )
    return "\n".join([note, "", *lines])


def _compiled(records: Records) -> str:
    names = (OURS, f"{OURS} compiled", "grouped_mm compiled", "dense compiled")
    rows = [
        [
            described(Shape(**record["shape"])),
            *(_spread(record["contenders"][name]["both"]["over_dense"]) for name in names),
        ]
        for record in records.values()
        if all(name in record["contenders"] for name in names)
    ]
    if not rows:
        return ""
    heads = ("shape", "ours", "ours, compiled", "`grouped_mm`, compiled", "dense, compiled")
    return (
        "## Compiled\n\nForward + backward under `torch.compile` (Inductor) over the dense FFN as "
        "it is: `python -m tests.benchmarks.layer --compiled --again --shape NAME`.\n\n"
        + _table(heads, rows)
    )


def _recomputed(records: Records) -> str:
    """Say what activation checkpointing of the layer saves and what it takes."""
    rows = []
    for record in records.values():
        contenders = record["contenders"]
        ours, dense, again = (contenders[name] for name in (OURS, "dense", "recomputed"))
        rows.append(
            [
                described(Shape(**record["shape"])),
                *(f"{each['saved_bytes'] / 1e6:,.2f}" for each in (dense, ours, again)),
                f"{again['saved_bytes'] / dense['saved_bytes']:.2f}",
                _spread(again["both"]["over_ecomoe"]),
                _spread(ours["both"]["over_dense"]),
                _spread(again["both"]["over_dense"]),
            ]
        )
    if not rows:
        return ""
    heads = (
        "shape", "saved, MB: dense", "ours", "ours, recomputed", "saved: recomputed / dense",
        "time: recomputed / ours", "time: ours / dense", "time: recomputed / dense",
    )  # fmt: skip
    return (
        "## Recomputation\n\nThe layer within `torch.utils.checkpoint` keeps its input alone and "
        "runs forward twice. Optional: `python -m tests.benchmarks.layer --recompute --shape "
        "NAME`.\n\n" + _table(heads, rows)
    )


def _models(models: dict[str, Any]) -> str:
    rows = []
    for record in models.values():
        ours, dense = record[OURS], record["dense"]
        rows.append(
            [
                f"{record['model']} shaped, {record['layers']} layers, {record['dtype']}",
                f"{dense['parameters'] / 1e6:.0f} M / {ours['parameters'] / 1e6:.0f} M",
                _ms(dense["seconds"]["step"][1]),
                *(
                    _spread(ours["over_dense"][part])
                    for part in ("step", "forward", "backward", "optimizer")
                ),
                str(record["rounds"]),
            ]
        )
    heads = (
        "model", "weights: dense / converted", "dense step", "step", "forward", "backward",
        "optimizer", "rounds",
    )  # fmt: skip
    return (
        "A converted model over its dense twin: every FFN is 16 experts of half its width, top-2; "
        "fused AdamW; bf16 is autocast over fp32 weights. The optimizer steps through every "
        "expert's weights, whatever the tokens did.\n\n" + _table(heads, rows)
    )


def _races(races: dict[str, Any], results: dict[str, Any]) -> Iterable[str]:
    yield (
        "`python -m examples.race`: a model and its dense twin of equal active FLOPs, the same "
        "seeds and batches, their steps in turn in one process. *Reaches* is when the EcoMoE "
        "model's validation loss is first at the dense twin's last, in its own seconds of "
        "training, over the seconds that the twin took to its end; below 1 means that the race is "
        "won. *step / dense* is the median of a race's own steps over that of the twin's."
    )
    rows = []
    for race in races.values():
        for run in race["runs"].values():
            result = run["result"]
            reached = result["reached"]
            rows.append(
                [
                    race["title"],
                    str(run["seed"]),
                    f"{result['dense']['loss']:.4f} / {result['ecomoe']['loss']:.4f}",
                    f"{result['dense']['seconds']:.0f} / {result['ecomoe']['seconds']:.0f}",
                    f"{result['step_over_dense']:.2f}",
                    "not reached" if reached is None else f"{reached:.2f}",
                ]
            )
    heads = (
        "race", "seed", "last loss: dense / EcoMoE", "seconds: dense / EcoMoE", "step / dense",
        "reaches",
    )  # fmt: skip
    yield _table(heads, rows)
    for name, race in races.items():
        text = f"![Loss against seconds, {name}](race-{name}.svg)\n\n{race['setting']}"
        if "plan" in race:
            text += (
                f" {race['title']}: {race_page.how_far_off(race)}. "
                f"{race_page.spent_on(name, race, results)}\n\n`{race_page.command(name, race)}`"
            )
        yield text


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    low, median, high = values
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms" if seconds < 0.01 else f"{seconds * 1e3:,.0f} ms"


def main(arguments: list[str] | None = None) -> None:
    """Write the page and its plots."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.page", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument("--races", type=Path, default=RESULTS, help="folder of race-*.json")
    parser.add_argument("--out", type=Path, default=DOCS / "benchmarks.md")
    given = parser.parse_args(arguments)
    results = json.loads(given.results.read_text())
    races = {}
    for path in sorted(given.races.glob("race-*.json")):
        race = json.loads(path.read_text())
        race["runs"] = {key: run for key, run in race["runs"].items() if "result" in run}
        if race["runs"]:
            races[path.stem.removeprefix("race-")] = race
    heading = by_hand = ""
    if given.out.exists():
        _, heading, by_hand = given.out.read_text().partition(BY_HAND)
    text = page(results, races, by_hand)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text + "\n" + heading + by_hand if heading else text)
    given.out.with_suffix(".svg").write_text(ratios(results["layers"]))
    for name, race in races.items():
        (given.out.parent / f"race-{name}.svg").write_text(curves(race))
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
