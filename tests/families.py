"""Tiny random models of the families of transformers that declare router logits.

One table of sizes fits most; what a family needs beside it stands in `OVERRIDES`.
"""

import importlib
import inspect
import re
from pathlib import Path

import torch

SIZES = {
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "ffn_hidden_size": 24,
    "d_ff": 24,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_hidden_layers": 3,
    "num_layers": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_heads": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "head_dim": 8,
    "d_kv": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "max_seq_len": 64,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "moe_layer_start_index": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
OVERRIDES = {
    "bailing_hybrid": {"layer_group_size": 2},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 4, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "doge": {"is_moe": True, "num_experts": 16},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 24],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    },
    "gemma4": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 64,
    },
    "glm4v_moe": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
        },
    },
    "glm5_next": {"qk_rope_head_dim": 0, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "layer_types": ["mamba", "attention", "attention"],
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mimo_v2_flash": {"head_dim": 24, "num_key_value_heads": 2},
    "mistral4": {"head_dim": 16},
    "nllb_moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "router_jitter_noise": 0.0},
    "qwen3_5_moe": LINEAR_THEN_FULL,
    "qwen3_next": LINEAR_THEN_FULL,
    "qwen4_exp": LINEAR_THEN_FULL
    | {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "step3p7": {"sliding_window": 8, "moe_layers_enum": [1, 2]},
    "switch_transformers": {
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "num_decoder_layers": 2,
        "expert_capacity": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def family_names():
    """Every family whose source declares router logits, in alphabetical order."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    return [
        path.parent.name
        for path in sorted(root.glob("*/modeling_*.py"))
        if re.search(r'"router_logits": *(\[)?OutputRecorder', path.read_text(encoding="utf-8"))
    ]


def model_class(family):
    """The family's text model, or the plainest one that there is."""
    from transformers import PreTrainedModel

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == module.__name__
        and "router_logits" in (getattr(cls, "_can_record_outputs", None) or {})
        and cls.config_class is not None
        and not cls.__name__.lower().endswith("pretrainedmodel")
    ]
    if family in ("switch_transformers", "nllb_moe"):
        prefix = {"switch_transformers": "SwitchTransformers", "nllb_moe": "NllbMoe"}[family]
        return getattr(module, f"{prefix}Model")
    for ending in ("TextModel", "Model", ""):
        for cls in classes:
            if cls.__name__.endswith(ending):
                return cls
    raise LookupError(family)


def tiny_model(family):
    """A tiny random model of the family, in training mode."""
    cls = model_class(family)
    config_class = cls.config_class
    known = {*vars(config_class()), *inspect.signature(config_class).parameters}
    known |= set(getattr(config_class, "__dataclass_fields__", {}))
    settings = {name: value for name, value in SIZES.items() if name in known}
    torch.manual_seed(0)
    model = cls(config_class(**settings | OVERRIDES.get(family, {})))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all() or (parameter == 0).all():
                parameter.normal_(std=0.2)
            elif any(part in name.split(".") for part in ("gate", "router", "classifier")):
                parameter.mul_(20)  # clear choices: no near ties that a recomputation might flip
    return model.train()
