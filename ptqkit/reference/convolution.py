"""A convolution as a matrix product: its inputs column by column (float64)."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

__all__ = ["im2col"]


def im2col(x, kernel, stride, padding, dilation, groups, mode="zeros"):
    """Return what every output position of a convolution is a product of.

    Parameters
    ----------
    x : ndarray, shape (samples, channels, *size)
    kernel, stride, dilation : sequence of int
        Per dimension.
    padding : sequence of (int, int)
        Values added before and behind, per dimension.
    groups : int
        Runs of channels that do not mix.
    mode : {"zeros", "reflect", "replicate", "circular"}
        What the added values are.

    Returns
    -------
    ndarray of float64, shape (groups, samples * positions, channels / groups * prod(kernel))
        Rows go through the samples, and in each through the positions with the last dimension
        fastest; columns go through the channels of the group, and in each through the kernel.
    """
    names: dict[str, Any] = {
        "zeros": "constant",
        "reflect": "reflect",
        "replicate": "edge",
        "circular": "wrap",
    }
    x = np.pad(np.asarray(x, np.float64), [(0, 0), (0, 0), *padding], mode=names[mode])
    samples, channels, *size = x.shape
    count = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)
    ]
    width = channels // groups
    result = []
    for group in range(groups):
        rows = []
        for sample, at in product(range(samples), product(*map(range, count))):
            row = []
            for channel, tap in product(range(width), product(*map(range, kernel))):
                place = [
                    p * s + t * d for p, s, t, d in zip(at, stride, tap, dilation, strict=True)
                ]
                row.append(x[(sample, group * width + channel, *place)])
            rows.append(row)
        result.append(rows)
    return np.array(result)
