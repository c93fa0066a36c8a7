"""From the weights of a dense feed-forward block to those of experts.

Axes: E experts, D input features, H hidden features of the dense block, W hidden features of an
expert, F output features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ecomoe.activations import Activation
from ecomoe.experts import ExpertLinear, Experts, FFNExperts, HeadExperts

Init = Literal["upcycle", "noise", "partial", "random"]
INITS: tuple[str, ...] = get_args(Init)

# What `amount` means, and is by default, where an init takes one.
DEFAULT_AMOUNTS = {"noise": 0.01, "partial": 0.5, "random": 0.01}


class Projection(NamedTuple):
    """A linear map in the layout of `nn.Linear`, without its graph.

    Attributes:
        weight: (out, in), often a view of the dense block's own parameter.
        bias: (out), or ``None``.
        trainable: Whether the dense weight asks for a gradient.
        bias_trainable: Whether the dense bias does.
    """

    weight: Tensor
    bias: Tensor | None
    trainable: bool
    bias_trainable: bool = False

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Projection:
        """Take a weight (out, in) and a bias from their graph."""
        return cls(
            weight.detach(),
            None if bias is None else bias.detach(),
            bool(weight.requires_grad),
            bias is not None and bool(bias.requires_grad),
        )

    def split(self, sections: int) -> list[Projection]:
        """Return equal parts of the output features, first to last."""
        weights = self.weight.chunk(sections)
        biases = [None] * sections if self.bias is None else self.bias.chunk(sections)
        asks = (self.trainable, self.bias_trainable)
        return [Projection(w, b, *asks) for w, b in zip(weights, biases, strict=True)]


@dataclass(frozen=True, eq=False, kw_only=True)
class DenseFFN:
    """A dense feed-forward block taken apart.

    It computes ``down(norm(drop(act(up x))))``, gated ``down(norm(drop(act(gate x) * up x)))``,
    followed by dropout of the output. Without ``up`` it is the second half of a block whose hidden
    features mix tokens: ``down(drop(x))``, with D = H.

    Attributes:
        down: (F, H).
        up: (H, D), or ``None``.
        gate: (H, D), or ``None`` in a plain block.
        activation: A callable or module on hidden features, (..., H) to (..., H); only after up.
        norm: A module on the hidden features, (S, H) to (S, H), or ``None``.
        dropout: Probability of dropping a hidden feature in training.
        output_dropout: Probability of dropping an output feature in training.
    """

    down: Projection
    up: Projection | None = None
    activation: Activation = torch.nn.functional.gelu
    gate: Projection | None = None
    norm: nn.Module | None = None
    dropout: float = 0.0
    output_dropout: float = 0.0

    @property
    def d_model(self) -> int:
        """Input features D."""
        return (self.down if self.up is None else self.up).weight.shape[1]

    @property
    def d_hidden(self) -> int:
        """Hidden features H."""
        return self.down.weight.shape[1]

    @property
    def d_output(self) -> int:
        """Output features F."""
        return self.down.weight.shape[0]

    @property
    def projections(self) -> list[Projection]:
        """The linear maps, the first layer's before the second's; the gate before up."""
        return [p for p in (self.gate, self.up, self.down) if p is not None]

    @property
    def flops(self) -> int:
        """Floating-point operations per token of the linear maps; 2 for a multiply-add."""
        return sum(2 * p.weight.numel() for p in self.projections)

    @property
    def fixed_width(self) -> bool:
        """Whether something in the block is made for exactly H hidden features."""
        if self.up is None:
            return True
        modules = [m for m in (self.activation, self.norm) if isinstance(m, nn.Module)]
        return any(t.numel() > 1 for m in modules for t in (*m.parameters(), *m.buffers()))


def copied_features(num_experts: int, *, d_hidden: int, width: int) -> tuple[Tensor, Tensor]:
    """Choose the hidden features that each expert copies from a dense block.

    Experts take consecutive runs of ``width`` features, one expert after the other, around and
    around. An expert wider than the block holds some features more than once and shares the output
    weight among the copies, so that it computes the same. A narrower one holds a part of the
    features with its output weights scaled by H / W: over experts chosen uniformly the expectation
    is the dense output.

    Args:
        num_experts: Experts E.
        d_hidden: Hidden features H of the dense block.
        width: Hidden features W of an expert.

    Returns:
        The features, int64, and the factors of their output weights, both ``(E, W)``.

    Example:
        >>> copied_features(3, d_hidden=4, width=2)[0].tolist()
        [[0, 1], [2, 3], [0, 1]]
        >>> copied_features(1, d_hidden=2, width=3)[1].tolist()
        [[0.5, 1.0, 0.5]]
    """
    starts_E = torch.arange(num_experts) * width
    features_EW = (starts_E.unsqueeze(1) + torch.arange(width)) % d_hidden
    copies_EH = torch.zeros(num_experts, d_hidden)
    copies_EH.scatter_add_(1, features_EW, torch.ones(features_EW.shape))
    return features_EW, max(1.0, d_hidden / width) / copies_EH.gather(1, features_EW)


@torch.no_grad()
def fill_experts(experts: Experts, ffn: DenseFFN, *, init: Init, amount: float) -> None:
    """Write the weights of a dense block into experts.

    Args:
        experts: Experts of the block's form (gated as it is, linear where it has no ``up``) and of
            any width W, or exactly H where ``ffn.fixed_width``. They have a bias where any
            projection of the block has one; the others are taken away.
        ffn: The dense block.
        init: ``"upcycle"`` copies (Komatsuzaki et al. 2023, arXiv:2212.05055). ``"noise"`` adds to
            each copy normal noise. ``"partial"`` draws a share of each expert's hidden features
            afresh, with the mean and deviation of what they replace: Drop-Upcycling (Nakamura et
            al. 2025, arXiv:2502.19261). ``"random"`` draws all, with the deviation of the block's
            weights around 0: a block that was just initialised is initialised anew.
        amount: For noise, its standard deviation over that of the weights; for partial, the share
            of hidden features drawn afresh, in [0, 1]; for random, how far experts differ, as
            `ecomoe.experts.ExpertLinear` has its ``spread``, in [0, 1]. Else without effect.
    """
    sources = [p for p in (ffn.gate, ffn.up) if p is not None]
    first, down = _projections(experts)
    for proj, dense in ((first, sources), (down, [ffn.down])):
        if proj is None:
            continue
        if all(source.bias is None for source in dense):
            proj.bias = None
        proj.weight.requires_grad_(any(source.trainable for source in dense))
        if proj.bias is not None:
            proj.bias.requires_grad_(any(source.bias_trainable for source in dense))
        if init == "random":
            _draw_all(proj, dense, amount)
    if init == "random":
        return
    num_experts, _, width = down.weight.shape
    features_EW, factors_EW = copied_features(num_experts, d_hidden=ffn.d_hidden, width=width)
    device = ffn.down.weight.device
    if ffn.d_hidden == width:
        copies: list[slice | Tensor] = [slice(None)] * num_experts
    else:
        copies = list(features_EW.to(device).unbind())
    factors_EW = factors_EW.to(device=device, dtype=ffn.down.weight.dtype)
    for e, features_W in enumerate(copies):
        if first is not None:
            _copy_rows(first, e, sources, features_W)
        down.weight[e].copy_(ffn.down.weight[:, features_W] * factors_EW[e])
        if down.bias is not None:
            assert ffn.down.bias is not None
            down.bias[e].copy_(ffn.down.bias)
    if init == "noise":
        for proj in (first, down):
            if proj is not None:
                _add_noise(proj, amount)
    elif init == "partial":
        _redraw_features(first, down, amount, sections=len(sources))


@torch.no_grad()
def shorten_outputs(experts: Experts, factor: float) -> None:
    """Multiply what experts put out by a factor."""
    for parameter in _projections(experts)[1].parameters():
        parameter.mul_(factor)


def _projections(experts: Experts) -> tuple[ExpertLinear | None, ExpertLinear]:
    """Return the experts' first linear map, if there are two, and their last."""
    if isinstance(experts, FFNExperts):
        return experts.gate_up_proj if experts.gated else experts.up_proj, experts.down_proj
    assert isinstance(experts, HeadExperts)
    return None, experts.head


