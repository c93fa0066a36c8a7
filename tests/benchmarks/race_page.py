"""What the page says of a race besides its table: how far off, time spent on what, the command."""

from __future__ import annotations

import json
import math
from typing import Any

from tests.benchmarks.aims import OURS, Records, described, router_share
from tests.benchmarks.shapes import Shape

# Which of the models whose steps are timed part by part is built like the race's, and how many
# tokens a step of the race has, about.
LIKE = {"gpt": "gpt2-small", "vit": "vit-tiny"}
TOKENS = 4096


def command(name: str, race: dict[str, Any]) -> str:
    """Return the command that runs the race; SOURCE stands for the data that the title names."""
    plan = {key: value for key, value in race["plan"].items() if key != "title"}
    options = " ".join(
        f"--{key.replace('_', '-')} "
        + (f"'{json.dumps(value)}'" if isinstance(value, dict) else f"{value:g}")
        for key, value in plan.items()
    )
    return f"python -m examples.race {name} --data SOURCE --seeds {len(race['runs'])} {options}"


def how_far_off(race: dict[str, Any]) -> str:
    """Say by how much each lost seed is behind at its end, and how many were won."""
    told = []
    for run in race["runs"].values():
        result = run["result"]
        if result["reached"] is None:
            behind = result["ecomoe"]["loss"] - result["dense"]["loss"]
            told.append(f"seed {run['seed']} ends {behind:+.3f} nats from the twin's last loss")
        elif result["reached"] > 1.0:
            late = result["reached"] - 1.0
            told.append(f"seed {run['seed']} is there {late:.0%} of the twin's time late")
    won = len(race["runs"]) - len(told)
    return f"{won} of {len(race['runs'])} seeds are won" + "".join(f"; {each}" for each in told)


def spent_on(name: str, race: dict[str, Any], results: dict[str, Any]) -> str:
    """Say what a sparse step's time over the twin's is spent on, in the model built alike.

    The optimizer's part is timed there. What the forward and backward passes take beyond the twin's
    is split as it is in the layer that is measured nearest to the race's.
    """
    models = [
        record
        for record in results.get("models", {}).values()
        if record["model"] == LIKE.get(name) and record["dtype"] == "fp32"
    ]
    if not models:
        return ""
    record = min(models, key=lambda each: each["layers"])
    ours, dense = record[OURS]["seconds"], record["dense"]["seconds"]
    beyond = {part: 1e3 * (ours[part][1] - dense[part][1]) for part in ours}
    text = (
        f"In the {record['model']} shaped model of {record['layers']} layers above, whose "
        f"every FFN is sparse, a step takes "
        f"{beyond['step']:,.0f} ms beyond its twin's {1e3 * dense['step'][1]:,.0f}: the optimizer, "
        f"through all experts' weights, {beyond['optimizer']:,.0f} ms; forward and backward "
        f"{beyond['forward'] + beyond['backward']:,.0f} ms"
    )
    near = _nearest(results["layers"], race["plan"]["d_model"])
    if near is None:
        return text + "."
    both = near["contenders"][OURS]["both"]
    router = router_share(near) * both["over_dense"][1]
    rest = both["over_dense"][1] - 1.0 - router
    return (
        f"{text}. In the layer alone ({described(Shape(**near['shape']))}) router and losses take "
        f"{router:.0%} of the dense block's time on top, and the experts' products, gathers and "
        f"weights {rest:+.0%} of it against that block."
    )


def _nearest(layers: Records, width: int) -> dict[str, Any] | None:
    """Return the record of such a layer as the race has that is nearest to it in size."""
    like = [
        record
        for record in layers.values()
        if not record["shape"]["gated"]
        and record["shape"]["dtype"] == "fp32"
        and record["shape"]["load"] == "balanced"
        and (record["shape"]["num_experts"], record["shape"]["top_k"]) == (16, 2)
    ]

    def apart(record: dict[str, Any]) -> float:
        shape = record["shape"]
        return abs(math.log(shape["tokens"] / TOKENS)) + abs(math.log(shape["d_model"] / width))

    return min(like, key=apart, default=None)
