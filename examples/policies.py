"""Ways to keep experts in use: this package's defaults and what it is compared with.

The peers differ from the layer only in what their authors changed: router, selection, loss.

Axes: N tokens, D features, E experts, K choices.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import ecomoe
from ecomoe import EcoMoE
from ecomoe.losses import expert_shares
from ecomoe.routers import LinearRouter
from ecomoe.routing import Routing
from ecomoe.schedule import Schedule


class Policy:
    """The package's defaults. Subclasses are the peers.

    Attributes:
        name: As in the table.
        sparse: Whether the model has experts at all.
        layer_options: Arguments of `EcoMoE` and `ecomoe.convert` beside the sizes.
    """

    name = "ecomoe"
    sparse = True
    layer_options: ClassVar[dict[str, Any]] = {}

    def prepare(self, model: nn.Module, *, total_steps: int) -> None:
        """Take hold of a fresh model."""
        self.model = model
        self.schedule = Schedule(model, total_steps=total_steps)
        self.total_steps = total_steps

    def before_step(self, progress: float) -> None:
        """Call before each step with the share of the training done."""
        self.schedule.advance(round(progress * self.total_steps))

    def extra_loss(self) -> Tensor | float:
        """Return what is added to the task's loss of the last forward pass."""
        return ecomoe.aux_loss(self.model)

    def after_step(self) -> None:
        """Call after each optimizer step."""


class Unbalanced(Policy):
    """A plain mixture: linear router, gates at temperature 1, nothing that balances."""

    name = "none"
    layer_options: ClassVar[dict[str, Any]] = {"strength": 0.0, "router": "linear"}

    def prepare(self, model: nn.Module, *, total_steps: int) -> None:
        self.model = model
        self.layers = [module for module in model.modules() if isinstance(module, EcoMoE)]
        for layer in self.layers:
            layer.temperature.fill_(1.0)

    def before_step(self, progress: float) -> None:
        return

    def extra_loss(self) -> Tensor | float:
        return 0.0


class SwitchLoss(Unbalanced):
    """The Switch Transformer's auxiliary loss, ``E sum(f P)`` a layer (Fedus et al. 2022).

    f is the share of slots, P the mean probability; its weight there is 0.01.
    """

    name = "switch"
    weight = 0.01

    def prepare(self, model: nn.Module, *, total_steps: int) -> None:
        super().prepare(model, total_steps=total_steps)
        self._losses: list[Tensor] = []
        for layer in self.layers:
            layer.router.register_forward_hook(self._read)

    def _read(self, module: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        probs_NE = torch.softmax(routing.logits_NE, dim=-1)
        num_experts = probs_NE.shape[-1]
        share_E = expert_shares(
            routing.expert_ids_NK, num_experts=num_experts, dtype=probs_NE.dtype
        )
        self._losses.append(num_experts * (share_E * probs_NE.mean(0)).sum())

    def extra_loss(self) -> Tensor | float:
        taken, self._losses = self._losses, []
        return self.weight * torch.stack(taken).sum()


class BiasedRouter(LinearRouter):
    """Chooses by score plus a bias that follows the load, weighs by the score (Wang et al. 2024).

    Scores are sigmoids, as there, so that the bias is on their scale.
    """

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, d_model: int, *, num_experts: int, top_k: int) -> None:
        super().__init__(d_model, num_experts=num_experts, top_k=top_k)
        self.register_buffer("bias_E", torch.zeros(num_experts))
        self.register_buffer("load_E", torch.zeros(num_experts))

    def forward(
        self, x_ND: Tensor, temperature: Tensor, random_routing: Tensor | None = None
    ) -> Routing:
        logits_NE = self.logits(x_ND.float())
        scores_NE = logits_NE.sigmoid()
        ids_NK = (scores_NE + self.bias_E).topk(self.top_k, dim=-1).indices
        chosen_NK = scores_NE.gather(-1, ids_NK)
        if self.training:
            self.load_E += expert_shares(
                ids_NK, num_experts=self.num_experts, dtype=self.load_E.dtype
            )
        weights_NK = chosen_NK / chosen_NK.sum(-1, keepdim=True)
        return Routing(logits_NE, torch.softmax(logits_NE, dim=-1), ids_NK, weights_NK)

    def follow_load(self, rate: float) -> None:
        """Move each bias by ``rate`` towards an even load, and forget the load."""
        self.bias_E += rate * (self.load_E.mean() - self.load_E).sign()
        self.load_E.zero_()


class LossFree(Unbalanced):
    """DeepSeek's balancing without a loss: a bias that moves by 0.001 a step."""

    name = "bias"
    rate = 0.001

    def prepare(self, model: nn.Module, *, total_steps: int) -> None:
        super().prepare(model, total_steps=total_steps)
        for layer in self.layers:
            layer.router = BiasedRouter(
                layer.d_model, num_experts=layer.num_experts, top_k=layer.top_k
            )

    def after_step(self) -> None:
        for layer in self.layers:
            layer.router.follow_load(self.rate)


class Dense(Unbalanced):
    """No experts: one feed-forward block of equal active FLOPs."""

    name = "dense"
    sparse = False


POLICIES = {policy.name: policy for policy in (Policy, SwitchLoss, LossFree, Unbalanced, Dense)}
