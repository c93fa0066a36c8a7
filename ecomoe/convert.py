"""Put EcoMoE layers in the place of a model's dense feed-forward blocks.

Three steps: find the blocks (an adapter per library knows its classes by name), validate
everything, replace. Until the last check has passed nothing is changed, and a failure while
replacing is undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ecomoe import arguments
from ecomoe.experts import Experts, FFNExperts, HeadExperts
from ecomoe.moe import EcoMoE
from ecomoe.multihop import MultiHop, check_hops
from ecomoe.oracle import Oracle
from ecomoe.sites import (
    AddsResidual,
    Found,
    Layers,
    adapters_of,
    find_blocks,
    refuse_hooks,
    select_blocks,
)
from ecomoe.summary import Cost, summary
from ecomoe.token_ids import feed_token_ids
from ecomoe.upcycle import DEFAULT_AMOUNTS, INITS, DenseFFN, Init, fill_experts, shorten_outputs

# A guard against slips: no memory holds the experts that lie beyond.
MAX_EXPERT_WIDTH = 1000

Model = TypeVar("Model", bound=nn.Module)

# Stands in a record for an oracle that was a function.
LOST = "a function"


def convert(
    model: Model,
    *,
    target_e: float = 0.545,
    tiers: tuple[int, ...] = (8, 4, 4),
    top_k: int = 2,
    layers: Layers = None,
    init: Init = "upcycle",
    init_amount: float | None = None,
    expert_width: float = 1.0,
    oracle_weight: float = 0.0,
    balance_weight: float = 0.4,
    ortho_weight: float = 0.0,
    temperature: float | None = None,
    entropy_weight: float | None = None,
    router: str = "linear",
    router_options: Mapping[str, Any] | None = None,
    oracle: Oracle | None = None,
    divergence_weight: float = 0.0,
    z_weight: float = 0.0,
    strength: float = 0.01,
    warmup_fraction: float = 0.0,
    hops: int = 1,
    verbose: bool = True,
) -> Model:
    """Replace a model's feed-forward blocks by EcoMoE layers, in place.

    What is token-wise in a block (activation, dropouts, a norm of its hidden features) goes into
    the layer; what stands around it (residual, LayerScale, DropPath, outer norms) stays. Device,
    dtype, training mode and frozen weights are kept. A model on the meta device converts too.

    Args:
        model: A model of timm or transformers, or one that contains blocks of theirs.
        target_e: See `EcoMoE`, as for every argument not described here.
        tiers: See `EcoMoE`.
        top_k: See `EcoMoE`.
        layers: Which blocks, in the model's order: ``None`` for all; ``"every other"`` for the
            second, fourth, ...; an index or several, negative ones from the end; a glob on module
            names or several (``"blocks.*.mlp"``); or a function of (name, module).
        init: How experts start. ``"upcycle"``: exact copies of the dense block, so that the
            converted model computes what the dense one did (at ``expert_width >= 1``). ``"noise"``:
            copies plus noise. ``"partial"``: copies with a share of hidden features drawn afresh
            (Drop-Upcycling). ``"random"``: drawn afresh.
        init_amount: For noise, its standard deviation over that of the weights, 0.01 by default;
            for partial, the share of hidden features drawn afresh, 0.5 by default; for random, how
            far experts differ, 0.01 by default: what `EcoMoE` calls ``spread``.
        expert_width: Hidden features of an expert over those of the dense block. Below 1 the
            experts are pieces of the block: the output equals the dense one in expectation only.
        oracle_weight: See `EcoMoE`.
        balance_weight: See `EcoMoE`.
        ortho_weight: See `EcoMoE`.
        temperature: See `EcoMoE`.
        entropy_weight: See `EcoMoE`.
        router: See `EcoMoE`; ``"hash"`` needs a model with token ids.
        router_options: See `EcoMoE`.
        oracle: See `EcoMoE`; ``"dense"`` compares with a frozen copy of the dense block.
        divergence_weight: See `EcoMoE`.
        z_weight: See `EcoMoE`.
        strength: See `EcoMoE`.
        warmup_fraction: See `EcoMoE`.
        hops: Passes through each layer; from 2 on it is put into an `ecomoe.multihop.MultiHop`.
            Copies of a dense block then have their outputs divided by ``hops``: together they are
            the dense block to first order in its update, and never exactly.
        verbose: Whether to print what was done.

    Returns:
        The model that was given.

    Raises:
        ValueError: An argument breaks its rule, there is nothing to replace, or a chosen block
            cannot be a mixture of experts or carries hooks. The model is as it was.
    """
    _check_module(model)
    arguments.flag("verbose", verbose)
    check_hops(hops)
    amount = _check_init(init, init_amount)
    _check_expert_width(expert_width)
    found, refused = find_blocks(model)
    chosen = select_blocks(model, found, refused, layers)
    settings: dict[str, Any] = {
        "tiers": tiers,
        "top_k": top_k,
        "target_e": target_e,
        "oracle_weight": oracle_weight,
        "balance_weight": balance_weight,
        "ortho_weight": ortho_weight,
        "temperature": temperature,
        "entropy_weight": entropy_weight,
        "router": router,
        "router_options": router_options,
        "oracle": oracle,
        "divergence_weight": divergence_weight,
        "z_weight": z_weight,
        "strength": strength,
        "warmup_fraction": warmup_fraction,
    }
    planned = [(block, _plan_layer(block, expert_width, hops, settings)) for block in chosen]
    for block, layer in planned:
        refuse_hooks(block, layer)
    embeddings = _token_embeddings(model) if router == "hash" else []
    before = Cost.of(model, dense=chosen)
    _replace(model, planned, hops=hops, init=init, amount=amount)
    if embeddings:
        feed_token_ids(model, *embeddings)
    record = {
        "blocks": [block.name for block in chosen],
        "expert_width": expert_width,
        "hops": hops,
        **settings,
    }
    if router_options is not None:
        record["router_options"] = dict(router_options)
    if callable(oracle):
        record["oracle"] = LOST
    for adapter in adapters_of(model):
        adapter.remember(model, record)
    if verbose:
        after = Cost.of(model, layers=planned, hops=hops)
        print(summary(before, after, planned, found, refused, hops=hops))
    return model


def rebuild(model: nn.Module, records: Sequence[Mapping[str, Any]], *, prefix: str = "") -> None:
    """Put the layers of earlier conversions into a dense model, for a checkpoint to fill.

    Args:
        model: A model built as the converted one was.
        records: What was done to it, in order: blocks by name, and the settings.
        prefix: What stands before the names in this model; names may also stand there without.

    Raises:
        ValueError: None of a record's blocks is in the model.
    """
    for record in records:
        settings = dict(record)
        blocks, expert_width = settings.pop("blocks"), settings.pop("expert_width")
        hops = settings.pop("hops", 1)
        settings["tiers"] = tuple(settings["tiers"])
        if settings["oracle"] == LOST:
            settings["oracle"] = _lost_oracle
        names = {form for name in blocks for form in (name, prefix + name)}
        chosen = [block for block in find_blocks(model)[0] if block.name in names]
        if not chosen:
            raise ValueError(
                f"model={type(model).__name__} has none of the blocks that were converted "
                f"({blocks[0]!r} and others); load the kind of model that was saved"
            )
        planned = [(block, _plan_layer(block, expert_width, hops, settings)) for block in chosen]
        _replace(model, planned, hops=hops, init="upcycle", amount=0.0)
        if settings["router"] == "hash":
            feed_token_ids(model, *_token_embeddings(model))


def _token_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that receive token ids.

    Raises:
        ValueError: There is none.
    """
    found = [part for adapter in adapters_of(model) for part in adapter.token_embeddings(model)]
    if not found:
        raise ValueError(
            f"router='hash' goes by token ids, and model={type(model).__name__} has no embedding "
            "of tokens; choose another router"
        )
    return found


