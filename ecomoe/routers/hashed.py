"""The router that goes by token ids.

Axes: N tokens, M of them that come, D features, E experts, K experts chosen for a token (top-k).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ecomoe.routers.base import Router
from ecomoe.routing import Routing, route_fixed, top_k_experts
from ecomoe.token_ids import INTEGERS, TokenIds, hash_scores


class HashRouter(Router):
    """Experts fixed by the token id, in equal parts: hash layers (Roller et al. 2021).

    No parameter and no gradient. Each pair of token id and expert has a pseudo-random number, and
    the ``top_k`` experts of the highest are the token's; each layer draws a seed of its own. The
    choice is final, so its logits say so: 0 for the chosen experts, `route_fixed`'s margin below
    for the others.

    The ids come from the model's token embedding by `ecomoe.token_ids.feed_token_ids`, which
    `ecomoe.convert` calls. Under gradient checkpointing run one forward pass to a backward pass: a
    recomputation reads the ids of the last.

    Args:
        d_model: Not used; every router takes it.
        num_experts: Experts E.
        top_k: Experts per token.
        device: Where the seed is.
        dtype: Not used.
    """

    seed: Tensor

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
        self.tokens = TokenIds()
        # Saved with the model: the experts know the tokens that they were trained on.
        self.register_buffer("seed", torch.empty(1, dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw another seed."""
        self.seed.random_(2**32)

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the numbers that rank the experts of each token, int64, ``(N, E)``."""
        ids = self.tokens.ids
        if ids is None:
            raise ValueError(
                "router='hash' goes by token ids, and this call has none; pass input_ids to a "
                "converted language model. In a model of your own, or where the embedding was "
                "replaced, call ecomoe.token_ids.feed_token_ids(model, embedding)"
            )
        if ids.dtype not in INTEGERS:
            raise ValueError(
                f"router='hash' got token ids of dtype {ids.dtype}, which must be integers; name "
                "the token embedding itself to feed_token_ids"
            )
        num_tokens = x_ND.shape[0] if self.part is None else self.part.num_tokens
        if ids.numel() != num_tokens:
            raise ValueError(
                f"router='hash' got {ids.numel()} token ids for {num_tokens} tokens and needs one "
                "a token; call the whole model, name the embedding that receives these tokens' ids "
                "to feed_token_ids, or choose another router where the model merges, adds or "
                "leaves out tokens"
            )
        ids_N = ids.reshape(-1).to(x_ND.device)
        ids_M = ids_N if self.part is None else ids_N[self.part.rows_M]
        return hash_scores(ids_M, num_experts=self.num_experts, seed=self.seed)

    def forward(
        self, x_ND: Tensor, temperature: Tensor, random_routing: Tensor | None = None
    ) -> Routing:
        """Route tokens by their ids; ``x_ND`` gives their number, device and precision."""
        wide_ND = x_ND.detach().to(torch.promote_types(x_ND.dtype, torch.float32))
        expert_ids_NK = top_k_experts(self.logits(wide_ND), top_k=self.top_k)
        return route_fixed(
            expert_ids_NK,
            num_experts=self.num_experts,
            temperature=temperature.to(wide_ND.dtype),
            random_routing=random_routing,
        )
