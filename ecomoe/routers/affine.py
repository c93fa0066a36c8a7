"""Routers whose scores are affine maps: of the token's features, or of an MLP's.

Axes: N tokens, D features, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecomoe.activations import has_hooks
from ecomoe.closed_form import linear_twice
from ecomoe.routers.base import Router


class Affine(nn.Module):
    """``x W^T + b``, but no `nn.Linear`: quantisers and adapters leave the router alone."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw as `nn.Linear` does: uniform within ``1/sqrt(in_features)``."""
        bound = 1.0 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)`` in the wider of the two dtypes."""
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return F.linear(x.to(wide), self.weight.to(wide), self.bias.to(wide))


class LinearRouter(Router):
    """One affine map from features to logits, as in most MoE transformers."""

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        self.score = Affine(d_model, num_experts, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters."""
        self.score.reset_parameters()

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the last map's weight (E, D) and bias (E,)."""
        return [self.score.weight, self.score.bias]

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the scores of all experts, ``(N, E)``."""
        return self.score(x_ND)  # type: ignore[no-any-return]

    def logits_apart(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `Router.logits_apart` does, from one product."""
        plain = type(self).logits is LinearRouter.logits and "logits" not in vars(self)
        transformed = torch._C._functorch.maybe_current_level() is not None
        if not plain or transformed or has_hooks(self.score):
            return super().logits_apart(x_ND)
        if x_ND.itemsize > self.score.weight.itemsize:
            return super().logits_apart(x_ND)
        return linear_twice(x_ND, self.score.weight, self.score.bias)


class MLPRouter(Router):
    """The E paper's router (section 3.1): D -> 128 -> E with a ReLU between."""

    hidden_features = 128

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        self.hidden = Affine(d_model, self.hidden_features, device=device, dtype=dtype)
        self.score = Affine(self.hidden_features, num_experts, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters."""
        self.hidden.reset_parameters()
        self.score.reset_parameters()

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the last map's weight (E, D) and bias (E,)."""
        return [self.score.weight, self.score.bias]

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the scores of all experts, ``(N, E)``."""
        return self.score(F.relu(self.hidden(x_ND)))  # type: ignore[no-any-return]
