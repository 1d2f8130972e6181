"""One token through a decoder block of LLaMA's kind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptqkit.reference.grids import to_bfloat16

__all__ = ["Linear", "bfloat16", "block_begin", "block_end", "rms_norm", "rotate"]

Rounding = Callable[[np.ndarray], np.ndarray]


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to bfloat16, ties to even, by way of float32; in float64."""
    return to_bfloat16(x).astype(np.float64)


class Linear:
    """``weight`` (out, in) in float64, ``bias`` (out,) or None."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return ``weight x + bias`` for x of shape (in,)."""
        y = self.weight @ x
        return y if self.bias is None else y + self.bias


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, rounded: Rounding) -> np.ndarray:
    """Return ``weight * x / sqrt(mean(x^2) + eps)``, rounded before and after the weight."""
    return rounded(weight * rounded(x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)))


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, rounded: Rounding) -> np.ndarray:
    """Turn the halves of the last axis by angles; cos and sin have its length."""
    half = x.shape[-1] // 2
    turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return rounded(rounded(x * cos) + rounded(turned * sin))


def block_begin(
    x: np.ndarray,
    angles: tuple[np.ndarray, np.ndarray],
    norms: tuple[np.ndarray, np.ndarray | None, np.ndarray | None],
    layers: tuple[Linear, Linear, Linear],
    head_dim: int,
    eps: float,
    rounded: Rounding = np.asarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return query (heads, head_dim), key and value (kv_heads, head_dim) of one token.

    Parameters
    ----------
    x : ndarray, shape (hidden,)
    angles : cosines and sines, shape (head_dim,)
    norms : weights of the norm, and of those of query and key heads or None
    layers : of query, key and value
    rounded : callable
        Rounds every number to the model's dtype where its modules do.
    """
    normed = rms_norm(x, norms[0], eps, rounded)
    query, key, value = (rounded(layer(normed)).reshape(-1, head_dim) for layer in layers)
    if norms[1] is not None:
        query = rms_norm(query, norms[1], eps, rounded)
    if norms[2] is not None:
        key = rms_norm(key, norms[2], eps, rounded)
    return rotate(query, *angles, rounded), rotate(key, *angles, rounded), value


def block_end(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    allowed: np.ndarray | None,
    scaling: float,
    x: np.ndarray,
    norm: np.ndarray,
    layers: tuple[Linear, Linear, Linear, Linear],
    eps: float,
    rounded: Rounding = np.asarray,
) -> np.ndarray:
    """Return the block's output (hidden,).

    Parameters
    ----------
    query : ndarray, shape (heads, head_dim)
    keys, values : ndarray, shape (kv_heads, tokens, head_dim)
    allowed : ndarray of bool, shape (tokens,), optional
    layers : output of the attention, gate, up, down
    """
    shared = len(query) // len(keys)
    keys, values = (np.repeat(a, shared, axis=0) for a in (keys, values))
    scores = np.einsum("hd,htd->ht", query, keys) * scaling
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    attended = rounded(np.einsum("ht,htd->hd", e / e.sum(axis=1, keepdims=True), values))
    o, gate, up, down = layers
    x = rounded(x + rounded(o(attended.reshape(-1))))
    normed = rms_norm(x, norm, eps, rounded)
    g = rounded(gate(normed))
    inner = rounded(rounded(g / (1 + np.exp(-g))) * rounded(up(normed)))
    return rounded(x + rounded(down(inner)))
