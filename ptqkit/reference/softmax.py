"""Softmax on a grid, the bias of its rounding, and what gives the missing mass back."""

from __future__ import annotations

import numpy as np

__all__ = [
    "allowed_keys",
    "exponentials_on_grid",
    "length_class",
    "softmax",
    "softmax_bias",
    "softmax_codes",
    "softmax_grid",
    "softmax_on_grid",
    "softmax_statistics",
    "squares_on_grid",
]


def softmax_grid(bits=8, minimum=0.0, maximum=1.0):
    """Return scale and zero-point of the asymmetric min-max grid of a range that holds 0."""
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, int(np.rint(-low / scale))


def allowed_keys(shape, allowed=None, causal=False):
    """Return boolean (batch, heads, q, k) of the keys that each row may see.

    ``allowed``: None, (batch, k), or anything that broadcasts; causal: query i of q sees the keys
    up to i + k - q.
    """
    batch, _, q, k = shape
    if allowed is None:
        allowed = np.ones((1, 1, 1, 1), bool)
    elif allowed.ndim == 2:
        allowed = allowed.reshape(batch, 1, 1, k)
    reach = np.ones((q, k), bool) if not causal else np.tri(q, k, k - q, dtype=bool)
    return np.broadcast_to(allowed & reach, shape)


def softmax(scores, allowed):
    """Return the softmax over the allowed keys of the last axis; 0 elsewhere and in empty rows."""
    e = exponentials(scores, allowed)
    total = e.sum(axis=-1, keepdims=True)
    return e / np.where(total > 0, total, 1.0)


def exponentials(scores, allowed):
    """Return exp(x - the largest allowed x of the row); 0 where nothing is allowed."""
    x = np.where(allowed, np.asarray(scores, np.float64), -np.inf)
    high = x.max(axis=-1, keepdims=True)
    return np.exp(x - np.where(np.isfinite(high), high, 0.0))


def softmax_codes(P, scale, zero, max_code):
    """Return clamp(round(p / s) + z, 0, 2^b - 1), dividing as a product with 1 / s in P's type.

    In float32 these are exactly the codes that the core counts.
    """
    P = np.asarray(P)
    inverse = P.dtype.type(1) / P.dtype.type(scale)
    return np.clip(np.rint(P * inverse) + zero, 0, max_code).astype(np.int64)


def softmax_on_grid(
    scores, scale, zero, max_code, *, correction=None, bias=0.0, allowed=None, causal=False
):
    """Return the softmax, rounded to the grid and corrected on the allowed keys, in float64.

    Shapes: scores (batch, heads, q, k). correction "bias": beta () or (heads,), so that
    y = s code - (s z - beta) [SBC, eq. 4]; "row_length": beta (lengths,) or (heads, lengths) by the
    number of allowed keys; "row_sum": (1 - sum of the row) / (number of allowed keys).

    Returns
    -------
    values, codes : ndarray, shape of scores
    corrections : ndarray, shape (batch, heads, q)
    """
    seen = allowed_keys(scores.shape, allowed, causal) & (scores != -np.inf)
    codes = softmax_codes(softmax(scores, seen), scale, zero, max_code)
    codes[~seen] = zero
    count = seen.sum(axis=-1)
    values = scale * (codes - zero)
    if correction == "row_sum":
        beta = (1.0 - values.sum(axis=-1)) / np.maximum(count, 1)
    elif correction == "row_length":
        table = np.broadcast_to(bias, (scores.shape[1], np.shape(bias)[-1]))
        beta = table[np.arange(scores.shape[1])[:, None], count]
    else:
        beta = np.broadcast_to(np.reshape(bias if correction else 0.0, (-1, 1)), count.shape)
    beta = np.where(count > 0, beta, 0.0)
    return np.where(seen, values + beta[..., None], 0.0), codes, beta


