"""Models whose blocks run in unusual ways, and what hooks they carry."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Block", "Late", "Model", "count_hooks", "late", "plain"]


class Block(nn.Module):
    """A residual MLP; with ``experts`` a token stream goes to one of two by its length."""

    def __init__(self, experts=False, autocast=False):
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2 if experts else 1))
        self.down = nn.Linear(32, 16)
        self.autocast = autocast

    def forward(self, x):
        h = torch.relu(self.up(x))
        h = torch.relu(self.experts[x.shape[1] % len(self.experts)](h))
        if self.autocast:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x + self.down(h).float()
        return x + self.down(h)


class Model(nn.Module):
    def __init__(self, blocks, **kwargs):
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(Block(**kwargs) for _ in range(blocks))

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def plain(seed=0, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model(2, **kwargs)


class Late(Model):
    """Enters autocast only for long inputs, which the short probe does not show."""

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        x = self.layers[0](x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=input_ids.shape[1] > 16):
            return self.layers[1](x)


def late():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Late(2)


def count_hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
