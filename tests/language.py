"""A tiny GPT-2 with EcoMoE layers, and padded sequences for it."""

import torch

import ecomoe

LENGTH, REAL, SIZE = 16, 10, 48


def make_model(num_labels=None):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=SIZE, n_positions=LENGTH, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    for block in model.transformer.h:
        block.mlp = ecomoe.EcoMoE(16, 32, tiers=(2, 2))
    return model


def make_data(num=32):
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(num):
        ids = torch.randint(1, SIZE, (LENGTH,), generator=generator)
        mask = torch.arange(LENGTH) < REAL
        labels = torch.where(mask, ids, -100)
        data.append({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})
    return data
