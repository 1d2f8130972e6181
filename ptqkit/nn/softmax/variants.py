"""The grids and corrections that tables of a quantized softmax compare, by their names there.

Known without PyTorch, as the command line offers them.
"""

from __future__ import annotations

__all__ = ["LANGUAGE_MODEL_VARIANTS", "TABLE_VARIANTS", "UNET_VARIANTS", "row_name"]

#: Correction, granularity and grid: arguments of ``SoftmaxCalibration.quantizers``.
Variant = tuple[str | None, str, str]

_CALIBRATED: dict[str, Variant] = {
    "none": (None, "tensor", "probabilities"),
    "bias": ("bias", "tensor", "probabilities"),
    "bias/head": ("bias", "head", "probabilities"),
}
_BY_ROW: dict[str, Variant] = {
    "row_sum": ("row_sum", "tensor", "probabilities"),
    "before": (None, "tensor", "exponentials"),
    "before/code_sum": ("code_sum", "tensor", "exponentials"),
    "before/row_sum": ("row_sum", "tensor", "exponentials"),
    "squares": (None, "tensor", "squares"),
    "squares/code_sum": ("code_sum", "tensor", "squares"),
    "squares/row_sum": ("row_sum", "tensor", "squares"),
}
TABLE_VARIANTS: dict[str, Variant] = {
    "log2": (None, "tensor", "log2"),
    "log2/row_sum": ("row_sum", "tensor", "log2"),
    "twin": (None, "tensor", "twin"),
    "twin/row_sum": ("row_sum", "tensor", "twin"),
}
"""Those on grids of :mod:`ptqkit.nn.softmax.tables`, which have no place in a file."""

LANGUAGE_MODEL_VARIANTS: dict[str, Variant] = {
    **_CALIBRATED,
    "row_length": ("row_length", "tensor", "probabilities"),
    "row_length/head": ("row_length", "head", "probabilities"),
    **_BY_ROW,
    **TABLE_VARIANTS,
}
"""Without "/head" a correction is one per attention module. "before": exponentials are rounded
before they are normalised."""

UNET_VARIANTS: dict[str, Variant] = {
    **_CALIBRATED,
    "bias/step": ("bias", "step", "probabilities"),
    "bias/step_head": ("bias", "step_head", "probabilities"),
    **_BY_ROW,
    **TABLE_VARIANTS,
}
"""The same, with corrections per time step and without those by the length of a row."""


def row_name(bits: int | None, correction: str, weights: str, unrounded: str) -> str:
    """Return the name of a line as in SBC's Table 3: SM8, SM8 + correction, W8A16-SM8.

    Parameters
    ----------
    bits : int or None
        None for a float softmax.
    correction : str
        Of the variants.
    weights : str
        Name of the weights; empty if they are the float ones.
    unrounded : str
        Name of the line with float weights and a float softmax.
    """
    if bits is None:
        return weights or unrounded
    plus = "" if correction == "none" else f" + {correction}"
    return f"{weights}{'-' if weights else ''}SM{bits}{plus}"
