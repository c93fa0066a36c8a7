"""Multi-hop routing: several passes of one mixture, each from where the last one led.

The equifinality paper (arXiv:2604.14419, figure 1C) sends a token through H hops of K experts. The
experts' updates accumulate, and the token's position, by which the next experts are chosen, moves
with them. With 12 experts a token in all, 1 x 12 is wide and 3 x 4 is deep.

Axes: N tokens, M tokens still on their way, D features, E experts, S slots sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ecomoe import arguments
from ecomoe.cost import flops_per_token
from ecomoe.dispatch import Plan
from ecomoe.experts import ExpertLinear, HeadExperts
from ecomoe.moe import EcoMoE
from ecomoe.routers import Part, keep_wide


def check_hops(hops: object) -> int:
    """Return a number of passes: an int from 1 on.

    Raises:
        ValueError: It is none.
    """
    if type(hops) is int and hops >= 1:
        return hops
    raise ValueError(f"hops={hops!r} must be an int >= 1; 1 is a single pass")


class MultiHop(nn.Module):
    """Passes tokens through a layer several times and returns the accumulated update.

    Hop h computes ``update_h = layer(x + h_accum)`` and adds it to ``h_accum``, which is returned:
    like any FFN's output, without the residual. Router and experts see the token where it is now,
    so its position in a cosine router's space moves with every hop. All hops share the router and
    the experts, as in the paper (its counts of parameters leave room for no others).

    Losses, schedule, monitor, checkpoints and training on several devices are those of the layer
    within. A monitor reports one layer, its counts summed over hops; the auxiliary losses of the
    hops are averaged, weighted by tokens.

    Args:
        layer: The mixture; its output has as many features as its input.
        hops: Passes, from 1 on.
        learned_scale: Whether the accumulated update is multiplied by a learned scalar, which
            starts at 1. With ``hops=1`` it is what the paper puts in the place of more hops.

    Attributes:
        halt: Set by `halting` while it is at work.

    Raises:
        ValueError: An argument breaks its rule.

    Example:
        >>> layer = EcoMoE(8, 1, tiers=(32,), top_k=4, router="cosine")
        >>> MultiHop(layer, hops=3)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, layer: EcoMoE, *, hops: int = 3, learned_scale: bool = False) -> None:
        super().__init__()
        if not isinstance(layer, EcoMoE):
            raise ValueError(
                f"layer={type(layer).__name__} must be an EcoMoE layer; build one and pass it"
            )
        if layer.num_classes is not None or layer.experts.d_output != layer.d_model:
            raise ValueError(
                f"layer maps {layer.d_model} features to {layer.experts.d_output}, and a hop "
                "starts where the last one ended; leave out num_classes and d_output"
            )
        check_hops(hops)
        arguments.flag("learned_scale", learned_scale)
        self.layer = layer
        self.hops = hops
        self.scale: nn.Parameter | None = None
        if learned_scale:
            reference = layer.temperature
            self.scale = nn.Parameter(torch.ones(1, device=reference.device))
        self.halt: Halt | None = None

    def reset_parameters(self) -> None:
        """Draw fresh parameters and go back to the start of the schedule."""
        self.layer.reset_parameters()
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., D)`` to the accumulated update, ``(..., D)``.

        Raises:
            ValueError: It is in training mode within `halting`.
        """
        if self.halt is not None and self.training:
            raise ValueError(
                "a MultiHop layer is in training mode within halting, which is for inference and "
                "would leave out nothing; call model.eval(), or train outside of halting"
            )
        if self._loses_calls(x):
            x = x.detach().requires_grad_()
        total: Tensor
        if self.halt is not None:
            last = x.movedim(self.layer.features_axis, -1)
            total = self._until_halted(last.reshape(-1, last.shape[-1]), self.halt)
            total = total.view(last.shape).movedim(-1, self.layer.features_axis)
        else:
            total = self.layer(x)
            for _ in range(self.hops - 1):
                total = total + self.layer(x + total)
        if self.scale is not None:
            total = (self.scale * total).to(x.dtype)
        return total

    def _loses_calls(self, x: Tensor) -> bool:
        # The auxiliary loss of a call is owned by the graph of its output. The first hop of a
        # frozen router has none where nothing below is trained, the later ones do by the experts:
        # the mean over hops would be over these alone.
        plain = not torch.compiler.is_compiling() and not x.requires_grad
        return plain and self.training and self.hops > 1 and torch.is_grad_enabled()

    def updates(self, x: Tensor) -> Tensor:
        """Return each hop's update before they are added up, ``(hops, ..., D)``."""
        found = [self.layer(x)]
        total = found[0]
        for _ in range(self.hops - 1):
            found.append(self.layer(x + total))
            total = total + found[-1]
        return torch.stack(found)

    def _until_halted(self, x_ND: Tensor, halt: Halt) -> Tensor:
        """Let tokens whose update has become small go; the others alone are computed on."""
        rows_M = torch.arange(x_ND.shape[0], device=x_ND.device)
        state_MD, total_ND = x_ND, torch.zeros_like(x_ND)
        for hop in range(self.hops):
            part = Part(rows_M, x_ND.shape[0]) if hop else None
            with self.layer.router.given(part):
                update_MD = self.layer(state_MD)
            # Exported, the number is a symbol, which would stay in the count.
            if not torch.compiler.is_exporting():
                halt.tokens[hop] += state_MD.shape[0]
            total_ND = total_ND.index_add(0, rows_M, update_MD)
            if hop + 1 == self.hops:
                break
            state_MD = x_ND[rows_M] + total_ND[rows_M]
            # The gather below needs its size on the host: one wait for the device a hop.
            # No hop is skipped when no token is left: with expert parallelism other ranks wait.
            going_M = relative_norm(update_MD, state_MD) >= halt.epsilon
            rows_M, state_MD = rows_M[going_M], state_MD[going_M]
        return total_ND

    def __getstate__(self) -> dict[str, Any]:
        # Whoever copies or saves the model within `halting` does not mean a model that halts.
        return {**self.__dict__, "halt": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.layer._apply(fn)
        super()._apply(keep_wide(fn), recurse=False)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Show hops when printed."""
        return f"hops={self.hops}, learned_scale={self.scale is not None}"


def relative_norm(update_MD: Tensor, state_MD: Tensor) -> Tensor:
    """Return ``||update|| / (||state|| + 1e-6)`` of each token, fp32 or wider, ``(M,)``.

    Equation 7 of the equifinality paper; the state is x plus the accumulated update.
    """
    wide = torch.promote_types(update_MD.dtype, torch.float32)
    update_M, state_M = (
        torch.linalg.vector_norm(t_MD.to(wide), dim=-1) for t_MD in (update_MD, state_MD)
    )
    ratio_M: Tensor = update_M / (state_M + 1e-6)
    return ratio_M


class StaticExperts(HeadExperts):
    """Experts that are a learned vector each, whatever the token: the paper's static experts.

    A linear map of the constant 1, so that dispatch and gradients are those of the others.

    Args:
        d_output: Features of the vectors.
        num_experts: Number of experts.
        device: As for `nn.Linear`.
        dtype: As for `nn.Linear`.
    """

    def __init__(
        self,
        d_output: int,
        *,
        num_experts: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            1, d_output, num_experts=num_experts, bias=False, device=device, dtype=dtype
        )

    def forward(self, x_SD: Tensor, plan: Plan) -> Tensor:
        """Return each slot's vector, ``(S, F)``."""
        return super().forward(x_SD.new_ones(x_SD.shape[0], 1), plan)


def make_static(layer: EcoMoE) -> EcoMoE:
    """Put `StaticExperts` in the place of a layer's experts, and return the layer.

    Raises:
        ValueError: It is no layer.

    Example:
        >>> layer = make_static(EcoMoE(8, 1, tiers=(32,), top_k=4, router="cosine"))
        >>> sum(parameter.numel() for parameter in layer.experts.parameters())
        256
    """
    if not isinstance(layer, EcoMoE):
        raise ValueError(
            f"layer={type(layer).__name__} must be an EcoMoE layer; pass the layer itself"
        )
    weight = next(m for m in layer.experts.modules() if isinstance(m, ExpertLinear)).weight
    layer.experts = StaticExperts(
        layer.experts.d_output,
        num_experts=layer.num_experts,
        device=weight.device,
        dtype=weight.dtype,
    )
    return layer


# --- halting ------------------------------------------------------------------------------------


@dataclass
class Halt:
    """One layer's halting, and what it came to.

    Attributes:
        epsilon: A token stops when its relative norm falls below.
        flops: Operations of one token in one hop.
        tokens: Tokens that each hop computed.
    """

    epsilon: float
    flops: int
    tokens: list[int]


@dataclass
class Saved:
    """What halting left out, over all forward passes since it was switched on.

    Attributes:
        layers: By name of the `MultiHop` layer.
    """

    layers: dict[str, Halt] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Operations done in the layers: routers and experts."""
        return sum(halt.flops * sum(halt.tokens) for halt in self.layers.values())

    @property
    def flops_in_full(self) -> int:
        """Operations that they would have done without halting."""
        return sum(halt.flops * halt.tokens[0] * len(halt.tokens) for halt in self.layers.values())

    @property
    def share(self) -> float:
        """Share of the operations that was saved; 0 before any token came."""
        return 1.0 - self.flops / self.flops_in_full if self.flops_in_full else 0.0

    @property
    def hops(self) -> float:
        """Mean hops of a token in a layer; 0 before any token came."""
        entered = sum(halt.tokens[0] for halt in self.layers.values())
        done = sum(sum(halt.tokens) for halt in self.layers.values())
        return done / entered if entered else 0.0


@contextmanager
def halting(model: nn.Module, *, epsilon: float) -> Iterator[Saved]:
    """Let tokens stop early in the `MultiHop` layers of a model that is in evaluation mode.

    Zero-shot relative-norm halting (equation 7 of the equifinality paper): after a hop, a token
    whose `relative_norm` is below ``epsilon`` takes no further hop. It is left out of what later
    hops compute, not masked. Every token takes the first hop.

    On an accelerator each hop but the last waits once for the device, since the number of tokens
    left must be known.

    Args:
        model: Holds `MultiHop` layers.
        epsilon: The bound, >= 0; 0 stops no token.

    Yields:
        What was saved, counted as the model is called.

    Raises:
        ValueError: An argument breaks its rule, or the model has no such layer or is training. Also
            within, where the model is called in training mode.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} must be an nn.Module; pass the model itself")
    epsilon = arguments.number("epsilon", epsilon)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MultiHop)}
    if not layers:
        raise ValueError(
            f"model={type(model).__name__} holds no MultiHop layer, so no hop can be left out; "
            "convert it with ecomoe.convert(model, hops=3), or put ecomoe.multihop.MultiHop around "
            "its layers"
        )
    if any(layer.training for layer in layers.values()):
        raise ValueError(
            "model is in training mode, and halting is for inference; call model.eval()"
        )
    saved = Saved(
        {
            name: Halt(epsilon, flops_per_token(layer.layer), [0] * layer.hops)
            for name, layer in layers.items()
        }
    )
    before = {name: layer.halt for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.halt = saved.layers[name]
        yield saved
    finally:
        for name, layer in layers.items():
            layer.halt = before[name]
