"""EcoMoE: router, dispatch, experts and auxiliary losses as one drop-in layer.

Axes: N tokens, D input features, E experts, K experts chosen for a token, S = N * K slots sorted by
expert, M probe tokens, F output features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecomoe import arguments, tensor_arguments
from ecomoe.activations import ACTIVATIONS, Activation
from ecomoe.auxiliary import AuxiliarySlot
from ecomoe.control import Control
from ecomoe.dispatch import Plan, combine, plan_dispatch, scatter_to_experts, unsort_slots
from ecomoe.experts import ExpertLinear, Experts, FFNExperts, HeadExperts, autocast_dtype
from ecomoe.losses import ShareReducer
from ecomoe.objective import other_terms, routing_losses, share_annealed
from ecomoe.oracle import Oracle, choose_oracle
from ecomoe.routers import build_router, keep_wide
from ecomoe.routing import Routing

# Measured (docs/evidence.md). It is no trade-off: where no expert starves, the loss is 0.
STARVATION_WEIGHT = 0.04
# While T is annealed, half of the experts may starve at once, and come back by themselves; a full
# pull on all of them would fill the optimizer's second moments, and the router learn less.
SUSTAIN_AT_START = 0.05


class EcoMoE(nn.Module):
    """Sparse mixture of tiered experts in place of a feed-forward block.

    Each token goes to its ``top_k`` best-scored experts; the output is their gate-weighted sum. No
    token is dropped, nothing waits for the device, and every shape follows from the input's.

    The control parameter ``E = T * H / (O + B)`` (equation 1 of the E paper) is given as a target;
    the constructor works out the routing temperature T and the entropy weight H from it. While the
    schedule advances (`set_progress`), T is annealed.

    In training the layer computes its auxiliary losses and leaves them to `ecomoe.aux_loss` or to
    an attached `ecomoe.Monitor`. Their sum is

    ``strength * (B * balance + H * entropy + O * oracle) + ortho_weight * ortho
    + divergence_weight * divergence + z_weight * z``,

    and, while an expert gets less than ``usage_floor`` of uniform usage and there is a balance
    loss, a small `ecomoe.losses.starvation_loss`, which brings it back.

    It is neither a router alone nor a whole block: residual, norm and DropPath stay outside.

    Args:
        d_model: Input features D, and output features F unless another argument says otherwise.
        d_hidden: Hidden features of each expert; ``None`` only with ``num_classes`` or
            ``d_output``, where each expert is then one linear map.
        tiers: Experts in each tier; their sum is the number of experts E.
        top_k: Experts per token, from 1 to E.
        target_e: The E to aim at: healthy from 0.5 on, collapse predicted below 0.2.
        oracle_weight: O, the weight of imitating a teacher's choice of experts.
        balance_weight: B, the weight of the balance loss.
        ortho_weight: Weight of the prototypes' orthogonality loss.
        temperature: Fixes T; H then follows from ``target_e``.
        entropy_weight: Fixes H; T then follows from ``target_e``.
        router: ``"linear"`` (D -> E), ``"mlp"`` (the paper's, D -> 128 -> E), ``"cosine"`` (to
            centroids in a small space), ``"cosine_iso"`` (the same with a linear router's number of
            parameters), ``"hash"`` (fixed by token id) or ``"random"`` (a frozen cosine router);
            see docs/routers.md.
        router_options: Arguments of that router's own: ``{"d_space": 64}`` of cosine and random.
        activation: A name (gelu, gelu_tanh, quick_gelu, relu, silu, swish, identity) or a callable.
        gated: Whether experts are gated (``act(gate x) * up x``).
        bias: Whether experts have biases.
        dropout: Probability of dropping a hidden feature of an expert in training.
        output_dropout: Probability of dropping an output feature of the layer in training.
        hidden_norm: A module over the experts' hidden features, before the last projection.
        d_output: Output features F where they differ from ``d_model``.
        oracle: The teacher that O weighs: ``"competence"`` (heads of lowest loss; needs
            ``targets``), ``"dense"`` (expert nearest to the ``dense`` module's output),
            ``"prototype"`` (nearest prototype) or a callable from tokens (N, D) to a distribution
            over experts (N, E). By default competence where experts have heads, else prototype.
        dense: The frozen dense block that ``oracle="dense"`` compares with, (N, D) to (N, D).
        divergence_weight: Weight of the loss that drives apart experts which share a token.
        z_weight: Weight of the router's z-loss.
        strength: Factor on O, B and H together. E does not see it, the outcome does.
        warmup_fraction: Share of training with random routing at the start; 0 for none.
        spread: How far experts differ at the start, from 0 (copies of one, as when a dense block is
            upcycled) to 1 (each drawn for itself). Experts that start alike learn from all tokens
            until they part, and a token that changes its expert loses little.
        num_classes: Makes each expert a classifier with this many outputs.
        device: As for `nn.Linear`.
        dtype: Dtype of the experts. The router is fp32 or wider whatever it is.

    Attributes:
        features_axis: The axis of features in the input and the output.
        usage_floor: Follows from E (`Control.usage_floor`); set it to 0 to let experts die.

    Raises:
        ValueError: An argument breaks its rule; the message names value, rule and remedy.
    """

    features_axis = -1
    temperature: Tensor
    random_routing: Tensor | None

    def __init__(
        self,
        d_model: int,
        d_hidden: int | None = None,
        *,
        tiers: tuple[int, ...] = (8, 4, 4),
        top_k: int = 2,
        target_e: float = 0.545,
        oracle_weight: float = 0.0,
        balance_weight: float = 0.4,
        ortho_weight: float = 0.0,
        temperature: float | None = None,
        entropy_weight: float | None = None,
        router: str = "linear",
        router_options: Mapping[str, Any] | None = None,
        activation: str | Activation = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        output_dropout: float = 0.0,
        hidden_norm: nn.Module | None = None,
        d_output: int | None = None,
        oracle: Oracle | None = None,
        dense: nn.Module | None = None,
        divergence_weight: float = 0.0,
        z_weight: float = 0.0,
        strength: float = 0.01,
        warmup_fraction: float = 0.0,
        spread: float = 0.01,
        num_classes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        tiers = arguments.tier_sizes(tiers)
        arguments.size("d_model", d_model)
        if num_classes is not None:
            arguments.size("num_classes", num_classes)
        if d_hidden is not None or (num_classes is None and d_output is None):
            arguments.size("d_hidden", d_hidden)
        if d_output is not None:
            arguments.size("d_output", d_output)
            if num_classes is not None:
                raise ValueError(
                    f"d_output={d_output} and num_classes={num_classes} both set the output "
                    "features; leave one out"
                )
        arguments.experts_per_token(top_k, num_experts=sum(tiers))
        strength = arguments.number("strength", strength)
        ortho_weight = arguments.number("ortho_weight", ortho_weight)
        divergence_weight = arguments.number("divergence_weight", divergence_weight)
        z_weight = arguments.number("z_weight", z_weight)
        dropout = arguments.number("dropout", dropout, below=1.0)
        output_dropout = arguments.number("output_dropout", output_dropout, below=1.0)
        warmup_fraction = arguments.number("warmup_fraction", warmup_fraction, below=1.0)
        spread = arguments.share("spread", spread)
        arguments.flag("gated", gated)
        arguments.flag("bias", bias)
        if isinstance(activation, type) or not callable(activation):
            arguments.choice("activation", activation, ACTIVATIONS)
        tensor_arguments.module("hidden_norm", hidden_norm)
        tensor_arguments.module("dense", dense)
        tensor_arguments.floating("dtype", dtype)
        tensor_arguments.device("device", device)
        if d_hidden is None and (gated or activation != "gelu" or hidden_norm is not None):
            raise ValueError(
                f"gated={gated}, activation={activation!r} and hidden_norm={hidden_norm!r} have no "
                "effect on linear experts; leave them out, or give d_hidden"
            )

        self.d_model = d_model
        self.d_hidden = d_hidden
        self.num_classes = num_classes
        self.tiers = tiers
        self.num_experts = sum(tiers)
        self.top_k = top_k
        self.control = Control.from_target(
            target_e,
            oracle_weight=oracle_weight,
            balance_weight=balance_weight,
            temperature=temperature,
            entropy_weight=entropy_weight,
        )
        self.strength = strength
        self.usage_floor = self.control.usage_floor
        self.output_dropout = output_dropout
        self.ortho_weight = ortho_weight
        self.divergence_weight = divergence_weight
        self.z_weight = z_weight
        self.warmup_fraction = warmup_fraction
        self.oracle = choose_oracle(
            oracle,
            oracle_weight=self.control.oracle_weight,
            has_heads=num_classes is not None,
            dense=dense,
        )

        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.router = build_router(
            router,
            d_model,
            num_experts=self.num_experts,
            top_k=top_k,
            options=router_options,
            device=device,
            dtype=wide,
        )
        self._ask_router()
        self.experts: Experts
        outputs = num_classes if num_classes is not None else d_output
        every_kind: dict[str, Any] = {
            "num_experts": self.num_experts,
            "bias": bias,
            "dropout": dropout,
            "spread": spread,
            "device": device,
            "dtype": dtype,
        }
        if d_hidden is None:
            assert outputs is not None
            self.experts = HeadExperts(d_model, outputs, **every_kind)
        else:
            self.experts = FFNExperts(
                d_model,
                d_hidden,
                d_output=outputs,
                activation=activation,
                gated=gated,
                norm=hidden_norm,
                **every_kind,
            )
        # Prototypes exist only where a loss trains them: a parameter without a gradient breaks DDP.
        self.prototypes: nn.Parameter | None = None
        if ortho_weight > 0 or self.oracle == "prototype":
            self.prototypes = nn.Parameter(
                torch.empty(self.num_experts, d_model, device=device, dtype=wide)
            )
        self.dense = dense.requires_grad_(False) if dense is not None else None
        # Persistent: a saved model must come back with the temperature its gates were trained at.
        self.register_buffer("temperature", torch.empty((), dtype=torch.float32, device=device))
        self.random_routing = None
        if warmup_fraction > 0:
            del self.random_routing
            self.register_buffer("random_routing", torch.empty((), dtype=torch.bool, device=device))
        self.auxiliary = AuxiliarySlot()
        self.reduce_shares: ShareReducer | None = None
        self._reset_own()

    def reset_parameters(self) -> None:
        """Draw fresh parameters and go back to the start of the schedule.

        What the caller brought (a norm, an activation, a dense block) stays as it is.
        """
        self.router.reset_parameters()
        for module in self.experts.modules():
            if isinstance(module, ExpertLinear):
                module.reset_parameters()
        self._reset_own()

    def _reset_own(self) -> None:
        if self.prototypes is not None:
            nn.init.normal_(self.prototypes, std=self.d_model**-0.5)
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """Set the schedule to a share of training done: anneals T and ends the random warm-up.

        Args:
            progress: Share of all optimizer steps already taken, in [0, 1]; 0 at the start.
        """
        self.temperature.fill_(self.control.temperature_at(progress))
        if self.random_routing is not None:
            self.random_routing.fill_(progress < self.warmup_fraction)

    def forward(self, x: Tensor, *, targets: Tensor | None = None) -> Tensor:
        """Map ``(..., d_model)`` to ``(..., F)``, where F is ``d_model`` unless set otherwise.

        Args:
            x: Tokens of any floating dtype that the experts' weights have (or under autocast).
            targets: Class ids of the tokens, ``(...)``; only the competence teacher reads them.

        Raises:
            ValueError: A shape or dtype does not fit.
        """
        self._check_input(x)
        x_ND = x.reshape(-1, self.d_model)
        # Copies: the schedule writes into the buffers, also while a graph still waits for backward.
        temperature = self.temperature.clone()
        random_routing = self.random_routing if self.training else None
        if random_routing is not None:
            random_routing = random_routing.clone()
        if self.training:
            self._ask_router()
        routing: Routing = self.router(x_ND, temperature, random_routing)
        weights_NK, ids_NK, slots = routing.weights_NK, routing.expert_ids_NK, None
        if self.training and torch.is_grad_enabled():
            y_NKF = None
            if self.divergence_weight > 0:
                y_SF, plan = slots = self._each_slot(x_ND, ids_NK)
                y_NKF = unsort_slots(y_SF, plan, top_k=self.top_k)
            weights_NK = self._leave_losses(x_ND, routing, temperature, y_NKF, targets)
        elif self.training:
            self.auxiliary.settle()
        y_NF = None
        if slots is None and type(self.experts) is FFNExperts:
            y_NF = self.experts.mixture(x_ND, weights_NK, ids_NK)
        if y_NF is None:
            y_SF, plan = slots or self._each_slot(x_ND, ids_NK)
            y_NF = combine(y_SF, weights_NK, plan)
        y_NF = y_NF.to(x.dtype)
        if self.output_dropout:
            y_NF = F.dropout(y_NF, self.output_dropout, self.training)
        return y_NF.view(*x.shape[:-1], self.experts.d_output)

    def _ask_router(self) -> None:
        """Tell the router what the losses need of it; their weights are the caller's to change."""
        # A compiler may take the weights for symbols: it branches on them, but compares no tuples.
        apart = True if self.sustained else False  # noqa: SIM210
        offset = True if self.z_weight > 0 else False  # noqa: SIM210
        router = self.router  # somebody's own may know of neither
        if (
            getattr(router, "scores_apart", None) is not apart
            or getattr(router, "offset_wanted", None) is not offset
        ):
            router.scores_apart, router.offset_wanted = apart, offset

    @property
    def sustained(self) -> bool:
        """Whether there is a starvation loss."""
        return self.usage_floor > 0 and self.strength * self.control.balance_weight > 0

    def _each_slot(self, x_ND: Tensor, ids_NK: Tensor) -> tuple[Tensor, Plan]:
        """Return each slot's output of its expert, and which slot is which."""
        plan = plan_dispatch(ids_NK, num_experts=self.num_experts)
        return self.experts(scatter_to_experts(x_ND, plan, top_k=self.top_k), plan), plan

    def _leave_losses(
        self,
        x_ND: Tensor,
        routing: Routing,
        temperature: Tensor,
        y_NKF: Tensor | None,
        targets: Tensor | None,
    ) -> Tensor:
        """Leave the call's auxiliary loss in the slot; return the gates, which may carry it."""
        weights = self.term_weights()
        loss, terms, share_of_ranks = routing_losses(
            routing,
            temperature=temperature,
            weights=weights,
            floor=self.usage_floor if self.sustained else 0.0,
            sustain=self._sustain(routing.logits_NE.dtype) if self.sustained else 1.0,
            reduce=self.reduce_shares,
        )
        others = other_terms(
            weights,
            x_ND=x_ND,
            routing=routing,
            y_NKF=y_NKF,
            targets=targets,
            oracle=self.oracle,
            experts=self.experts,
            dense=self.dense,
            prototypes_ED=self.prototypes,
        )
        for name, term in others.items():
            part = term * weights[name]
            loss = part if loss is None else loss + part
            terms[name] = term.detach()
        if loss is None:
            return routing.weights_NK
        if self.reduce_shares is not None:
            loss = loss * share_of_ranks
        if x_ND.shape[0] > 0:
            self.auxiliary.terms = terms
        else:
            # Without tokens too: DDP waits for each parameter's gradient.
            loss = loss.nan_to_num() * 0.0
        weights_NK = routing.weights_NK
        if self.prototypes is not None:
            # These losses alone train them: DDP looks from the output on and would not find them.
            weights_NK = weights_NK + 0.0 * self.prototypes.sum()
        return self.auxiliary.leave(weights_NK, loss)

    def _sustain(self, dtype: torch.dtype) -> Tensor | float:
        """Return the share of its full weight that the starvation loss has at this temperature."""
        span = self.control.temperature, self.control.temperature_at(1.0)
        return share_annealed(self.temperature.to(dtype), *span, at_start=SUSTAIN_AT_START)

    def term_weights(self) -> dict[str, float]:
        """Return the factor of each auxiliary loss in the total, by name."""
        return {
            "balance": self.strength * self.control.balance_weight,
            "starvation": STARVATION_WEIGHT,
            "entropy": self.strength * self.control.entropy_weight,
            "oracle": self.strength * self.control.oracle_weight,
            # Reaches the prototypes alone, and nothing else reaches them but ortho: 1 is a choice
            # of their learning rate, no trade-off against another loss.
            "prototype": 1.0,
            "ortho": self.ortho_weight,
            "divergence": self.divergence_weight,
            "z": self.z_weight,
        }

    def _check_input(self, x: Tensor) -> None:
        tensor_arguments.tokens(x, d_model=self.d_model)
        weight = next(self.experts.parameters())
        if x.dtype == weight.dtype:
            return
        if not x.is_floating_point() or autocast_dtype(x) is None:
            raise ValueError(
                f"x has dtype {x.dtype}, the experts have {weight.dtype}; cast one of them, or run "
                "under torch.autocast"
            )

    def __prepare_scriptable__(self) -> EcoMoE:
        raise ValueError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script, which torch has "
            "deprecated; use torch.export.export(model, ...) or torch.compile(model)"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The schedule's temperature and the prototypes are as wide as the router.
        own = keep_wide(fn)
        for module in self.children():
            module._apply(fn)
        super()._apply(own, recurse=False)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Show sizes and the control parameter when printed."""
        control = self.control
        return (
            f"d_model={self.d_model}, d_hidden={self.d_hidden}, tiers={self.tiers}, "
            f"top_k={self.top_k}, E={control.e:.3f} (T={control.temperature:.3g}, "
            f"H={control.entropy_weight:.3g}, O={control.oracle_weight:g}, "
            f"B={control.balance_weight:g}), strength={self.strength:g}"
        )
