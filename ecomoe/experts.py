"""Tiers of experts, held as stacked weights.

Experts are numbered through: tier 0 first, then tier 1, and so on. The weights of all experts of a
layer are one tensor per projection, so that there is no module, hook or launch per expert.

Axes: M tokens of a probe, S slots sorted by expert, E experts, D input features, H hidden features,
F output features.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecomoe.activations import ACTIVATIONS, Activation, has_hooks, name_of
from ecomoe.dispatch import Plan, sort_slots
from ecomoe.feed_forward import feed_forward
from ecomoe.grouped import grouped_linear
from ecomoe.pieces import for_host

# Tokens, gates, weights and biases of the two projections, as `feed_forward` takes them.
Operands = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast prescribes on the tensor's device, if it is at work there."""
    kind = tensor.device.type
    if tensor.is_meta or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None  # fp64 stays, as in `F.linear`
    return torch.get_autocast_dtype(kind)


def _as_autocast(tensor: Tensor) -> Tensor:
    dtype = autocast_dtype(tensor)
    return tensor if dtype is None else tensor.to(dtype)


def tier_of_experts(tiers: tuple[int, ...]) -> list[int]:
    """Return the tier of each expert.

    >>> tier_of_experts((2, 1))
    [0, 0, 1]
    """
    return [tier for tier, size in enumerate(tiers) for _ in range(size)]


