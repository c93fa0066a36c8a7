"""Small dense models to convert."""

import timm
import torch
import transformers
from torch import nn


class Block(nn.Module):
    """A residual block around any FFN."""

    def __init__(self, mlp, depth=1):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"mlp": mlp()}) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = x + block["mlp"](x)
        return x


def vit(**kwargs):
    settings = dict(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    return timm.models.VisionTransformer(**{**settings, **kwargs})


def gpt2(**kwargs):
    settings = dict(n_layer=3, n_embd=32, n_head=2, vocab_size=64, n_positions=32)
    tokens = dict(bos_token_id=0, eos_token_id=0)
    config = transformers.GPT2Config(**{**settings, **tokens, **kwargs})
    return transformers.GPT2LMHeadModel(config)


def jittered(module):
    """Move every parameter off its initial value, so that zero biases hide no mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def relative_error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def snapshot(model):
    return {name: (id(module), module.training) for name, module in model.named_modules()}
