"""What a layer costs: operations of a token, parameters of its routing."""

from __future__ import annotations

from torch import nn

from ecomoe.moe import EcoMoE


def flops_per_token(layer: EcoMoE) -> int:
    """Return the floating-point operations of one token's forward pass: router and its K experts.

    Products of matrices alone, two operations each; selection, gates and activations are left out.
    """
    stacked = sum(p.numel() for p in layer.experts.parameters() if p.dim() == 3)
    return 2 * (stacked * layer.top_k // layer.num_experts + _scores(layer.router))


def routing_parameters(layer: EcoMoE) -> int:
    """Return the number of learned parameters of the router; what is frozen is not among them."""
    return sum(parameter.numel() for parameter in layer.router.parameters())


def _scores(router: nn.Module) -> int:
    # A frozen router keeps its maps in buffers, and computes with them all the same.
    maps = (*router.parameters(), *router.buffers())
    return sum(tensor.numel() for tensor in maps if tensor.dim() == 2)
