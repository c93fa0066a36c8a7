"""The two architectures of the paper, at any size, and a small ViT built of the same blocks.

Axes: B samples, L positions, D features, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecomoe import EcoMoE

Build = Callable[[int], nn.Module]


class Residual(nn.Module):
    """Pre-activation block of two 3 x 3 convolutions (Zagoruyko and Komodakis 2016)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        carried = x if self.shortcut is None else self.shortcut(active)
        return carried + self.conv2(F.relu(self.norm2(self.conv1(active))))


class WideResNet(nn.Module):
    """Wide residual network that ends in ``features`` features: WRN-depth-widen.

    Args:
        depth: Layers, 6 n + 4; the paper's is 28.
        widen: Factor on the three groups' 16, 32 and 64 channels; the paper's is 10.
        channels: Colours of the images.
        stem: Channels of the first convolution.
        features: Output features; the paper's are 256.
    """

    def __init__(
        self, *, depth: int, widen: int, channels: int = 3, stem: int = 16, features: int = 256
    ) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth={depth} must be 6 n + 4; pass 10, 16, 22, 28, ...")
        widths = [stem, *(stem * widen * 2**group for group in range(3))]
        layers: list[nn.Module] = [nn.Conv2d(channels, stem, 3, padding=1, bias=False)]
        for group in range(3):
            for index in range((depth - 4) // 6):
                inputs = widths[group] if index == 0 else widths[group + 1]
                stride = 2 if index == 0 and group > 0 else 1
                layers.append(Residual(inputs, widths[group + 1], stride=stride))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.project = nn.Linear(widths[-1], features)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(B, C, height, width)`` to ``(B, features)``."""
        pooled = F.relu(self.norm(self.layers(images))).mean((-2, -1))
        return F.relu(self.project(pooled))


class Classifier(nn.Module):
    """An encoder whose features go to a mixture of expert heads, or to any other head."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return class logits; the labels reach only a competence teacher, in training."""
        features = self.encoder(images)
        if isinstance(self.head, EcoMoE) and self.training:
            return self.head(features, targets=targets)
        return self.head(features)


def rotate(x: Tensor) -> Tensor:
    """Rotate each pair of features by an angle that grows with the position (RoPE).

    Args:
        x: ``(..., L, D)`` with an even D; features i and i + D/2 are a pair.
    """
    length, features = x.shape[-2:]
    rates = 10_000.0 ** (-torch.arange(0, features, 2, device=x.device) / features)
    angles = torch.arange(length, device=x.device)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention; causal and rotary for text, neither for images."""

    def __init__(self, width: int, *, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if self.causal:
            query, key = rotate(query), rotate(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm transformer block around any feed-forward module."""

    def __init__(self, width: int, *, heads: int, causal: bool, ffn: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads=heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class GPT(nn.Module):
    """GPT-2-style language model with RoPE; ``build_ffn(width)`` gives each block's FFN."""

    def __init__(
        self, *, vocabulary: int, layers: int, width: int, heads: int, build_ffn: Build
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(
            *(Block(width, heads=heads, causal=True, ffn=build_ffn(width)) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Map ids ``(B, L)`` to logits of the next id, ``(B, L, vocabulary)``."""
        hidden = self.norm(self.blocks(self.embed(ids)))
        return hidden @ self.embed.weight.T


class ViT(nn.Module):
    """Small vision transformer; ``build_ffn(width)`` gives each block's FFN."""

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        patch: int,
        classes: int,
        layers: int,
        width: int,
        heads: int,
        build_ffn: Build,
    ) -> None:
        super().__init__()
        channels, height, across = shape
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        count = (height // patch) * (across // patch)
        self.positions = nn.Parameter(torch.randn(1, count, width) * 0.02)
        self.blocks = nn.Sequential(
            *(Block(width, heads=heads, causal=False, ffn=build_ffn(width)) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """Map ``(B, C, height, width)`` to class logits."""
        tokens = self.patches(images).flatten(2).mT + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def dense_ffn(width: int, hidden: int) -> nn.Module:
    """Return the dense twin of an expert."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
