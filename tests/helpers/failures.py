"""Things that fail on purpose: a layer's target, a module in its n-th call."""

from __future__ import annotations

import contextlib

import torch

import ptqkit
from ptqkit.hf.quantization import solve


def fail_target(monkeypatch, part):
    """Let the corrected weights of layers whose name holds ``part`` fail."""
    inner = ptqkit.target_weights

    def fail(*args, name=None, **options):
        if part in name:
            raise ValueError(f"{name}: on purpose")
        return inner(*args, name=name, **options)

    monkeypatch.setattr(solve, "target_weights", fail)


@contextlib.contextmanager
def broken_activation(mlp, call, kind):
    """Let an MLP's activation raise in its n-th call; yields a list with the number of calls."""
    own, calls = mlp.act_fn, [0]

    class Broken(torch.nn.Module):
        def forward(self, x):
            calls[0] += 1
            if calls[0] == call:
                raise kind("in the model")
            return own(x)

    mlp.act_fn = Broken()
    try:
        yield calls
    finally:
        mlp.act_fn = own
