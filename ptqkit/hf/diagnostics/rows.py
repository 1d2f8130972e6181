"""Rows of a diagnosis: inputs of layers, gains of norms, weights and attention modules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from ptqkit._repr import one_line_repr

__all__ = ["PARTS", "AttentionRow", "Diagnosis", "InputRow", "NormRow", "WeightRow"]

PARTS = ("attention in", "attention out", "mlp in", "mlp out")
NAN = math.nan


@dataclass
class InputRow:
    """A tensor that linear layers read. Numbers that were not measured are NaN (None in JSON).

    Attributes
    ----------
    name : str
        First layer that reads it.
    block : str
    depth : int
        Number of the block, counted over all stacks.
    part : str
        One of :data:`PARTS`: the first tensor of attention or MLP, or a later one.
    consumers : list of str
    channels, tokens : int
    norm : str or None
        Norm that made it.
    norm_std : float
        Standard deviation of that norm's gain.
    rms, rmse_token, rmse_tensor, std, kurtosis, maximum, median : float
        As :class:`ptqkit.ActivationStatistics` defines them; the tensor is a calibration batch.
    largest : list of (magnitude, token, channel)
    channel_absmax, channel_counts : list
        Per channel: largest magnitude; tokens with one of at least the report's threshold.
    histogram : dict
        ``edges`` and ``counts`` of the magnitudes, two bins to the octave.
    """

    __repr__ = one_line_repr

    name: str
    block: str
    depth: int
    part: str
    consumers: list[str]
    channels: int
    tokens: int = 0
    norm: str | None = None
    norm_std: float = NAN
    rms: float = NAN
    rmse_token: float = NAN
    rmse_tensor: float = NAN
    std: float = NAN
    kurtosis: float = NAN
    maximum: float = NAN
    median: float = NAN
    largest: list[Any] = field(default_factory=list)
    channel_absmax: list[float] = field(default_factory=list)
    channel_counts: list[int] = field(default_factory=list)
    histogram: dict[str, list[float]] = field(default_factory=dict)

    @property
    def max_to_median(self) -> float:
        """Largest magnitude by the median one."""
        return self.maximum / self.median if self.median else math.inf

    @property
    def relative_error(self) -> float:
        """rmse_token by rms."""
        return self.rmse_token / self.rms if self.rms else 0.0


@dataclass
class NormRow:
    """Gain of a norm, as it is stored.

    Attributes
    ----------
    name, block : str
    depth : int
    channels : int
        1 for a norm with a single gain.
    mean, std, minimum, maximum : float
    quantiles : list of float
        At the report's ``quantiles``.
    """

    __repr__ = one_line_repr

    name: str
    block: str
    depth: int
    channels: int
    mean: float
    std: float
    minimum: float
    maximum: float
    quantiles: list[float]


@dataclass
class WeightRow:
    """Weight of a linear layer.

    Attributes
    ----------
    name, block : str
    depth : int
    part : str
        Of :data:`PARTS`.
    shape : list of int
        (out, in).
    std, absmax, kurtosis : float
        Over all weights; the kurtosis is the excess over that of a normal distribution.
    spectral_norm, stable_rank : float
        See :func:`ptqkit.spectral_norm`.
    quantiles : list of float
        At the report's ``quantiles``.
    """

    __repr__ = one_line_repr

    name: str
    block: str
    depth: int
    part: str
    shape: list[int]
    std: float
    absmax: float
    kurtosis: float
    spectral_norm: float
    stable_rank: float
    quantiles: list[float]


@dataclass
class AttentionRow:
    """Heads of an attention module; lists have a number per head.

    Attributes
    ----------
    name, block : str
    depth : int
    sink : list of float
        Mean attention of all tokens to the first of their sequence.
    mass_lost : list of float
        Mean over rows of 1 - the sum of the probabilities rounded to the grid on [0, 1].
    zero_fraction : list of float
        Share of the allowed probabilities that round to zero.
    key_error, value_error : list of float
        Per key head: root of the error's energy by the tensor's, a symmetric grid per token.
    """

    __repr__ = one_line_repr

    name: str
    block: str
    depth: int
    sink: list[float]
    mass_lost: list[float]
    zero_fraction: list[float]
    key_error: list[float]
    value_error: list[float]


class Diagnosis(Protocol):
    """What curves and figures read of a :class:`ptqkit.hf.DiagnosisReport`."""

    model: str
    inputs: list[InputRow]
    norms: list[NormRow]
    weights: list[WeightRow]
    quantiles: list[float]

    @property
    def depth(self) -> int:
        """Number of blocks."""
