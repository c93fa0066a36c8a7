"""What a model weighs before and after a conversion, and how that is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ecomoe.cost import flops_per_token
from ecomoe.moe import EcoMoE
from ecomoe.sites import Found, refusals


@dataclass(frozen=True)
class Cost:
    """What a model weighs.

    Attributes:
        parameters: All of them.
        active: Those that take part in computing one token.
        flops: Floating-point operations of the blocks in question, for one token forward.
    """

    parameters: int
    active: int
    flops: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        dense: Sequence[Found] = (),
        layers: Sequence[tuple[Found, EcoMoE]] = (),
        hops: int = 1,
    ) -> Cost:
        """Weigh a model, with the operations of dense blocks or of layers in it, each ``hops``."""
        parameters = sum(p.numel() for p in model.parameters())
        idle = flops = 0
        for module in model.modules():
            if isinstance(module, EcoMoE):
                share = module.top_k / module.num_experts
                stacked = sum(p.numel() for p in module.experts.parameters() if p.dim() > 1)
                idle += round(stacked * (1 - share))
        for block in dense:
            flops += block.site.ffn.flops
        for _, layer in layers:
            flops += hops * flops_per_token(layer)
        return cls(parameters, parameters - idle, flops)


def summary(
    before: Cost,
    after: Cost,
    planned: Sequence[tuple[Found, EcoMoE]],
    found: Sequence[Found],
    refused: Mapping[str, str],
    *,
    hops: int = 1,
) -> str:
    """Return what a conversion did, in lines for the terminal.

    Args:
        before: What the model weighed.
        after: What it weighs.
        planned: The blocks that were replaced, and their layers.
        found: All blocks that could have been.
        refused: Names of those that could not, with the reason.
        hops: Passes through each layer.
    """
    block, layer = planned[0]
    control = layer.control
    names = block.name if len(planned) == 1 else f"{block.name} ... {planned[-1][0].name}"
    lines = [
        f"EcoMoE: {len(planned)} of {len(found)} feed-forward blocks replaced ({names})",
        f"  each with {layer.num_experts} experts in tiers {layer.tiers}, top_k={layer.top_k}, "
        f"{f'{hops} hops, ' if hops > 1 else ''}"
        f"E={control.e:.3f} ({control.phase})",
        f"  {'':<28}{'before':>12}{'after':>12}",
    ]
    for label, one, other in (
        ("parameters", before.parameters, after.parameters),
        ("active for a token", before.active, after.active),
        ("FLOPs a token, these blocks", before.flops, after.flops),
    ):
        lines.append(f"  {label:<28}{_short(one):>12}{_short(other):>12}")
    lines.extend(f"  {clause}" for clause in refusals(refused))
    return "\n".join(lines)


def _short(number: int) -> str:
    """Write a count with three digits.

    >>> _short(1_234_567), _short(987)
    ('1.23 M', '987')
    """
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
