"""Modules that turn tokens into a `Routing`.

A router computes in fp32 (fp64 inside an fp64 model) whatever the dtype around it: a rounding error
in a logit changes which expert a token reaches.

Axes: N tokens, D features, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecomoe.routing import Routing, route, without_autocast


class Router(nn.Module):
    """What every router shares: precision, selection and the `Routing` it returns.

    A subclass computes the logits. A forward hook on a router sees the whole decision.
    """

    def __init__(self, *, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the scores of all experts for fp32 (or fp64) tokens, ``(N, E)``."""
        raise NotImplementedError(f"{type(self).__name__} must define logits(x_ND)")

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the parameters whose first axis counts experts; `ecomoe.rescue` writes them."""
        raise NotImplementedError(f"{type(self).__name__} must define expert_parameters()")

    def forward(
        self, x_ND: Tensor, temperature: Tensor, random_routing: Tensor | None = None
    ) -> Routing:
        """Route tokens of any floating dtype; see `ecomoe.routing.route`."""
        with without_autocast(x_ND):
            wide = torch.promote_types(x_ND.dtype, torch.float32)
            logits_NE = self.logits(x_ND.to(wide))
            return route(
                logits_NE,
                top_k=self.top_k,
                temperature=temperature,
                random_routing=random_routing,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keep_wide(fn), recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Show sizes when printed."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}"


def keep_wide(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap the function of ``nn.Module._apply`` so that ``.half()`` and the like spare fp32 values.

    Moves between devices go through, and so does a change to a wider dtype.
    """

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if tensor.is_floating_point() and result.itemsize < tensor.itemsize <= 4:
            return tensor.to(result.device)
        return result

    return apply


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


ROUTERS: dict[str, type[LinearRouter] | type[MLPRouter]] = {
    "mlp": MLPRouter,
    "linear": LinearRouter,
}
