"""Predictions set beside what is true: the outcomes that experts are judged by.

Axes: M predictions, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ecomoe.routers import Part


class Seen(NamedTuple):
    """First choices of one evaluation call, kept until its labels are known; small integers."""

    first_N: Tensor
    predicted_N: Tensor | None
    valid_N: Tensor | None


def seen_in_place(first_M: Tensor, judged_M: Tensor | None, part: Part | None) -> Seen:
    """Put the first choices of a part of the tokens where predictions of all will look for them."""
    if part is None:
        return Seen(first_M, None, judged_M)
    first_N = first_M.new_zeros(part.num_tokens)
    first_N[part.rows_M] = first_M
    judged_N = torch.zeros_like(first_N, dtype=torch.bool)
    judged_N[part.rows_M] = True if judged_M is None else judged_M
    return Seen(first_N, None, judged_N)


class Outcomes(NamedTuple):
    """What is known about M predictions, one per sample or one per token.

    Attributes:
        targets_M: True classes, int64; where ``valid_M`` is false, of no meaning.
        correct_M: Whether the most probable class is the true one; of NaN logits, none is.
        confidence_M: The highest class probability, shares of 1.
        valid_M: Whether there is a true class.
        losses_M: Cross-entropies, nats, fp32; 0 where there is no true class.
    """

    targets_M: Tensor
    correct_M: Tensor
    confidence_M: Tensor
    valid_M: Tensor
    losses_M: Tensor


def outcomes_of(
    outputs: Tensor, targets: Tensor, *, shift: bool = False, ignore_index: int = -100
) -> Outcomes:
    """Compare class logits with true classes.

    Args:
        outputs: Logits, ``(..., C)``.
        targets: True classes ``(...)``, or their probabilities ``(..., C)`` (soft labels).
        shift: Whether position t predicts the target of position t + 1 (causal language models);
            the last position then has none.
        ignore_index: The target that stands for none, as does every id that is no class.

    Raises:
        ValueError: The kinds or the shapes do not fit.
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise ValueError(
            f"outputs is {_kind(outputs)}; it must be a floating-point tensor: pass the model's "
            "class logits (..., C)"
        )
    if outputs.dim() < 2 or outputs.shape[-1] < 2:
        raise ValueError(
            f"outputs has shape {tuple(outputs.shape)}; it must be class logits (..., C) with at "
            "least two classes: accuracy means nothing for other outputs"
        )
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets is {_kind(targets)}; it must be a tensor of class ids: pass one")
    if targets.shape == outputs.shape and targets.is_floating_point():
        targets = targets.argmax(-1)
    if targets.shape != outputs.shape[:-1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)} for outputs of {tuple(outputs.shape)}; "
            f"it must be {tuple(outputs.shape[:-1])}, one class id per prediction"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(
            f"targets is {_kind(targets)}; it must hold whole numbers, one class id per "
            "prediction: pass targets.long()"
        )
    outputs, targets = outputs.detach(), targets.to(outputs.device, torch.int64)
    if shift:
        nothing = torch.full_like(targets[..., :1], ignore_index)
        targets = torch.cat([targets[..., 1:], nothing], dim=-1)
    # On the device: whether ids are out of range is not worth waiting for.
    valid = (targets != ignore_index) & (targets >= 0) & (targets < outputs.shape[-1])
    logits = outputs.float()
    highest, predicted = logits.max(-1)
    total = logits.logsumexp(-1)
    true = logits.gather(-1, torch.where(valid, targets, 0).unsqueeze(-1)).squeeze(-1)
    return Outcomes(
        targets.reshape(-1),
        ((predicted == targets) & ~highest.isnan()).reshape(-1),
        (highest - total).exp().reshape(-1),
        valid.reshape(-1),
        torch.where(valid, total - true, 0.0).reshape(-1),
    )


def domains_of(domains: Tensor, shape: torch.Size) -> Tensor:
    """Return the domain of each of M predictions, ``(M,)``.

    Args:
        domains: Whole numbers, one for each prediction, or one for each sample.
        shape: Of the predictions, samples first.

    Raises:
        ValueError: The kind or the shape does not fit.
    """
    if not isinstance(domains, Tensor) or domains.is_floating_point() or domains.is_complex():
        raise ValueError(
            f"domains is {_kind(domains)}; it must be a tensor of whole numbers: pass one id a "
            "sample"
        )
    leading = shape[: domains.dim()]
    if not domains.dim() or domains.shape != leading:
        raise ValueError(
            f"domains has shape {tuple(domains.shape)} for predictions of {tuple(shape)}; it must "
            f"be {tuple(shape[:1])} or {tuple(shape)}: pass one id a sample"
        )
    spread = domains.reshape(*leading, *[1] * (len(shape) - domains.dim())).expand(shape)
    return spread.reshape(-1).long()


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
