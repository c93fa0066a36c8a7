"""What a model's ``config.json`` says of its feed-forward blocks, as `ecomoe cost` needs it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]

# The names that configurations of transformers give to a size; the first that is there counts.
KEYS = {
    "d_model": ("hidden_size", "n_embd", "d_model", "dim"),
    "d_hidden": (
        "moe_intermediate_size",
        "expert_ffn_hidden_size",
        "intermediate_size",
        "ffn_hidden_size",
        "n_inner",
        "d_ff",
        "decoder_ffn_dim",
    ),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
}
ACTIVATIONS = ("mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function")
# Families name the activation that a second map is multiplied with. Those of SiLU are all gated.
GATES = ("silu", "swish", "swiglu", "geglu")
# Gated with another activation, or without naming one.
GATED_FAMILIES = ("gemma", "diffusion_gemma", "lfm2", "openai_privacy_filter", "modernbert")
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
SHARED_WIDTHS = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "shared_intermediate_size",
    "share_expert_dim",
)
# One shared expert, as wide as the others, beside any experts, without a word in the configuration.
SHARING_FAMILIES = ("llama4", "hunyuan_v1_moe")
# Of the layers without experts, where the experts have a width of their own.
DENSE_WIDTHS = ("dense_intermediate_size", "intermediate_size_mlp", *KEYS["d_hidden"][2:])
# What a list of the layers' kinds calls those without experts.
DENSE_KINDS = ("dense",)


@dataclass(frozen=True)
class ModelConfig:
    """The feed-forward blocks of a model; None where its configuration does not say.

    Attributes:
        d_model: Features of a token.
        d_hidden: Hidden features of an expert, or of the dense block.
        layers: Blocks: those with experts, where the model has experts.
        experts: Routed experts of a block.
        top_k: Routed experts of a token.
        gated: Whether a block multiplies its hidden features with a gate's.
        shared: Hidden features of a block's shared experts, together.
        dense_layers: Layers besides that have a dense block.
        dense_hidden: Hidden features of that block.
    """

    d_model: int | None
    d_hidden: int | None
    layers: int | None
    experts: int | None
    top_k: int | None
    gated: bool
    shared: int = 0
    dense_layers: int = 0
    dense_hidden: int | None = None


def read_config(path: Path) -> ModelConfig:
    """Return what a configuration says; a folder stands for the ``config.json`` in it.

    Raises:
        ValueError: There is no such file, or it is no configuration.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"--config {str(file)!r} does not exist; give a model's config.json, or its folder"
        ) from error
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"--config {str(file)!r} holds no JSON object; give a model's config.json")
    return model_config(config)


def model_config(config: Config) -> ModelConfig:
    """Return what a configuration of transformers, as a mapping, says of its blocks.

    >>> model_config({"hidden_size": 64, "intermediate_size": 96, "hidden_act": "silu"}).gated
    True
    """
    config = {**config, **(config.get("text_config") or {})}
    # DBRX keeps its blocks' settings apart.
    config = {**config, **(config.get("ffn_config") or {})}
    sizes = {name: _first(config, keys) for name, keys in KEYS.items()}
    if sizes["d_hidden"] is None and sizes["d_model"] is not None:
        sizes["d_hidden"] = 4 * sizes["d_model"]  # what transformers does for GPT-2
    dense_layers = 0
    if sizes["experts"] is not None and isinstance(sizes["layers"], int) and sizes["layers"] > 0:
        sparse = _sparse_layers(config, sizes["layers"])
        sizes["layers"], dense_layers = sparse, sizes["layers"] - sparse
    shared = _first(config, SHARED_WIDTHS)
    if shared is None:
        sharing = str(config.get("model_type", "")).startswith(SHARING_FAMILIES)
        number = int(sharing and sizes["experts"] is not None)
        shared = (_first(config, SHARED) or number) * (sizes["d_hidden"] or 0)
    return ModelConfig(
        **sizes,
        gated=_is_gated(config),
        shared=shared,
        dense_layers=dense_layers,
        dense_hidden=_first(config, DENSE_WIDTHS) or sizes["d_hidden"],
    )


def _first(config: Config, keys: tuple[str, ...]) -> Any:
    """Return the first number under one of the keys; what takes it refuses what is no int."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value:  # for each modality: text comes first
            value = value[0]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    return None


def _is_gated(config: Config) -> bool:
    """Return whether the blocks are gated, by the family and by the activation's name."""
    if str(config.get("model_type", "")).startswith(GATED_FAMILIES):
        return True
    if config.get("is_gated_act") or str(config.get("feed_forward_proj")).startswith("gated"):
        return True
    named = [config[key] for key in ACTIVATIONS if config.get(key)]
    if "ffn_act_fn" in config:
        named.insert(0, (config["ffn_act_fn"] or {}).get("name"))
    return bool(named) and str(named[0]).lower() in GATES


def _sparse_layers(config: Config, layers: int) -> int:
    """Return how many layers have experts, by the ways in which families say so."""
    kinds = config.get("mlp_layer_types")
    if kinds:
        return sum(kind not in DENSE_KINDS for kind in kinds)
    if config.get("moe_layers"):  # Llama 4: the layers with experts
        return len(config["moe_layers"])
    each = config.get("moe_layer_freq") or 1
    if isinstance(each, list):
        return sum(map(bool, each))
    step, offset = config.get("decoder_sparse_step") or 1, 1
    if config.get("expert_layer_period"):  # Jamba
        step = config["expert_layer_period"]
        offset = step - config.get("expert_layer_offset", 0)
    if config.get("interleave_moe_layer_step"):
        step = config["interleave_moe_layer_step"]
    first = config.get("first_k_dense_replace") or config.get("num_dense_layers") or 0
    last = layers - 1
    if config.get("moe_layer_start_index") is not None:  # ERNIE 4.5
        first, step = config["moe_layer_start_index"], config.get("moe_layer_interval") or 1
        end = config.get("moe_layer_end_index", -1)
        last = end if end >= 0 else last
    dense = set(config.get("mlp_only_layers") or ())
    return sum(
        first <= layer <= last
        and layer not in dense
        and layer % each == 0
        and (layer + offset) % step == 0
        for layer in range(layers)
    )
