"""Divergence of logits, and the gradients that scales and codes are tuned by."""

from __future__ import annotations

import numpy as np

__all__ = ["code_gradient", "divergence", "scale_gradient"]


def divergence(target, logits):
    """Return sum_t KL(softmax(target_t) || softmax(logits_t)) and its gradient for the logits.

    Parameters
    ----------
    target, logits : array, shape (tokens, vocabulary)

    Returns
    -------
    float
        In nats.
    ndarray of float64, shape (tokens, vocabulary)
        softmax(logits) - softmax(target).
    """
    log_p, log_q = _log_softmax(target), _log_softmax(logits)
    p = np.exp(log_p)
    return float(np.sum(p * (log_p - log_q))), np.exp(log_q) - p


def scale_gradient(codes, zero_points, g_idx, gradient):
    """Return the gradient for the scales of ``w = scale * (code - zero)`` from that for w.

    Parameters
    ----------
    codes : array of integers, shape (out, in)
    zero_points : array of integers, shape (out, groups)
    g_idx : array of integers, shape (in,)
    gradient : array, shape (out, in)

    Returns
    -------
    ndarray of float64, shape (out, groups)
    """
    zeros = np.asarray(zero_points, np.float64)
    index = np.asarray(g_idx)
    each = np.asarray(gradient, np.float64) * (np.asarray(codes, np.float64) - zeros[:, index])
    return np.stack([each[:, index == g].sum(axis=1) for g in range(zeros.shape[1])], axis=1)


def code_gradient(scales, g_idx, gradient):
    """Return the gradient for codes before rounding, as if rounding were not there.

    Parameters
    ----------
    scales : array, shape (out, groups)
    g_idx : array of integers, shape (in,)
    gradient : array, shape (out, in)
        For w.

    Returns
    -------
    ndarray of float64, shape (out, in)

    References
    ----------
    Bengio, Leonard and Courville, 2013, arXiv:1308.3432.
    """
    return np.asarray(gradient, np.float64) * np.asarray(scales, np.float64)[:, np.asarray(g_idx)]


def _log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
