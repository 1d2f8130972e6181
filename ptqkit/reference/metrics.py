"""Signal-to-quantization-noise ratio."""

from __future__ import annotations

import numpy as np

__all__ = ["energies", "sqnr"]


def energies(reference, quantized):
    """Return the energy of the signal and of the error of every row, (rows, 2)."""
    x, y = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (reference, quantized))
    return np.stack([(x * x).sum(axis=1), ((y - x) ** 2).sum(axis=1)], axis=1)


def sqnr(reference, quantized, per="sample", channel_axis=-1):
    """Return the SQNR in dB [SBC, eq. 1].

    per "sample": 10 log10(mean over samples (axis 0) of ||x||^2 / ||y - x||^2), the mean inside the
    logarithm; "tensor": the ratio of the two sums; "channel": the same for each channel.
    """
    if per == "channel":
        reference, quantized = (np.moveaxis(a, channel_axis, 0) for a in (reference, quantized))
    signal, noise = energies(reference, quantized).T
    if per == "tensor":
        signal, noise = signal.sum(), noise.sum()
    with np.errstate(divide="ignore"):
        ratio = np.where(noise > 0, signal / np.where(noise > 0, noise, 1), np.inf)
        return 10 * np.log10(ratio.mean() if per == "sample" else ratio)
