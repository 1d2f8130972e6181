"""Bias correction: the mean error that quantized weights leave in a layer's output."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["bias_correction"]


def _as_float64(x: Any, what: str, ndim: int) -> np.ndarray:
    """Return a finite float64 array of ``ndim`` dimensions."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.double() if x.is_floating_point() else x).numpy()
    try:
        x = np.asarray(x)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{what} must be an array: {error}") from None
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(f"{what} must be floating point, not {x.dtype}")
    if x.ndim != ndim or x.size == 0:
        raise ValueError(f"{what} must have {ndim} dimension(s), but has shape {x.shape}")
    x = x.astype(np.float64, copy=False)
    if not np.isfinite(x).all():
        raise ValueError(f"{what} holds NaN or Inf")
    return x


def bias_correction(W: Any, W_hat: Any, mean: Any) -> np.ndarray:
    """Return (W_hat - W) E[x], to be subtracted from the bias [AWEQ, equations 11 to 15].

    With it, the quantized layer's mean output over the calibration inputs is the float layer's.

    Parameters
    ----------
    W, W_hat : array or torch tensor, shape (out, in), floating point
        Weights before and after quantization.
    mean : array or torch tensor, shape (in,), floating point
        E[x], the mean of each input over the calibration tokens (``ChannelRanges.mean``).

    Returns
    -------
    ndarray of float64, shape (out,)

    Raises
    ------
    TypeError, ValueError
        Not floating point, shapes that differ, NaN or Inf.
    """
    W, W_hat = _as_float64(W, "W", 2), _as_float64(W_hat, "W_hat", 2)
    mean = _as_float64(mean, "mean", 1)
    if W.shape != W_hat.shape:
        raise ValueError(f"W_hat must have the shape {W.shape} of W, not {W_hat.shape}")
    if len(mean) != W.shape[1]:
        raise ValueError(f"mean has {len(mean)} inputs, but W has {W.shape[1]}")
    return (W_hat - W) @ mean
