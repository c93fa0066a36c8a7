"""The layers that are measured against each other, all sent the same tokens by the same routing.

Axes: N tokens, D features, E experts, K experts chosen for a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ecomoe
from ecomoe.closed_form import linear_twice
from ecomoe.routing import Routing
from tests.benchmarks.shapes import Load, Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Bytes that a peer may copy for one product; `batched_mm` copies the weights once for each slot.
COPY_LIMIT = 2**28


class Forced:
    """Logits that decide where tokens go, added to what each router computes itself."""

    logits_NE: Tensor

    def draw(self, shape: Shape, generator: torch.Generator, device: torch.device) -> None:
        """Draw the next batch's logits.

        Differences between experts are far larger than what the routers say, whose last maps are
        made small, so all contenders send a token to the same experts.
        """
        favour_E = popularity(shape.load, shape.num_experts)
        uniform_NE = torch.rand(shape.tokens, shape.num_experts, generator=generator)
        gumbel_NE = -(-uniform_NE.clamp(1e-9, 1 - 1e-7).log()).log()
        self.logits_NE = (favour_E + gumbel_NE).to(device)


def popularity(load: Load, num_experts: int) -> Tensor:
    """Return each expert's log-share of the first choices, up to a constant, ``(E,)``."""
    if load == "balanced":
        return torch.zeros(num_experts)
    if load == "zipf":
        return -torch.arange(1, num_experts + 1).float().log()
    return torch.tensor([30.0] + [0.0] * (num_experts - 1))


class DenseFFN(nn.Module):
    """The feed-forward block of equal active FLOPs."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.top_k * shape.d_hidden
        self.gated = shape.gated
        self.up = nn.Linear(shape.d_model, 2 * width if shape.gated else width, not shape.gated)
        self.down = nn.Linear(width, shape.d_model, not shape.gated)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map (N, D) to (N, D)."""
        if self.gated:
            gate, up = self.up(x_ND).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]
        return self.down(F.gelu(self.up(x_ND)))  # type: ignore[no-any-return]


def build_ours(shape: Shape, forced: Forced) -> nn.Module:
    """Return the package's layer with its defaults."""
    layer = ecomoe.EcoMoE(
        shape.d_model,
        shape.d_hidden,
        tiers=(shape.num_experts,),
        top_k=shape.top_k,
        gated=shape.gated,
        bias=not shape.gated,
        activation="silu" if shape.gated else "gelu",
    )
    with torch.no_grad():
        for weight in layer.router.expert_parameters():
            weight.mul_(0.01)
    router, score = layer.router, layer.router.score
    router.logits = lambda x_ND: score(x_ND) + forced.logits_NE
    router.logits_apart = lambda x_ND: tuple(
        logits_NE + forced.logits_NE for logits_NE in linear_twice(x_ND, score.weight, score.bias)
    )
    return layer


def build_delegated(shape: Shape, forced: Forced, implementation: str) -> nn.Module:
    """Return the package's layer with experts that a back end of transformers computes."""
    layer = build_ours(shape, forced)
    try:
        ecomoe.set_experts_implementation(layer, implementation)
    except ValueError as error:
        raise ImportError(str(error)) from error
    return layer


class Products(nn.Module):
    """The experts' products alone: each expert has as many tokens, and all are in one batch.

    No router, gates, activation, bias nor losses, and gradients by automatic differentiation.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        sizes = shape.num_experts, shape.d_hidden, shape.d_model
        self.shape = shape
        self.ups = nn.ParameterList(
            nn.Parameter(torch.empty(sizes)) for _ in range(1 + shape.gated)
        )
        self.down = nn.Parameter(torch.empty(sizes).mT.contiguous())
        for weight in self.parameters():
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map (N, D) to (N, D)."""
        shape = self.shape
        rows_EPD = x_ND.repeat(shape.top_k, 1).view(shape.num_experts, -1, shape.d_model)
        hidden_EPH = torch.bmm(rows_EPD, self.ups[0].mT)
        for weight_EHD in self.ups[1:]:
            hidden_EPH = hidden_EPH + torch.bmm(rows_EPD, weight_EHD.mT)
        y_EPD = torch.bmm(hidden_EPH, self.down.mT)
        return y_EPD.view(shape.top_k, -1, shape.d_model).sum(0)


class Beforehand(nn.Module):
    """A router that has decided already: what is left of the layer's time is not the router's."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = [router]
        self.routing: Routing

    def decide(self, x_ND: Tensor, temperature: Tensor) -> None:
        """Route the next batch, outside of what is timed."""
        with torch.no_grad():
            decided = self.router[0](x_ND, temperature)
        self.routing = decided._replace(weights_NK=decided.weights_NK.requires_grad_())

    def forward(self, *args: Any) -> Routing:
        """Return the decision."""
        return self.routing


class PeerRouter(nn.Module):
    """The router of transformers' Mixtral: a linear map, softmax, top-k, renormalised."""

    def __init__(self, shape: Shape, forced: Forced) -> None:
        super().__init__()
        self.top_k, self.forced = shape.top_k, [forced]
        self.weight = nn.Parameter(torch.empty(shape.num_experts, shape.d_model))
        nn.init.normal_(self.weight, std=1e-3)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, gates and experts."""
        logits_NE = F.linear(x_ND, self.weight) + self.forced[0].logits_NE
        top_NK, ids_NK = logits_NE.float().softmax(-1).topk(self.top_k, dim=-1)
        return logits_NE, top_NK / top_NK.sum(-1, keepdim=True), ids_NK


def build_transformers(shape: Shape, forced: Forced, implementation: str) -> nn.Module:
    """Return transformers' Mixtral block with one of its experts implementations.

    Its experts are gated and without bias. For plain shapes the same block holds plain experts
    with a bias, declared by transformers' own decorator.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_hidden,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        hidden_act="silu" if shape.gated else "gelu",
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    if not shape.gated:
        block.experts = _plain_experts()(config)
    block.gate = PeerRouter(shape, forced)
    for weight in block.experts.parameters():
        nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
    return _Unbatched(block)


