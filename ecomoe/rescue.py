"""Revive dead experts of a model in trouble by seeding them from busy ones.

Axes: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ecomoe import arguments
from ecomoe.ecology.events import Event
from ecomoe.ecology.taxonomy import Thresholds
from ecomoe.experts import ExpertLinear
from ecomoe.moe import EcoMoE

if TYPE_CHECKING:
    from ecomoe.ecology.monitor import Monitor
    from ecomoe.ecology.report import Report

__all__ = ["Rescued", "rescue"]

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Rescued(NamedTuple):
    """An expert that was seeded anew.

    Attributes:
        layer: Name of its layer in the model, without the parts that wrappers add.
        expert: Its id.
        donor: The living expert that it is now a copy of, up to noise.
    """

    layer: str
    expert: int
    donor: int


@torch.no_grad()
def rescue(
    model: nn.Module,
    usage: Monitor | Report | Mapping[str, Any] | None = None,
    *,
    event: Event | None = None,
    optimizer: Optimizer | None = None,
    thresholds: str | Thresholds = "relative",
    noise: float = 0.01,
    seed: int = 0,
) -> list[Rescued]:
    """Make each dead expert a copy of a busy one of its layer, router included; return who.

    Dead is who gets so few of all slots (basis topk) that it is DEAD by the taxonomy; an expert
    that is nobody's first choice but many tokens' second works, and is left alone. The donor is the
    busiest expert; for the next dead one, half of its tokens are taken as given away. The
    dead expert gets the donor's weights, prototype and row of the router, each with a little
    noise, so that the two score alike and share the donor's tokens until training tells them apart.
    With ``top_k=1`` the layer computes what it did before, up to the noise; with more, a token that
    the donor shared with another expert may now be shared by donor and copy alone.

    The optimizer's state of the seeded slices becomes the donor's. (Zeros would not do: Adam would
    take steps many times too long until its second moments have grown again.)

    Call it where no output waits for its backward pass, as after ``optimizer.step()``: weights that
    a graph has saved must not change under it. Where that is known, such a call is refused; else
    autograd refuses the backward pass.

    The noise is drawn from a generator of its own, so that data-parallel ranks that call this with
    the same usage stay alike, and the global generators are left alone.

    As an action of the monitor:

    ``def revive(event):``
    ``    if event.kind == "death" and event.basis == "topk":``
    ``        ecomoe.rescue(model, monitor, event=event, optimizer=optimizer)``

    with ``monitor = ecomoe.Monitor(model, optimizer=optimizer, on_event=revive)``.

    Args:
        model: Holds the layers; changed in place.
        usage: What was counted: a monitor, a report or its dict (evaluation traffic where there is
            any), or for each layer's name the slots that each expert got, (E,). It may have watched
            the model inside its wrappers (DDP, `torch.compile`), or this one within them. By
            default the monitor that watches the model.
        event: A death that the monitor found: then only this expert is rescued.
        optimizer: The one in use, if any.
        thresholds: What DEAD means; see `Monitor`.
        noise: Standard deviation of the noise over that of the donor's values, >= 0.
        seed: Of the noise.

    Raises:
        ValueError: An argument breaks its rule, no monitor or several watch the model and
            ``usage`` names none, a layer is missing from it or does not fit,
            nobody in a layer lives, an output of it waits for its backward pass, its experts are
            sharded, or its router does not tell which of its parameters belong to an expert. The
            model is as it was.

    Example:
        >>> layer = EcoMoE(8, 8, tiers=(4,))
        >>> rescue(layer, {"": [60, 0, 30, 10]})
        [Rescued(layer='', expert=1, donor=0)]
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} must be a module; pass the model to rescue")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer={type(optimizer).__name__} must be a torch.optim.Optimizer; pass the one "
            "that trains the model"
        )
    if event is not None and (not isinstance(event, Event) or event.kind != "death"):
        raise ValueError(
            f"event={event!r} must be an Event of kind 'death', which names layer and expert; pass "
            "the one that Monitor(on_event=...) gave, or leave event out for all dead experts"
        )
    noise = arguments.number("noise", noise)
    limits = Thresholds.named(thresholds)
    counts = _counts_of(_monitor_of(model) if usage is None else usage)
    planned: list[tuple[EcoMoE, Rescued]] = []
    for name, layer in _layers(model, counts, event):
        slots = _checked(counts[name], name=name, layer=layer)
        bound = limits.scaled(layer.num_experts).dead_usage * sum(slots)
        dead = [expert for expert, count in enumerate(slots) if count < bound]
        if event is not None:
            dead = [expert for expert in dead if expert == event.expert]
        if dead:
            _check_layer(layer, name)
            planned += [(layer, found) for found in _pair(name, slots, dead)]
    generator = torch.Generator().manual_seed(seed)
    state = {} if optimizer is None else optimizer.state
    for layer, found in planned:
        for parameter in expert_parameters(layer):
            _copy(parameter, found, noise=noise, generator=generator)
            for value in state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape[:1] == parameter.shape[:1]:
                    value[found.expert] = value[found.donor]
    return [found for _, found in planned]


def expert_parameters(layer: EcoMoE) -> Iterator[nn.Parameter]:
    """Yield the parameters whose first axis counts experts: weights, router rows, prototypes."""
    for module in layer.experts.modules():
        if isinstance(module, ExpertLinear):
            yield from module.parameters()
    yield from layer.router.expert_parameters()
    if layer.prototypes is not None:
        yield layer.prototypes


