"""Activation functions by name, and for the CPU their values and gradients into given memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    """Return ``x * sigmoid(1.702 x)``, the approximation of GELU that CLIP uses."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU in its tanh approximation, as GPT-2 uses it."""
    return F.gelu(x, approximate="tanh")


def identity(x: Tensor) -> Tensor:
    """Return ``x`` (by a name, since a layer with a lambda could not be pickled)."""
    return x


ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "identity": identity,
}

aten = torch.ops.aten

# Elements up to which oneDNN takes longer for GELU's gradient than PyTorch's own operator.
ONEDNN_STARTS = 2**13

# Where two of the functions above are told apart, and from clipped variants of them.
_PROBES = (-1e3, -20.0, -7.0, -3.0, -1.5, -0.7, -0.1, 0.0, 0.1, 0.7, 1.5, 3.0, 7.0, 20.0, 1e3)


def name_of(activation: Activation) -> str | None:
    """Return the name in `ELEMENTWISE` of a function, or of a module that computes the same.

    Libraries have modules of their own for the same few functions: a module without parameters is
    known by its values. ``None`` for any other.
    """
    for name in ELEMENTWISE:
        if activation is ACTIVATIONS[name]:
            return name
    if not isinstance(activation, nn.Module) or activation.state_dict() or has_hooks(activation):
        return None
    probes = torch.tensor([_PROBES, _PROBES[::-1]], dtype=torch.float64, device="cpu")
    if type(probes) is not Tensor:  # under FakeTensorMode, where values are unknown
        return None
    try:
        with torch.no_grad():
            values = activation(probes.clone())
    except Exception:  # whatever it asks of its input, it is none of the above
        return None
    for name in ELEMENTWISE:
        if isinstance(values, Tensor) and values.shape == probes.shape:
            close = torch.allclose(values, ACTIVATIONS[name](probes), rtol=1e-12, atol=1e-14)
            if close:
                return name
    return None


def has_hooks(module: nn.Module) -> bool:
    """Return whether something waits for calls of the module, or of every module."""
    if "forward" in vars(module):  # as accelerate wraps it, to bring offloaded weights
        return True
    forward, backward = module._forward_hooks, module._backward_hooks
    own = forward or module._forward_pre_hooks or backward or module._backward_pre_hooks
    return bool(own) or bool(nn.modules.module._has_any_global_hook())


# Name -> (values into `out`, gradient into `out`); `out` may be the gradient that comes in.
Elementwise = tuple[Callable[[Tensor, Tensor], None], Callable[[Tensor, Tensor, Tensor], None]]


def _gelu_gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
    if x.dim() == 2 and x.numel() <= ONEDNN_STARTS:  # it takes none that is not contiguous
        grad, x, out = grad.mT, x.mT, out.mT
    aten.gelu_backward.grad_input(grad, x, grad_input=out)


def _quick_gelu(x: Tensor, out: Tensor) -> None:
    torch.mul(x, 1.702, out=out)
    out.sigmoid_().mul_(x)


def _quick_gelu_gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
    gate = torch.sigmoid(1.702 * x)
    slope = gate * (1.0 + 1.702 * x * (1.0 - gate))
    torch.mul(grad, slope, out=out)


# Those that `ecomoe.feed_forward` knows; what it does not know is composed of single operators.
ELEMENTWISE: dict[str, Elementwise] = {
    "gelu": (lambda x, out: aten.gelu.out(x, out=out), _gelu_gradient),
    "gelu_tanh": (
        lambda x, out: aten.gelu.out(x, approximate="tanh", out=out),
        lambda grad, x, out: aten.gelu_backward.grad_input(
            grad, x, approximate="tanh", grad_input=out
        ),
    ),
    "quick_gelu": (_quick_gelu, _quick_gelu_gradient),
    "relu": (
        lambda x, out: aten.relu.out(x, out=out),
        lambda grad, x, out: aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
    ),
    "silu": (
        lambda x, out: aten.silu.out(x, out=out),
        lambda grad, x, out: aten.silu_backward.grad_input(grad, x, grad_input=out),
    ),
}


def activate(pre: Tensor, activation: str, *, out: Tensor) -> Tensor:
    """Write the hidden layer ``(..., H)`` of pre-activations, ``(..., 2 H)`` where it is gated."""
    values, _ = ELEMENTWISE[activation]
    d_hidden = out.shape[-1]
    values(pre[..., :d_hidden], out)
    return out if pre.shape[-1] == d_hidden else out.mul_(pre[..., d_hidden:])


def activate_backward(grad: Tensor, pre: Tensor, activation: str, *, out: Tensor) -> None:
    """Write the pre-activations' gradient from that of the hidden layer, which is overwritten."""
    values, gradient = ELEMENTWISE[activation]
    d_hidden = grad.shape[-1]
    if pre.shape[-1] == d_hidden:
        gradient(grad, pre, out)
        return
    gate, up = pre[..., :d_hidden], pre[..., d_hidden:]
    values(gate, out[..., d_hidden:])
    out[..., d_hidden:].mul_(grad)
    gradient(grad.mul_(up), gate, out[..., :d_hidden])
