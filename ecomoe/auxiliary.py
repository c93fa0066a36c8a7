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
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ecomoe.hooks import ForwardHook

MAX_UNREAD_CALLS = 1024

_UNREAD = (
    "the auxiliary losses of an EcoMoE layer were computed but never used, so nothing balances its "
    "experts: add ecomoe.aux_loss(model) to the loss before backward(), or attach ecomoe.Monitor"
)
_REENTRANT = (
    "the auxiliary losses of an EcoMoE layer are lost under reentrant checkpointing, which "
    "computes them only inside backward(): use checkpoint(..., use_reentrant=False) or attach "
    "ecomoe.Monitor"
)
_LOST = (
    "the optimizer stepped, and the auxiliary losses of the EcoMoE layers did not reach the "
    "gradient, since the final loss was not where a Monitor looks for it"
)
_TWICE = (
    "ecomoe.aux_loss(model) is 0 here because a Monitor already delivers the auxiliary losses; "
    "adding both would count them twice: drop one of the two"
)


class AuxiliarySlot:
    """Where one layer leaves its auxiliary loss.

    It belongs to a run, not to the model: copies and pickles of a layer get an empty one, since a
    tensor with a graph can be neither copied nor pickled.

    Attributes:
        terms: The last call's losses by name, detached scalars, before their weights.
    """

    def __init__(self) -> None:
        self.terms: dict[str, Tensor] = {}
        self.relay: LossRelay | None = None
        self.cell: Tensor | None = None  # the gradient of one token's auxiliary loss
        self.tokens: Tensor | None = None  # tokens of the calls since the last backward pass
        self._clear()

    def _clear(self) -> None:
        self._pending: Tensor | None = None
        self._num_tokens: Tensor | None = None
        self._num_calls = 0
        self._read = False
        self._version: int | None = None
        self._spent: list[bool] = []  # non-empty once a backward pass went through what was read

    def __deepcopy__(self, memo: dict[int, Any]) -> AuxiliarySlot:
        return AuxiliarySlot()

    def __reduce__(self) -> tuple[type[AuxiliarySlot], tuple[()]]:
        return AuxiliarySlot, ()

    def leave(self, weights_NK: Tensor, loss: Tensor, *, version: int | None) -> Tensor:
        """Take one call's auxiliary loss; return the gates, which carry it where a relay is armed.

        Args:
            weights_NK: The gates of this call.
            loss: The call's weighted auxiliary loss, scalar, with its graph.
            version: The layer's `step_version`.
        """
        if self.cell is not None and self.tokens is not None:
            self.tokens.add_(weights_NK.shape[0])
            return _Carry.apply(weights_NK, loss, self.cell)  # type: ignore[no-any-return]
        if not torch.compiler.is_compiling() and _inside_backward():
            if self._pending is None:
                warnings.warn(_REENTRANT, stacklevel=2)
            return weights_NK
        if not torch.compiler.is_compiling() and _is_left_over(self._pending):
            self._clear()
        # By the number of calls, since the compiler warns where it meets an earlier call's tensor.
        unread = self._num_calls > 0 and not self._read
        stepped = version != self._version or self._num_calls >= MAX_UNREAD_CALLS
        if unread and stepped:
            warnings.warn(_UNREAD, stacklevel=2)
        if self._read or stepped:
            self._clear()
        # Nothing here may save a tensor for backward: a recomputation does not come this far, and
        # checkpointing compares the numbers of tensors saved.
        weighted = loss * weights_NK.shape[0]
        num_tokens = loss.new_full((), weights_NK.shape[0])
        if self._num_calls > 0 and self._pending is not None and self._num_tokens is not None:
            weighted = self._pending + weighted
            num_tokens = self._num_tokens + num_tokens
        self._pending, self._num_tokens = weighted, num_tokens
        # A number that grows would have the compiler write a graph for each of its values. For the
        # same reason tokens are counted in a tensor.
        self._num_calls = 1 if torch.compiler.is_compiling() else self._num_calls + 1
        self._version = version
        return weights_NK

    def read(
        self, *, version: int | None, on_gradient: Callable[[Tensor], None] | None = None
    ) -> Tensor | None:
        """Return the token-weighted mean over the calls since the last step, or ``None``.

        After a backward pass and a step of the optimizer the value comes without its graph, which
        is spent: for a log, or because this step left the layer out.

        Args:
            version: The layer's `step_version`.
            on_gradient: Called in the backward pass, just before it enters the layer.
        """
        if self._pending is None or self._num_tokens is None:
            return None
        self._read = True
        mean = self._pending / self._num_tokens.clamp_min(1.0)
        if self._spent and version != self._version:
            return mean.detach()
        if self._pending.requires_grad and not torch.compiler.is_compiling():
            spent = self._spent  # not self: the graph must not hold on to the slot
            self._pending.register_hook(lambda _: spent.append(True))
            if on_gradient is not None:
                self._pending.register_hook(on_gradient)
        return mean


