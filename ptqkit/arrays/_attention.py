"""Scores and probabilities of attention as the core takes them: checks and shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ptqkit.arrays._inputs import _from_tensor, _is_tensor

__all__ = ["as_allowed", "as_attention", "as_float32", "as_queries"]


def as_float32(x: Any, what: str) -> np.ndarray:
    """Return an aligned, C-contiguous float32 array; halves are widened, doubles rounded.

    Raises
    ------
    TypeError
        If it is not floating point.
    """
    bf16 = False
    if _is_tensor(x):
        x, bf16 = _from_tensor(x)
    x = np.asarray(x)
    if bf16:
        return (np.ascontiguousarray(x).astype(np.uint32) << 16).view(np.float32)
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(f"{what} must be floating point, not {x.dtype}")
    with np.errstate(over="ignore"):  # what overflows is refused as an infinity
        x = np.asarray(x, np.float32, order="C")  # unlike ascontiguousarray, keeps 0-D
    return x if x.flags.aligned else x.copy()


def as_attention(x: Any, what: str) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return x (..., heads, q, k) as float32 (batch, heads, q, k), and its own shape.

    Two axes are one head of one sample.
    """
    x = as_float32(x, what)
    if x.ndim < 2 or x.shape[-1] == 0 or (x.ndim > 2 and x.shape[-3] == 0):
        raise ValueError(
            f"{what} must have shape (..., heads, q, k) with at least one head and one key, but "
            f"has shape {x.shape}"
        )
    heads = x.shape[-3] if x.ndim > 2 else 1
    return x.reshape(math.prod(x.shape[:-3]), heads, *x.shape[-2:]), x.shape


def _as_bool(mask: Any, what: str) -> np.ndarray:
    if _is_tensor(mask):
        mask = mask.detach().cpu().numpy()
    mask = np.asarray(mask)
    if mask.dtype == bool:
        return mask
    if not np.issubdtype(mask.dtype, np.integer):
        raise TypeError(
            f"{what} must be boolean or integer (1 = allowed), not {mask.dtype}; a mask that is "
            "added to the scores is allowed where it is 0: pass mask == 0"
        )
    return mask != 0


def as_allowed(allowed: Any, sizes: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the mask as (batch or 1, heads or 1, q or 1, k), or None for None.

    Parameters
    ----------
    allowed : array or tensor of bool or int, or None
        Keys, (batch, k); or entries, an array with the axes of ``shape``, each full or 1.
    sizes : tuple
        (batch, heads, q, k).
    shape : tuple
        Of the scores, as the user knows them.
    """
    if allowed is None:
        return None
    allowed = _as_bool(allowed, "allowed")
    batch, _, _, k = sizes
    pairs = zip(allowed.shape, shape, strict=False)
    if allowed.shape == (batch, k) and len(shape) > 2:
        allowed = allowed.reshape(batch, 1, 1, k)
    elif allowed.ndim != len(shape) or any(a not in (1, b) for a, b in pairs):
        raise ValueError(
            f"allowed must have shape {(batch, k)} (batch, keys), or that of the scores, {shape}, "
            f"where any axis may be 1; but it has shape {allowed.shape}"
        )
    else:
        lead, rest = allowed.shape[:-3], ((1,) * 3 + allowed.shape)[-3:]
        if math.prod(lead) != 1:  # several axes that become one cannot be broadcast one by one
            allowed, lead = np.broadcast_to(allowed, shape[:-3] + rest), shape[:-3]
        allowed = allowed.reshape(math.prod(lead), *rest)
    return np.ascontiguousarray(np.broadcast_to(allowed, (*allowed.shape[:-1], k)))


def as_queries(queries: Any, batch: int, q: int) -> np.ndarray | None:
    """Return the rows that count, bool (batch, q), or None for None."""
    if queries is None:
        return None
    queries = _as_bool(queries, "queries")
    if queries.shape != (batch, q):
        raise ValueError(f"queries must have shape {(batch, q)} (batch, q), not {queries.shape}")
    return np.ascontiguousarray(queries)
