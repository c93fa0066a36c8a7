"""The way of the sums from the device to the host: once a report, together, reduced over processes.

Axes: E experts, C labels, M probed tokens, K experts chosen for a token, V sums of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, distributed

from ecomoe.ecology.saturation import Choices
from ecomoe.ecology.statistics import LABEL_KINDS, LabelKind, wide_dtype
from ecomoe.ecology.taps import LayerTap, Probe
from ecomoe.ecology.traffic import Phase

Reduce: TypeAlias = Callable[[Tensor], object]


class Taken(NamedTuple):
    """What was moved to the host of one layer.

    Attributes:
        sums: By phase the vector ``(V,)``, fp64.
        extras: Scalars of the last call, by name.
        labels: Evaluated tokens by expert and label, ``(E, C)``, by kind, with the phase "eval".
        choices: For probed tokens, those of the first process, with the phase "eval".
    """

    sums: dict[Phase, Tensor]
    extras: dict[str, float]
    labels: dict[LabelKind, Tensor]
    choices: Choices | None


def take_sums(
    taps: Sequence[LayerTap],
    phases: tuple[Phase, ...],
    *,
    restart: bool = True,
    reduce: Reduce | None = None,
    first: bool = True,
    outcomes_3: Tensor | None = None,
) -> tuple[dict[str, Taken], Tensor]:
    """Move the sums to the host, one transfer a device, and start them anew at zero.

    Args:
        taps: The layers; those that saw no call yet are left out.
        phases: The kinds of traffic.
        restart: Whether to start anew at zero.
        reduce: Adds up, in place, the sums of all processes.
        first: Whether this is the first process, whose choices are the ones to keep.
        outcomes_3: Sums over all predictions, to take along.

    Returns:
        By layer what was taken, and the outcomes, zeros where there are none.
    """
    taps = [tap for tap in taps if tap.sums]
    parts: dict[torch.device, list[Tensor]] = {}
    extras: dict[torch.device, list[Tensor]] = {}
    device = _device_of(taps, together=reduce is not None)
    if outcomes_3 is None:
        outcomes_3 = torch.zeros(3, dtype=wide_dtype(device), device=device)
    outcomes_3 = outcomes_3.to(device)
    parts[outcomes_3.device], extras[outcomes_3.device] = [outcomes_3], []
    names = {tap.name: list(tap.extras()) for tap in taps}
    for tap in taps:
        of_tap = _parts_of(tap, phases, first=first)
        device = of_tap[0].device
        parts.setdefault(device, []).extend(of_tap)
        scalars = [value.to(of_tap[0]).reshape(1) for value in tap.extras().values()]
        extras.setdefault(device, []).extend(scalars)
    hosts = {
        device: iter(_to_host(vectors, extras[device], reduce)) for device, vectors in parts.items()
    }
    outcomes_3 = next(hosts[outcomes_3.device])
    taken = {}
    for tap in taps:
        host = hosts[tap.sums[phases[0]].device]
        sums = {phase: next(host) for phase in phases}
        labels: dict[LabelKind, Tensor] = {}
        choices = None
        if "eval" in phases:
            labels = {kind: next(host).view(tap.labels[kind].shape) for kind in _kinds(tap)}
            choices = None if tap.probe is None else _choices(next(host), tap.probe)
        taken[tap.name] = Taken(sums, {}, labels, choices)
        if restart:
            tap.restart(phases)
    for tap in taps:
        host = hosts[tap.sums[phases[0]].device]
        taken[tap.name].extras.update({name: next(host).item() for name in names[tap.name]})
    return taken, outcomes_3


def _device_of(taps: Sequence[LayerTap], *, together: bool) -> torch.device:
    for tap in taps:
        if tap.sums:
            return tap.sums["train"].device
    if together and distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())  # which exchanges nothing else
    return torch.device("cpu")


def _kinds(tap: LayerTap) -> list[LabelKind]:
    return [kind for kind in LABEL_KINDS if kind in tap.labels]


def _parts_of(tap: LayerTap, phases: Sequence[Phase], *, first: bool) -> list[Tensor]:
    """Return what is added up over processes of one layer, as vectors."""
    parts = [tap.sums[phase] for phase in phases]
    if "eval" in phases:
        parts += [tap.labels[kind].view(-1) for kind in _kinds(tap)]
        if tap.probe is not None:
            flat = [part.to(parts[0]).reshape(-1) for part in tap.probe]
            parts.append(torch.cat(flat) * float(first))
    return parts


def _choices(flat: Tensor, probe: Probe) -> Choices:
    (data,), valid_M, ids = flat.split([1, probe.valid_M.numel(), probe.ids_MK.numel()])
    ids_MK = ids.view(probe.ids_MK.shape)[valid_M > 0]
    return Choices(data.item(), ids_MK.long().tolist())


def agree(
    taps: Sequence[LayerTap], phases: tuple[Phase, ...], *, failed: bool
) -> tuple[bool, bool]:
    """Tell the other processes how this one stands before sums are added up.

    Args:
        taps: The layers.
        phases: The kinds of traffic to take.
        failed: Whether the watching has failed here.

    Returns:
        Whether it has failed anywhere, and whether all processes have the same sums: layers are
        found at their first call, and adding up others' would mix layers.
    """
    size = sum(
        part.numel() for tap in taps if tap.sums for part in _parts_of(tap, phases, first=True)
    )
    facts_3 = torch.tensor([int(failed), size, -size], device=_device_of(taps, together=True))
    distributed.all_reduce(facts_3, op=distributed.ReduceOp.MAX)
    any_failed, largest, smallest = facts_3.tolist()
    return bool(any_failed), largest == -smallest


def _to_host(
    sums: Sequence[Tensor], extras: Sequence[Tensor], reduce: Reduce | None
) -> tuple[Tensor, ...]:
    sums_V = torch.cat(list(sums))
    if reduce is not None:
        reduce(sums_V)
    sizes = [vector.shape[0] for vector in (*sums, *extras)]
    host = torch.cat([sums_V, *extras]).cpu().double()
    pieces: tuple[Tensor, ...] = host.split(sizes)
    return pieces
