"""How auxiliary losses reach the gradient, whoever owns the loss.

There are two ways, and a layer is on one of them at a time:

- *Explicit*: ``loss = task_loss + aux_loss(model)``, for a loop that owns its loss.
- *Relay*: somebody else owns the loss (a trainer, a criterion outside the model). Each layer's
  gates pass through an identity function that also holds its auxiliary loss. When the final loss
  starts its backward pass, its gradient is copied into one cell per layer; the identity's backward
  hands that cell on as the gradient of the auxiliary loss. So whatever the owner does to the final
  loss (divide by accumulation steps, scale for fp16, average over ranks) is done to the auxiliary
  losses too, and the logged loss stays the task loss.

Auxiliary losses are *summed* over layers. A layer that is called several times in one forward pass
counts once: its calls are averaged, weighted by tokens.

Axes: N tokens, K experts chosen for a token.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_UNREAD = (
    "the auxiliary losses of an EcoMoE layer were computed but never used, so nothing balances its "
    "experts: add ecomoe.aux_loss(model) to the loss before backward(), or let ecomoe.Monitor in a "
    "transformers Trainer, or a TaskSession around a timm task, deliver them"
)
_REENTRANT = (
    "the auxiliary losses of an EcoMoE layer are lost under reentrant checkpointing, which "
    "computes them only inside backward(): use checkpoint(..., use_reentrant=False), or let "
    "ecomoe.Monitor in a transformers Trainer, or a TaskSession, deliver them"
)
_TWICE = (
    "ecomoe.aux_loss(model) is 0 here because a Monitor already delivers the auxiliary losses; "
    "adding both would count them twice: drop one of the two"
)


class _Call:
    """One call's auxiliary loss, which lives as long as the graph of the call's output.

    Attributes:
        loss: Scalar; without its graph once a backward pass has used that up.
        num_tokens: Its weight among the calls of a forward pass.
        read: Whether somebody took the loss.
        spent: Whether its graph is used up.
        owner: The node of that graph which holds this; gone with the output.
    """

    def __init__(self, loss: Tensor, num_tokens: int) -> None:
        self.loss = loss
        self.num_tokens = num_tokens
        self.read = False
        self.spent = False
        self.owner: weakref.ref[Any] | None = None

    def waits(self) -> bool:
        """Return whether a backward pass may still come through the output."""
        return not self.spent and self.owner is not None and self.owner() is not None

    def spend(self) -> None:
        """Let go of the graph, unless this backward pass retains it."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.loss = self.loss.detach()
            self.spent = True


class Relay(Protocol):
    """What a slot and `aux_loss` ask of an armed relay, `ecomoe.relay.LossRelay`."""

    def own_forward(self) -> object:
        """Return what the graph of the forward pass under way shall hold on to."""

    def tell(self, message: str) -> None:
        """Warn, once."""


