"""Statistics of activations that say how hard they are to quantize, and norms of matrices."""

from __future__ import annotations

import numpy as np

__all__ = ["activation_statistics", "outlier_dimensions", "spectral_norm", "stable_rank"]


def activation_statistics(X, *, bits=8, threshold=6.0, absmax=None):
    """All that :class:`ptqkit.ActivationStatistics` reports of X (tokens, channels), by definition.

    Grids are symmetric with scale absmax / (2^(b-1) - 1) [IPQS], one per token or one for X, of
    which ``absmax`` may say the largest magnitude. Standard deviation and excess kurtosis are over
    the channels of a token, not corrected for their number; the kurtosis is the mean over tokens
    whose values are not all equal. The median is the lower of two middle values.

    Returns
    -------
    dict of str to float or ndarray
    """
    X = np.asarray(X, np.float64)
    magnitudes = np.abs(X)
    top = 2 ** (bits - 1) - 1
    reach = magnitudes.max() if absmax is None else absmax
    centred = X - X.mean(axis=1, keepdims=True)
    second, fourth = (centred**2).mean(axis=1), (centred**4).mean(axis=1)
    varied = X.max(axis=1) > X.min(axis=1)
    flat = np.sort(magnitudes, axis=None)
    return {
        "rms": np.sqrt((X**2).mean()),
        "rmse_token": _rmse(X, magnitudes.max(axis=1, keepdims=True) / top, top),
        "rmse_tensor": _rmse(X, np.full((1, 1), reach / top), top),
        "std": np.sqrt(second).mean(),
        "kurtosis": (fourth[varied] / second[varied] ** 2 - 3).mean() if varied.any() else np.nan,
        "largest": flat[::-1][:3],
        "median": flat[(flat.size - 1) // 2],
        "channel_absmax": magnitudes.max(axis=0),
        "channel_counts": (magnitudes >= threshold).sum(axis=0),
    }


def _rmse(X, scale, top):
    """Root of the mean squared rounding error over all values."""
    scale = np.where(scale > 0, scale, 1)
    codes = np.clip(np.rint(X / scale), -top, top)
    return np.sqrt(((X - codes * scale) ** 2).mean())


def outlier_dimensions(hidden, *, value=6.0, layers=0.25, tokens=0.06):
    """Outlier dimensions of hidden states, a matrix (tokens, channels) per layer [LLM.int8()].

    Dimensions with |x| >= value somewhere in that share of the layers, and in that share of all
    tokens of all layers.
    """
    large = [np.abs(np.asarray(h, np.float64)) >= value for h in hidden]
    in_layers = np.mean([x.any(axis=0) for x in large], axis=0)
    in_tokens = np.concatenate(large).mean(axis=0)
    return np.flatnonzero((in_layers >= layers) & (in_tokens >= tokens))


def spectral_norm(W):
    """Largest singular value of W [IPQS, eq. 3], by the full decomposition."""
    return np.linalg.svd(np.asarray(W, np.float64), compute_uv=False)[0]


def stable_rank(W):
    """||W||_F^2 / ||W||_2^2."""
    return (np.asarray(W, np.float64) ** 2).sum() / spectral_norm(W) ** 2
