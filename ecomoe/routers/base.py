"""What every router shares: precision, selection and the `Routing` it returns.

A router computes in fp32 (fp64 inside an fp64 model) whatever the dtype around it: a rounding error
in a logit changes which expert a token reaches.

Axes: N tokens, M of them that come, D features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ecomoe.routing import Routing, route, without_autocast


class Part(NamedTuple):
    """Some of a model's tokens, where a layer is not given all of them.

    Attributes:
        rows_M: Which tokens come, of the ``num_tokens``.
        num_tokens: All tokens.
    """

    rows_M: Tensor
    num_tokens: int


class Router(nn.Module):
    """What every router shares: precision, selection and the `Routing` it returns.

    A subclass computes the logits. A forward hook on a router sees the whole decision.

    Attributes:
        options: Names of the arguments that the class has of its own; see `build_router`.
        scores_apart: Whether it returns `Routing.own_logits_NE` in training.
        offset_wanted: Whether it returns `Routing.offset_N1` in training.
        part: Which of the model's tokens the call under way has; ``None`` for all. See `given`.
    """

    scores_apart = False
    offset_wanted = True
    part: Part | None = None

    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k

    def reset_parameters(self) -> None:
        """Draw fresh parameters, where there are any."""

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the scores of all experts for fp32 (or fp64) tokens, ``(N, E)``.

        A constant may be taken from all of a token's: see `offset`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define logits(x_ND)")

    def offset(self, x_ND: Tensor) -> Tensor | None:
        """Return what `logits` takes from a token's scores, ``(N, 1)``; ``None`` for nothing."""
        return None

    def logits_apart(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores for tokens of any dtype, and once more without a gradient for these."""
        wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        return self.logits(wide_ND), self.logits(wide_ND.detach())

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the parameters whose first axis counts experts; `ecomoe.rescue` writes them."""
        raise NotImplementedError(f"{type(self).__name__} must define expert_parameters()")

    def forward(
        self, x_ND: Tensor, temperature: Tensor, random_routing: Tensor | None = None
    ) -> Routing:
        """Route tokens of any floating dtype; see `ecomoe.routing.route`."""
        with without_autocast(x_ND):
            own_logits_NE = offset_N1 = None
            learns = self.training and torch.is_grad_enabled()
            if self.scores_apart and learns:
                logits_NE, own_logits_NE = self.logits_apart(x_ND)
            else:
                logits_NE = self.logits(x_ND.to(torch.promote_types(x_ND.dtype, torch.float32)))
            if self.offset_wanted and learns:
                offset_N1 = self.offset(x_ND.to(torch.promote_types(x_ND.dtype, torch.float32)))
            routing = route(
                logits_NE,
                top_k=self.top_k,
                temperature=temperature,
                random_routing=random_routing,
            )
            return routing._replace(own_logits_NE=own_logits_NE, offset_N1=offset_N1)

    @contextmanager
    def given(self, part: Part | None) -> Iterator[None]:
        """Let whoever knows something of each of the model's tokens know which of them come."""
        self.part = part
        try:
            yield
        finally:
            self.part = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keep_wide(fn), recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Show sizes when printed."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}"


def keep_wide(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap the function of ``nn.Module._apply`` so that ``.half()`` and the like spare fp32 values.

    Moves between devices go through, and so does a change to a wider dtype.
    """

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if tensor.is_floating_point() and result.itemsize < tensor.itemsize <= 4:
            return tensor.to(result.device)
        return result

    return apply