class AuxiliarySlot:
    """Where one layer leaves its auxiliary loss.

    It belongs to a run, not to the model: copies and pickles of a layer get an empty one, since a
    tensor with a graph can be neither copied nor pickled.

    On the explicit way a call's loss is owned by the graph of the call's output: it is gone when
    the output is thrown away, and loses its own graph when a backward pass comes through. So a
    skipped batch reaches no later one, and nothing piles up, whatever the optimizer does. Only the
    last call's is held here too, since its output may be of no interest to who reads the loss.

    Attributes:
        terms: The last call's losses by name, detached scalars, before their weights.
    """

    def __init__(self) -> None:
        self.terms: dict[str, Tensor] = {}
        self.relay: Relay | None = None
        self.cell: Tensor | None = None  # the gradient of one token's auxiliary loss
        self.tokens: Tensor | None = None  # tokens of the calls of one forward pass
        self._calls: list[weakref.ref[_Call]] = []
        self._last: _Call | None = None
        self._told: set[str] = set()
        self._clear_traced()

    def _clear_traced(self) -> None:
        self._pending: Tensor | None = None
        self._num_tokens: Tensor | None = None
        self._num_calls = 0
        self._taken: tuple[Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[type[AuxiliarySlot], tuple[()]]:
        return AuxiliarySlot, ()

    def leave(self, weights_NK: Tensor, loss: Tensor) -> Tensor:
        """Take one call's auxiliary loss; return the gates, whose graph carries or owns it.

        Args:
            weights_NK: The gates of this call.
            loss: The call's weighted auxiliary loss, scalar, with its graph.
        """
        if self.cell is not None and self.tokens is not None:
            self.tokens.add_(weights_NK.shape[0])
            owned = None
            if not torch.compiler.is_compiling() and (
                loss.requires_grad or weights_NK.requires_grad
            ):
                assert self.relay is not None
                owned = self.relay.own_forward()
            return _Carry.apply(weights_NK, loss, self.cell, owned)  # type: ignore[no-any-return]
        if _is_traced():
            self._leave_traced(loss, weights_NK.shape[0])
            return weights_NK
        if loss.requires_grad and not weights_NK.requires_grad:
            # A frozen router: a backward pass shall come through the gates all the same.
            weights_NK = weights_NK.detach().requires_grad_()
        if _inside_backward():
            if not self._calls:
                self._tell(_REENTRANT)
            return weights_NK
        self.settle()
        self._last = _Call(loss, weights_NK.shape[0])
        self._calls.append(weakref.ref(self._last))
        # Nothing here may save a tensor for backward: a recomputation does not come this far, and
        # checkpointing compares the numbers of tensors saved.
        owned_NK: Tensor = _Own.apply(weights_NK, self._last)
        if owned_NK.grad_fn is not None:
            self._last.owner = weakref.ref(owned_NK.grad_fn)
        return owned_NK

    def settle(self) -> None:
        """Drop what is done with; a forward pass in training begins so, with gradients or not."""
        if _is_traced():
            return
        self._clear_traced()
        last, self._last = self._last, None
        if last is not None and last.spent and not last.read:
            self._tell(_UNREAD)
        del last
        calls = [(reference, reference()) for reference in self._calls]
        self._calls = [
            reference
            for reference, call in calls
            if call is not None and not call.read and not call.spent
        ]

    def waits(self) -> bool:
        """Return whether an output of the layer is known to wait for its backward pass.

        It is not known of a relay's, nor in compiled or transformed functions.
        """
        calls = [reference() for reference in self._calls]
        return any(call is not None and call.waits() for call in calls)

    def read(self, *, on_gradient: Callable[[Tensor], None] | None = None) -> Tensor | None:
        """Return the token-weighted mean over the calls that wait for their backward pass.

        After that pass the value comes without its graph: for a log, or because the forward pass
        left this layer out. ``None`` if there is none.

        Args:
            on_gradient: Called in the backward pass, just before it enters the layer.
        """
        if self._pending is not None and self._num_tokens is not None:
            # Set aside: the next call finds the slot as the first did, and needs no other graph.
            taken = self._pending, self._num_tokens
            self._clear_traced()
            self._taken = taken
        if self._taken is not None:
            pending, tokens = self._taken
            if on_gradient is not None and pending.requires_grad:
                pending.register_hook(on_gradient)
            return pending / tokens.clamp_min(1.0)
        if _is_traced():
            return None
        alive = [call for call in (reference() for reference in self._calls) if call is not None]
        calls = [call for call in alive if not call.spent] or alive
        num_tokens = max(sum(call.num_tokens for call in calls), 1)
        total = None
        for call in calls:
            if call.loss.requires_grad and not call.read:
                # A weak one: the graph must not hold on to what holds it.
                call.loss.register_hook(partial(_spend, weakref.ref(call)))
                if on_gradient is not None:
                    call.loss.register_hook(on_gradient)
            call.read = True
            part = call.loss
            if call.num_tokens != num_tokens:
                part = part * (call.num_tokens / num_tokens)
            total = part if total is None else total + part
        return total

    def _leave_traced(self, loss: Tensor, num_tokens: int) -> None:
        """Add up the losses of calls in a compiled or transformed function, until they are read.

        What the graph of such a function owns cannot be told, nor when it is used up.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and _is_left_over(self._pending):
            self._clear_traced()
        self._taken = None
        weighted = loss * num_tokens
        tokens = loss.new_full((), num_tokens)
        # By the number of calls, since the compiler warns where it meets an earlier call's tensor.
        if self._num_calls > 0 and self._pending is not None and self._num_tokens is not None:
            weighted = self._pending + weighted
            tokens = self._num_tokens + tokens
        self._pending, self._num_tokens = weighted, tokens
        # A number that grows would have the compiler write a graph for each of its values. For the
        # same reason tokens are counted in a tensor.
        self._num_calls = 1

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=4)


def _spend(reference: weakref.ref[_Call], grad: Tensor) -> None:
    call = reference()
    if call is not None:
        call.spend()


class _Own(torch.autograd.Function):
    """Identity on the gates, whose graph owns a call and lets it know of a backward pass."""

    @staticmethod
    def forward(ctx, weights_NK, call):  # type: ignore[no-untyped-def]
        ctx.call = call
        return weights_NK.view_as(weights_NK)

    @staticmethod
    def backward(ctx, grad_NK):  # type: ignore[no-untyped-def]
        ctx.call.spend()
        return grad_NK, None


class _Carry(torch.autograd.Function):
    """Identity on the gates; its backward gives ``cell`` times the tokens to the auxiliary loss.

    Its graph owns ``forward_pass``, so that it is known when nobody can go back through that.
    """

    @staticmethod
    def forward(ctx, weights_NK, loss, cell, forward_pass):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cell)
        ctx.forward_pass = forward_pass
        return weights_NK.clone()

    @staticmethod
    def backward(ctx, grad_NK):  # type: ignore[no-untyped-def]
        (cell,) = ctx.saved_tensors
        return grad_NK, torch.ops.ecomoe.read_cell(cell, grad_NK), None, None


@torch.library.custom_op("ecomoe::read_cell", mutates_args=())
def _read_cell(cell: Tensor, grad_NK: Tensor) -> Tensor:
    """Return the cell times the number of tokens, as it stands once ``grad_NK`` exists.

    An operator of its own, because the compiler may move a plain product, which needs nothing of
    the backward pass, into the forward pass, where the cell is still empty.
    """
    return cell * grad_NK.shape[0]


@_read_cell.register_fake
def _(cell: Tensor, grad_NK: Tensor) -> Tensor:
    return torch.empty_like(cell)


# In a second-order gradient the cell is a constant.
_read_cell.register_autograd(lambda ctx, grad: (None, None))


def auxiliary_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, AuxiliarySlot]]:
    """Yield (name, layer, slot) of every layer of ``model`` that computes auxiliary losses."""
    for name, module in model.named_modules():
        slot = vars(module).get("auxiliary")  # to ask the module itself takes ten times as long
        if isinstance(slot, AuxiliarySlot):
            yield name, module, slot


def aux_loss(model: nn.Module) -> Tensor:
    """Return the auxiliary losses of the last forward pass, summed over layers, with their graph.

    For a loop that owns its loss: ``loss = task_loss + ecomoe.aux_loss(model)``. It is 0 in
    evaluation, and 0 with a warning where a Monitor delivers the losses already. Reading it twice
    in a step returns the same value; after ``backward()`` it comes without its graph.

    Args:
        model: Any module that contains EcoMoE layers.

    Returns:
        A scalar, fp32 or wider, on the first layer's device.

    Raises:
        ValueError: The model has no EcoMoE layer. Also in ``backward()`` of a model under FSDP2, if
            it starts from this loss alone.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} must be an nn.Module; pass the model itself")
    layers = list(auxiliary_layers(model))
    if not layers:
        raise ValueError(
            f"model={type(model).__name__} holds no EcoMoE layer, so it has no auxiliary loss; "
            "convert it first with ecomoe.convert(model, ...)"
        )
    device = next(layers[0][1].parameters()).device
    total = torch.zeros((), device=device)
    if not torch.compiler.is_compiling():
        relays = {slot.relay for _, _, slot in layers if slot.relay is not None}
        for relay in relays:
            relay.tell(_TWICE)
        if relays:
            return total
    for name, layer, slot in layers:
        if not layer.training:
            continue
        pending = slot.read(on_gradient=_gathered_check(model, name))
        if pending is not None:
            total = total + pending.to(device)
    return total


def _gathered_check(model: nn.Module, name: str) -> Callable[[Tensor], None] | None:
    """Return what must hold when the gradient reaches a layer, if the model may be under FSDP."""
    if torch.compiler.is_compiling() or "torch.distributed.fsdp" not in sys.modules:
        return None
    from ecomoe.distributed import check_gathered

    return check_gathered(model, name)


def _is_left_over(pending: Tensor | None) -> bool:
    """Whether a tensor comes from a `torch.func` transform that has ended, and is of no use."""
    functorch = torch._C._functorch
    if pending is None or not functorch.is_functorch_wrapped_tensor(pending):
        return False
    ended = functorch.maybe_current_level() is None
    return ended or functorch.is_dead_tensor_wrapper(pending)  # type: ignore[attr-defined]


def _is_traced() -> bool:
    """Whether this runs under the compiler or a `torch.func` transform."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.maybe_current_level() is not None


def _inside_backward() -> bool:
    """Whether this runs in a recomputation: a forward pass that ``backward()`` itself started."""
    return bool(torch._C._current_graph_task_id() != -1)