def _copy_rows(
    first: ExpertLinear, expert: int, sources: list[Projection], features_W: slice | Tensor
) -> None:
    rows = [source.weight[features_W] for source in sources]
    first.weight[expert].copy_(torch.cat(rows))
    if first.bias is not None:
        biases = [
            row.new_zeros(row.shape[0]) if source.bias is None else source.bias[features_W]
            for row, source in zip(rows, sources, strict=True)
        ]
        first.bias[expert].copy_(torch.cat(biases))


def _draw_all(proj: ExpertLinear, sources: list[Projection], spread: float) -> None:
    for rows, source in zip(proj.weight.chunk(len(sources), dim=1), sources, strict=True):
        rows.copy_(_apart(rows, spread) * source.weight.std())
    if proj.bias is not None:
        for rows, source in zip(proj.bias.chunk(len(sources), dim=1), sources, strict=True):
            deviation = 0.0 if source.bias is None else source.bias.std()
            rows.copy_(_apart(rows, spread) * deviation)


def _apart(like: Tensor, spread: float) -> Tensor:
    """Draw normal values of deviation 1 that differ along the first axis by ``spread``."""
    drawn = torch.randn_like(like)
    if spread < 1.0:
        drawn = drawn * spread + torch.randn_like(like[:1]) * math.sqrt(1 - spread**2)
    return drawn


def _add_noise(proj: ExpertLinear, amount: float) -> None:
    for weight in proj.weight:
        weight.add_(torch.randn_like(weight) * (amount * weight.std()))


def _redraw_features(
    first: ExpertLinear | None, down: ExpertLinear, share: float, *, sections: int
) -> None:
    """Draw the same share of hidden features of each expert anew in all its projections."""
    width = down.weight.shape[-1]
    num_redrawn = round(share * width)
    if not num_redrawn:
        return
    for e in range(down.weight.shape[0]):
        features = torch.randperm(width)[:num_redrawn].to(down.weight.device)
        for rows in _sections(first, e, sections) if first is not None else ():
            rows[features] = _like(rows[features])
        columns = down.weight[e].T
        columns[features] = _like(columns[features])


def _sections(first: ExpertLinear, expert: int, sections: int) -> Iterator[Tensor]:
    """Yield views of one expert's first projection, each with the hidden features as rows."""
    yield from first.weight[expert].chunk(sections)
    if first.bias is not None:
        yield from first.bias[expert].chunk(sections)


def _like(tensor: Tensor) -> Tensor:
    """Draw a normal tensor with the mean and standard deviation of another."""
    deviation = tensor.std(correction=0)
    return torch.randn_like(tensor) * deviation + tensor.mean()
