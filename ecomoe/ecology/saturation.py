"""Whether routing has settled: do tokens still get the experts that they once got?

Router saturation as in OLMoE (Muennighoff et al. 2024, section 5.1): the share of a token's top-k
experts that two states of a model have in common, averaged over fixed tokens. By chance alone it is
K / E.

The tokens are a few of the first batch of each evaluation. Their hidden states change as the model
learns, so it is by the model's inputs, of which a fingerprint is taken, that they are known to be
the same: evaluations of other data, or of shuffled data, are not compared. Where several processes
evaluate, the tokens are those of the first.

All here works on plain data on the host, so that it is saved with a checkpoint. A few earlier
evaluations are remembered, so that the last record of a run holds OLMoE's curve: the overlap of
each of them with the end.

Axes: M probed tokens, K experts chosen for a token.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Memory = dict[str, Any]

MAX_SNAPSHOTS = 8


class Choices(NamedTuple):
    """Which experts the probed tokens of a layer got.

    Attributes:
        data: Fingerprint of the model's inputs.
        ids_MK: Ids of the experts.
    """

    data: float
    ids_MK: Sequence[Sequence[int]]


def compare(
    memory: Memory, choices: Mapping[str, Choices], *, step: int
) -> tuple[dict[str, list[dict[str, float]]], Memory]:
    """Compare an evaluation's choices with those of earlier ones on the same data.

    Args:
        memory: What the last call returned; ``{}`` at the start.
        choices: By layer.
        step: Optimizer step of the evaluation.

    Returns:
        By layer the ``overlap``, shares of 1, with the choices at each earlier ``step`` that is
        remembered, and the memory for the next call.
    """
    memory = dict(memory)
    found = {}
    for name, (data, ids_MK) in choices.items():
        snapshots = memory.get(name, [])
        same = [s for s in snapshots if math.isclose(s["data"], data, rel_tol=1e-9)]
        earlier = [(s["step"], _decode(s)) for s in same if s["tokens"] == len(ids_MK)]
        found[name] = [
            {"step": then, "overlap": overlap(ids_MK, before_MK)}
            for then, before_MK in earlier
            if ids_MK and len(before_MK[0]) == len(ids_MK[0])
        ]
        snapshots = [*snapshots, _encode(data, ids_MK, step=step)] if ids_MK else snapshots
        if len(snapshots) > MAX_SNAPSHOTS:
            # Thin the older half; the first one always stays.
            half = MAX_SNAPSHOTS // 2
            snapshots = snapshots[:half:2] + snapshots[half:]
        memory[name] = snapshots
    return found, memory


def overlap(first_MK: Sequence[Sequence[int]], second_MK: Sequence[Sequence[int]]) -> float:
    """Return the share of experts that the tokens have in both, whatever their order.

    >>> overlap([[0, 1], [2, 3]], [[1, 0], [2, 5]])
    0.75
    """
    common = [len({*a} & {*b}) for a, b in zip(first_MK, second_MK, strict=True)]
    return sum(common) / sum(map(len, first_MK))


def _encode(data: float, ids_MK: Sequence[Sequence[int]], *, step: int) -> dict[str, Any]:
    # Two bytes an id: a list of numbers would be five times as long in a checkpoint.
    flat = b"".join(expert.to_bytes(2, "little") for ids_K in ids_MK for expert in ids_K)
    ids = base64.b64encode(flat).decode()
    return {"step": step, "data": data, "tokens": len(ids_MK), "ids": ids}


def _decode(snapshot: Mapping[str, Any]) -> list[list[int]]:
    flat = base64.b64decode(snapshot["ids"])
    ids = [int.from_bytes(flat[i : i + 2], "little") for i in range(0, len(flat), 2)]
    top_k = len(ids) // snapshot["tokens"]
    return [ids[i : i + top_k] for i in range(0, len(ids), top_k)]
