"""The quantized softmax on torch tensors and its corrections.

Codes ``q = clamp(round(p * (1 / s)) + z, 0, 2**b - 1)`` stand for ``s*q - c`` with ``c = s*z``, and
a correction only changes the offset (Pandey et al. 2023: ``c' = s*z - beta``).
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

On a grid of exponentials codes stand for ``s*q / S`` with ``S`` the sum of exp(x - max) over the
row, which is 1 over the row's largest probability: rounding comes before normalising. There are
two corrections: ``row_sum``, (1 - sum of the row's own s*q / S) / n, and ``code_sum``, which
divides by the sum of the codes, ``q / sum(q)``. On a grid of squares, codes of the root of exp(x -
max) stand for ``(s*q)^2 / S``, with the same corrections.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ptqkit.arrays.softmax import UNFITTED, SoftmaxGrid, check_correction, softmax_on_grid

__all__ = ["CORRECTIONS", "SoftmaxQuantizer", "row_lengths"]

CORRECTIONS = ("bias", "row_length", "row_sum", "code_sum", None)


class SoftmaxQuantizer:
    """Quantizes the probabilities of one attention module and corrects their bias.

    Parameters
    ----------
    grid : SoftmaxGrid
        Of probabilities, or of exponentials or squares, which have the corrections "row_sum" and
        "code_sum".
    correction : {"bias", "row_length", "row_sum", "code_sum", None}
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
        check_correction(grid, correction)
        self.grid, self.correction = grid, correction
        self.bias = _check_bias(correction, bias)
        self.longest = longest
        self.edges = _check_edges(correction, edges, self.bias)
        self._tensors: dict[Any, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._table = np.empty(0)

    @property
    def heads(self) -> int | None:
        """Heads that the correction is for; None if it is for the whole tensor."""
        per_head = 2 if self.correction == "row_length" else 1
        return None if self.bias is None or self.bias.ndim < per_head else len(self.bias)

    @property
    def uncorrected(self) -> SoftmaxQuantizer:
        """The same grid without a correction."""
        return SoftmaxQuantizer(self.grid)

    @torch.no_grad()
    def __call__(self, p: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        """Return the quantized and corrected probabilities (batch, heads, q, k), dtype as given."""
        self._check_heads(p)
        grid = self.grid
        steps, scale = self._steps(p, allowed)
        steps = steps.clamp_(-grid.zero_point, grid.max_code - grid.zero_point).round_()
        if allowed is not None:
            steps = steps.masked_fill_(~allowed, 0.0)
        sums = self._sums(steps)
        if grid.of == "squares":
            steps = steps.square_()
        if self.correction == "code_sum":
            assert sums is not None
            return (steps / sums.clamp_(min=1).float()).to(p.dtype)
        y = steps * scale
        if self.correction is not None:
            y += self._offset(steps, sums, scale, allowed)
            if allowed is not None:
                y = y.masked_fill_(~allowed, 0.0)
        return y.to(p.dtype)

    def fused(
        self, scores: torch.Tensor, allowed: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Return the quantized and corrected softmax of scores, written over them.

        One pass of :func:`ptqkit.softmax_on_grid` in place of PyTorch's softmax and the six or
        seven passes of calling the quantizer. Both give the same codes, except for probabilities
        within 1e-6 of their value from a tie; from equal codes, values without a correction are
        equal, and corrected ones within 2 units in the last place of the larger of the value and
        its correction.

        Parameters
        ----------
        scores : Tensor, shape (batch, heads, q, k)
        allowed : Tensor of bool, optional
            Broadcastable to the scores.

        Returns
        -------
        Tensor or None
            None if the scores are not float32 on the CPU, or part of a gradient.

        Raises
        ------
        ValueError
            If an allowed score is NaN or +Inf.
        """
        if scores.dtype != torch.float32 or scores.device.type != "cpu" or scores.requires_grad:
            return None
        self._check_heads(scores)
        correction, bias = self._by_length(scores.shape[-1])
        scores = scores.contiguous()
        softmax_on_grid(
            scores.numpy(),
            self.grid,
            correction=correction,
            bias=bias,
            allowed=None if allowed is None else allowed.numpy(),
            out=scores.numpy(),
        )
        return scores

    def _by_length(self, keys: int) -> tuple[str | None, np.ndarray | None]:
        """Correction and bias as :func:`ptqkit.softmax_on_grid` takes them, for rows of ``keys``.

        There, a bias that depends on the row length is a table with an entry for every length.
        """
        if self.bias is None or (self.correction == "bias" and keys <= (self.longest or keys)):
            return self.correction, self.bias
        if self._table.shape[-1] <= keys:
            # Longer than needed: a growing cache of keys needs no new table every time.
            length = np.maximum(np.arange(1 << keys.bit_length()), 1)
            if self.correction == "bias":
                self._table = self.bias[..., None] * np.minimum((self.longest or 0) / length, 1)
            else:
                assert self.edges is not None
                place = np.searchsorted(self.edges, length).clip(max=len(self.edges) - 1)
                self._table = self.bias[..., place] / length
        return "row_length", self._table

    def _check_heads(self, x: torch.Tensor) -> None:
        if self.heads is not None and self.heads != x.shape[1]:
            raise ValueError(
                f"the softmax correction is for {self.heads} heads, the module has {x.shape[1]}"
            )

    def _steps(self, p: torch.Tensor, allowed: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
        """Return probabilities in steps of the grid, not rounded, and the value of a step.

        On a grid of squares the value is that of a step's square.
        """
        grid = self.grid
        inverse = float(np.float32(1) / np.float32(grid.scale))
        if grid.of == "probabilities":
            return p.float() * inverse, grid.scale
        # e / sum(e) over the row's largest is e: the softmax itself need not be taken apart.
        largest = row_largest(p, allowed)
        if grid.of == "squares":
            root = (p.float() / largest).clamp_(min=0).sqrt_()
            return root.mul_(inverse), grid.scale**2 * largest
        return (p.float() * inverse).div_(largest), grid.scale * largest

    def _sums(self, steps: torch.Tensor) -> torch.Tensor | None:
        """Return the sum of a row's steps, or of their squares, if the correction needs it."""
        if self.correction not in ("row_sum", "code_sum"):
            return None
        # A sum of whole numbers in double is exact: no order of addition shows.
        if self.grid.of == "squares":
            return steps.double().square_().sum(-1, keepdim=True)
        return steps.sum(-1, keepdim=True, dtype=torch.float64)

    def _offset(
        self,
        steps: torch.Tensor,
        sums: torch.Tensor | None,
        scale: Any,
        allowed: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return what every allowed entry of a row gains, float32, broadcastable to ``steps``."""
        count = row_lengths(allowed, steps)
        if sums is not None:
            return ((1.0 - sums * scale) / count).float()
        bias, edges = self._on(steps.device)
        if self.correction == "bias":
            bias = bias.view(-1, 1, 1)
            if self.longest is None:
                return bias
            return bias * (self.longest / count).clamp_(max=1.0)
        place = torch.bucketize(count, edges).clamp_(max=len(edges) - 1)  # type: ignore[arg-type]
        if self.heads is None:
            return bias[place] / count
        heads = torch.arange(steps.shape[1], dtype=torch.long, device=steps.device).view(-1, 1, 1)
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
    """Return the allowed keys of every row, float32 (..., q, 1) and at least 1."""
    if allowed is None:
        return torch.full((1, 1), float(p.shape[-1]), dtype=torch.float32, device=p.device)
    count = allowed.expand(*allowed.shape[:-1], p.shape[-1]).sum(-1, keepdim=True)
    return count.clamp_(min=1).to(torch.float32)


def row_largest(p: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """Return the largest allowed probability of every row, float32 (..., q, 1), above 0."""
    seen = p if allowed is None else p.masked_fill(~allowed, 0.0)
    return seen.amax(-1, keepdim=True).float().clamp_(min=torch.finfo(torch.float32).tiny)


def _check_bias(correction: str | None, bias: Any) -> np.ndarray | None:
    if correction in UNFITTED:
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
