"""What a measurement gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ptqkit._repr import one_line_repr

__all__ = ["Measured"]


@dataclass(frozen=True)
class Measured:
    """One value and what it was measured over.

    Attributes
    ----------
    value : float
    metric : {"perplexity", "acc", "acc_norm"}
        Accuracies are shares from 0 to 1.
    higher_is_better : bool
    count : int
        Tokens scored, or items.
    left_out : int
        Items longer than the model takes.
    truncated : int
        Contexts whose beginning was cut off to fit the model.
    chance : float
        Value that guessing gives; NaN for a perplexity.
    """

    __repr__ = one_line_repr

    value: float
    metric: str
    higher_is_better: bool
    count: int
    left_out: int = 0
    truncated: int = 0
    chance: float = math.nan
