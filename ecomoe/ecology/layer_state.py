"""What a checkpoint keeps of a layer's sums that no report has taken yet, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ecomoe.ecology.lockdown import NUM_PROBES
from ecomoe.ecology.recorder import check_keys
from ecomoe.ecology.statistics import LABEL_KINDS, Layout
from ecomoe.ecology.taps import LayerTap, Nearest, Probe
from ecomoe.ecology.traffic import PHASES
from ecomoe.ecology.transfer import Taken

State = dict[str, Any]


def layer_state(tap: LayerTap, taken: Taken) -> State:
    """Return the state of a layer, from what was taken of it without a restart."""
    sums = {
        phase: {name: s.tolist() for name, s in tap.layouts[phase].unpack(sums_V).items()}
        for phase, sums_V in taken.sums.items()
        if sums_V.any()
    }
    return {
        "tiers": list(tap.tiers),
        "sums": sums,
        "labels": {kind: c.int().tolist() for kind, c in taken.labels.items() if c.any()},
        "choices": None if taken.choices is None else list(taken.choices),
        "nearest": None if taken.nearest is None else [list(pair) for pair in taken.nearest],
    }


def check_layer_state(tap: LayerTap, state: object) -> None:
    """Check the state of a layer.

    Raises:
        ValueError: It belongs to a layer of other tiers, or did not come from `layer_state`.
    """
    name = f"state['sums'][{tap.name!r}]"
    optional = (list, type(None))
    checked = check_keys(
        state,
        {"tiers": list, "sums": dict, "labels": dict, "choices": optional, "nearest": optional},
        name=name,
    )
    check_keys(checked["sums"], dict.fromkeys(checked["sums"], dict), name=name)
    tiers = tuple(checked["tiers"])
    if tap.sums and tiers != tap.tiers:
        raise ValueError(
            f"the state has tiers {tiers} for layer {tap.name!r} of tiers {tap.tiers}; load it "
            "into a monitor of the same model"
        )
    shapes = Layout(sum(tiers), len(tiers)).shapes
    fits = set(checked["sums"]) <= set(PHASES) and set(checked["labels"]) <= set(LABEL_KINDS)
    fits &= all(
        name in shapes and _has_shape(values, shapes[name])
        for sums in checked["sums"].values()
        for name, values in sums.items()
    )
    fits &= all(_is_table(table, rows=sum(tiers)) for table in checked["labels"].values())
    if checked["choices"] is not None:
        data, ids_MK = (*checked["choices"], None, None)[:2]
        fits &= isinstance(data, int | float) and _is_table(ids_MK) and len(ids_MK) <= NUM_PROBES
    if checked["nearest"] is not None:
        nearest = checked["nearest"]
        fits &= _is_table(nearest, rows=sum(tiers)) and all(len(pair) == 2 for pair in nearest)
    if not fits:
        raise ValueError(
            f"the state of layer {tap.name!r} must have sums of {sum(tiers)} experts by name, "
            "labels by expert, and choices by token; pass what Monitor.state_dict() returned"
        )


def _has_shape(values: object, shape: tuple[int, ...]) -> bool:
    if not shape:
        return isinstance(values, int | float)
    return (
        isinstance(values, list)
        and len(values) == shape[0]
        and all(_has_shape(value, shape[1:]) for value in values)
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
    tap.restart(PHASES)
    like = tap.sums["train"]
    for phase, sums in state["sums"].items():
        parts = {
            name: torch.tensor(values, dtype=like.dtype).to(like) for name, values in sums.items()
        }
        tap.add(phase, parts)
    tap.labels = {
        kind: torch.tensor(table).to(like.device, torch.int32)
        for kind, table in state["labels"].items()
    }
    tap.compared = was_compared(state)
    if state["choices"] is not None:
        data, ids_MK = state["choices"]
        ids = torch.tensor(ids_MK, dtype=tap.id_dtype, device=like.device).view(len(ids_MK), -1)
        missing = NUM_PROBES - len(ids_MK)
        valid_M = torch.arange(NUM_PROBES, device=like.device) < len(ids_MK)
        padded_MK = torch.cat([ids, ids.new_zeros(missing, ids.shape[1])])
        tap.probe = Probe(torch.tensor(data, dtype=like.dtype).to(like), valid_M, padded_MK)
    if state["nearest"] is not None:
        experts, cosines = zip(*state["nearest"], strict=True)
        one = like.new_ones(())
        ids_E = torch.tensor(experts, dtype=tap.id_dtype, device=like.device)
        tap.nearest = Nearest(one, ids_E, torch.tensor(cosines, dtype=like.dtype).to(like))


def was_compared(state: Mapping[str, Any]) -> bool:
    """Whether the experts' outputs were compared in the evaluation that a state is of."""
    return bool(state["sums"].get("eval", {}).get("compared"))
