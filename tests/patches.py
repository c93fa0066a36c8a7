"""A small model over patches and its training, for tests of the monitor."""

import torch
from torch import nn
from torch.nn import functional as F

import ecomoe

STEPS = 12


class Classifier(nn.Module):
    def __init__(self, num_classes=None):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.moe = ecomoe.EcoMoE(8, 16, tiers=(2, 2), num_classes=num_classes)
        self.head = nn.Identity() if num_classes else nn.Linear(8, 3)

    def forward(self, x):
        """Patches (B, P, 6) to logits of the sample, their mean."""
        return self.head(self.moe(self.embed(x))).mean(1)


def batches(num=STEPS):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        x = torch.randn(8, 5, 6, generator=generator)
        yield x, x.sum((1, 2)).gt(0).long()


def make(**options):
    torch.manual_seed(0)
    model = Classifier(**options)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model, optimizer, monitor=None):
    for step, (x, y) in enumerate(batches()):
        loss = F.cross_entropy(model(x), y) + ecomoe.aux_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 4 == 3:
            model.eval()
            with torch.no_grad():
                for x, y in batches(2):
                    outputs = model(x)
                    if monitor is not None:
                        monitor.evaluate(outputs=outputs, targets=y)
            model.train()


def watched(**settings):
    model, optimizer = make()
    with ecomoe.Monitor(model, optimizer=optimizer, total_steps=STEPS, **settings) as monitor:
        train(model, optimizer, monitor)
    return model, monitor
