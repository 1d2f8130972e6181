"""Bias correction: the mean error that quantized weights leave in a layer's output."""

from __future__ import annotations

from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import as_pair, as_vector, check_threads

__all__ = ["bias_correction"]


def bias_correction(W: Any, W_hat: Any, mean: Any, *, threads: int = 0) -> np.ndarray:
    """Return (W_hat - W) E[x], to be subtracted from the bias [AWEQ, equations 11 to 15].

    With it, the quantized layer's mean output over the calibration inputs is the float layer's.

    Parameters
    ----------
    W, W_hat : array or torch tensor, shape (out, in), floating point
        Weights before and after quantization.
    mean : array or torch tensor, shape (in,), floating point
        E[x], the mean of each input over the calibration tokens (``ChannelRanges.mean``).
    threads : int
        0 means automatic. The result does not depend on it.

    Returns
    -------
    ndarray of float64, shape (out,)

    Raises
    ------
    TypeError, ValueError
        Not floating point, shapes that differ, NaN or Inf.
    """
    threads = check_threads(threads)
    W, W_hat = as_pair(W, W_hat, "W", "W_hat")
    mean = as_vector(mean, "mean")
    if W.ndim != 2 or W.size == 0:
        raise ValueError(f"W must be a non-empty matrix, but has shape {W.shape}")
    if len(mean) != W.shape[1]:
        raise ValueError(f"mean has {len(mean)} inputs, but W has {W.shape[1]}")
    out = np.empty(len(W), np.float64)
    _core.bias_correction(W, W_hat, mean, out, threads)
    if not np.isfinite(out).all():  # every NaN or Inf that went in comes out
        for x, what in ((W, "W"), (W_hat, "W_hat")):
            if not np.isfinite(x).all():
                raise ValueError(f"{what} holds NaN or Inf")
        raise ValueError("the correction overflows: W, W_hat or mean are huge")
    return out
