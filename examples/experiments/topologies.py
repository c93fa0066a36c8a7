"""The variants of the equifinality paper (arXiv:2604.14419), and what is measured of them.

The text at hand does not name the five cosine variants; here they are all ways to spend 12 experts
in hops of 2 experts or more. Sizes follow from the ratios that it prints: E = 2 D rank-1 experts,
and a space of D / 8 dimensions.

Axes: B samples, L positions, D features, E experts, K experts chosen for a token, H hops.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecomoe import Control, EcoMoE
from ecomoe.cost import flops_per_token, routing_parameters
from ecomoe.ecology.alignment import (
    collinearity,
    displacement,
    hop_diversity,
)
from ecomoe.multihop import MultiHop, halting, make_static, relative_norm
from ecomoe.routers import CosineRouter
from ecomoe.token_ids import feed_token_ids
from examples.experiments.data import Samples
from examples.experiments.measure import Batch, Record
from examples.experiments.models import GPT
from examples.experiments.records import SCALES, Scale, Setting

BUDGET = 12  # experts of one hidden feature that a token meets
PERCENTS = (5, 10, 20, 40, 60, 80, 100)
# The paper does not give its auxiliary losses. What is compared is the topology, so they are to
# decide as little as they can.
STRENGTH = 0.001
QUANTILES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
GOAL = 0.25  # of the operations, to be saved by halting
DEFAULTS = Control.from_target(0.545, oracle_weight=0.0, balance_weight=0.4)

# The paper's 50,000 steps of 32,768 tokens are 14 epochs of WikiText-103. 23 layers give the
# parameters that it prints: 76 M with cosine routers, 86 M with linear ones.
SIZES: dict[str, dict[str, Any]] = {
    "paper": {
        "layers": 23,
        "width": 512,
        "heads": 8,
        "context": 256,
        "batch": {"language": 128},
        "epochs": {"language": 14},
        "encoder_lr": 3e-4,
        "expert_lr": 3e-4,
    },
    "small": {
        "layers": 2,
        "width": 48,
        "heads": 4,
        "context": 128,
        "train_tokens": 123_000,
        "test_tokens": 8_200,
        "batch": {"language": 8},
        "epochs": {"language": 1},
        "encoder_lr": 6e-3,
        "expert_lr": 6e-3,
    },
    # Twelve times as many steps as small, of a model half as large.
    "convergence": {
        "layers": 1,
        "width": 32,
        "heads": 4,
        "context": 128,
        "train_tokens": 500_000,
        "test_tokens": 16_400,
        "batch": {"language": 8},
        "epochs": {"language": 3},
        "encoder_lr": 6e-3,
        "expert_lr": 6e-3,
    },
    "smoke": {"epochs": {"language": 1}, "train_tokens": 3_000, "test_tokens": 600},
}


def sized(name: str) -> Scale:
    """Return a scale of the experiments with the sizes of this paper."""
    base = SCALES.get(name, SCALES["small"])
    return replace(base, **{"name": name, **SIZES[name]}, percents=PERCENTS, temperatures=())


@dataclass(frozen=True, kw_only=True)
class Topology(Setting):
    """A variant: how tokens find experts, and what these are.

    Attributes:
        router: As for `EcoMoE`.
        hops: Passes through the mixture.
        top_k: Experts a pass.
        rank: Hidden features of an expert; there are ``2 D / rank`` experts.
        static: Whether experts are vectors.
        scaled: Whether a learned scalar multiplies the update.
        dense: ``"flops"`` or ``"parameters"`` for a dense FFN that has as many as 1 x 12 does; it
            is run as a mixture of one expert, whose gate is 1.
    """

    data: str = "wikitext103"
    control: Control = DEFAULTS
    strength: float | None = STRENGTH
    warmup: float = 0.0
    router: str = "cosine"
    hops: int = 1
    top_k: int = BUDGET
    rank: int = 1
    static: bool = False
    scaled: bool = False
    dense: str | None = None

    def layer_arguments(self, width: int) -> dict[str, Any]:
        """Return what the variant says of its layers."""
        given: dict[str, Any] = {
            "target_e": self.control.e,
            "temperature": self.control.temperature,
            "balance_weight": self.control.balance_weight,
            "bias": False,
            "spread": 1.0,
        }
        if self.dense is not None:
            return given | {"tiers": (1,), "top_k": 1, "router": "linear", "strength": 0.0}
        given |= {
            "tiers": (max(2 * width // self.rank, self.top_k),),
            "top_k": self.top_k,
            "router": self.router,
        }
        if self.router in ("cosine", "random"):
            given["router_options"] = {"d_space": _space(width)}
        if self.strength is not None:
            given["strength"] = self.strength
        return given

    def build_ffn(self, width: int) -> nn.Module:
        """Return what stands in the place of a block's FFN."""
        given = self.layer_arguments(width)
        if self.dense is not None:
            routing = _space(width) * 3 * width
            parameters = 2 * width + round(routing / (2 * width))
            return EcoMoE(width, BUDGET if self.dense == "flops" else parameters, **given)
        layer = EcoMoE(width, self.rank, **given)
        if self.static:
            make_static(layer)
        return MultiHop(layer, hops=self.hops, learned_scale=self.scaled)

    def build(self, scale: Scale, samples: Samples) -> nn.Module:
        """Return the language model."""
        model = GPT(
            vocabulary=samples.classes,
            layers=scale.layers,
            width=scale.width,
            heads=scale.heads,
            build_ffn=self.build_ffn,
        )
        if self.router == "hash":
            feed_token_ids(model, model.embed)
        return model

    def measure(self, model: nn.Module, tests: list[Batch], folder: Path) -> Record:
        """Return costs and what the hops do; keep the experts' weights for comparing seeds."""
        layers = [module for module in model.modules() if isinstance(module, EcoMoE)]
        hopping = [module for module in model.modules() if isinstance(module, MultiHop)]
        routed = self.dense is None
        # One score of one expert is an artefact of running a dense FFN as a mixture.
        flops = sum(flops_per_token(layer) for layer in layers) * self.hops
        found: Record = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "routing_parameters": sum(map(routing_parameters, layers)) if routed else 0,
            "flops": flops if routed else flops - sum(2 * layer.d_model for layer in layers),
        }
        if self.scaled:
            found["scales"] = [
                module.scale.item() for module in hopping if module.scale is not None
            ]
        if self.hops > 1:
            found["hops"] = hop_statistics(model, hopping, tests[0][0])
        if self.hops == 3:
            found["halting"] = halting_curve(model, hopping, tests)
        if routed:
            experts = [dict(layer.experts.named_parameters()) for layer in layers]
            weights = [{name: t.detach().cpu() for name, t in own.items()} for own in experts]
            torch.save(
                {"experts": weights, "embed": model.embed.weight.detach().cpu()}, kept(folder)
            )
        return found


