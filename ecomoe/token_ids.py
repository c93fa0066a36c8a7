"""Token ids for routers that go by them: where they come from, and how they rank experts.

Axes: N tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class TokenIds:
    """The token ids of the forward pass under way, shared by the hash routers of a model.

    A copy or a pickle of the model has one of its own, without the ids. See
    `feed_token_ids`.

    Attributes:
        ids: Ids as the embedding received them, or ``None`` before it has received any.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"ids": None}

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a token embedding."""
        ids = args[0] if args else kwargs.get("input")
        self.ids = ids.detach() if isinstance(ids, Tensor) else None

    def forget(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the whole model: the ids of an earlier batch are not this one's."""
        self.ids = None


def hash_scores(ids_N: Tensor, *, num_experts: int, seed: Tensor) -> Tensor:
    """Return a pseudo-random number of each pair of token id and expert, int64, ``(N, E)``.

    Args:
        ids_N: Token ids, of any integer dtype.
        num_experts: E.
        seed: One number in [0, 2^32), ``(1,)``.
    """
    token_N1 = scramble(ids_N.to(torch.int64).unsqueeze(-1) + seed)
    expert_E = scramble(torch.arange(num_experts, device=ids_N.device))
    return scramble(token_N1 + expert_E)


def scramble(number: Tensor) -> Tensor:
    """Mix the bits of 32-bit numbers (held in int64), one to one.

    The multipliers are below 2^30, so that no product overflows: overflow is undefined in the code
    that compilers write. Shifts and multipliers: C. Wellons, hash-prospector, "lowbias32" family.
    """
    mask = 2**32 - 1
    number = number & mask
    for shift, multiplier in ((16, 0x2C1B3C6D), (12, 0x297A2D39)):
        number = ((number ^ (number >> shift)) * multiplier) & mask
    return number ^ (number >> 15)


def feed_token_ids(model: nn.Module, *embeddings: nn.Module) -> None:
    """Let the hash routers of a model read the token ids that its embeddings receive.

    So they have the ids of each call, whoever calls: in generation with a cache those of the new
    tokens, in a decoder its own. `ecomoe.convert` does this for models of transformers; call it for
    a model of your own, or again after ``resize_token_embeddings``.

    Args:
        model: Holds hash routers; its forward pass forgets the ids of the one before.
        embeddings: The modules whose first argument is token ids, in the tokens' order.

    Raises:
        ValueError: There is no hash router, or no embedding.
    """
    for module in (model, *embeddings):
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"{module!r} must be an nn.Module; pass the model and its embeddings themselves"
            )
    modules = model.modules()
    routers = [
        module for module in modules if isinstance(getattr(module, "tokens", None), TokenIds)
    ]
    if not routers:
        raise ValueError(
            f"model={type(model).__name__} holds no hash router; give layers router='hash' first"
        )
    if not embeddings:
        raise ValueError(
            "embeddings are missing; name the modules that receive token ids, e.g. model.embed"
        )
    tokens = TokenIds()
    for router in routers:
        router.tokens = tokens  # type: ignore[assignment]
    if model not in embeddings:
        model.register_forward_pre_hook(tokens.forget)
    for embedding in embeddings:
        embedding.register_forward_pre_hook(tokens.read, with_kwargs=True)
