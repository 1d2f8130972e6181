"""Channel ranges and activation-weight equalization (float64) [AWEQ, section 3.2]."""

from __future__ import annotations

import numpy as np

__all__ = [
    "SCALE_LIMITS",
    "channel_ranges",
    "equalization_error",
    "equalization_precision",
    "equalization_scales",
    "fake_quantize",
    "static_range",
    "weight_span",
]

SCALE_LIMITS = (2.0**-20, 2.0**20)  # of an equalization scale


def channel_ranges(X, mask=None):
    """Return minimum, maximum and mean of each channel over the tokens whose mask is true."""
    X = np.asarray(X, np.float64).reshape(-1, np.shape(X)[-1])
    if mask is not None:
        X = X[np.asarray(mask, bool).reshape(-1)]
    return X.min(axis=0), X.max(axis=0), X.mean(axis=0)


def weight_span(weights):
    """Return max - min of every column of the layers (out, in) that one tensor feeds, together."""
    W = np.concatenate([np.asarray(w, np.float64) for w in weights])
    return W.max(axis=0) - W.min(axis=0)


def equalization_scales(activation_span, weight_span, alpha=0.5, channel_of=None):
    """Return s = rx^alpha / rw^(1 - alpha), float64; alpha = 1/2 is eq. 10, s = sqrt(rx / rw).

    Tied channels count with the largest of their spans. A channel with either span 0 keeps
    s = 1; the rest lies in ``SCALE_LIMITS``.
    """
    rx = np.asarray(activation_span, np.float64)
    rw = np.asarray(weight_span, np.float64)
    if channel_of is not None:
        _, group = np.unique(channel_of, return_inverse=True)
        rx = np.array([rx[group == g].max() for g in group])
        rw = np.array([rw[group == g].max() for g in group])
    live = (rx > 0) & (rw > 0)
    s = np.where(live, rx, 1.0) ** alpha / np.where(live, rw, 1.0) ** (1 - alpha)
    return np.where(live, np.clip(s, *SCALE_LIMITS), 1.0)


def equalization_precision(activation_span, weight_span, scales):
    """Return p^X, p^W and the sum of their products, channel by channel [AWEQ, eqs. 4-8]."""
    rx = [r / s for r, s in zip(activation_span, scales, strict=True)]
    rw = [r * s for r, s in zip(weight_span, scales, strict=True)]
    px, pw = ([r / max(spans) for r in spans] for spans in (rx, rw))
    return np.array(px), np.array(pw), sum(x * w for x, w in zip(px, pw, strict=True))


def fake_quantize(x, low, high, max_code, symmetric):
    """Return x rounded on the min-max grid of [low, high] (broadcast), back in float64.

    Symmetric: scale = absmax / (max_code / 2), signed codes in [-(max_code + 1) / 2,
    (max_code - 1) / 2]. Asymmetric: scale = (high - low) / max_code, zero = round(-low / scale).
    Scales and quotients are float32, as in PyTorch: a symmetric grid puts the largest value on a
    tie, where only that decides.
    """
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    reach = np.maximum(-low, high) * 2 if symmetric else high - low
    scale = np.where(reach > 0, reach / max_code, 1.0).astype(np.float32)
    scale = np.maximum(scale, np.float32(2.0**-126))
    half = (max_code + 1) // 2
    zero = half if symmetric else np.clip(np.round(np.float32(-low) / scale), 0, max_code)
    codes = np.clip(np.round(np.float32(x) / scale).astype(np.float64) + zero, 0, max_code)
    return scale.astype(np.float64) * (codes - zero)


def static_range(minimum, maximum, scales):
    """Return the range of a whole tensor of activations after division by the channels' scales."""
    low, high = (np.asarray(v, np.float32) / scales for v in (minimum, maximum))
    return np.float64(low.min()), np.float64(high.max())


def _rtn(W, max_code, group_size, symmetric, per_tensor):
    if per_tensor:
        return fake_quantize(W, W.min(), W.max(), max_code, symmetric)
    groups = W.reshape(len(W), -1, group_size or W.shape[1])
    ends = groups.min(axis=2, keepdims=True), groups.max(axis=2, keepdims=True)
    return fake_quantize(groups, *ends, max_code, symmetric).reshape(W.shape)


def equalization_error(
    weights,
    X,
    scales,
    *,
    max_code,
    group_size=None,
    symmetric=False,
    per_tensor=False,
    activation_max_code=None,
    activation_range=None,
    activation_symmetric=True,
):
    """Return the sum of (Q_a(X / s) Q_w(W s)^T - X W^T)^2 over all entries [AWEQ, section 3.2].

    ``activation_range`` (low, high) of X / s makes Q_a static over the tensor; None makes it
    dynamic per token; ``activation_max_code`` None leaves activations alone. X / s and W s are
    rounded to float32, as what is folded into a model is.
    """
    X, s = np.asarray(X, np.float32), np.asarray(scales, np.float32)
    A = (X / s).astype(np.float64)
    if activation_max_code is not None:
        low, high = activation_range or (A.min(axis=1)[:, None], A.max(axis=1)[:, None])
        A = fake_quantize(A, low, high, activation_max_code, activation_symmetric)
    total = 0.0
    for W in weights:
        W = np.asarray(W, np.float32)
        scaled = (W * s).astype(np.float64)
        Q = _rtn(scaled, max_code, group_size, symmetric, per_tensor)
        total += np.square(A @ Q.T - X.astype(np.float64) @ W.T.astype(np.float64)).sum()
    return total
