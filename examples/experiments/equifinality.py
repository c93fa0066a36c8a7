"""The equifinality paper's experiments (arXiv:2604.14419): does routing topology matter?

    python -m examples.experiments.equifinality --scale small --seeds 3 --data text.txt

trains every variant with every seed (or goes on where it was stopped), measures hops, halting and
alignment, writes one JSON file and prints the table: routing parameters, active FLOPs, perplexity,
and the equivalence test of all pairs. The paper's scale is ``--scale paper``; ``--scale
convergence`` trains wide and deep variants of a small model until they change little.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from ecomoe.ecology.alignment import vocabulary_alignment, weight_alignment
from examples.experiments.data import Library
from examples.experiments.measure import Record
from examples.experiments.records import Scale
from examples.experiments.runner import interruptible, rounded, run_folder, run_setting
from examples.experiments.topologies import (
    SIZES,
    STRENGTH,
    VARIANTS,
    Topology,
    kept,
    sized,
    variants_at,
    wall_clock,
)

TOP_IDS = {"paper": 20}


def seed_alignment(folders: list[Path], *, top: int) -> Record | None:
    """Compare the experts of a variant's seeds, layer by layer; ``None`` without MLP experts."""
    runs = [torch.load(kept(folder)) for folder in folders]
    if len(runs) < 2 or "up_proj.weight" not in runs[0]["experts"][0]:
        return None
    rows = []
    for index, first in enumerate(runs):
        for second in runs[index + 1 :]:
            for one, other in zip(first["experts"], second["experts"], strict=True):
                words = vocabulary_alignment(
                    one["down_proj.weight"][:, :, 0],
                    other["down_proj.weight"][:, :, 0],
                    first_VD=first["embed"],
                    second_VD=second["embed"],
                    top=top,
                )
                weights = weight_alignment(
                    one["up_proj.weight"][:, 0], other["up_proj.weight"][:, 0]
                )
                rows.append((words.mean, words.chance, weights.mean, weights.chance))
    names = ("jaccard", "jaccard_chance", "cosine", "cosine_chance")
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return dict(zip(names, means, strict=True))


def compact(variant: Topology, result: Record) -> Record:
    """Return what the table needs of a run."""
    final = result["final"]
    return {
        "name": variant.name,
        "seed": result["seed"],
        "steps": result["steps"],
        "seconds": result["seconds"],
        "loss": final["loss"],
        "perplexity": math.exp(final["loss"]),
        # Of hundreds of experts each has less than the absolute threshold when all is even.
        "dead": sum(layer["dead_relative"]["topk"] for layer in final["layers"]),
        "history": [[record["percent"], record["loss"]] for record in result["history"]],
        **result["measured"],
    }


def run(
    scale: Scale,
    library: Library,
    *,
    seeds: int,
    out: Path,
    results: Path,
    variants: tuple[Topology, ...] = VARIANTS,
    say: Callable[[str], None] = print,
) -> Path:
    """Run what is missing; return the JSON file, written anew after each seed."""
    name, command = f"equifinality-{scale.name}", f"--scale {scale.name}"
    strength = variants[0].strength
    if strength != STRENGTH:
        name, command = f"{name}-strength-{strength:g}", f"{command} --strength {strength:g}"
    path = results / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs: list[Record] = []
    folders: dict[str, list[Path]] = {variant.name: [] for variant in variants}
    for seed in range(seeds):
        for variant in variants:
            samples = library.get(variant.data)
            folder = run_folder(out, variant, scale, samples, seed)
            result = run_setting(variant, scale, samples, seed=seed, folder=folder)
            runs.append(compact(variant, result))
            folders[variant.name].append(folder)
            say(f"{variant.name}, seed {seed}: perplexity {runs[-1]['perplexity']:.4f}")
        alignment = {
            variant.name: seed_alignment(folders[variant.name], top=TOP_IDS.get(scale.name, 10))
            for variant in variants
            if variant.dense is None and variant.rank == 1
        }
        content = {
            "equifinality": scale.name,
            "command": f"python -m examples.experiments.equifinality {command} --seeds {seed + 1} "
            "--data TEXT",
            "data": library.get(variants[0].data).name,
            "strength": variants[0].strength,
            "seeds": seed + 1,
            "steps": runs[0]["steps"],
            "size": {
                "layers": scale.layers,
                "width": scale.width,
                "context": scale.context,
                "batch": scale.batch["language"],
            },
            "runs": runs,
            "alignment": {name: found for name, found in alignment.items() if found},
        }
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(rounded(content), separators=(",", ":")) + "\n")
        unfinished.replace(path)
    return path


@interruptible()
def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    from examples.experiments.equifinality_plot import write_plot
    from examples.experiments.equifinality_table import tables

    parser = argparse.ArgumentParser(
        prog="python -m examples.experiments.equifinality", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--scale", choices=SIZES, default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--strength", type=float, default=STRENGTH, help="of the auxiliary losses; %(default)s"
    )
    parser.add_argument("--margin", type=float, help="perplexity that matters; 3 %% of 1x12's")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SOURCE",
        help="a text file, or a hub data set; at paper scale WikiText-103 comes from the hub",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--results", type=Path, help="folder of the JSON file; OUT/results")
    parser.add_argument("--plot", type=Path, help="write an HTML file of plots as well")
    parser.add_argument("--clock", action="store_true", help="only time halting on this machine")
    options = parser.parse_args(arguments)
    if options.clock:
        rows = wall_clock()
        for row in rows:
            ratio = row["seconds"] / rows[0]["seconds"]
            how = "without halting" if row["quantile"] is None else f"saving {row['saved']:.1%}"
            print(f"{how}: {1000 * row['seconds']:.1f} ms, {ratio:.2f} of the full pass")
        return
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds} must be at least 1")
    if options.margin is not None and not 0 < options.margin < math.inf:
        parser.error(f"--margin {options.margin} must be a perplexity above 0")
    scale = sized(options.scale)
    console = Console()
    try:
        path = run(
            scale,
            Library(options.data, scale),
            seeds=options.seeds,
            out=options.out,
            results=options.results or options.out / "results",
            variants=variants_at(options.scale, strength=options.strength),
            say=lambda line: console.print(line, highlight=False),
        )
    except ValueError as error:
        parser.error(str(error))
    content = json.loads(path.read_text())
    for table in tables(content, margin=options.margin):
        console.print(table)
    if options.plot is not None:
        console.print(f"plots: {write_plot(content, options.plot)}")
    console.print(f"results: {path}")


if __name__ == "__main__":
    main()
