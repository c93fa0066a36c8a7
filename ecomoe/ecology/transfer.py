"""The way of the sums from the device to the host: once a report, together, reduced over processes.

Axes: E experts, C labels, M probed tokens, K experts chosen for a token, V sums of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, distributed

from ecomoe.ecology.lockdown import NUM_PROBES
from ecomoe.ecology.saturation import Choices
from ecomoe.ecology.statistics import LABEL_KINDS, LabelKind, wide_dtype
from ecomoe.ecology.taps import LayerTap
from ecomoe.ecology.traffic import Phase

Reduce: TypeAlias = Callable[[Tensor], object]


class Taken(NamedTuple):
    """What was moved to the host of one layer.

    Attributes:
        sums: By phase the vector ``(V,)``, fp64.
        extras: Scalars of the last call, by name.
        labels: Evaluated tokens by expert and label, ``(E, C)``, by kind, with the phase "eval".
        choices: For probed tokens, those of the first process, with the phase "eval".
        nearest: For each expert the one most like it, with their mean cosine, as the first process
            saw them, with the phase "eval".
    """

    sums: dict[Phase, Tensor]
    extras: dict[str, float]
    labels: dict[LabelKind, Tensor]
    choices: Choices | None
    nearest: list[tuple[int, float]] | None


class Extent(NamedTuple):
    """How much there is to take of a layer; all 0 where it saw no call yet.

    Attributes:
        num_experts: E.
        num_labels: Of each of `LABEL_KINDS`.
        top_k: K of the probed tokens, 0 without any.
        compared: Whether the experts' outputs were compared, 0 or 1.
    """

    num_experts: int
    num_labels: tuple[int, ...]
    top_k: int
    compared: int

    @classmethod
    def of(cls, tap: LayerTap) -> Extent:
        """Return how much there is of a layer in this process."""
        tables = [tap.labels.get(kind) for kind in LABEL_KINDS]
        return cls(
            tap.num_experts if tap.sums else 0,
            tuple(0 if table is None else table.shape[1] for table in tables),
            0 if tap.probe is None else tap.probe.ids_MK.shape[1],
            int(tap.nearest is not None),
        )

    def facts(self) -> list[int]:
        """Return it as numbers, for `from_facts`."""
        return [self.num_experts, *self.num_labels, self.top_k, self.compared]

    @classmethod
    def from_facts(cls, facts: Sequence[int]) -> Extent:
        """Return what `facts` gave."""
        return cls(facts[0], tuple(facts[1:-2]), facts[-2], facts[-1])


def take_sums(
    taps: Sequence[LayerTap],
    phases: tuple[Phase, ...],
    *,
    restart: bool = True,
    extents: Sequence[Extent] | None = None,
    outcomes_3: Tensor | None = None,
) -> tuple[dict[str, Taken], Tensor]:
    """Move the sums to the host, one transfer a device, and start them anew at zero.

    Args:
        taps: The layers; those that saw no call yet are left out.
        phases: The kinds of traffic.
        restart: Whether to start anew at zero.
        extents: Of each layer in all processes together, whose sums are then added up; ``None``
            for those of this process alone.
        outcomes_3: Sums over all predictions, to take along.

    Returns:
        By layer what was taken, and the outcomes, zeros where there are none.
    """
    together = extents is not None
    known = zip(taps, extents or [Extent.of(tap) for tap in taps], strict=True)
    called = {tap: extent for tap, extent in known if extent.num_experts}
    for tap, extent in called.items():
        if not tap.sums:  # only other processes have called it
            tap.tiers = tap.tiers or (extent.num_experts,)
            tap.allocate(_device_of(taps, together=together))
    parts: dict[torch.device, list[Tensor]] = {}
    extras: dict[torch.device, list[Tensor]] = {}
    device = _device_of(taps, together=together)
    if outcomes_3 is None:
        outcomes_3 = torch.zeros(3, dtype=wide_dtype(device), device=device)
    outcomes_3 = outcomes_3.to(device)
    parts[outcomes_3.device], extras[outcomes_3.device] = [outcomes_3], []
    names = {tap: list(tap.extras()) for tap in called}
    for tap, extent in called.items():
        of_tap = _parts_of(tap, phases, extent, first=not together or distributed.get_rank() == 0)
        parts.setdefault(tap.device, []).extend(of_tap)
        scalars = [value.to(of_tap[0]).reshape(1) for value in tap.extras().values()]
        extras.setdefault(tap.device, []).extend(scalars)
    reduce = distributed.all_reduce if together else None
    hosts = {
        device: iter(_to_host(vectors, extras[device], reduce)) for device, vectors in parts.items()
    }
    outcomes_3 = next(hosts[outcomes_3.device])
    taken = {
        tap.name: _taken(hosts[tap.device], phases, extent, num_experts=tap.num_experts)
        for tap, extent in called.items()
    }
    for tap in called:
        taken[tap.name].extras.update({name: next(hosts[tap.device]).item() for name in names[tap]})
        if restart:
            tap.restart(phases)
    return taken, outcomes_3


def _device_of(taps: Sequence[LayerTap], *, together: bool) -> torch.device:
    for tap in taps:
        if tap.sums:
            return tap.device
    if together and distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())  # which exchanges nothing else
    return torch.device("cpu")


def _parts_of(
    tap: LayerTap, phases: Sequence[Phase], extent: Extent, *, first: bool
) -> list[Tensor]:
    """Return what is added up over processes of one layer, as vectors of the extent's sizes."""
    like = tap.sums["train"]
    parts = [
        tap.sums[phase] if phase in tap.sums else like.new_zeros(tap.layouts[phase].size)
        for phase in phases
    ]
    if "eval" not in phases:
        return parts
    for kind, size in zip(LABEL_KINDS, extent.num_labels, strict=True):
        if size:
            table = tap.labels.get(kind)
            parts.append(
                like.new_zeros(tap.num_experts * size) if table is None else table.to(like).view(-1)
            )
    for noted, size in (
        (tap.probe, 1 + NUM_PROBES + NUM_PROBES * extent.top_k if extent.top_k else 0),
        (tap.nearest, 1 + 2 * tap.num_experts if extent.compared else 0),
    ):
        if size and noted is not None and first:
            parts.append(torch.cat([part.to(like).reshape(-1) for part in noted]))
        elif size:
            parts.append(like.new_zeros(size))
    return parts


