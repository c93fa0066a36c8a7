"""The oracle: a teacher distribution over experts, which the router may learn to imitate.

Section 3.2 of the E paper; its weight is O.

Axes: N tokens, D input features, E experts, F output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecomoe import arguments, losses
from ecomoe.experts import Experts

Teacher = Callable[[Tensor], Tensor]
Oracle = Literal["competence", "dense", "prototype"] | Teacher

# A dense teacher runs every expert; on this many tokens of a batch it is cheap and its mean steady.
MAX_DENSE_TEACHER_TOKENS = 256


def choose_oracle(
    oracle: Oracle | None, *, oracle_weight: float, has_heads: bool, dense: nn.Module | None
) -> Oracle | None:
    """Return the oracle that a layer uses, ``None`` where its weight is 0.

    By default experts with heads have the competence oracle, others the prototype oracle.

    Raises:
        ValueError: The oracle lacks what it reads, or would have no effect.
    """
    if oracle == "dense" and dense is None:
        raise ValueError(
            "dense=None, but oracle='dense' compares experts with a dense block; pass "
            "dense=<the block>, or choose oracle='prototype'"
        )
    if oracle != "dense" and dense is not None:
        raise ValueError(
            f"dense is given, but oracle={oracle!r} does not read it; set oracle='dense'"
        )
    if oracle == "competence" and not has_heads:
        raise ValueError(
            "oracle='competence' needs experts with heads; give num_classes, or choose "
            "oracle='prototype'"
        )
    if isinstance(oracle, type) or not (oracle is None or callable(oracle)):
        arguments.choice("oracle", oracle, ("competence", "dense", "prototype"))
    if oracle_weight == 0:
        if oracle is not None:
            raise ValueError(
                f"oracle={oracle!r} has no effect at oracle_weight=0; give oracle_weight > 0"
            )
        return None
    if oracle is not None:
        return oracle
    return "competence" if has_heads else "prototype"


def imitation_loss(
    oracle: Oracle,
    x_ND: Tensor,
    logits_NE: Tensor,
    *,
    experts: Experts,
    dense: nn.Module | None,
    prototypes_ED: Tensor | None,
    targets: Tensor | None,
) -> Tensor:
    """Return the divergence of the router's probabilities from the teacher's, a scalar in nats.

    Raises:
        ValueError: Targets are missing or do not fit, or a callable returns another shape.
    """
    if oracle == "dense":
        # Evenly spaced tokens, not random ones: evaluation and resuming stay reproducible.
        stride = max(-(-x_ND.shape[0] // MAX_DENSE_TEACHER_TOKENS), 1)
        x_ND, logits_NE = x_ND[::stride], logits_NE[::stride]
    with torch.no_grad():
        if oracle == "competence":
            teacher_NE = _competence_teacher(experts, x_ND, targets, dtype=logits_NE.dtype)
        elif oracle == "dense":
            assert dense is not None
            outputs_NEF = experts.all_outputs(x_ND).to(logits_NE.dtype)
            teacher_NE = losses.dense_teacher(outputs_NEF, dense(x_ND).to(logits_NE.dtype))
        elif oracle == "prototype":
            assert prototypes_ED is not None
            teacher_NE = losses.prototype_teacher(x_ND.to(prototypes_ED.dtype), prototypes_ED)
        else:
            assert callable(oracle)
            teacher_NE = oracle(x_ND)
    if teacher_NE.shape != logits_NE.shape:
        raise ValueError(
            f"oracle returned shape {tuple(teacher_NE.shape)}; it must give one "
            f"distribution over experts per token, {tuple(logits_NE.shape)}"
        )
    return losses.oracle_loss(logits_NE, teacher_NE)


def _competence_teacher(
    experts: Experts, x_ND: Tensor, targets: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    if targets is None:
        raise ValueError(
            "targets=None, but oracle='competence' compares the experts' losses on them; call "
            "layer(x, targets=labels) in training, or choose oracle='prototype'"
        )
    if targets.numel() != x_ND.shape[0]:
        raise ValueError(
            f"targets has {targets.numel()} entries for {x_ND.shape[0]} tokens; it must hold "
            "one class id per token"
        )
    outputs_NEF = experts.all_outputs(x_ND).to(dtype)
    targets_NE = targets.reshape(-1, 1).expand(-1, experts.num_experts)
    losses_NE = F.cross_entropy(outputs_NEF.transpose(1, 2), targets_NE, reduction="none")
    return losses.competence_teacher(losses_NE)
