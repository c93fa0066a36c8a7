"""The relay: how auxiliary losses reach the gradient where somebody else owns the loss.

What the two ways are, `ecomoe.auxiliary` says.
"""

from __future__ import annotations

import warnings
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ecomoe.auxiliary import AuxiliarySlot, auxiliary_layers
from ecomoe.hooks import ForwardHook

_LOST = (
    "the optimizer stepped, and the auxiliary losses of the EcoMoE layers did not reach the "
    "gradient, since the final loss was not where a Monitor looks for it"
)


class _Owned:
    """Held by a graph, to know by a weak reference when that is gone."""


class _ForwardPass:
    """One forward pass and its tokens by layer; dead once nobody can go back through it."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self._owned: weakref.ref[_Owned] | None = None

    @property
    def is_owned(self) -> bool:
        """Whether a graph has held it; one that none ever held may still be needed."""
        return self._owned is not None

    @property
    def is_alive(self) -> bool:
        return self._owned is None or self._owned() is not None

    def own(self) -> _Owned:
        owned = None if self._owned is None else self._owned()
        if owned is None:
            owned = _Owned()
            self._owned = weakref.ref(owned)
        return owned


class LossRelay:
    """Carries the gradient of a final loss to the auxiliary losses of a model's layers.

    `watch` the module that the loop calls, and `attach` each final loss before ``backward()``.

    What is exact: over a window of gradient accumulation and over data-parallel ranks, the
    auxiliary gradient is the mean of what the micro-batches give. For equally large micro-batches
    that is the gradient of one big batch for every loss that is a mean over tokens or a function
    of parameters alone (entropy, oracle, z, divergence, prototype, ortho).

    The balance loss is nonlinear in a batch's means: it balances each micro-batch, a little more
    than balancing the window. For a router as initialised, the relative error of its gradient
    beside one big batch is below ``E / N``, for E experts and N independent tokens a micro-batch.
    Measured: at most 0.75 E / N for independent tokens (E = 4 to 32, N = 64 to 4096), and up to
    5 E / N where tokens come in runs of 16 alike. A balanced router has a gradient near 0, of
    which any error is a large part.

    Args:
        model: Any module that contains layers with an `AuxiliarySlot`.

    Attributes:
        num_attached: Final losses attached so far.

    Raises:
        ValueError: Another relay is armed on the model already.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = list(auxiliary_layers(model))
        taken = [name for name, _, slot in layers if slot.relay is not None]
        if taken:
            raise ValueError(
                f"layer {taken[0]!r} already has its auxiliary losses delivered; a model takes one "
                "Monitor at a time: close the other one first"
            )
        self._slots = [slot for _, _, slot in layers]
        self._hooks: list[RemovableHandle] = []
        for _, layer, slot in layers:
            parameter = next(layer.parameters())
            device, wide = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
            slot.relay = self
            slot.cell = torch.zeros((), dtype=wide, device=device)
            slot.tokens = torch.zeros((), dtype=torch.float32, device=device)
            count = ForwardHook(partial(self._count_unrecorded, slot))
            self._hooks.append(layer.register_forward_pre_hook(count, with_kwargs=True))
        self._spent = True
        self._in_recorded_forward = True
        self._num_checked = 0
        self._told: set[str] = set()
        self.num_attached = 0
        self._passes = [_ForwardPass()]
        self._divisors: list[Tensor] | None = None

    def watch(self, module: nn.Module) -> None:
        """Call `begin_forward` before each forward pass of ``module``, until `close`.

        Args:
            module: What the training loop calls: the model, or what wraps it. A compiled model is
                watched from outside, since hooks inside it become part of the graph.
        """
        hook = ForwardHook(lambda *_: self.begin_forward())
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def begin_forward(self) -> None:
        """Start a new count of tokens; forward passes that wait for their backward keep theirs."""
        self._in_recorded_forward = torch.is_grad_enabled()
        if self._spent:
            for slot in self._slots:
                assert slot.cell is not None
                slot.cell.data.zero_()
            self._passes.clear()
            self._divisors = None
            self._spent = False
        elif torch.is_grad_enabled():
            self._passes[-1].tokens = [_tokens(slot).clone() for slot in self._slots]
        else:
            return
        for slot in self._slots:
            _tokens(slot).zero_()
        self._passes.append(_ForwardPass())

    def own_forward(self) -> object:
        """Return what the graph of the forward pass under way shall hold on to."""
        return self._passes[-1].own()

    def attach(self, loss: Tensor, *, weight: float = 1.0) -> None:
        """Let the gradient of ``loss``, times ``weight``, reach the auxiliary losses.

        Args:
            loss: The final loss, a scalar. Without a graph (evaluation) nothing happens.
            weight: What the owner of the loss left out: ``1 / accumulation steps`` where nothing
                after this call divides the loss by them, else 1.
        """
        if not loss.requires_grad:
            return
        self.num_attached += 1
        # Compiled and checkpointed layers leave it to the loss to own their forward pass.
        owned = None if self._passes[-1].is_owned else self.own_forward()
        loss.register_hook(partial(self._fill, weight=weight, owned=owned))

    def check(self, remedy: str) -> None:
        """Warn, once, if no final loss was attached since the last check.

        Args:
            remedy: How the owner of the loop mends it; ends the warning.
        """
        if self.num_attached == self._num_checked:
            self.tell(f"{_LOST}: {remedy}")
        self._num_checked = self.num_attached

    def tell(self, message: str) -> None:
        """Warn, once."""
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=3)

    def _fill(self, grad: Tensor, *, weight: float, owned: object) -> None:
        self._spent = True
        if self._divisors is None:
            self._divisors = self._count()
        scale = grad.detach().sum() * weight
        for slot, divisor in zip(self._slots, self._divisors, strict=True):
            assert slot.cell is not None
            # Through .data: the cell is saved for backward, and must be filled after that.
            slot.cell.data.copy_(scale.to(slot.cell) / divisor)

    def _count(self) -> list[Tensor]:
        """Return each layer's tokens in the forward passes whose graph is still there."""
        *earlier, current = self._passes
        current.tokens = [_tokens(slot).clone() for slot in self._slots]
        alive = [one.tokens for one in (*earlier, current) if one.is_alive]
        return [
            torch.stack(counts).sum(0).clamp_min(1.0)
            for counts in zip(*(alive or [current.tokens]), strict=True)
        ]

    def _count_unrecorded(
        self, slot: AuxiliarySlot, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Count the tokens of a call whose graph only ``backward()`` will build.

        Under reentrant checkpointing the forward pass runs without gradients, so the layer does
        not leave its loss there; but how many tokens there were in all must be known before the
        first of its calls is computed again.
        """
        if layer.training and not torch.is_grad_enabled() and self._in_recorded_forward:
            x = args[0] if args else kwargs["x"]
            assert slot.tokens is not None
            slot.tokens.add_(x.numel() // max(x.shape[-1], 1))

    def close(self) -> None:
        """Disarm the layers: from here on they are on the explicit way again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for slot in self._slots:
            if slot.relay is self:
                slot.relay = slot.cell = slot.tokens = None


def _tokens(slot: AuxiliarySlot) -> Tensor:
    assert slot.tokens is not None, "the relay is armed"
    return slot.tokens
