"""Differences of perplexity with standard errors, paired window by window."""

from __future__ import annotations

import math

from ptqkit.hf.evaluation.likelihood import PerplexityResult

__all__ = ["perplexity_difference"]


def perplexity_difference(
    found: PerplexityResult, reference: PerplexityResult
) -> tuple[float, float]:
    """Return how much higher one perplexity is than another on the same windows, and its error.

    What is hard about a window is hard for both models, so that the difference is known better
    than either perplexity. To first order a window of n tokens with the summed loss l moves a
    perplexity P of mean loss L over N tokens by ``u = P (l - n L) / N``; over m windows the
    standard error of the difference is ``sqrt(m / (m - 1) sum((u_found - u_reference)^2))``.

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
    difference, count = found.perplexity - reference.perplexity, len(found.scored)
    if count < 2 or not math.isfinite(difference):
        return difference, math.nan
    moves = (a - b for a, b in zip(_influence(found), _influence(reference), strict=True))
    return difference, math.sqrt(count / (count - 1) * math.fsum(u * u for u in moves))


def _influence(result: PerplexityResult) -> list[float]:
    mean, factor = result.nll_per_token, result.perplexity / result.tokens
    return [
        factor * (loss - n * mean) for loss, n in zip(result.losses, result.scored, strict=True)
    ]
