"""What each correction of a quantized softmax costs at inference, per row of attention.

Counted for integer attention that keeps the codes, multiplies them with V as integers, and applies
scales to the output of a row, beyond the float softmax that every kernel computes: the maximum, n
exponentials and their sum. n is the number of allowed keys, d the width of a value.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptqkit._repr import one_line_repr

__all__ = ["COSTS", "CorrectionCost"]


@dataclass(frozen=True)
class CorrectionCost:
    """Cost of one grid and correction, per row.

    Attributes
    ----------
    products : str
        Float products before rounding: n if each exponential is normalised first, else none.
    integer_sums : int
        Sums over the n codes of a row.
    divisions : int
        Beyond the one by the float sum that every softmax has.
    reads : int
        More passes over the row than rounding makes: 1 if the float sum must be known before the
        first code is.
    value_sum : bool
        Whether the sum of the values of the allowed keys is needed (d additions per key, shared by
        all rows of a head), and d products and additions per row with it.
    lookups : int
        Numbers read from a table by the length of the row.
    calibration : bool
        Whether constants come from calibration data.
    """

    __repr__ = one_line_repr

    products: str = "none"
    integer_sums: int = 0
    divisions: int = 0
    reads: int = 0
    value_sum: bool = False
    lookups: int = 0
    calibration: bool = False


COSTS: dict[tuple[str, str | None], CorrectionCost] = {
    ("probabilities", None): CorrectionCost("n", reads=1),
    ("probabilities", "bias"): CorrectionCost("n", reads=1, value_sum=True, calibration=True),
    ("probabilities", "row_length"): CorrectionCost(
        "n", reads=1, value_sum=True, lookups=1, calibration=True
    ),
    ("probabilities", "row_sum"): CorrectionCost(
        "n", reads=1, integer_sums=1, divisions=1, value_sum=True
    ),
    ("exponentials", None): CorrectionCost(),
    ("exponentials", "row_sum"): CorrectionCost(integer_sums=1, divisions=1, value_sum=True),
    ("exponentials", "code_sum"): CorrectionCost(integer_sums=1),
    ("squares", None): CorrectionCost(),
    ("squares", "row_sum"): CorrectionCost(integer_sums=1, divisions=1, value_sum=True),
    ("squares", "code_sum"): CorrectionCost(integer_sums=1),
}
"""By grid and correction.

The division of "row_sum" is that by the number of keys; the code sum's divides in the place of the
float sum. Codes of exponentials exist as soon as the maximum is known, so that normalising costs d
products per row and not n. Codes of squares are squared before the product with V, so its integers
have twice the bits: 8 for 4.
"""