class _Carry(torch.autograd.Function):
    """Identity on the gates; its backward gives ``cell`` times the tokens to the auxiliary loss."""

    @staticmethod
    def forward(ctx, weights_NK, loss, cell):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cell)
        return weights_NK.clone()

    @staticmethod
    def backward(ctx, grad_NK):  # type: ignore[no-untyped-def]
        (cell,) = ctx.saved_tensors
        return grad_NK, torch.ops.ecomoe.read_cell(cell, grad_NK), None


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
        self._told = False
        self.num_attached = 0

    def watch(self, module: nn.Module) -> None:
        """Call `begin_forward` before each forward pass of ``module``, until `close`.

        Args:
            module: What the training loop calls: the model, or what wraps it. A compiled model is
                watched from outside, since hooks inside it become part of the graph.
        """
        hook = ForwardHook(lambda *_: self.begin_forward())
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def begin_forward(self) -> None:
        """Start a new count of tokens, unless the last forward still waits for its backward."""
        self._in_recorded_forward = torch.is_grad_enabled()
        if not self._spent:
            return
        for slot in self._slots:
            assert slot.cell is not None
            assert slot.tokens is not None
            slot.tokens.zero_()
            slot.cell.data.zero_()
        self._spent = False

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
        loss.register_hook(lambda grad: self._fill(grad, weight))

    def check(self, remedy: str) -> None:
        """Warn, once, if no final loss was attached since the last check.

        Args:
            remedy: How the owner of the loop mends it; ends the warning.
        """
        if self.num_attached == self._num_checked and not self._told:
            self._told = True
            warnings.warn(f"{_LOST}: {remedy}", stacklevel=2)
        self._num_checked = self.num_attached

    def _fill(self, grad: Tensor, weight: float) -> None:
        self._spent = True
        scale = grad.detach().sum() * weight
        for slot in self._slots:
            assert slot.cell is not None
            assert slot.tokens is not None
            share = scale.to(slot.cell) / slot.tokens.clamp_min(1.0)
            # Through .data: the cell is saved for backward, and must be filled after that.
            slot.cell.data.copy_(share)

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


class TermMeans:
    """Averages the auxiliary losses of a model's layers by name, for a log.

    Sums stay on the device; `compute` waits for it once. A layer called several times in one
    forward pass is represented by its last call. Nothing is reduced over ranks.

    Args:
        model: Any module that contains EcoMoE layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = list(auxiliary_layers(model))
        self._sums: dict[tuple[tuple[int, str], ...], tuple[Tensor, int]] = {}

    def add(self) -> None:
        """Take the losses of the last forward pass."""
        found = [
            ((index, name), term)
            for index, (_, _, slot) in enumerate(self._layers)
            for name, term in slot.terms.items()
        ]
        if not found:
            return
        # One stack and one addition, however many layers there are.
        keys = tuple(key for key, _ in found)
        device = found[0][1].device
        values = torch.stack([term.to(device, torch.float32) for _, term in found])
        total, count = self._sums.get(keys, (torch.zeros_like(values), 0))
        self._sums[keys] = (total + values, count + 1)

    def compute(self) -> dict[str, float]:
        """Return the means since the last call by name, and start anew; empty if there are none.

        Each loss is averaged over layers and forward passes, before its weight. ``total`` is what
        was added to the task loss: weighted, summed over layers, averaged over forward passes.
        """
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        weighted, passes = 0.0, 0
        for keys, (values, count) in self._sums.items():
            passes += count
            for (index, name), value in zip(keys, values.tolist(), strict=True):
                layer: Any = self._layers[index][1]
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + count
                weighted += layer.term_weights()[name] * value
        self._sums.clear()
        means = {name: value / counts[name] for name, value in sums.items()}
        return {**means, "total": weighted / passes} if means else {}


def auxiliary_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, AuxiliarySlot]]:
    """Yield (name, layer, slot) of every layer of ``model`` that computes auxiliary losses."""
    for name, module in model.named_modules():
        slot = getattr(module, "auxiliary", None)
        if isinstance(slot, AuxiliarySlot):
            yield name, module, slot


def aux_loss(model: nn.Module) -> Tensor:
    """Return the auxiliary losses of the last forward pass, summed over layers, with their graph.

    For a loop that owns its loss: ``loss = task_loss + ecomoe.aux_loss(model)``. It is 0 in
    evaluation, and 0 with a warning where a Monitor delivers the losses already. Reading it twice
    in a step returns the same value.

    Args:
        model: Any module that contains EcoMoE layers.

    Returns:
        A scalar, fp32 or wider, on the first layer's device.

    Raises:
        ValueError: The model has no EcoMoE layer. Also in ``backward()`` of a model under FSDP2, if
            it starts from this loss alone.
    """
    layers = list(auxiliary_layers(model))
    if not layers:
        raise ValueError(
            f"model={type(model).__name__} holds no EcoMoE layer, so it has no auxiliary loss; "
            "convert it first with ecomoe.convert(model, ...)"
        )
    device = next(layers[0][1].parameters()).device
    total = torch.zeros((), device=device)
    if not torch.compiler.is_compiling() and any(slot.relay for _, _, slot in layers):
        warnings.warn(_TWICE, stacklevel=2)
        return total
    for name, layer, slot in layers:
        if not layer.training:
            continue
        pending = slot.read(version=step_version(layer), on_gradient=_gathered_check(model, name))
        if pending is not None:
            total = total + pending.to(device)
    return total


def step_version(layer: nn.Module) -> int | None:
    """Return a number that changes with each optimizer step, at no synchronisation.

    ``None`` while compiling, where versions cannot be read.
    """
    if torch.compiler.is_compiling():
        return None
    return sum(parameter._version for parameter in layer.parameters())


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


def _inside_backward() -> bool:
    """Whether this runs in a recomputation: a forward pass that ``backward()`` itself started."""
    return bool(torch._C._current_graph_task_id() != -1)
