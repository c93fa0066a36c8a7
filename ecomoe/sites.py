"""Where the dense feed-forward blocks of a model are, and how a layer takes their place.

An adapter for each library knows its blocks by the names of their classes. Nothing is guessed from
structure: attention, heads and gates are made of the same linear maps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ecomoe.activations import Activation
from ecomoe.moe import EcoMoE
from ecomoe.upcycle import DenseFFN, Projection

Rule = Callable[[Any], "Site | tuple[Site, ...] | None"]
LayerFilter = Callable[[str, nn.Module], bool]
Layers = int | str | LayerFilter | Sequence[int | str] | None

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Libraries whose models can be converted, by the first name of their classes' modules.
_ADAPTERS = {
    "timm": "ecomoe.integrations.timm",
    "transformers": "ecomoe.integrations.huggingface",
}


class ChannelsFirst(EcoMoE):
    """The layer where features are axis 1, as in images (B, D, height, width)."""

    features_axis = 1

    def forward(self, x: Tensor, *, targets: Tensor | None = None) -> Tensor:
        """Map ``(B, d_model, ...)`` to ``(B, F, ...)``."""
        y = super().forward(x.movedim(1, -1), targets=targets).movedim(-1, 1)
        # As a 1x1 convolution does: the input's memory layout is the output's.
        return y.contiguous() if x.is_contiguous() else y


class AddsResidual(EcoMoE):
    """The layer where the block itself adds the residual: ``layer(x, residual)``."""

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor, *, targets: Tensor | None = None
    ) -> Tensor:
        """Return ``residual + layer(x)``; shapes as in `EcoMoE.forward`."""
        return residual + super().forward(x, targets=targets)


class NormsInput(EcoMoE):
    """The layer where the block itself normalises its input first; the norm is ``input_norm``."""

    input_norm: nn.Module

    def forward(self, x: Tensor, *, targets: Tensor | None = None) -> Tensor:
        """Return ``layer(input_norm(x))``; shapes as in `EcoMoE.forward`."""
        return super().forward(self.input_norm(x), targets=targets)


class Refused(ValueError):
    """A block that cannot become a mixture of experts; the message says why."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Site:
    """A dense block and how a layer takes its place, in names relative to a module.

    Attributes:
        ffn: The block, taken apart.
        seat: Name of the submodule that the layer replaces; "" for the module itself.
        layer: How the layer is called there.
        emptied: Names of submodules or functions that become `nn.Identity`: the block's further
            parts, where its parts are called one by one from outside.
        zeroed: Names of dropout probabilities of the module that become 0, because the layer now
            applies them.
        extras: Modules of the block that become submodules of the layer.
    """

    ffn: DenseFFN
    seat: str = ""
    layer: type[EcoMoE] = EcoMoE
    extras: Mapping[str, nn.Module] = field(default_factory=dict)
    emptied: tuple[str, ...] = ()
    zeroed: tuple[str, ...] = ()


