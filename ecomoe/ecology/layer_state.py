"""What a checkpoint keeps of a layer's sums that no report has taken yet, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ecomoe.ecology.recorder import check_keys
from ecomoe.ecology.statistics import LABEL_KINDS, Layout
from ecomoe.ecology.taps import LayerTap, Probe
from ecomoe.ecology.traffic import PHASES
from ecomoe.ecology.transfer import Taken

State = dict[str, Any]


def layer_state(tap: LayerTap, taken: Taken) -> State:
    """Return the state of a layer, from what was taken of it without a restart."""
    return {
        "tiers": list(tap.tiers),
        "sums": {phase: sums_V.tolist() for phase, sums_V in taken.sums.items()},
        "labels": {kind: c.tolist() for kind, c in taken.labels.items() if c.any()},
        "choices": None if taken.choices is None else list(taken.choices),
    }


def check_layer_state(tap: LayerTap, state: object) -> None:
    """Check the state of a layer.

    Raises:
        ValueError: It belongs to a layer of other tiers, or did not come from `layer_state`.
    """
    name = f"state['sums'][{tap.name!r}]"
    optional = (list, type(None))
    checked = check_keys(
        state, {"tiers": list, "sums": dict, "labels": dict, "choices": optional}, name=name
    )
    check_keys(checked["sums"], dict.fromkeys(PHASES, list), name=name)
    tiers = tuple(checked["tiers"])
    if tap.sums and tiers != tap.tiers:
        raise ValueError(
            f"the state has tiers {tiers} for layer {tap.name!r} of tiers {tap.tiers}; load it "
            "into a monitor of the same model"
        )
    num_experts, size = sum(tiers), Layout(sum(tiers), len(tiers)).size
    fits = all(len(checked["sums"][phase]) == size for phase in PHASES)
    fits &= set(checked["labels"]) <= set(LABEL_KINDS)
    fits &= all(_is_table(table, rows=num_experts) for table in checked["labels"].values())
    if checked["choices"] is not None:
        data, ids_MK = (*checked["choices"], None, None)[:2]
        fits &= isinstance(data, int | float) and _is_table(ids_MK)
    if not fits:
        raise ValueError(
            f"the state of layer {tap.name!r} must have {size} sums in each phase, labels by "
            f"{num_experts} experts, and choices by token; pass what Monitor.state_dict() returned"
        )


def _is_table(table: object, *, rows: int | None = None) -> bool:
    """Whether this is a list of equally long lists of numbers."""
    if not isinstance(table, list) or (rows is not None and len(table) != rows):
        return False
    return all(
        isinstance(row, list)
        and len(row) == len(table[0])
        and all(isinstance(value, int | float) for value in row)
        for row in table
    )


def load_layer_state(tap: LayerTap, state: Mapping[str, Any]) -> None:
    """Set a layer's sums to a state that passes `check_layer_state`."""
    if not tap.sums:
        tap.tiers = tuple(state["tiers"])
        tap.allocate(torch.device("cpu"))  # moves with the first call
    for phase, sums_V in tap.sums.items():
        sums_V.copy_(torch.tensor(state["sums"][phase], dtype=sums_V.dtype))
    like = tap.sums["eval"]
    tap.labels = {kind: torch.tensor(table).to(like) for kind, table in state["labels"].items()}
    tap.compared = bool(tap.layout.unpack(like)["compared"] > 0)
    tap.probe = None
    if state["choices"] is not None:
        data, ids_MK = state["choices"]
        valid_M = torch.ones(len(ids_MK), dtype=torch.bool, device=like.device)
        ids = torch.tensor(ids_MK, dtype=torch.int16, device=like.device).view(len(ids_MK), -1)
        tap.probe = Probe(torch.tensor(data).to(like), valid_M, ids)
