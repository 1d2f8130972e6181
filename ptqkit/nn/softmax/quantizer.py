"""The quantized softmax on torch tensors, its corrections, and what they are estimated from.

The same as :func:`ptqkit.softmax_on_grid`, for a model that has computed the probabilities: codes
``q = clamp(round(p * (1 / s)) + z, 0, 2**b - 1)`` stand for ``s*q - c`` with ``c = s*z``, and a
correction only changes the offset (Pandey et al. 2023: ``c' = s*z - beta``).
Forbidden entries are exactly 0 and get nothing: otherwise a token would see later ones. With n
the allowed keys of a row, every allowed entry gains

``bias``
    beta = mean(1/n) - mean(s*q - c) over the allowed entries of the calibration set (eq. 4). In
    rows with more keys than any it was estimated on, beta times longest / n: the mass that is
    added stays what it was at the longest row, where the constant would go on growing.
``row_length``
    D(n) / n, with D(n) the mean mass that rows with about n keys lost
    (:meth:`ptqkit.SoftmaxBias.bias_by_length`); longer rows have the D of the longest.
``row_sum``
    (1 - sum of the row's own s*q - c) / n: every row sums to 1, without calibration.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ptqkit.arrays.softmax import SoftmaxGrid
from ptqkit.arrays.softmax_bias import SoftmaxBias, length_class
from ptqkit.errors import CalibrationError
from ptqkit.nn.attention import AttentionHook

__all__ = ["CORRECTIONS", "GRANULARITIES", "SoftmaxQuantizer", "SoftmaxStatistics"]

CORRECTIONS = ("bias", "row_length", "row_sum", None)
GRANULARITIES = ("tensor", "head")


def length_edges(longest: int) -> list[int]:
    """Last row length of every class that SoftmaxBias tells apart, up to ``longest``."""
    lengths = np.arange(1, longest + 1)
    last = np.flatnonzero(np.diff(length_class(lengths), append=-1))
    return lengths[last].tolist()


class SoftmaxQuantizer:
    """Quantizes the probabilities of one attention module and corrects their bias.

    Parameters
    ----------
    grid : SoftmaxGrid
    correction : {"bias", "row_length", "row_sum", None}
    bias : array, optional
        Of "bias": beta, of shape () or (heads,). Of "row_length": D for every bin of row lengths,
        of shape (bins,) or (heads, bins).
    longest : int, optional
        Of "bias": most allowed keys of a row in the calibration set; by default no limit.
    edges : sequence of int, optional
        Of "row_length": last row length of every bin, rising; longer rows use the last bin.

    Raises
    ------
    ValueError
        If the parts do not fit each other.
    """

    def __init__(
        self,
        grid: SoftmaxGrid,
        correction: str | None = None,
        bias: Any = None,
        *,
        longest: int | None = None,
        edges: Any = None,
    ) -> None:
        if correction not in CORRECTIONS:
            raise ValueError(f"correction must be one of {CORRECTIONS}, not {correction!r}")
        self.grid, self.correction = grid, correction
        self.bias = _check_bias(correction, bias)
        self.longest = longest
        self.edges = _check_edges(correction, edges, self.bias)
        self._tensors: dict[Any, tuple[torch.Tensor, torch.Tensor | None]] = {}

    @property
    def heads(self) -> int | None:
        """Heads that the correction is for; None where it is for the whole tensor."""
        per_head = 2 if self.correction == "row_length" else 1
        return None if self.bias is None or self.bias.ndim < per_head else len(self.bias)

    @torch.no_grad()
    def __call__(self, p: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        """Return the quantized and corrected probabilities (batch, heads, q, k), dtype as given."""
        if self.heads is not None and self.heads != p.shape[1]:
            raise ValueError(
                f"the softmax correction is for {self.heads} heads, the module has {p.shape[1]}"
            )
        grid = self.grid
        inverse = float(np.float32(1) / np.float32(grid.scale))
        steps = p.float() * inverse
        steps = steps.clamp_(-grid.zero_point, grid.max_code - grid.zero_point).round_()
        if allowed is not None:
            steps = steps.masked_fill_(~allowed, 0.0)
        y = steps * grid.scale
        if self.correction is not None:
            y += self._offset(steps, allowed)
            if allowed is not None:
                y = y.masked_fill_(~allowed, 0.0)
        return y.to(p.dtype)

    def _offset(self, steps: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """What every allowed entry of a row gains, float32, broadcastable to ``steps``."""
        count = row_lengths(allowed, steps)
        if self.correction == "row_sum":
            # A sum of whole numbers in double is exact: no order of addition shows.
            sums = steps.sum(-1, keepdim=True, dtype=torch.float64)
            return ((1.0 - sums * self.grid.scale) / count).float()
        bias, edges = self._on(steps.device)
        if self.correction == "bias":
            bias = bias.view(-1, 1, 1)
            if self.longest is None:
                return bias
            return bias * (self.longest / count).clamp_(max=1.0)
        place = torch.bucketize(count, edges).clamp_(max=len(edges) - 1)  # type: ignore[arg-type]
        if self.heads is None:
            return bias[place] / count
        heads = torch.arange(steps.shape[1], device=steps.device).view(-1, 1, 1)
        return bias[heads, place] / count

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        if device not in self._tensors:
            bias = torch.as_tensor(np.asarray(self.bias, np.float32), device=device)
            edges = None
            if self.edges is not None:
                edges = torch.tensor(self.edges, dtype=torch.float32, device=device)
            self._tensors[device] = (bias, edges)
        return self._tensors[device]

    def __deepcopy__(self, memo: Any) -> SoftmaxQuantizer:
        return SoftmaxQuantizer(
            self.grid, self.correction, self.bias, longest=self.longest, edges=self.edges
        )

    def __repr__(self) -> str:
        """Grid and correction."""
        per = "head" if self.heads else "tensor"
        text = "" if self.correction is None else f", {self.correction!r} per {per}"
        return f"SoftmaxQuantizer({self.grid}{text})"


def row_lengths(allowed: torch.Tensor | None, p: torch.Tensor) -> torch.Tensor:
    """Allowed keys of every row, float32 (..., q, 1) and at least 1."""
    if allowed is None:
        return torch.full((1, 1), float(p.shape[-1]), device=p.device)
    count = allowed.expand(*allowed.shape[:-1], p.shape[-1]).sum(-1, keepdim=True)
    return count.clamp_(min=1).to(torch.float32)


def _check_bias(correction: str | None, bias: Any) -> np.ndarray | None:
    if correction in (None, "row_sum"):
        if bias is not None:
            raise ValueError(f"bias has no place with correction {correction!r}")
        return None
    if bias is None:
        raise ValueError(f"correction {correction!r} needs a bias from calibration data")
    values = np.array(bias, dtype=np.float64)
    least = 1 if correction == "row_length" else 0
    if values.ndim not in (least, least + 1) or values.size == 0:
        raise ValueError(
            f"bias of correction {correction!r} must have {least} or {least + 1} dimensions and "
            f"at least one value, not shape {values.shape}"
        )
    if not np.isfinite(values).all() or np.abs(values).max() > 1:
        raise ValueError("bias must hold finite numbers from -1 to 1")
    return values


def _check_edges(
    correction: str | None, edges: Any, bias: np.ndarray | None
) -> tuple[int, ...] | None:
    if correction != "row_length":
        if edges is not None:
            raise ValueError(f"edges have no place with correction {correction!r}")
        return None
    bins = bias.shape[-1] if bias is not None else 0
    values = tuple(int(e) for e in edges) if edges is not None else ()
    if len(values) != bins or any(b <= a for a, b in zip((0, *values), values, strict=False)):
        raise ValueError(f"edges must be {bins} rising positive integers, one per bin of bias")
    return values


class SoftmaxStatistics(AttentionHook):
    """Collects, in one pass, what corrections of one attention module are made from.

    Probabilities are those of the model at hand and stay as they are.

    Parameters
    ----------
    name : str
        Of the module, for messages.
    heads : int
    grid : SoftmaxGrid

    Attributes
    ----------
    bias : SoftmaxBias
    longest : int
        Most allowed keys of a row so far.
    rows : Tensor or None
        Which tokens of the batch at hand count, bool (batch, sequence).
    """

    def __init__(self, name: str, heads: int, grid: SoftmaxGrid) -> None:
        self.name, self.heads, self.grid = name, heads, grid
        self.bias = SoftmaxBias(heads, grid=grid)
        self.longest = 0
        self.rows: torch.Tensor | None = None

    def softmax(self, p: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Count the probabilities in."""
        if p.shape[1] != self.heads:
            raise ValueError(f"{self.name} has {p.shape[1]} heads, not {self.heads}")
        mask = None if allowed is None else allowed.cpu()
        try:
            self.bias.update(p.detach().cpu(), mask, queries=self.rows)
        except ValueError as error:
            raise CalibrationError(f"softmax of {self.name}: {error}") from error
        # Rows of padding are no longer than those of the tokens beside it.
        self.longest = max(self.longest, int(row_lengths(allowed, p).max()))
        return p

    def quantizer(self, correction: str | None, granularity: str) -> SoftmaxQuantizer:
        """Quantizer with a correction from what was counted."""
        if correction == "bias":
            beta = self.bias.bias(granularity)
            return SoftmaxQuantizer(self.grid, correction, beta, longest=self.longest)
        if correction == "row_length":
            edges = length_edges(self.longest)
            # One value per class of lengths says all: n * beta(n) is the same in a class.
            mass = self.bias.bias_by_length(self.longest, granularity)[..., edges] * edges
            return SoftmaxQuantizer(self.grid, correction, mass, edges=edges)
        return SoftmaxQuantizer(self.grid, correction)