def _space(width: int) -> int:
    return max(width // 8, 2)


def _variants() -> tuple[Topology, ...]:
    cosine = tuple(
        Topology(name=f"cosine {hops}x{BUDGET // hops}", hops=hops, top_k=BUDGET // hops)
        for hops in (1, 2, 3, 4, 6)
    )
    return (
        *cosine,
        Topology(name="cosine iso 1x12", router="cosine_iso"),
        Topology(name="linear 1x12", router="linear"),
        Topology(name="hash 1x12", router="hash"),
        Topology(name="random 1x12", router="random"),
        Topology(name="top-1", top_k=1, rank=BUDGET),
        Topology(name="1x12, learned scalar", scaled=True),
        Topology(name="static 1x12", static=True),
        Topology(name="static 3x4", static=True, hops=3, top_k=4),
        Topology(name="dense, same FLOPs", dense="flops"),
        Topology(name="dense, same parameters", dense="parameters"),
    )


VARIANTS = _variants()
FIVE = tuple(variant.name for variant in VARIANTS[:5])
WIDE, DEEP = "cosine 1x12", "cosine 3x4"
# Wide and deep of each kind of experts.
DEPTH_PAIRS = {"MLP experts": (WIDE, DEEP), "static experts": ("static 1x12", "static 3x4")}


def variants_at(scale: str, *, strength: float = STRENGTH) -> tuple[Topology, ...]:
    """Return the variants that a scale is for."""
    return tuple(
        replace(variant, strength=strength)
        for variant in VARIANTS
        if scale != "convergence" or variant.name in (WIDE, DEEP)
    )


def kept(folder: Path) -> Path:
    """Return where a run keeps the weights that seeds are compared by."""
    return folder / "experts.pt"


# --- what the hops of a trained model do --------------------------------------------------------


@contextmanager
def inputs_of(modules: list[MultiHop]) -> Iterator[list[Tensor]]:
    """Collect what enters each module, in the order of calls."""
    seen: list[Tensor] = []
    with ExitStack() as stack:
        for module in modules:
            hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
            stack.callback(hook.remove)
        yield seen


@torch.no_grad()
def hop_statistics(model: nn.Module, hopping: list[MultiHop], inputs: Tensor) -> Record:
    """Return collinearity, diversity and displacement, averaged over layers."""
    model.eval()
    device = next(model.parameters()).device
    with inputs_of(hopping) as entered:
        model(inputs.to(device))
    cosines, diversities, displacements = [], [], []
    for module, x in zip(hopping, entered, strict=True):
        x_ND = x.reshape(-1, x.shape[-1])
        chosen: list[Tensor] = []
        hook = module.layer.router.register_forward_hook(
            lambda _, args, routing, chosen=chosen: chosen.append(routing.expert_ids_NK)
        )
        updates_HND = module.updates(x_ND)
        hook.remove()
        cosine_HH = collinearity(updates_HND)
        cosines.append([float(cosine_HH[0, 1]), float(cosine_HH[0, -1])])
        diversities.append(hop_diversity(torch.stack(chosen)))
        states_HND = torch.cat([x_ND[None], x_ND + updates_HND.cumsum(0)[:-1]])
        router = module.layer.router
        assert isinstance(router, CosineRouter)
        displacements.append(displacement(torch.stack([router.positions(s) for s in states_HND])))
    return {
        "collinearity": sum(first for first, _ in cosines) / len(cosines),
        "collinearity_last": sum(last for _, last in cosines) / len(cosines),
        "diversity": sum(diversities) / len(diversities),
        "displacement": sum(displacements) / len(displacements),
    }


@torch.no_grad()
def heldout_loss(model: nn.Module, tests: list[Batch]) -> float:
    """Return the cross-entropy of a test set, nats a token."""
    device = next(model.parameters()).device
    total = count = 0.0
    for inputs, targets in tests:
        logits = model(inputs.to(device)).flatten(0, -2).float()
        total += float(F.cross_entropy(logits, targets.to(device).flatten(), reduction="sum"))
        count += targets.numel()
    return total / count


@torch.no_grad()
def relative_norms(model: nn.Module, hopping: list[MultiHop], inputs: Tensor) -> Tensor:
    """Return the relative norms of all hops but the last, on a batch, sorted."""
    with inputs_of(hopping) as entered:
        model(inputs.to(next(model.parameters()).device))
    norms = []
    for module, x in zip(hopping, entered, strict=True):
        updates = module.updates(x)
        states = x + updates.cumsum(0)
        norms.append(relative_norm(updates[:-1], states[:-1]).flatten().cpu())
    return torch.cat(norms).sort().values


def halting_curve(model: nn.Module, hopping: list[MultiHop], tests: list[Batch]) -> Record:
    """Return loss against saved operations over epsilon, and the epsilon that saves a quarter."""
    model.eval()
    norms = relative_norms(model, hopping, tests[0][0])

    def halted(epsilon: float) -> Record:
        with halting(model, epsilon=epsilon) as saved:
            loss = heldout_loss(model, tests)
        return {"epsilon": epsilon, "saved": saved.share, "hops": saved.hops, "loss": loss}

    low, high = 0.0, float(norms[-1]) * 1.01
    for _ in range(6):  # the share rises with epsilon
        middle = (low + high) / 2
        point = halted(middle)
        low, high = (middle, high) if point["saved"] < GOAL else (low, middle)
    full, quarter = heldout_loss(model, tests), halted(high)
    curve = [halted(float(torch.quantile(norms, q))) for q in QUANTILES]
    return {"loss": full, "curve": curve, "goal": GOAL, "at_goal": quarter}


@torch.no_grad()
def wall_clock(
    *, d_model: int = 256, d_hidden: int = 128, tokens: int = 4096, repeats: int = 7
) -> list[Record]:
    """Return seconds of a 3x4 layer at several bounds, beside the operations that were saved.

    The layer is as drawn and the tokens are normal: what is timed is the leaving out, not whether
    it was wise. Each time is the least of a few.
    """
    torch.manual_seed(0)
    layer = EcoMoE(d_model, d_hidden, tiers=(32,), top_k=4, router="cosine")
    model = MultiHop(layer, hops=3).eval()
    x = torch.randn(tokens, d_model)
    updates = model.updates(x)
    states = x + updates.cumsum(0)
    norms = relative_norm(updates[:-1], states[:-1]).flatten()
    rows: list[Record] = []
    for quantile in (None, 0.0, 0.3, 0.5, 0.8, 1.0):
        seconds, share = [], 0.0
        for _ in range(repeats):
            with ExitStack() as stack:
                if quantile is not None:
                    epsilon = float(norms.quantile(quantile)) * (1.01 if quantile == 1.0 else 1.0)
                    saved = stack.enter_context(halting(model, epsilon=epsilon))
                began = time.perf_counter()
                model(x)
                seconds.append(time.perf_counter() - began)
                share = saved.share if quantile is not None else 0.0
        rows.append({"quantile": quantile, "saved": share, "seconds": min(seconds)})
    return rows