def exponentials_on_grid(scores, scale, max_code, *, correction=None, allowed=None, causal=False):
    """Return exponentials, rounded to the grid and divided by their sum, in float64.

    With e = exp(x - max), S = sum(e) and q = clamp(round(e / s), 0, 2^b - 1): s q / S on the
    allowed keys; correction "row_sum" adds (1 - sum(s q) / S) / (number of allowed keys) there, and
    "code_sum" is q / sum(q) instead.

    Returns
    -------
    values, codes : ndarray, shape of scores
    scales, corrections : ndarray, shape (batch, heads, q)
    """
    seen = allowed_keys(scores.shape, allowed, causal) & (scores != -np.inf)
    e = np.where(seen, exponentials(scores, seen), 0.0)
    codes = np.clip(np.rint(e / scale), 0, max_code).astype(np.int64)
    count, total = seen.sum(axis=-1), codes.sum(axis=-1)
    divisor = total if correction == "code_sum" else e.sum(axis=-1) / scale
    scales = 1.0 / np.where(count > 0, divisor, 1.0)
    beta = (1.0 - scales * total) / np.maximum(count, 1) * (correction == "row_sum")
    beta = np.where(count > 0, beta, 0.0)
    return np.where(seen, scales[..., None] * codes + beta[..., None], 0.0), codes, scales, beta


def squares_on_grid(scores, scale, max_code, *, correction=None, allowed=None, causal=False):
    """Return exponentials whose roots are rounded to the grid, divided by their sum, in float64.

    With e = exp(x - max), S = sum(e) and q = clamp(round(sqrt(e) / s), 0, 2^b - 1): (s q)^2 / S on
    the allowed keys; correction "row_sum" adds (1 - sum((s q)^2) / S) / (number of allowed keys)
    there, and "code_sum" is q^2 / sum(q^2) instead.

    Returns
    -------
    values, codes : ndarray, shape of scores
    scales, corrections : ndarray, shape (batch, heads, q)
        The scales are those of q^2.
    """
    seen = allowed_keys(scores.shape, allowed, causal) & (scores != -np.inf)
    e = np.where(seen, exponentials(scores, seen), 0.0)
    codes = np.clip(np.rint(np.sqrt(e) / scale), 0, max_code).astype(np.int64)
    count, total = seen.sum(axis=-1), (codes**2).sum(axis=-1)
    divisor = total if correction == "code_sum" else e.sum(axis=-1) / scale**2
    scales = 1.0 / np.where(count > 0, divisor, 1.0)
    beta = (1.0 - scales * total) / np.maximum(count, 1) * (correction == "row_sum")
    beta = np.where(count > 0, beta, 0.0)
    values = scales[..., None] * codes**2 + beta[..., None]
    return np.where(seen, values, 0.0), codes, scales, beta


def length_class(length):
    """Return the class of a row length: exact below 16, then 8 classes per octave."""
    if length < 16:
        return length
    octave = length.bit_length() - 1
    return 16 + 8 * (octave - 4) + (length >> (octave - 3)) - 8


def softmax_statistics(P, scale, zero, max_code, allowed, classes=240):
    """Return rows, entries, sum of code - z and zero codes (heads, classes, 4) if allowed.

    Rows without an allowed key count for nothing.
    """
    sums = np.zeros((P.shape[1], classes, 4), np.int64)
    codes = softmax_codes(P, scale, zero, max_code) - zero
    for b, h, i in np.ndindex(P.shape[:3]):
        seen = allowed[b, h, i]
        count = int(seen.sum())
        if count:
            code = codes[b, h, i][seen]
            sums[h, length_class(count)] += (1, count, code.sum(), (code == 0).sum())
    return sums


def softmax_bias(P, Q, allowed):
    """Return beta = E[p] - E[q(p)] of the allowed entries [SBC, eq. 4], () and per head (heads,).

    E[p] is the mean of 1 / (allowed keys of the row): what n_seq becomes under a mask.
    """
    count = allowed.sum(axis=-1)
    one_over = np.where(allowed, 1.0 / np.maximum(count, 1)[..., None], 0.0)
    error = np.where(allowed, one_over - Q, 0.0)
    entries = count.sum(axis=(0, 2))
    return error.sum() / entries.sum(), error.sum(axis=(0, 2, 3)) / entries