def _lost_oracle(x_ND: Tensor) -> Tensor:
    raise ValueError(
        "oracle was a function of your own, which a checkpoint cannot hold; set layer.oracle to it "
        "on every EcoMoE layer before training"
    )


def _plan_layer(
    block: Found, expert_width: float, hops: int, settings: Mapping[str, Any]
) -> EcoMoE:
    """Build the layer of a block without memory, so that every check runs before any change."""
    ffn = block.site.ffn
    if hops > 1 and (ffn.d_output != ffn.d_model or issubclass(block.site.layer, AddsResidual)):
        what = (
            "adds the residual itself"
            if ffn.d_output == ffn.d_model
            else f"maps {ffn.d_model} features to {ffn.d_output}"
        )
        raise ValueError(
            f"hops={hops} must be 1 for {block.name}, which {what}, and a hop starts where the "
            "last one ended; leave hops out, or leave the block out of layers"
        )
    dtypes = [projection.weight.dtype for projection in ffn.projections]
    for dtype in dtypes:
        if not dtype.is_floating_point:
            raise ValueError(
                f"{block.name} has weights of dtype {dtype}, which cannot be trained; load the "
                "model unquantised"
            )
    width = max(1, round(expert_width * ffn.d_hidden))
    if width != ffn.d_hidden and ffn.fixed_width:
        raise ValueError(
            f"expert_width={expert_width} must be 1 for {block.name}, whose {ffn.d_hidden} hidden "
            "features go through a norm, a learnt activation or a convolution of that width; leave "
            "expert_width out, or leave the block out of layers"
        )
    form: dict[str, Any] = {} if ffn.up is None else {"activation": ffn.activation}
    return block.site.layer(
        ffn.d_model,
        None if ffn.up is None else width,
        gated=ffn.gate is not None,
        bias=any(p.bias is not None for p in ffn.projections),
        dropout=ffn.dropout,
        output_dropout=ffn.output_dropout,
        hidden_norm=ffn.norm,
        d_output=ffn.d_output,
        dense=DenseTwin(ffn) if settings["oracle"] == "dense" else None,
        device="meta",
        dtype=dtypes[0],
        **form,
        **settings,
    )