def _taken(
    host: Iterator[Tensor], phases: Sequence[Phase], extent: Extent, *, num_experts: int
) -> Taken:
    sums = {phase: next(host) for phase in phases}
    labels: dict[LabelKind, Tensor] = {}
    choices = nearest = None
    if "eval" in phases:
        labels = {
            kind: next(host).view(num_experts, size)
            for kind, size in zip(LABEL_KINDS, extent.num_labels, strict=True)
            if size
        }
        if extent.top_k:
            choices = _choices(next(host), top_k=extent.top_k)
        if extent.compared:
            nearest = _nearest(next(host), num_experts)
    return Taken(sums, {}, labels, choices, nearest)


def _choices(flat: Tensor, *, top_k: int) -> Choices | None:
    (data,), valid_M, ids = flat.split([1, NUM_PROBES, NUM_PROBES * top_k])
    ids_MK = ids.view(NUM_PROBES, top_k)[valid_M > 0]
    return Choices(data.item(), ids_MK.long().tolist()) if len(ids_MK) else None


def _nearest(flat: Tensor, num_experts: int) -> list[tuple[int, float]] | None:
    (compared,), ids_E, cosine_E = flat.split([1, num_experts, num_experts])
    if not compared:
        return None
    return list(zip(ids_E.long().tolist(), (cosine_E / compared).tolist(), strict=True))


def agree(
    taps: Sequence[LayerTap], *, failed: bool, num_classes: int
) -> tuple[bool, int, list[Extent] | None]:
    """Tell the other processes how this one stands before sums are added up.

    Args:
        taps: The layers, the same in all processes.
        failed: Whether the watching has failed here.
        num_classes: Classes of the task, 0 where they are not known here.

    Returns:
        Whether it has failed anywhere, the largest number of classes, and what there is of each
        layer in all processes together: some may have called layers, or judged outcomes, that
        others have not. ``None`` where they contradict each other, for adding up would then mix
        sums.
    """
    facts = [fact for tap in taps for fact in Extent.of(tap).facts()]
    # The largest, and of those that are not 0 the smallest.
    both = [int(failed), num_classes, *facts, *(-fact if fact else -(2**62) for fact in facts)]
    facts_F = torch.tensor(both, device=_device_of(taps, together=True))
    distributed.all_reduce(facts_F, op=distributed.ReduceOp.MAX)
    any_failed, num_classes, *found = facts_F.tolist()
    largest, smallest = found[: len(facts)], [-fact for fact in found[len(facts) :]]
    if any(high and high != low for high, low in zip(largest, smallest, strict=True)):
        return bool(any_failed), num_classes, None
    size = len(facts) // len(taps)
    extents = [Extent.from_facts(largest[at : at + size]) for at in range(0, len(largest), size)]
    return bool(any_failed), num_classes, extents


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