def linear_map(linear: Any) -> Projection:
    """Take the weights of an `nn.Linear`, or of a convolution that is one at each pixel.

    Raises:
        Refused: It is neither, or something hangs on it that experts would lose.
    """
    if is_parametrized(linear) or linear._forward_hooks or linear._forward_pre_hooks:
        raise Refused(
            f"its {type(linear).__name__} carries a parametrization or hooks (weight or spectral "
            "norm, pruning, ...), which experts would lose; remove them first"
        )
    plain = any(
        isinstance(linear, cls) and type(linear).forward is cls.forward
        for cls in (nn.Linear, nn.Conv1d, nn.Conv2d)
    )
    if isinstance(linear, (nn.Conv1d, nn.Conv2d)):
        ones = (*linear.kernel_size, *linear.stride, linear.groups)
        plain = plain and set(ones) == {1} and not any(linear.padding)
    if not plain or isinstance(linear.weight, nn.parameter.UninitializedParameter):
        raise Refused(
            f"its {type(linear).__name__} is no plain linear map; merge or unwrap what was put in"
        )
    return Projection.of(linear.weight.flatten(1), linear.bias)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A rule for one kind of block: the names under which a module keeps the parts.

    Names are those of attributes, dotted where the parts lie deeper. Called with a module, it
    returns the `Site`.

    Attributes:
        down: The last linear map.
        up: The first linear map, or both of them where ``packed``; ``None`` where the last one
            alone is token-wise.
        act: The activation, or several applied in turn, or the function itself.
        gate: The linear map of the gate, in a gated block.
        packed: Which half of ``up``'s output is the gate, where one map computes both.
        norm: A norm of the hidden features between activation and last map.
        dropout: The `nn.Dropout` or the probability for hidden features.
        output_dropout: The `nn.Dropout` or the probability for the output.
        input_norm: A norm of the input that belongs to the block.
        layer: As in `Site`; by default `ChannelsFirst` where the maps are convolutions.
        seat: As in `Site`.
        emptied: As in `Site`.
        zeroed: As in `Site`.
        linear: Takes the weights out of a linear map.
    """

    down: str
    up: str | None = None
    act: str | tuple[str, ...] | Activation = ()
    gate: str | None = None
    packed: Literal["gate first", "gate last"] | None = None
    norm: str | None = None
    dropout: str | None = None
    output_dropout: str | None = None
    input_norm: str | None = None
    layer: type[EcoMoE] | None = None
    seat: str = ""
    emptied: tuple[str, ...] = ()
    zeroed: tuple[str, ...] = ()
    linear: Callable[[Any], Projection] = linear_map

    def __call__(self, module: nn.Module) -> Site:
        """Take the block of a module apart."""
        names = {"gate": self.gate, "up": self.up, "down": self.down}
        maps = {key: attrgetter(name)(module) for key, name in names.items() if name is not None}
        projections = {key: self.linear(linear) for key, linear in maps.items()}
        if self.packed is not None:
            first, second = projections["up"].split(2)
            gate, up = (first, second) if self.packed == "gate first" else (second, first)
            projections |= {"gate": gate, "up": up}
        images = any(isinstance(linear, (nn.Conv1d, nn.Conv2d)) for linear in maps.values())
        norm = None if self.norm is None else _on_rows(attrgetter(self.norm)(module), images)
        ffn = DenseFFN(
            **projections,
            activation=self._activation(module, images),
            norm=None if isinstance(norm, nn.Identity) else norm,
            dropout=_probability(module, self.dropout),
            output_dropout=_probability(module, self.output_dropout),
        )
        layer = self.layer or (ChannelsFirst if images else EcoMoE)
        extras = {}
        if self.input_norm is not None:
            layer, extras["input_norm"] = NormsInput, attrgetter(self.input_norm)(module)
        return Site(
            ffn=ffn,
            layer=layer,
            extras=extras,
            seat=self.seat,
            emptied=self.emptied,
            zeroed=self.zeroed,
        )

    def _activation(self, module: nn.Module, images: bool) -> Activation:
        if callable(self.act):
            return self.act
        names = (self.act,) if isinstance(self.act, str) else self.act
        steps = [attrgetter(name)(module) for name in names]
        steps = [_on_rows(s, images) for s in steps if not isinstance(s, nn.Identity)]
        return steps[0] if len(steps) == 1 else nn.Sequential(*steps)


def _on_rows(module: Any, images: bool) -> Any:
    """Let a module of image features work on rows, if it tells features apart (a norm does).

    Raises:
        Refused: It is a norm over several tokens of one image.
    """
    if isinstance(module, (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)):
        raise Refused(
            f"its {type(module).__name__} normalises hidden features over the whole image, so it "
            "cannot work token by token"
        )
    state = module.state_dict().values() if images and isinstance(module, nn.Module) else ()
    return OnRows(module) if any(t.numel() > 1 for t in state) else module


def _probability(module: nn.Module, name: str | None) -> float:
    if name is None:
        return 0.0
    dropout = attrgetter(name)(module)
    if dropout is None or isinstance(dropout, nn.Identity):
        return 0.0
    return float(getattr(dropout, "p", dropout))


class OnRows(nn.Module):
    """A norm of image features (B, H, height, width), applied to rows (S, H)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x_SH: Tensor) -> Tensor:
        """Normalise each row as if it were one pixel."""
        y_SHPP: Tensor = self.norm(x_SH[:, :, None, None])
        return y_SHPP.flatten(1)


@dataclass(frozen=True, eq=False)
class Found:
    """A `Site` with its place in a model.

    Attributes:
        name: Name of the submodule that the layer replaces.
        owner: Name of the module that the site's names are relative to.
        module: That module.
        site: The site.
    """

    name: str
    owner: str
    module: nn.Module
    site: Site


def adapters_of(model: nn.Module) -> list[Any]:
    """Import the adapters of the libraries whose classes a model holds.

    An adapter is a module with ``recognise(name, module)``, which returns a site, several or
    ``None``, ``token_embeddings(model)``, and ``remember(model, record)``, which makes a conversion
    part of what the library saves.
    """
    roots = {cls.__module__.partition(".")[0] for m in model.modules() for cls in type(m).__mro__}
    return [import_module(path) for root, path in _ADAPTERS.items() if root in roots]


def find_blocks(model: nn.Module) -> tuple[list[Found], dict[str, str]]:
    """Find the feed-forward blocks of a model, in its order.

    Returns:
        The blocks that can be replaced; and the names of those that cannot, with the reason.
    """
    adapters = adapters_of(model)
    found: list[Found] = []
    refused: dict[str, str] = {}
    for owner, module in model.named_modules():
        for adapter in adapters:
            try:
                site = adapter.recognise(owner, module)
            except Refused as reason:
                refused[owner] = str(reason)
                continue
            for one in (site,) if isinstance(site, Site) else site or ():
                name = ".".join(part for part in (owner, one.seat) if part)
                if name:
                    found.append(Found(name, owner, module, one))
    return found, refused


