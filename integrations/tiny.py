"""Tiny random models of transformers' families, built from configurations: nothing is downloaded.

For tests and for the census: two layers, 32 features, and inputs that fit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# What a configuration's attribute of this name becomes.
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ["hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim"], 32
    ),
    **dict.fromkeys(["text_embed_dim", "word_embed_proj_dim", "projection_dim"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["num_encoder_layers", "encoder_num_hidden_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "d_inner", "dff"], 64),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "dim_ff"], 64),
    **dict.fromkeys(["head_dim", "d_kv", "d_head", "dim_head", "rotary_dim"], 8),
    "vocab_size": 128,
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx"], 128),
    **dict.fromkeys(["max_source_positions", "max_target_positions", "seq_length"], 64),
    "image_size": 32,
    "patch_size": 8,
    **dict.fromkeys(["pad_token_id", "eos_token_id"], 0),
    **dict.fromkeys(["bos_token_id", "decoder_start_token_id"], 1),
}

# Families whose parts must fit together in a way that the table above does not know; None leaves an
# attribute as it is.
_TWO_STAGES: dict[str, Any] = {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 16}
_PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "mlp_ratios": [2, 2],
}
FITTING: dict[str, dict[str, Any]] = {
    "convnext": {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "patch_size": 4},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "dinov3_convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": 64},
    "donut-swin": {**_TWO_STAGES, "patch_size": 4, "window_size": 2},
    "funnel": {
        "architectures": ["FunnelModel"],  # the Auto class fails on a family of two without a name
        "block_sizes": [1, 1],
        "block_repeats": [1, 1],
        "num_hidden_layers": None,
        "num_decoder_layers": 1,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "lilt": {"hidden_size": 48},
    "glpn": {**_PYRAMID, "decoder_hidden_size": 16},
    "maskformer-swin": {**_TWO_STAGES, "patch_size": 4, "window_size": 2},
    "pvt": {
        **_PYRAMID,
        "num_encoder_blocks": 4,
        "patch_sizes": [4, 2, 2, 2],
        "strides": [4, 2, 2, 2],
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [16, 16, 16, 32],
        "num_attention_heads": [1, 1, 1, 2],
        "sequence_reduction_ratios": [2, 1, 1, 1],
        "mlp_ratios": [2, 2, 2, 2],
        "image_size": 64,
    },
    "mobilevitv2": {"patch_size": 2, "image_size": 64},
    "segformer": _PYRAMID,
    "swin": {**_TWO_STAGES, "patch_size": 4, "window_size": 2},
    "swin2sr": {**_TWO_STAGES, "window_size": 4},
    "swinv2": {**_TWO_STAGES, "patch_size": 4, "window_size": 2},
    "timesformer": {"num_frames": 2},
    "videomae": {"num_frames": 2, "tubelet_size": 1},
    "vivit": {"num_frames": 2, "tubelet_size": [1, 8, 8]},
    "xlnet": {"n_layer": 2},
    "yolos": {"image_size": [32, 32], "num_detection_tokens": 4},
}


# Families that the tables above are known to fit.
_FITTED = """
    afmoe aimv2 aimv2_vision_model albert altclip apertus arcee audio-spectrogram-transformer
    bart beit bert bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot
    blenderbot-small blip bloom camembert chinese_clip chinese_clip_vision_model clip
    clip_text_model clip_vision_model clipseg codegen cohere cohere2 convbert convnext cpmant
    ctrl cwm data2vec-audio data2vec-text data2vec-vision deberta deberta-v2 deepseek_v3 deit
    diffllama dinov2 dinov2_with_registers dinov3_convnext dinov3_vit distilbert doge donut-swin
    dpr dpt electra ernie ernie4_5 ernie4_5_moe esm eurobert exaone4 exaone_moe falcon flaubert
    flava flint fnet focalnet fsmt funnel gemma gemma2 gemma3_text git glm glm4 glm4_moe
    glm4_moe_lite glpn gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj granite
    granite_docling_text granite_swa groupvit gte helium higgs_audio_v2 hrm_text hubert
    hunyuan_v1_dense hy_v3 hyperclovax ijepa imagegpt internlm3 internvl_vision iquestcoder
    jais2 jina_embeddings_v3 laguna layoutlm led lfm2 lilt llama longformer longt5 m2m_100
    marian markuplm maskformer-swin mbart megatron-bert metaclip_2 ministral ministral3 mistral
    mlcd mlcd_vision_model mobilebert mobilevit mobilevitv2 modernbert modernbert-decoder
    molmo2_text moonshine moss_transcribe_diarize_audio mpnet mpt mra mt5 muse_glimmer_text mvp
    nanochat nemotron nllb-moe nomic_bert nystromformer olmo olmo2 olmo3 openai-gpt opt owlv2
    owlvit pegasus pegasus_x persimmon phi phi3 pixio pixtral plbart prophetnet pvt pvt_v2
    qianfan_ocr_vision qwen2 qwen2_audio_encoder qwen3 qwen3_vl_text radio rembert roberta
    roberta-prelayernorm roc_bert roformer sam_hq_vision_model sam_vision_model sapiens2
    seed_oss segformer sew sew-d siglip siglip_vision_model smollm3 speech_to_text splinter
    stablelm starcoder2 swiftformer swin swinv2 switch_transformers t5 t5gemma tapas timesformer
    tipsv2 tipsv2_text_model tipsv2_vision_model ultrabert umt5 unispeech unispeech-sat
    vaultgemma videomae vilt vision-text-dual-encoder visual_bert vit vit_mae vit_msn vitdet
    vivit voxtral_encoder wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm whisper xglm xlm
    xlm-roberta xlm-roberta-xl xlnet yolos yoso
