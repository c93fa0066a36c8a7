"""Checks of arguments that are torch's own: modules, dtypes, devices, tokens.

Where something may be left out, `None` passes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def module(name: str, value: object) -> None:
    """Check for a module.

    Raises:
        ValueError: It is none.
    """
    if value is not None and not isinstance(value, nn.Module):
        raise ValueError(f"{name}={value!r} must be a module; pass an nn.Module or None")


def floating(name: str, value: object) -> None:
    """Check for a dtype that experts may have.

    Raises:
        ValueError: It is none.
    """
    if value is not None and value not in DTYPES:
        raise ValueError(
            f"{name}={value} must be a floating dtype of 16 bits or more, one of "
            f"{', '.join(map(str, DTYPES))}; pass one of these"
        )


def device(name: str, value: torch.device | str | None) -> None:
    """Check for a device, which need not be here.

    Raises:
        ValueError: It is none.
    """
    if value is None:
        return
    try:
        torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name}={value!r} must name a device; pass e.g. 'cpu' or 'cuda:0'"
        ) from error


def tokens(x: object, *, d_model: int) -> None:
    """Check for a tensor ``(..., d_model)``.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"x is a {type(x).__name__}, not a tensor; pass torch.as_tensor(x)")
    if x.dim() == 0 or x.shape[-1] != d_model:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; its last axis must be d_model={d_model}: "
            "move the channels last"
        )