def _monitor_of(model: nn.Module) -> Monitor:
    from ecomoe.ecology.monitor import monitors_of

    found = monitors_of(model)
    if len(found) != 1:
        raise ValueError(
            f"usage=None stands for the monitor that watches the model, and {len(found)} do; pass "
            "one, a report, or the slots that each expert got by layer"
        )
    return found[0]


def _counts_of(usage: Any) -> dict[str, Sequence[float]]:
    """Return the slots of each expert, (E,), by the layer's name."""
    report = usage.report() if callable(getattr(usage, "report", None)) else usage
    record = report.to_dict() if callable(getattr(report, "to_dict", None)) else report
    if not isinstance(record, Mapping):
        raise ValueError(
            f"usage is a {type(usage).__name__}; it must be a Monitor, a Report or a mapping from "
            "layers' names to the slots of each expert: pass one of these"
        )
    if "layers" in record:
        record = {layer["name"]: layer["counts"]["topk"] for layer in record["layers"]}
    return _by_unwrapped(record)


def _by_unwrapped(by_name: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the same by unwrapped names, or as it is where two layers would have one name."""
    found = {_unwrapped(name): value for name, value in by_name.items()}
    return found if len(found) == len(by_name) else dict(by_name)


def _unwrapped(name: object) -> str:
    """Return a layer's name without what DDP, FSDP, compilation and checkpointing add to it."""
    return ".".join(part for part in str(name).split(".") if part not in WRAPPERS)


def _layers(
    model: nn.Module, counts: Mapping[str, Any], event: Event | None
) -> Iterator[tuple[str, EcoMoE]]:
    layers = _by_unwrapped({n: m for n, m in model.named_modules() if isinstance(m, EcoMoE)})
    if not layers:
        raise ValueError(
            f"model={type(model).__name__} has no EcoMoE layer; pass the model that was converted"
        )
    wanted: Mapping[Any, EcoMoE | None] = layers
    if event is not None:
        named = event.layer if event.layer in layers else _unwrapped(event.layer)
        wanted = {named: layers.get(str(named))}
    for name, layer in wanted.items():
        if layer is None or name not in counts:
            raise ValueError(
                f"layer {name!r} must be in both usage ({', '.join(map(repr, counts))}) and model "
                f"({', '.join(map(repr, layers))}); pass the model that was counted"
            )
        yield name, layer


def _checked(counts: Any, *, name: str, layer: EcoMoE) -> list[float]:
    try:
        slots = torch.as_tensor(counts).double().flatten().tolist()
    except (RuntimeError, TypeError, ValueError):
        slots = []
    if len(slots) != layer.num_experts or min(slots) < 0 or not 0 < sum(slots) < float("inf"):
        raise ValueError(
            f"usage[{name!r}]={counts!r} must be {layer.num_experts} counts >= 0, not all 0; "
            "pass the slots that each expert got"
        )
    return slots


def _check_layer(layer: EcoMoE, name: str) -> None:
    """Refuse a layer whose experts cannot be written one by one."""
    if next(layer.router.parameters(), None) is None:
        raise ValueError(
            f"the router of layer {name!r}, {type(layer.router).__name__}, learns nothing, so no "
            "expert can be given another's tokens; choose router='linear' or another that learns, "
            "or pass a part of the model without this layer"
        )
    if layer.auxiliary.waits():
        raise ValueError(
            f"layer {name!r} has an output that waits for backward(), which needs the weights as "
            "they are; call rescue after backward() and optimizer.step(), and compute under "
            "torch.no_grad() what is never trained on"
        )
    try:
        parameters = list(expert_parameters(layer))
    except NotImplementedError as error:
        raise ValueError(
            f"the router of layer {name!r}, {type(layer.router).__name__}, does not tell which of "
            "its parameters belong to an expert; give it a method expert_parameters() that returns "
            "those whose first axis counts experts"
        ) from error
    for parameter in parameters:
        if isinstance(parameter, DTensor) or parameter.shape[0] != layer.num_experts:
            raise ValueError(
                f"layer {name!r} holds a parameter of shape {tuple(parameter.shape)} as "
                f"{type(parameter).__name__}, but all {layer.num_experts} experts must be on this "
                "device; rescue the whole model, before it is sharded or from a gathered checkpoint"
            )


def _pair(name: str, slots: Sequence[float], dead: Sequence[int]) -> Iterator[Rescued]:
    """Give each dead expert the donor with most tokens left, which then keeps half of them."""
    left = {expert: count for expert, count in enumerate(slots) if expert not in dead}
    if not left:
        raise ValueError(
            f"layer {name!r}: all {len(slots)} experts are DEAD by these thresholds, so that none "
            "can be copied; pass thresholds='relative', or convert the model anew"
        )
    for expert in dead:
        donor = max(left, key=lambda living: left[living])
        left[donor] /= 2
        yield Rescued(name, expert, donor)


def _copy(
    parameter: nn.Parameter, found: Rescued, *, noise: float, generator: torch.Generator
) -> None:
    source = parameter[found.donor]
    scale = source.float().std(correction=0) if source.numel() > 1 else source.float().abs()
    drawn = torch.randn(source.shape, generator=generator).to(source.device)
    parameter[found.expert] = source + (noise * scale * drawn).to(source.dtype)