"""
FAMILIES = tuple(_FITTED.split())


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Return a small configuration of a family, its parts included.

    Args:
        model_type: The family, as in ``config.model_type``.
        **overrides: Attributes of the configuration.
    """
    from transformers import CONFIG_MAPPING

    return _shrink(CONFIG_MAPPING[model_type], {**FITTING.get(model_type, {}), **overrides})


def _shrink(cls: type[Any], overrides: dict[str, Any]) -> Any:
    default = cls()
    aliases = getattr(default, "attribute_map", {})
    small = {
        name: _like(getattr(default, name), value)
        for name, value in SMALL.items()
        if hasattr(default, name) and name not in aliases and not _is_computed(cls, name)
    }
    for name in getattr(cls, "sub_configs", {}):
        value = getattr(default, name, None)
        if value is not None and hasattr(type(value), "sub_configs"):
            small[name] = _shrink(type(value), overrides.pop(name, {}))
    layers = small.get("num_hidden_layers")
    for name in ("layer_types", "mlp_layer_types"):
        types = getattr(default, name, None)
        if types and layers and name not in aliases and not _is_computed(cls, name):
            small[name] = types[:layers]
    chosen = {**small, **overrides}
    return cls(**{name: value for name, value in chosen.items() if value is not None})


def _is_computed(cls: type[Any], name: str) -> bool:
    return isinstance(getattr(cls, name, None), property)


def _like(default: Any, value: Any) -> Any:
    """Repeat a value where the default is a list, one entry a stage."""
    return type(default)([value] * len(default)) if isinstance(default, (list, tuple)) else value


def tiny_model(model_type: str, *, auto: str = "AutoModel", **overrides: Any) -> nn.Module:
    """Build a random model of a family.

    Args:
        model_type: The family, as in ``config.model_type``.
        auto: The name of transformers' automatic class that builds it.
        **overrides: Attributes of the configuration.
    """
    import transformers

    config = tiny_config(model_type, **overrides)
    model: nn.Module = getattr(transformers, auto).from_config(config)
    return model


def inputs_for(model: Any, *, batch: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Return inputs that a tiny model takes, from its ``main_input_name`` and configuration."""
    config = model.config
    vision = getattr(config, "vision_config", config)
    text = getattr(config, "text_config", config)
    accepted = inspect.signature(model.forward).parameters
    made: dict[str, Callable[[], torch.Tensor]] = {
        "input_ids": lambda: torch.randint(3, text.vocab_size - 3, (batch, length)),
        "decoder_input_ids": lambda: torch.randint(3, text.vocab_size - 3, (batch, length)),
        "pixel_values": lambda: torch.randn(
            batch,
            *([vision.num_frames] if hasattr(vision, "num_frames") else []),
            getattr(vision, "num_channels", 3),
            *_pair(getattr(vision, "image_size", 32)),
        ),
        "input_values": lambda: torch.randn(
            batch, *([config.max_length, config.num_mel_bins] if spectra else [4000])
        ),
        "input_features": lambda: torch.randn(batch, *_features(config)),
        "bbox": lambda: torch.randint(0, 100, (batch, length, 4)).sort(-1).values,
    }
    spectra = hasattr(config, "num_mel_bins")
    wanted = [getattr(model, "main_input_name", "input_ids")]
    if getattr(config, "is_encoder_decoder", False):
        wanted.append("decoder_input_ids")
    if "bbox" in accepted:
        wanted.append("bbox")
    if "pixel_values" in accepted and "input_ids" in accepted:
        wanted += ["pixel_values", "input_ids"]
    return {name: made[name]() for name in dict.fromkeys(wanted) if name in accepted}


def _features(config: Any) -> tuple[int, int]:
    if hasattr(config, "feature_projection_input_dim"):  # frames first
        return 24, config.feature_projection_input_dim
    if hasattr(config, "input_feat_per_channel"):
        return 24, config.input_feat_per_channel
    return config.num_mel_bins, 2 * config.max_source_positions


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)
