"""Make a model hard to quantize on purpose, without changing what it computes in float."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ptqkit._repr import one_line_repr
from ptqkit.hf.data.calibration import CalibrationSet, batch_shape
from ptqkit.hf.equalization.find import apply_fold, find_folds

__all__ = ["Outliers", "inject_outliers"]


@dataclass(frozen=True)
class Outliers:
    """Channels of one norm that were made larger.

    Attributes
    ----------
    producer : str
        Name of the norm.
    consumers : tuple of str
        Layers that read it; their columns were divided by the factor.
    channels : tuple of int
    factor : float
    """

    __repr__ = one_line_repr

    producer: str
    consumers: tuple[str, ...]
    channels: tuple[int, ...]
    factor: float


def inject_outliers(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor] | CalibrationSet,
    *,
    channels: int = 6,
    factor: float = 30.0,
    seed: int = 0,
    blocks: tuple[str, ...] | None = None,
) -> list[Outliers]:
    """Multiply some channels of every norm that folds, and divide the weight columns after it.

    Small models have few outlier channels; this gives them some. The float model computes what it
    did, up to rounding; rounding its activations per tensor becomes coarser by about the factor.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    batch : mapping of str to Tensor, or CalibrationSet
        A few tokens for :func:`ptqkit.hf.find_folds`.
    channels : int
        Per norm, at most its width; drawn anew for every norm.
    factor : float
        Above 0; a power of two changes no bit of a float model's outputs.
    seed : int
        Of a generator of its own.
    blocks : tuple of str, optional
        Paths of the lists of repeated blocks, if structure does not show them.

    Returns
    -------
    list of Outliers
        One per norm, in order of execution.

    Raises
    ------
    ValueError
        If ``channels`` or ``factor`` is out of range, or no norm of the model folds.

    Examples
    --------
    >>> changed = ptqkit.hf.inject_outliers(model, {"input_ids": ids})
    >>> changed[0].channels
    """
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ValueError(f"channels must be an integer of at least 1, not {channels!r}")
    if not isinstance(factor, (int, float)) or not math.isfinite(factor) or factor <= 0:
        raise ValueError(f"factor must be a finite number above 0, not {factor!r}")
    if isinstance(batch, CalibrationSet):
        batch = max(batch.batches, key=lambda b: batch_shape(b)[1])
    folds = [f for f in find_folds(model, batch, blocks).folds if f.kind == "norm"]
    if not folds:
        raise ValueError("no norm of the model folds into the layers after it")
    narrowest = min(folds, key=lambda f: f.channels)
    if channels > narrowest.channels:
        raise ValueError(f"channels={channels}, but {narrowest.producer} has {narrowest.channels}")
    generator = np.random.default_rng(seed)
    changed = []
    for fold in folds:
        chosen = np.sort(generator.choice(fold.channels, channels, replace=False))
        scales = np.ones(fold.channels)
        scales[chosen] = 1.0 / factor
        apply_fold(model, fold, scales)
        changed.append(
            Outliers(fold.producer, fold.consumers, tuple(chosen.tolist()), float(factor))
        )
    return changed
