"""Bias correction: the mean error that quantized weights leave in a layer's output."""

from __future__ import annotations

from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import check_threads

__all__ = ["bias_correction"]


def _as_float(x: Any, what: str, ndim: int) -> np.ndarray:
    """Return a non-empty float32 or float64 array of ``ndim`` dimensions; nothing is rounded."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        half = x.is_floating_point() and x.itemsize < 4
        x = (x.float() if half else x).numpy()
    try:
        x = np.asarray(x)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{what} must be an array: {error}") from None
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(f"{what} must be floating point, not {x.dtype}")
    if x.ndim != ndim or x.size == 0:
        raise ValueError(
            f"{what} must have {ndim} dimension(s) and not be empty, but has shape {x.shape}"
        )
    return x.astype(np.float64 if x.itemsize > 4 else np.float32, copy=False)


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
    W, W_hat = _as_float(W, "W", 2), _as_float(W_hat, "W_hat", 2)
    mean = np.ascontiguousarray(_as_float(mean, "mean", 1), np.float64)
    if W.shape != W_hat.shape:
        raise ValueError(f"W_hat must have the shape {W.shape} of W, not {W_hat.shape}")
    if len(mean) != W.shape[1]:
        raise ValueError(f"mean has {len(mean)} inputs, but W has {W.shape[1]}")
    kind = np.result_type(W, W_hat)
    factors = [np.require(a, kind, ["C", "A"]) for a in (W, W_hat)]
    out = np.empty(len(W), np.float64)
    _core.bias_correction(*factors, mean, out, threads)
    if not np.isfinite(out).all():  # every NaN or Inf that went in comes out
        for x, what in ((W, "W"), (W_hat, "W_hat"), (mean, "mean")):
            if not np.isfinite(x).all():
                raise ValueError(f"{what} holds NaN or Inf")
        raise ValueError("the correction overflows: W, W_hat or mean are huge")
    return out
