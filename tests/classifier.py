"""A small model with two mixtures, for tests of what happens around a layer."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ecomoe import EcoMoE

EVERY_LOSS = {
    "oracle_weight": 0.5,
    "ortho_weight": 0.4,
    "divergence_weight": 0.3,
    "z_weight": 0.02,
    "strength": 1.0,
}


class Classifier(nn.Module):
    """Two layers in a row, each called on its tokens in ``num_calls`` chunks of growing size."""

    def __init__(self, *, checkpointing=None, num_calls=1, **keywords):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 8)
        self.moes = nn.ModuleList(EcoMoE(8, 5, tiers=(2, 2), **keywords) for _ in range(2))
        self.head = nn.Linear(8, 3)
        self.checkpointing = checkpointing
        self.num_calls = num_calls
        self.double()

    def forward(self, x):
        x = self.embed(x)
        for moe in self.moes:
            if self.checkpointing is None:
                x = x + self.call(moe, x)
            else:
                x = x + checkpoint(self.call, moe, x, use_reentrant=self.checkpointing)
        return self.head(x)

    def call(self, moe, x):
        sizes = [1] * (self.num_calls - 1)
        return torch.cat([moe(part) for part in x.split([*sizes, len(x) - sum(sizes)])])


def batch(seed=0, num_tokens=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (num_tokens,), generator=generator)
