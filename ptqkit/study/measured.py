"""What a measurement gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ptqkit._repr import one_line_repr
from ptqkit.hf.evaluation.likelihood import perplexity

__all__ = ["Measured", "measure_text"]


@dataclass(frozen=True)
class Measured:
    """One value and what it was measured over.

    Attributes
    ----------
    value : float
    metric : str
        "perplexity", or "acc" and "acc_norm", which are shares from 0 to 1, or the name of a
        function.
    higher_is_better : bool
    count : int
        Tokens scored, or items.
    left_out : int
        Items longer than the model takes.
    truncated : int
        Contexts whose beginning was cut off to fit the model.
    chance : float
        Value that guessing gives; NaN for a perplexity.
    losses : list of float
        For standard errors: of a perplexity the summed negative log-likelihood of each window, in
        nats; else the value of each item. Empty if only the whole is known.
    scored : list of int
        Tokens of each window; of an item, 1.
    """

    __repr__ = one_line_repr

    value: float
    metric: str
    higher_is_better: bool
    count: int
    left_out: int = 0
    truncated: int = 0
    chance: float = math.nan
    losses: list[float] = field(default_factory=list, repr=False)
    scored: list[int] = field(default_factory=list, repr=False)


def measure_text(model: Any, tokenizer: Any, text: Any, **settings: Any) -> Measured:
    """Measure the perplexity of a text.

    Parameters
    ----------
    model, tokenizer, text, **settings
        See :func:`ptqkit.hf.perplexity`.

    Raises
    ------
    NotFiniteError
        If the logits, and so the value, are not finite.
    """
    found = perplexity(model, tokenizer, text, **settings)
    return Measured(
        found.perplexity,
        "perplexity",
        False,
        found.tokens,
        losses=list(found.losses),
        scored=list(found.scored),
    )