class _Unbatched(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.block(x_ND.unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]


def _plain_experts() -> type[nn.Module]:
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import use_experts_implementation

    @use_experts_implementation(has_gate=False, has_bias=True)
    class PlainExperts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            sizes = config.num_local_experts, config.intermediate_size, config.hidden_size
            self.num_experts, width, d_model = sizes
            self.up_proj = nn.Parameter(torch.empty(sizes))
            self.up_proj_bias = nn.Parameter(torch.empty(self.num_experts, width))
            self.down_proj = nn.Parameter(torch.empty(self.num_experts, d_model, width))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, d_model))
            self.act_fn = ACT2FN[config.hidden_act]

        def forward(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
            """The loop over experts that Mixtral's eager form is, for plain experts."""
            out_ND = torch.zeros_like(x_ND)
            for expert in ids_NK.unique().tolist():
                token_S, choice_S = torch.where(ids_NK == expert)
                hidden = F.linear(x_ND[token_S], self.up_proj[expert], self.up_proj_bias[expert])
                y = F.linear(
                    self.act_fn(hidden), self.down_proj[expert], self.down_proj_bias[expert]
                )
                y = y * weights_NK[token_S, choice_S, None]
                out_ND.index_add_(0, token_S, y.to(out_ND.dtype))
            return out_ND

    return PlainExperts


def build_st_moe(shape: Shape) -> nn.Module:
    """Return st-moe-pytorch's layer, which drops the tokens over its capacity.

    Raises:
        ImportError: It is not installed.
    """
    from st_moe_pytorch import MoE

    mult = 1.5 * shape.d_hidden / shape.d_model  # its experts are 2/3 of what it is told
    layer = MoE(shape.d_model, shape.num_experts, mult, gating_top_n=shape.top_k)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = layer

        def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
            found = self.moe(x_ND.unsqueeze(0))
            return found.outputs.squeeze(0), found.total_aux_loss

    return Both()


class Recomputed(nn.Module):
    """A layer that keeps its input alone, and computes the rest again in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return the layer's output (N, D)."""
        y_ND: Tensor = checkpoint(self.layer, x_ND, use_reentrant=False)
        return y_ND


def builders(
    shape: Shape, forced: Forced, *, compiled: bool, recompute: bool = False
) -> dict[str, Callable[[], nn.Module] | str]:
    """Return how to build each contender, or why it is left out."""
    slot_weights = (3 if shape.gated else 2) * shape.d_model * shape.d_hidden
    copied = shape.tokens * shape.top_k * slot_weights * DTYPES[shape.dtype].itemsize
    found: dict[str, Callable[[], nn.Module] | str] = {
        "dense": lambda: DenseFFN(shape),
        "ecomoe": lambda: build_ours(shape, forced),
        "products": lambda: Products(shape),
    }
    if shape.tokens * shape.top_k % shape.num_experts:
        found["products"] = "tokens cannot be spread evenly"
    for name in ("grouped_mm", "eager", "batched_mm"):
        found[name] = lambda name=name: build_transformers(shape, forced, name)
    if copied > COPY_LIMIT:
        found["batched_mm"] = f"would copy over {COPY_LIMIT / 2**20:.0f} MiB of weights"
    if shape.num_experts >= 256 and shape.d_model >= 512:
        found["eager"] = "needs a step of minutes"
    found["st_moe"] = lambda: build_st_moe(shape)
    if not shape.gated:
        found["st_moe"] = "its experts are gated"
    elif shape.load != "balanced" or shape.top_k < 2 or shape.dtype != "fp32":
        found["st_moe"] = "routes by itself, to two experts or more, in fp32"
    elif shape.tokens > 8192:
        found["st_moe"] = "its dispatch tensor grows with the square of the tokens"
    if torch.cuda.is_available():  # what needs one
        found["ecomoe sonicmoe"] = lambda: build_delegated(shape, forced, "sonicmoe")
    if recompute:
        found["recomputed"] = lambda: Recomputed(build_ours(shape, forced))
    if compiled:
        found["dense compiled"] = lambda: torch.compile(DenseFFN(shape))  # type: ignore[return-value]
        found["ecomoe compiled"] = lambda: torch.compile(build_ours(shape, forced))  # type: ignore[return-value]
        found["grouped_mm compiled"] = lambda: torch.compile(  # type: ignore[return-value]
            build_transformers(shape, forced, "grouped_mm")
        )
    return found
