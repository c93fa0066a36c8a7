"""Experts computed by the kernels that transformers has for its own mixtures.

Its back ends (`ExpertsInterface`) are functions of an experts module, tokens, chosen experts and
gates. The stacked weights have the same layout here, so such a function gets them as they are.

Axes: N tokens, K experts chosen for a token, D input features, F output features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecomoe.experts import FFNExperts
from ecomoe.moe import EcoMoE

# Back ends that have no gradient: with one asked for, the layer computes by itself.
WITHOUT_GRADIENT = ("deepgemm",)


@dataclass(frozen=True)
class Delegate:
    """A back end by its name, so that a layer which has one can be copied and pickled."""

    name: str

    def __call__(
        self, experts: FFNExperts, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor
    ) -> Tensor | None:
        """Return each token's gate-weighted sum ``(N, F)``; ``None`` where it cannot compute it."""
        if x_ND.shape[0] == 0 or experts.norm is not None:
            return None
        if self.name in WITHOUT_GRADIENT and torch.is_grad_enabled():
            return None
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        forward = ALL_EXPERTS_FUNCTIONS[self.name]
        module = _Experts(experts, x_ND)
        y_NF: Tensor = forward(module, x_ND.to(module.down_proj.dtype), expert_ids_NK, weights_NK)
        return y_NF


def set_experts_implementation(model: nn.Module, name: str | None) -> int:
    """Let one of transformers' back ends compute the experts of a model's EcoMoE layers.

    Routing, losses and what a monitor sees are unchanged. Where the back end cannot serve (no
    tokens, dropout in training, a hook on the experts, gradients with ``deepgemm``), the layer
    computes by itself, as it does without one. Weights do not depend on it, and it is not saved
    with them.

    Args:
        model: Any module that contains EcoMoE layers.
        name: ``"grouped_mm"``, ``"batched_mm"``, ``"sonicmoe"``, ``"deepgemm"`` or another name in
            transformers' `ExpertsInterface`; ``None`` for the layer's own way.

    Returns:
        How many layers compute so from now on.

    Raises:
        ValueError: The name is unknown, its kernel cannot be loaded here, or a layer has what it
            does not support. Nothing was changed.
    """
    layers = {
        path: module.experts
        for path, module in (model.named_modules() if isinstance(model, nn.Module) else ())
        if isinstance(module, EcoMoE) and type(module.experts) is FFNExperts
    }
    if not layers:
        raise ValueError(
            f"model={type(model).__name__} holds no EcoMoE layer with feed-forward experts on one "
            "device, so no back end can compute them; convert it first with "
            "ecomoe.convert(model, ...)"
        )
    if name is not None:
        _check_loadable(name)
        for path, experts in layers.items():
            _check_supported(name, path, experts)
    for experts in layers.values():
        experts.delegate = None if name is None else Delegate(name)
    return len(layers)


def _check_loadable(name: str) -> None:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ValueError(
            f"name={name!r} asks for a back end of transformers, which is not installed or too old "
            f"({error}); install ecomoe[hf]"
        ) from error
    known = sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())
    if name not in known:
        raise ValueError(
            f"name={name!r} must be None or one of {', '.join(known)}; others can be added to "
            "transformers' ExpertsInterface"
        )
    try:
        if name == "sonicmoe":
            from transformers.integrations.sonicmoe import is_sonicmoe_loadable

            is_sonicmoe_loadable(raise_error=True)
        elif name == "deepgemm":
            from transformers.integrations.deepgemm import is_deepgemm_loadable

            is_deepgemm_loadable(raise_error=True)
    except ImportError as error:
        raise ValueError(
            f"name={name!r} cannot be loaded here: {str(error).rstrip('.')}; pass None for the "
            "layer's own way"
        ) from error


def _check_supported(name: str, path: str, experts: FFNExperts) -> None:
    where = f"the experts of {path or 'the layer'}"
    if experts.norm is not None:
        raise ValueError(
            f"{where} have a norm over their hidden features, which name={name!r} does not "
            "compute; pass None"
        )
    if name == "sonicmoe":
        from transformers.integrations.sonicmoe import ACT_MAP

        activation = experts.activation_name()
        if not experts.gated or activation not in ACT_MAP:
            raise ValueError(
                f"{where} have gated={experts.gated} and activation={activation or 'their own'}; "
                f"name='sonicmoe' computes gated ones with {', '.join(sorted(ACT_MAP))} alone: "
                "pass another name, or None"
            )


@dataclass(frozen=True)
class _Config:
    hidden_act: str | None


class _Experts:
    """What a back end reads of an experts module of transformers; tensors by their names there."""

    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True
    _is_expert_parallel = False

    def __init__(self, experts: FFNExperts, x_ND: Tensor) -> None:
        first, down = experts.projections()
        weight_EGD, bias_EG = first.cast_operands(x_ND)
        self.num_experts = experts.num_experts
        self.has_gate = experts.gated
        self.has_bias = bias_EG is not None
        self.act_fn = experts.activation
        self.config = _Config(experts.activation_name())
        if experts.gated:
            self.gate_up_proj, self.gate_up_proj_bias = weight_EGD, bias_EG
        else:
            self.up_proj, self.up_proj_bias = weight_EGD, bias_EG
        self.down_proj, self.down_proj_bias = down.cast_operands(x_ND)

    def _apply_gate(self, pre_SG: Tensor) -> Tensor:
        gate_SH, up_SH = pre_SG.chunk(2, dim=-1)
        return self.act_fn(gate_SH) * up_SH