class ExpertLinear(nn.Module):
    """One linear map per expert: ``weight`` (E, out, in) and ``bias`` (E, out).

    The 2-D bias is called ``bias`` so that optimizers which spare biases from weight decay find it.

    Attributes:
        spread: How far experts differ at the start; see `reset_parameters`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        spread: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spread = spread
        self.weight = nn.Parameter(
            torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype))
            if bias
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw with the variance of `nn.Linear`, ``1 / (3 in)``.

        Each expert is ``sqrt(1 - spread^2) common + spread own``, both drawn uniformly: 1 draws
        each expert for itself, 0 makes them copies of one.
        """
        bound = 1.0 / math.sqrt(self.weight.shape[-1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
            if self.spread < 1.0:
                common = torch.empty_like(parameter[0]).uniform_(-bound, bound)
                with torch.no_grad():
                    parameter.mul_(self.spread).add_(common, alpha=math.sqrt(1 - self.spread**2))

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias of the experts that are computed here."""
        return self.weight, self.bias

    def cast_operands(self, x_SD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return `operands` in the dtype in which autocast has ``x_SD`` multiplied."""
        weight_EFD, bias_EF = self.operands()
        dtype = autocast_dtype(x_SD)
        if dtype is None:
            return weight_EFD, bias_EF
        return weight_EFD.to(dtype), None if bias_EF is None else bias_EF.to(dtype)

    def is_plain(self) -> bool:
        """Return whether calling it does nothing but what `forward` does here."""
        return type(self).forward is ExpertLinear.forward and not has_hooks(self)

    def forward(self, x_SD: Tensor, ends_E: Tensor) -> Tensor:
        """Apply to each slot, sorted by expert, its expert's map, ``(S, F)``."""
        # Operators of our own are not on autocast's list: cast as it does for F.linear.
        return grouped_linear(_as_autocast(x_SD), *self.cast_operands(x_SD), ends_E)

    def extra_repr(self) -> str:
        """Show sizes when printed."""
        num_experts, out_features, in_features = self.weight.shape
        return f"{num_experts} x ({in_features} -> {out_features}), bias={self.bias is not None}"


class Experts(nn.Module):
    """What the layer asks of its experts.

    A forward hook on them sees the slots, the plan and each slot's output before the gates.
    """

    num_experts: int
    d_output: int

    def forward(self, x_SD: Tensor, plan: Plan) -> Tensor:
        """Return each slot's output of its own expert, ``(S, F)``."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x_SD, plan)")

    def all_outputs(self, x_MD: Tensor) -> Tensor:
        """Return every expert's output on every token, ``(M, E, F)``; for probes and teachers."""
        num_tokens = x_MD.shape[0]
        ids_S = torch.arange(self.num_experts, device=x_MD.device).repeat_interleave(
            num_tokens, output_size=self.num_experts * num_tokens
        )
        ends_E = torch.arange(1, self.num_experts + 1, device=x_MD.device) * num_tokens
        slots_S = torch.arange(ids_S.shape[0], device=x_MD.device)
        plan = Plan(slots_S, slots_S, ids_S, ends_E.to(torch.int32))
        y_SF = self.forward(x_MD.repeat(self.num_experts, 1), plan)
        return y_SF.view(self.num_experts, num_tokens, self.d_output).transpose(0, 1)


class Delegate(Protocol):
    """Who computes experts in place of `FFNExperts`; see `ecomoe.set_experts_implementation`."""

    def __call__(
        self, experts: FFNExperts, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor
    ) -> Tensor | None:
        """Return each token's gate-weighted sum, ``(N, F)``; ``None`` where it cannot."""


class FFNExperts(Experts):
    """Feed-forward experts, plain ``down(act(up x))`` or gated ``down(act(gate x) * up x)``.

    Dropout, then a norm where there is one, stand before the down projection. The experts share
    the norm, and an activation that has parameters.

    Weights follow the layout of transformers' experts: ``gate_up_proj`` (E, 2H, D) holds the gate
    first, then the up projection; ``down_proj`` is (E, F, H).

    Args:
        d_model: Input features.
        d_hidden: Hidden features of each expert.
        num_experts: Number of experts.
        d_output: Output features; ``d_model`` by default.
        activation: A name of `ACTIVATIONS`, or a callable on tensors, which may be a module.
        gated: Whether the hidden layer is gated.
        bias: Whether projections have biases.
        dropout: Probability of dropping a hidden feature in training.
        norm: A module over the hidden features, from (S, H) to (S, H).
        spread: How far experts differ at the start; see `ExpertLinear.reset_parameters`.
        device: As for `nn.Linear`.
        dtype: As for `nn.Linear`.

    Attributes:
        delegate: Who computes `mixture` in its place; ``None`` for nobody.
    """

    delegate: Delegate | None = None

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        *,
        num_experts: int,
        d_output: int | None = None,
        activation: str | Activation = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        norm: nn.Module | None = None,
        spread: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.d_hidden = d_hidden
        self.d_output = d_model if d_output is None else d_output
        self.gated = gated
        self.dropout = dropout
        self.activation = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.norm = norm
        self._known_activation = (self.activation, name_of(self.activation))
        first = ExpertLinear(
            num_experts,
            d_model,
            2 * d_hidden if gated else d_hidden,
            bias=bias,
            spread=spread,
            device=device,
            dtype=dtype,
        )
        if gated:
            self.gate_up_proj = first
        else:
            self.up_proj = first
        self.down_proj = ExpertLinear(
            num_experts,
            d_hidden,
            self.d_output,
            bias=bias,
            spread=spread,
            device=device,
            dtype=dtype,
        )

    def forward(self, x_SD: Tensor, plan: Plan) -> Tensor:
        """Return each slot's output of its own expert, ``(S, F)``."""
        operands = self._operands(x_SD, None)
        if operands is not None:
            return self._in_one_operator(operands, torch.arange(x_SD.shape[0]), plan.ends_E)
        if self.gated:
            gate_SH, up_SH = self.gate_up_proj(x_SD, plan.ends_E).chunk(2, dim=-1)
            hidden_SH = self.activation(gate_SH) * up_SH
        else:
            hidden_SH = self.activation(self.up_proj(x_SD, plan.ends_E))
        if self.dropout:
            hidden_SH = F.dropout(hidden_SH, self.dropout, self.training)
        if self.norm is not None:
            hidden_SH = self.norm(hidden_SH)
        return self.down_proj(hidden_SH, plan.ends_E)  # type: ignore[no-any-return]

    def mixture(self, x_ND: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor) -> Tensor | None:
        """Return each token's gate-weighted sum of its experts' outputs, ``(N, F)``.

        ``None`` where it takes `forward`, slot by slot: on an accelerator, or where somebody waits
        for a call of the experts or of a part of them.
        """
        if has_hooks(self):
            return None
        if self.delegate is not None and self._are_plain():
            y_NF = self.delegate(self, x_ND, expert_ids_NK, weights_NK)
            if y_NF is not None:
                return y_NF
        operands = self._operands(x_ND, weights_NK)
        if operands is None:
            return None
        order_S, _, ends_E = sort_slots(expert_ids_NK, num_experts=self.num_experts)
        return self._in_one_operator(operands, order_S, ends_E)

    def activation_name(self) -> str | None:
        """Return the activation's name in `activations.ELEMENTWISE`; ``None`` for any other."""
        known, name = self._known_activation
        return name if known is self.activation else None

    def projections(self) -> tuple[ExpertLinear, ExpertLinear]:
        """Return the map to the hidden features, and the one from them."""
        return (self.gate_up_proj if self.gated else self.up_proj), self.down_proj

    def _are_plain(self) -> bool:
        """Return whether nobody waits for a call of a part of the experts, nor drops features."""
        if self.dropout and self.training:
            return False
        if isinstance(self.activation, nn.Module) and has_hooks(self.activation):
            return False
        return all(isinstance(m, ExpertLinear) and m.is_plain() for m in self.projections())

    def _operands(self, x_ND: Tensor, weights_NK: Tensor | None) -> Operands | None:
        """Return what `feed_forward` takes, or ``None`` where it is not for these experts.

        It passes over the projections as modules, so nobody may be waiting for calls of them.
        """
        if not for_host(x_ND) or self.activation_name() is None:
            return None
        if self.norm is not None or not self._are_plain():
            return None
        first, down = self.projections()
        x_ND = _as_autocast(x_ND)
        tensors = x_ND, weights_NK, *first.cast_operands(x_ND), *down.cast_operands(x_ND)
        if not all(t is None or (type(t) in (Tensor, nn.Parameter) and t.is_cpu) for t in tensors):
            return None
        return tensors

    def _in_one_operator(self, operands: Operands, order_S: Tensor, ends_E: Tensor) -> Tensor:
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
        activation = self.activation_name()
        assert activation is not None
        y_NF, _ = feed_forward(*operands, order_S, ends_E, activation, keep)
        return y_NF


class HeadExperts(Experts):
    """Linear classifier heads: the E paper's vision experts, over 256 encoded features.

    Args:
        d_model: Input features.
        num_classes: Classes, the output features.
        num_experts: Number of experts.
        bias: Whether the heads have biases.
        dropout: Probability of dropping an input feature in training.
        spread: How far experts differ at the start; see `ExpertLinear.reset_parameters`.
        device: As for `nn.Linear`.
        dtype: As for `nn.Linear`.
    """

    def __init__(
        self,
        d_model: int,
        num_classes: int,
        *,
        num_experts: int,
        bias: bool = True,
        dropout: float = 0.0,
        spread: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.d_output = num_classes
        self.dropout = dropout
        self.head = ExpertLinear(
            num_experts,
            d_model,
            num_classes,
            bias=bias,
            spread=spread,
            device=device,
            dtype=dtype,
        )

    def forward(self, x_SD: Tensor, plan: Plan) -> Tensor:
        """Return each slot's class logits from its own expert, ``(S, F)``."""
        if self.dropout:
            x_SD = F.dropout(x_SD, self.dropout, self.training)
        return self.head(x_SD, plan.ends_E)  # type: ignore[no-any-return]
