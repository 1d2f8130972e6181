"""Inputs of layers, for the accumulators."""

from __future__ import annotations

import numpy as np
import pytest

DTYPES = ["float32", "float16", "bfloat16"]
LEVELS = ["base", "avx2", "avx512", "avx512_bf16", "avx512_vnni_bf16_amx"]


def inputs(tokens, n, dtype="float32", seed=0):
    """What update() takes, and the same values in float64; channels differ in mean and range."""
    rng = np.random.default_rng([seed, tokens, n])
    X = rng.normal(size=(tokens, n)) * rng.uniform(0.01, 20, n) + rng.normal(size=n)
    return as_given(X, dtype)


def as_given(X, dtype):
    """Values rounded to a dtype (bfloat16: a tensor), and what they are then in float64."""
    if dtype == "bfloat16":
        torch = pytest.importorskip("torch")
        tensor = torch.from_numpy(X).to(torch.bfloat16)
        return tensor, tensor.double().numpy()
    X = X.astype(dtype)
    return X, X.astype(np.float64)
