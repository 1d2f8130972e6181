"""Differences of perplexity with standard errors, paired window by window."""

from __future__ import annotations

import math

from ptqkit._paired import Sample, standard_errors
from ptqkit.hf.evaluation.likelihood import PerplexityResult

__all__ = ["perplexity_difference"]


def perplexity_difference(
    found: PerplexityResult, reference: PerplexityResult
) -> tuple[float, float]:
    """Return how much higher one perplexity is than another on the same windows, and its error.

    Returns
    -------
    difference, error : float
        NaN if a perplexity is not finite; the error also of fewer than two windows.

    Raises
    ------
    ValueError
        If the two were measured over different windows.
    """
    if found.scored != reference.scored:
        raise ValueError("the perplexities were measured over different windows")
    difference = found.perplexity - reference.perplexity
    if not math.isfinite(difference):
        return difference, math.nan
    first, second = (
        Sample.of([one.perplexity], [one.losses], one.scored, True) for one in (found, reference)
    )
    return difference, standard_errors(first - second)[0]
