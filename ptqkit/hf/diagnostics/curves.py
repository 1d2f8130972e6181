"""Numbers of a diagnosis over the depth of its model."""

from __future__ import annotations

import math

import numpy as np

from ptqkit.errors import check_choice
from ptqkit.hf.diagnostics.rows import PARTS, Diagnosis

__all__ = ["METRICS", "curve"]

METRICS = (
    "rmse_token",
    "rmse_tensor",
    "std",
    "kurtosis",
    "max_to_median",
    "norm_std",
    "spectral_norm",
    "stable_rank",
)
"""Numbers that have a curve over depth."""

_OF_WEIGHTS = {"spectral_norm": max, "stable_rank": min}


def curve(report: Diagnosis, metric: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of a metric over the depth of a model, at one part of its blocks.

    Where several layers read the tensor, the largest spectral norm and the smallest stable rank
    count; where a block has several tensors of the part, the first.

    Returns
    -------
    depths : ndarray of int64
    values : ndarray of float64
        Finite ones alone.
    """
    check_choice("metric", metric, METRICS)
    check_choice("part", part, PARTS)
    weights = {row.name: row for row in report.weights}
    found: dict[int, float] = {}
    for row in report.inputs:
        if row.part != part or row.depth in found:
            continue
        value = math.nan
        if metric not in _OF_WEIGHTS:
            value = getattr(row, metric)
        elif own := [getattr(weights[c], metric) for c in row.consumers if c in weights]:
            value = _OF_WEIGHTS[metric](own)
        if math.isfinite(value):
            found[row.depth] = value
    depths = sorted(found)
    return np.array(depths, np.int64), np.array([found[d] for d in depths])