class DenseTwin(nn.Module):
    """A frozen copy of a dense block, without dropout: what ``oracle="dense"`` compares with.

    Args:
        ffn: The block.
    """

    def __init__(self, ffn: DenseFFN) -> None:
        super().__init__()
        bias = any(p.bias is not None for p in ffn.projections)
        dtype = ffn.projections[0].weight.dtype
        self.expert: Experts
        if ffn.up is None:
            self.expert = HeadExperts(
                ffn.d_model, ffn.d_output, num_experts=1, bias=bias, device="meta", dtype=dtype
            )
        else:
            self.expert = FFNExperts(
                ffn.d_model,
                ffn.d_hidden,
                num_experts=1,
                d_output=ffn.d_output,
                activation=deepcopy(ffn.activation),
                gated=ffn.gate is not None,
                bias=bias,
                norm=deepcopy(ffn.norm),
                device="meta",
                dtype=dtype,
            )

    def train(self, mode: bool = True) -> DenseTwin:
        """Stay in evaluation mode: a batch norm in a teacher learns no statistics."""
        return super().train(False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return the block's output, ``(N, F)``."""
        return self.expert.all_outputs(x_ND).squeeze(1)


def _replace(
    model: nn.Module,
    planned: list[tuple[Found, EcoMoE]],
    *,
    hops: int,
    init: Init,
    amount: float,
) -> None:
    undo: list[tuple[nn.Module, str, Any]] = []
    holders = _holders(model)

    def put(owner: nn.Module, path: str, new: object) -> None:
        where, _, attribute = path.rpartition(".")
        holder = owner.get_submodule(where)
        undo.append((holder, attribute, getattr(holder, attribute)))
        setattr(holder, attribute, new)

    try:
        for block, layer in planned:
            _fill_layer(layer, block.site.ffn, hops=hops, init=init, amount=amount)
            for name, module in block.site.extras.items():
                layer.add_module(name, module)
            new = MultiHop(layer, hops=hops) if hops > 1 else layer
            new.train(block.module.training)
            if block.site.seat:
                put(block.module, block.site.seat, new)
            else:
                for holder, attribute in holders[id(block.module)]:
                    put(holder, attribute, new)
            for name in block.site.emptied:
                put(block.module, name, nn.Identity().train(block.module.training))
            for name in block.site.zeroed:
                put(block.module, name, 0.0)
    except BaseException:
        for holder, attribute, old in reversed(undo):
            if not isinstance(old, nn.Module):
                delattr(holder, attribute)  # a function or number may have become a module
            setattr(holder, attribute, old)
        raise


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Map each submodule (by id) to all the places it is held in; a shared one has several."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        holder, _, attribute = name.rpartition(".")
        if name:
            holders.setdefault(id(module), []).append((model.get_submodule(holder), attribute))
    return holders


def _fill_layer(layer: EcoMoE, ffn: DenseFFN, *, hops: int, init: Init, amount: float) -> None:
    """Give a planned layer its memory and its start values."""
    device = ffn.down.weight.device
    experts = layer.experts
    if device.type != "meta":
        # What copies nothing from the dense block first: experts without memory cost no drawing.
        inside = set(experts.modules())
        _allocate((m for m in layer.modules() if m not in inside), device)
        layer.reset_parameters()
        _allocate(experts.modules(), device)
    fill_experts(experts, ffn, init=init, amount=amount)
    if hops > 1 and init != "random":
        shorten_outputs(experts, 1 / hops)
    if isinstance(layer.dense, DenseTwin):
        fill_experts(layer.dense.expert, ffn, init="upcycle", amount=0.0)
        shorten_outputs(layer.dense.expert, 1 / hops)
        layer.dense.requires_grad_(False)


def _allocate(modules: Iterator[nn.Module], device: torch.device) -> None:
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                memory = torch.empty_like(parameter, device=device)
                setattr(module, name, nn.Parameter(memory, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device=device))


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} must be an nn.Module; pass the model itself")


def _check_init(init: object, amount: object) -> float:
    if not isinstance(init, str) or init not in INITS:
        raise ValueError(f"init={init!r} must be one of {', '.join(INITS)}; pick one of these")
    if amount is None:
        return DEFAULT_AMOUNTS.get(init, 0.0)
    if init not in DEFAULT_AMOUNTS:
        raise ValueError(
            f"init_amount={amount!r} has no effect with init={init!r}; leave it out, or choose "
            f"init={' or '.join(repr(name) for name in DEFAULT_AMOUNTS)}"
        )
    most = arguments.LARGEST if init == "noise" else 1.0
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount <= most:
        raise ValueError(
            f"init_amount={amount!r} must be a number from 0 to {most:g} with init={init!r}; "
            "change it"
        )
    return float(amount)


def _check_expert_width(width: object) -> None:
    number = isinstance(width, (int, float)) and not isinstance(width, bool)
    if not number or not 0 < width <= MAX_EXPERT_WIDTH:  # type: ignore[operator]
        raise ValueError(
            f"expert_width={width!r} must be a number > 0 and at most {MAX_EXPERT_WIDTH}, the "
            "width of an expert over that of the dense block; 1 keeps it, 0.5 halves it"
        )