def refuse_hooks(block: Found, layer: EcoMoE) -> None:
    """Raise where a module that the layer displaces, and does not take over, carries hooks.

    Raises:
        ValueError: There is one; it is named.
    """
    stays = set(layer.modules())
    for name in (block.site.seat, *block.site.emptied):
        part = attrgetter(name)(block.module) if name else block.module
        for inner, module in part.named_modules() if isinstance(part, nn.Module) else ():
            if module not in stays and any(getattr(module, kind) for kind in _HOOKS):
                path = ".".join(word for word in (block.owner, name, inner) if word)
                raise ValueError(
                    f"{path} carries hooks, which would be lost with it; remove them first, and "
                    "register them on the converted model"
                )


def class_rule(rules: Mapping[str, Rule], module: nn.Module, *, root: str) -> Rule | None:
    """Return the rule for a module's class, for an adapter.

    A subclass follows its base's rule unless it has a ``forward`` of its own.

    Args:
        rules: Rules by the name of a class, qualified as far as it takes to be the only one.
        module: Any module.
        root: The library that the class must come from.
    """
    for cls in type(module).__mro__:
        forward = getattr(cls, "forward", None)
        if cls.__module__.partition(".")[0] == root and forward is type(module).forward:
            path = f"{cls.__module__}.{cls.__qualname__}".split(".")
            for start in range(1, len(path)):
                rule = rules.get(".".join(path[start:]))
                if rule is not None:
                    return rule
    return None


def select_blocks(
    model: nn.Module, found: list[Found], refused: Mapping[str, str], layers: Layers
) -> list[Found]:
    """Choose blocks by the ``layers`` argument of `convert`, in the model's order.

    Raises:
        ValueError: Nothing is chosen, or what is asked for does not exist or cannot be replaced.
    """
    if not found:
        raise ValueError(_nothing_found(model, refused))
    if layers is None:
        return found
    if callable(layers):
        chosen = [block for block in found if layers(block.name, model.get_submodule(block.name))]
    elif layers == "every other":
        chosen = found[1::2]
    else:
        several = isinstance(layers, Iterable) and not isinstance(layers, (str, Mapping))
        wanted = list(layers) if several else [layers]  # type: ignore[arg-type]
        names = {name for want in wanted for name in _names_meant(want, found, refused)}
        chosen = [block for block in found if block.name in names]
    if not chosen:
        raise ValueError(
            f"layers={layers!r} chooses none of the model's feed-forward blocks, which are "
            f"{_listed([block.name for block in found])}; choose at least one"
        )
    return chosen


def _names_meant(want: object, found: list[Found], refused: Mapping[str, str]) -> list[str]:
    names = [block.name for block in found]
    if type(want) is int:
        if not -len(names) <= want < len(names):
            raise ValueError(
                f"layers={want} must be from {-len(names)} to {len(names) - 1}, for the model has "
                f"{len(names)} feed-forward blocks; correct the index"
            )
        return [names[want]]
    if not isinstance(want, str):
        raise ValueError(
            f"layers={want!r} must be an index, a glob on module names, 'every other', a list of "
            "indices and globs, a function of (name, module), or None; pass one of these"
        )
    for name, reason in refused.items():
        if fnmatchcase(name, want):
            raise ValueError(f"layers={want!r} means {name!r} too, and {reason}; leave it out")
    matching = [name for name in names if fnmatchcase(name, want)]
    if not matching:
        raise ValueError(
            f"layers={want!r} matches none of the model's feed-forward blocks, which are "
            f"{_listed(names)}; correct the glob"
        )
    return matching


def _nothing_found(model: nn.Module, refused: Mapping[str, str]) -> str:
    message = f"model={type(model).__name__} holds no feed-forward block that can be replaced"
    layers = sum(isinstance(module, EcoMoE) for module in model.modules())
    if layers:
        return f"{message}, for it is converted already ({layers} EcoMoE layers); convert it once"
    if refused:
        return f"{message}: " + "; ".join(refusals(refused)) + "; choose another model"
    classes = Counter(type(m).__name__ for m in model.modules() if next(m.children(), None))
    held = [f"{count} {name}" for name, count in classes.most_common()]
    return (
        f"{message}; what holds submodules in it is {_listed(held) if held else 'nothing'}; pass a "
        "model of timm or transformers, or put EcoMoE into the model yourself"
    )


def refusals(refused: Mapping[str, str]) -> list[str]:
    """Say in one clause for each reason which blocks are refused."""
    names: dict[str, list[str]] = {}
    for name, reason in refused.items():
        names.setdefault(reason, []).append(name)
    return [f"{_listed(where)} refused, for {reason}" for reason, where in names.items()]


def _listed(items: Sequence[str], most: int = 6) -> str:
    rest = f", ... ({len(items) - most} more)" if len(items) > most else ""
    return ", ".join(items[:most]) + rest
