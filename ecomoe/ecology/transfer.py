"""The way of the sums from the device to the host: once a report, together, reduced over processes.

Axes: E experts, C classes, V sums of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ecomoe.ecology.taps import LayerTap, Phase

Reduce: TypeAlias = Callable[[Tensor], None]


class Taken(NamedTuple):
    """What was moved to the host of one layer.

    Attributes:
        sums: By phase the vector ``(V,)``, fp64.
        extras: Scalars of the last call, by name.
        classes_EC: Judged tokens by expert and class, with the phase "eval".
    """

    sums: dict[Phase, Tensor]
    extras: dict[str, float]
    classes_EC: Tensor | None


def take_sums(
    taps: Sequence[LayerTap],
    phases: tuple[Phase, ...],
    *,
    restart: bool = True,
    reduce: Reduce | None = None,
) -> dict[str, Taken]:
    """Move the sums to the host, one transfer a device, and start them anew at zero.

    Args:
        taps: The layers; those that saw no call yet are left out.
        phases: The kinds of traffic.
        restart: Whether to start anew at zero.
        reduce: Adds up, in place, the sums of all processes.
    """
    taps = [tap for tap in taps if tap.sums]
    parts: dict[torch.device, list[Tensor]] = {}
    extras: dict[torch.device, list[Tensor]] = {}
    names = {tap.name: list(tap.extras()) for tap in taps}
    for tap in taps:
        of_tap = [tap.sums[phase] for phase in phases]
        if "eval" in phases and tap.classes_EC is not None:
            of_tap.append(tap.classes_EC.view(-1))
        device = of_tap[0].device
        parts.setdefault(device, []).extend(of_tap)
        scalars = [value.to(of_tap[0]).reshape(1) for value in tap.extras().values()]
        extras.setdefault(device, []).extend(scalars)
    hosts = {
        device: iter(_to_host(vectors, extras[device], reduce)) for device, vectors in parts.items()
    }
    taken = {}
    for tap in taps:
        host = hosts[tap.sums[phases[0]].device]
        sums = {phase: next(host) for phase in phases}
        classes_EC = None
        if "eval" in phases and tap.classes_EC is not None:
            classes_EC = next(host).view(tap.classes_EC.shape)
        taken[tap.name] = Taken(sums, {}, classes_EC)
        if restart:
            for phase in phases:
                tap.sums[phase].zero_()
            if classes_EC is not None and tap.classes_EC is not None:
                tap.classes_EC.zero_()
    for tap in taps:
        host = hosts[tap.sums[phases[0]].device]
        taken[tap.name].extras.update({name: next(host).item() for name in names[tap.name]})
    return taken


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
