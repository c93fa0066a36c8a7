"""What is read of a model's configuration is what the model that is built of it has."""

import pytest
import torch

from ecomoe.model_config import model_config


def test_a_dense_model_says_whether_its_blocks_are_gated():
    llama = {"model_type": "llama", "hidden_size": 64, "hidden_act": "silu"}
    found = model_config({**llama, "intermediate_size": 96, "num_hidden_layers": 3})
    assert (found.gated, found.d_hidden, found.layers, found.experts) == (True, 96, 3, None)
    assert not model_config({"model_type": "gpt2", "activation_function": "gelu_new"}).gated
    assert model_config({"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh"}).gated
    assert model_config({"feed_forward_proj": "gated-gelu"}).gated
    assert not model_config({"feed_forward_proj": "relu"}).gated
    assert not model_config({"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu"}).gated


@pytest.mark.parametrize(
    ("said", "sparse"),
    [
        ({}, 8),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, 3),
        ({"expert_layer_period": 4, "expert_layer_offset": 1}, 2),
        ({"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 5}, 5),
        ({"first_k_dense_replace": 2, "moe_layer_freq": 3}, 2),
        ({"moe_layer_freq": [0] * 7 + [1]}, 1),
        ({"moe_layers": [1, 3]}, 2),
        ({"interleave_moe_layer_step": 2}, 4),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 6, "moe_layer_interval": 2}, 3),
    ],
)
def test_layers_without_experts_are_counted_apart(said, sparse):
    found = model_config({"num_hidden_layers": 8, "num_experts": 4, **said})
    assert (found.layers, found.dense_layers) == (sparse, 8 - sparse)


@pytest.mark.parametrize(
    ("said", "width"),
    [
        ({"intermediate_size": 96, "moe_intermediate_size": 32}, 96),  # DeepSeek
        ({"intermediate_size": 32, "intermediate_size_mlp": 96}, 96),  # Llama 4
        ({"intermediate_size": 32, "dense_intermediate_size": 96}, 96),  # MiniMax
        ({"intermediate_size": 32}, 32),  # Jamba
        ({"moe_intermediate_size": 32}, 32),
    ],
)
def test_dense_layers_have_a_width_of_their_own(said, width):
    found = model_config({"num_hidden_layers": 8, "num_experts": 4, "moe_layers": [1, 3], **said})
    assert (found.d_hidden, found.dense_hidden) == (32, width)


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "deepseek_v3", "ernie4_5_moe", "jamba", "qwen2_moe"]
)
def test_models_of_transformers_have_what_is_read(family):
    families = pytest.importorskip("tests.families")
    model = families.tiny_model(family)
    blocks = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    blocks = [block for block in blocks if getattr(block.gate_up_proj, "ndim", 0) == 3]
    num_experts, twice_hidden, d_model = blocks[0].gate_up_proj.shape
    found = model_config(model.config.to_dict())
    assert (found.d_model, 2 * found.d_hidden, found.experts, found.layers, found.gated) == (
        d_model,
        twice_hidden,
        num_experts,
        len(blocks),
        True,
    )


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama4_text", {}),
        ("hunyuan_v1_moe", {"num_experts": 4, "head_dim": 16}),
        ("qwen2_moe", {"shared_expert_intermediate_size": 48}),
        ("deepseek_v3", {"moe_intermediate_size": 24, "n_shared_experts": 2}),
    ],
)
def test_shared_experts_are_as_wide_as_the_model_s(family, sizes):
    transformers = pytest.importorskip("transformers")
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 8, **sizes}
    config = transformers.CONFIG_MAPPING[family](**sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shared = [
        module
        for name, module in model.named_modules()
        if name.endswith(("shared_expert", "shared_experts", "shared_mlp"))
    ]
    assert model_config(config.to_dict()).shared == shared[0].down_proj.in_features


def test_a_family_that_shares_where_it_has_experts_shares_none_where_it_has_not():
    said = {"model_type": "llama4_text", "hidden_size": 64, "intermediate_size": 32}
    assert model_config(said).shared == 0
    assert model_config({**said, "num_local_experts": 4}).shared == 32
    assert model_config({"num_experts": 4, "share_expert_dim": 40}).shared == 40  # Step
