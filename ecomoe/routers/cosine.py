"""Routers whose scores are scaled cosines to centroids in a small space.

Axes: N tokens, D features, E experts, M tokens or experts, P features of the space that centroids
lie in.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecomoe import arguments
from ecomoe.routers.base import Router

# Of a place or a centroid, to have a direction.
SHORTEST = 1e-12


class CosineRouter(Router):
    """Scaled cosine between a token's place in a small space and learned centroids.

    ``logits = scale * cos(P x, c_e)``: the equifinality paper's geometric routing, whose space has
    64 dimensions. It has ``d_space * (D + E) + 1`` parameters where a linear map has ``D * E``. The
    scale is learned as its logarithm, so that it stays positive; it starts at 10 (as in CLIP and
    SigLIP), since the cosines alone would leave every gate near uniform. A temperature divides the
    scaled similarity.

    Args:
        d_model: Features D.
        num_experts: Experts E.
        top_k: Experts per token.
        d_space: Dimensions of the space. Tokens fill at most D of them, whatever P is; the parts of
            all centroids beyond do no more than weaken each expert's score, which one dimension
            does as well. So D + 1 is the bound, or 64 in a layer that is smaller.
        device: As for `nn.Linear`.
        dtype: As for `nn.Linear`.

    Raises:
        ValueError: ``d_space`` is no int from 1 to the bound.
    """

    options: ClassVar[tuple[str, ...]] = ("d_space",)
    initial_scale = 10.0
    projection: Tensor
    centroids: Tensor
    log_scale: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int,
        d_space: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        self.d_space = arguments.size("d_space", d_space)
        most = max(d_model + 1, 64)
        if d_space > most:
            raise ValueError(
                f"d_space={d_space} must be an int from 1 to {most}: maps of d_model={d_model} "
                f"features fill no more than {d_model} dimensions; lower d_space"
            )
        self._declare("projection", torch.empty(d_space, d_model, device=device, dtype=dtype))
        self._declare("centroids", torch.empty(num_experts, d_space, device=device, dtype=dtype))
        # One element and not a scalar: FSDP shards no scalars.
        self._declare("log_scale", torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def _declare(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(tensor))

    def reset_parameters(self) -> None:
        """Draw a projection as `nn.Linear` does, and centroids in directions without preference."""
        with torch.no_grad():
            bound = 1.0 / math.sqrt(self.projection.shape[1])
            self.projection.uniform_(-bound, bound)
            self.centroids.normal_(std=self.d_space**-0.5)
            self.log_scale.fill_(math.log(self.initial_scale))

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the centroids (E, P)."""
        assert isinstance(self.centroids, nn.Parameter)
        return [self.centroids]

    def positions(self, x_ND: Tensor) -> Tensor:
        """Return the tokens' places in the space, ``(N, P)``; only their directions count."""
        wide = torch.promote_types(x_ND.dtype, self.projection.dtype)
        return F.linear(x_ND.to(wide), self.projection.to(wide))

    def cosines(self, x_ND: Tensor) -> Tensor:
        """Return the cosines between the tokens' places and the centroids, ``(N, E)``."""
        place_NP = _directions(self.positions(x_ND))
        centroid_EP = _directions(self.centroids.to(place_NP.dtype))
        return F.linear(place_NP, centroid_EP)

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the scores of all experts less each token's greatest, ``(N, E)``.

        The softmax of either is the same. But a division of large scores by a low temperature costs
        digits of their differences, and the scale's gradient sums up multiples of them.
        """
        cosines_NE = self.cosines(x_ND)
        return self.log_scale.exp() * (cosines_NE - cosines_NE.amax(-1, keepdim=True))

    def offset(self, x_ND: Tensor) -> Tensor:
        """Return each token's greatest score, ``(N, 1)``."""
        return self.log_scale.exp() * self.cosines(x_ND).amax(-1, keepdim=True)

    def extra_repr(self) -> str:
        """Show sizes when printed."""
        return f"{super().extra_repr()}, d_space={self.d_space}"


class IsoCosineRouter(CosineRouter):
    """`CosineRouter` in the space that gives it as many parameters as a linear router has.

    The control for the number of parameters, the paper's "iso-parameter cosine": the largest space
    with ``d_space * (D + E) + 1 <= D * E + E``, and at least one dimension.
    """

    options: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        linear = d_model * num_experts + num_experts
        super().__init__(
            d_model,
            num_experts=num_experts,
            top_k=top_k,
            d_space=max((linear - 1) // (d_model + num_experts), 1),
            device=device,
            dtype=dtype,
        )


class RandomRouter(CosineRouter):
    """`CosineRouter` whose projection, centroids and scale stay as they were drawn.

    Tokens still go by what they are like, but nothing is learned about where: the paper's
    "random-fixed". (A random assignment that ignores the token's content is what `HashRouter` is.)
    The tensors are buffers, so that no optimizer and no ``requires_grad_(True)`` finds them.
    """

    # What stays as it was drawn is nobody's to give away.
    expert_parameters = Router.expert_parameters

    def _declare(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor)


def _directions(vectors_MP: Tensor) -> Tensor:
    """Return vectors of length 1, and zeros without a gradient for those that have no direction.

    `F.normalize` divides those by its smallest length, and their gradient with them: by 1e-12.
    """
    length_M1 = torch.linalg.vector_norm(vectors_MP, dim=-1, keepdim=True)
    return vectors_MP / torch.where(length_M1 <= SHORTEST, torch.inf, length_M1)
