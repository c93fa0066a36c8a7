"""Modules that turn tokens into a `Routing`, by name.

Which of them to choose is a question that the equifinality paper (arXiv:2604.14419) asks;
docs/routers.md sets them side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ecomoe import arguments
from ecomoe.routers.affine import Affine, LinearRouter, MLPRouter
from ecomoe.routers.base import Part, Router, keep_wide
from ecomoe.routers.cosine import CosineRouter, IsoCosineRouter, RandomRouter
from ecomoe.routers.hashed import HashRouter

__all__ = [
    "ROUTERS",
    "Affine",
    "CosineRouter",
    "HashRouter",
    "IsoCosineRouter",
    "LinearRouter",
    "MLPRouter",
    "Part",
    "RandomRouter",
    "Router",
    "build_router",
    "keep_wide",
]

ROUTERS: dict[str, type[Router]] = {
    "mlp": MLPRouter,
    "linear": LinearRouter,
    "cosine": CosineRouter,
    "cosine_iso": IsoCosineRouter,
    "hash": HashRouter,
    "random": RandomRouter,
}


def build_router(
    name: str,
    d_model: int,
    *,
    num_experts: int,
    top_k: int,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Router:
    """Return a router by its name in `ROUTERS`.

    Args:
        name: A key of `ROUTERS`.
        d_model: Features D.
        num_experts: Experts E.
        top_k: Experts per token.
        options: Arguments of the router's own, such as ``{"d_space": 32}``.
        device: As for `nn.Linear`.
        dtype: As for `nn.Linear`.

    Raises:
        ValueError: The name or an option is unknown, or an option's value breaks its rule.
    """
    arguments.choice("router", name, ROUTERS)
    build: Callable[..., Router] = ROUTERS[name]
    known = ROUTERS[name].options
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(
            f"router_options={options!r} must be a dict of the router's own arguments; pass e.g. "
            "{'d_space': 32}, or None"
        )
    unknown = [key for key in options or () if key not in known]
    if unknown:
        raise ValueError(
            f"router_options={options!r} names {_listed(unknown)}, and router={name!r} takes "
            f"{_listed(known) or 'no options'}; leave out "
            f"{_listed(unknown) if known else 'router_options'}"
        )
    return build(
        d_model,
        num_experts=num_experts,
        top_k=top_k,
        device=device,
        dtype=dtype,
        **(options or {}),
    )


def _listed(names: Iterable[object]) -> str:
    return ", ".join(repr(name) for name in names)
