"""Weights of 2, 3, 4 or 8 bits as they lie in memory while a model runs, and their products."""

from __future__ import annotations

from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit.arrays._inputs import BF16, F16, F32, as_array, check_threads
from ptqkit.errors import check_choice

__all__ = ["PackedMatrix"]

LANES = 16  # PTQ_LANES: outputs of a panel
LONGEST_INT8_GROUP = 66311  # PTQ_INT8_GROUP
MOST_PLACES = 1 << 28  # PTQ_MOST_PLACES
ACTIVATIONS = {"float": 0, "int8": 1}
STEPS = {2: (16, 1), 3: (32, 3), 4: (8, 1), 8: (4, 1)}  # bits: inputs of a step, its words
_DTYPES = {
    "float32": (np.float32, F32),
    "float16": (np.float16, F16),
    "bfloat16": (np.uint16, BF16),
}


def stored_bits(bits: Any) -> int:
    """Return the bits of a stored code; ternary codes are stored in 2 bits."""
    if isinstance(bits, str) and bits == "ternary":
        return 2
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or bits not in STEPS:
        raise ValueError(f"bits must be 2, 3, 4, 8 or 'ternary', not {bits!r}")
    return int(bits)


def _empty_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array whose data starts at a cache line."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    block = np.empty(size + 64, np.uint8)
    start = -block.ctypes.data % 64
    return block[start : start + size].view(dtype).reshape(shape)


def _smallest_exact(scales: np.ndarray) -> np.ndarray:
    """Return float32 scales in 16 bits if each fits exactly: float16, or the bits of bfloat16."""
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    if np.array_equal(half.astype(np.float32), scales):
        return half
    bits = scales.view(np.uint32)
    return scales if np.any(bits & 0xFFFF) else (bits >> 16).astype(np.uint16)


def _float32(scales: np.ndarray) -> np.ndarray:
    if scales.dtype == np.uint16:
        return (scales.astype(np.uint32) << 16).view(np.float32)
    return scales.astype(np.float32)


def _panels(a: np.ndarray, fill: int) -> np.ndarray:
    """Return (outputs, groups) as (panels, groups, LANES), padded."""
    panels = -(-a.shape[0] // LANES)
    out = _empty_aligned((panels, a.shape[1], LANES), a.dtype)
    out[...] = fill
    for panel in range(panels):
        rows = a[panel * LANES : (panel + 1) * LANES]
        out[panel, :, : len(rows)] = rows.T
    return out


def _rows(a: np.ndarray, outputs: int) -> np.ndarray:
    """Inverse of :func:`_panels`."""
    return np.ascontiguousarray(a.transpose(0, 2, 1).reshape(-1, a.shape[1])[:outputs])


def _check_g_idx(g_idx: Any, inputs: int, groups: int) -> np.ndarray:
    """Return the group of each input as int32, or raise ValueError."""
    if g_idx is None:
        if inputs % groups:
            raise ValueError(
                f"{groups} groups do not divide {inputs} inputs evenly: pass g_idx, the group of "
                "each input"
            )
        return np.repeat(np.arange(groups, dtype=np.int32), inputs // groups)
    g_idx = np.asarray(g_idx)
    if g_idx.shape != (inputs,) or not np.issubdtype(g_idx.dtype, np.integer):
        raise ValueError(
            f"g_idx must be an integer array of shape ({inputs},), not {g_idx.dtype} of shape "
            f"{g_idx.shape}"
        )
    if inputs and (int(g_idx.min()) < 0 or int(g_idx.max()) >= groups):
        raise ValueError(
            f"g_idx must lie in [0, {groups - 1}], as there are {groups} groups, but holds "
            f"{int(g_idx.min())} to {int(g_idx.max())}"
        )
    return g_idx.astype(np.int32)


def _places(g_idx: np.ndarray, groups: int, step: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Lay out the inputs group by group, each group from a whole step on.

    Returns
    -------
    starts : ndarray of int32, shape (groups + 1,)
    order : ndarray of int32, shape (places,), or None
        The input at each place, -1 for padding; None if all padding is at the end.
    """
    counts = np.bincount(g_idx, minlength=groups)
    starts = np.zeros(groups + 1, np.int64)
    np.cumsum(-(-counts // step) * step, out=starts[1:])
    if starts[-1] > MOST_PLACES:
        raise ValueError(f"{len(g_idx)} inputs are more than {MOST_PLACES} places can hold")
    by_group = np.argsort(g_idx, kind="stable")
    first = np.cumsum(counts) - counts
    at = np.arange(len(g_idx)) + np.repeat(starts[:-1] - first, counts)
    if np.array_equal(by_group, at):
        return starts.astype(np.int32), None
    order = np.full(int(starts[-1]), -1, np.int32)
    order[at] = by_group
    return starts.astype(np.int32), order


class PackedMatrix:
    """Hold a weight matrix packed for products on the CPU: ``w = scale * (code - zero)``.

    Sixteen outputs lie side by side, so that a kernel reads the words of memory once, in order.
    The arrays are kept as they are given, so they may be views of a mapped file.

    Parameters
    ----------
    words : ndarray of uint32, shape (panels, lane words, 16)
        As :meth:`pack` lays them out; ``panels`` is ``ceil(out / 16)``.
    scales : ndarray of float32, float16, or uint16 (bits of bfloat16), shape (panels, groups, 16)
    zeros : ndarray of uint8, shape (panels, groups, 16)
    bits : {2, 3, 4, 8, "ternary"}
    shape : tuple of int
        (out, in).
    g_idx : array of integers, shape (in,), optional
        Group of each input; None: consecutive inputs, groups of equal size.

    Raises
    ------
    TypeError, ValueError
        Shapes or dtypes that do not belong together, g_idx out of range, scales that are not
        finite, zeros beyond the largest code.
    """

    def __init__(
        self,
        words: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray,
        *,
        bits: int | str,
        shape: tuple[int, int],
        g_idx: Any = None,
    ) -> None:
        self.bits = stored_bits(bits)
        outputs, inputs = (int(n) for n in shape)
        if not (1 <= outputs <= MOST_PLACES and 1 <= inputs <= MOST_PLACES):
            raise ValueError(f"shape must be two sizes from 1 to {MOST_PLACES}, not {shape!r}")
        self.shape = (outputs, inputs)
        arrays = {"words": words, "scales": scales, "zeros": zeros}
        for name, a in arrays.items():
            if not isinstance(a, np.ndarray) or a.ndim != 3 or not a.flags.c_contiguous:
                raise ValueError(f"{name} must be a C-contiguous array of 3 dimensions")
        if words.dtype != np.uint32 or zeros.dtype != np.uint8:
            raise TypeError(
                f"words must be uint32 and zeros uint8, not {words.dtype}, {zeros.dtype}"
            )
        if scales.dtype not in (np.float32, np.float16, np.uint16):
            raise TypeError(f"scales must be float32, float16 or uint16, not {scales.dtype}")
        groups = scales.shape[1]
        if groups < 1:
            raise ValueError("scales must have at least one group")
        step, step_words = STEPS[self.bits]
        if words.shape[1] < -(-inputs // step) * step_words:  # before anything of this size is made
            raise ValueError(f"words of shape {words.shape} are too few for {inputs} inputs")
        self.g_idx = _check_g_idx(g_idx, inputs, groups)
        self._starts, self._order = _places(self.g_idx, groups, step)
        panels, lane_words = -(-outputs // LANES), int(self._starts[-1]) // step * step_words
        wanted = {"words": lane_words, "scales": groups, "zeros": groups}
        for name, a in arrays.items():
            if a.shape != (panels, wanted[name], LANES):
                raise ValueError(
                    f"{name} must have shape {(panels, wanted[name], LANES)} for a matrix of shape "
                    f"{self.shape} at {self.bits} bits in {groups} group(s), not {a.shape}"
                )
        if not np.isfinite(_float32(scales)).all():
            raise ValueError("scales hold NaN or Inf")
        if int(zeros.max()) >= 1 << self.bits:
            raise ValueError(f"zeros must lie in [0, {(1 << self.bits) - 1}]")
        self.words, self.scales, self.zeros = words, scales, zeros
        self._held = (words, self._order, self.bits, scales, zeros, self._starts)
        self._longest_group = int(np.diff(self._starts).max())

    @classmethod
    def pack(
        cls, codes: Any, scales: Any, zeros: Any, *, bits: int | str, g_idx: Any = None
    ) -> PackedMatrix:
        """Pack codes and their grids, once, for instance when a model is loaded.

        Scales that all fit 16 bits exactly are stored in 16 bits.

        Parameters
        ----------
        codes : array of integers below ``2**bits``, shape (out, in)
        scales : array of floats, shape (out, groups)
        zeros : array of integers below ``2**bits``, shape (out, groups)
        bits : {2, 3, 4, 8, "ternary"}
        g_idx : array of integers, shape (in,), optional
            Group of each input; None: consecutive inputs, groups of equal size.

        Raises
        ------
        TypeError, ValueError
            See the class.
        """
        stored = stored_bits(bits)
        codes, scales = np.asarray(codes), as_array(scales, "scales")
        zeros, largest = np.asarray(zeros), (1 << stored) - 1
        for name, a in {"codes": codes, "zeros": zeros}.items():
            if a.ndim != 2 or not np.issubdtype(a.dtype, np.integer) or a.size == 0:
                raise ValueError(f"{name} must be a non-empty 2-D array of integers")
            if int(a.min()) < 0 or int(a.max()) > largest:
                raise ValueError(f"{name} must lie in [0, {largest}] to fit {stored} bits")
        if not np.issubdtype(scales.dtype, np.floating):
            raise TypeError(f"scales must be floating point, not {scales.dtype}")
        if scales.shape != zeros.shape or len(scales) != len(codes):
            raise ValueError(
                f"scales {scales.shape} and zeros {zeros.shape} must have one shape, (out, groups) "
                f"for codes of shape {codes.shape}"
            )
        outputs, inputs = codes.shape
        groups = scales.shape[1]
        with np.errstate(over="ignore"):
            scales = np.ascontiguousarray(scales, np.float32)
        g_idx = _check_g_idx(g_idx, inputs, groups)
        step, step_words = STEPS[stored]
        starts, order = _places(g_idx, groups, step)
        lane_words = int(starts[-1]) // step * step_words
        words = _empty_aligned((-(-outputs // LANES), lane_words, LANES), np.uint32)
        _core.words_pack(np.ascontiguousarray(codes, np.uint8), words, order, stored, 0)
        return cls(
            words,
            _panels(_smallest_exact(scales), 0),
            _panels(zeros.astype(np.uint8), 0),
            bits=stored,
            shape=(outputs, inputs),
            g_idx=g_idx,
        )

    def copy(self) -> PackedMatrix:
        """Return the same in memory of its own, aligned to cache lines."""
        arrays = []
        for a in (self.words, self.scales, self.zeros):
            arrays.append(_empty_aligned(a.shape, a.dtype))
            arrays[-1][...] = a
        words, scales, zeros = arrays
        return PackedMatrix(
            words, scales, zeros, bits=self.bits, shape=self.shape, g_idx=self.g_idx
        )

    @property
    def groups(self) -> int:
        """Grids per output."""
        return int(self.scales.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales and zeros, and of the order of the inputs if there is one."""
        order = 0 if self._order is None else self._order.nbytes
        return self.words.nbytes + self.scales.nbytes + self.zeros.nbytes + order

    def __repr__(self) -> str:
        size = f"{self.shape[0]} x {self.shape[1]}"
        return (
            f"<PackedMatrix {size}, {self.bits} bits, {self.groups} group(s), {self.nbytes} bytes>"
        )

    def matmul(
        self,
        x: Any,
        *,
        activations: str = "float",
        dtype: str | None = None,
        threads: int | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return ``x w^T`` from the packed codes.

        ``"float"`` multiplies codes and activations in float32, or exactly with activations in
        fixed point, 23 bits under the largest of their group, where the CPU does that faster. With
        u = 2**-24 and k places (the inputs, padded), the error is in both at most
        ``2 (k + 8) u sum_g 2**bits |scale_g| sum |x|``, sums over each output's groups g and the
        inputs of each (and what underflows: nothing if all x are 0 or above 1e-30). ``"int8"``
        first rounds the activations of each token and group to ``s * [-127, 127]``, s their
        largest magnitude / 127: each x is wrong by at most s / 2. Its products and their sums in a
        group are exact integers, and the result is the same bit for bit on every CPU. Neither
        result depends on ``threads``.

        Parameters
        ----------
        x : array of float32, float16 or (with ``dtype="bfloat16"``) uint16, shape (..., in)
            uint16 are the bits of bfloat16. Other floating-point types are rounded to float32.
        activations : {"float", "int8"}
        dtype : {"float32", "float16", "bfloat16"}, optional
            What x holds; None: what its own dtype says.
        threads : int, optional
            None or 0: automatic.
        out : ndarray of float32, shape (..., out), optional
            C-contiguous; written and returned.

        Returns
        -------
        ndarray of float32, shape (..., out)

        Raises
        ------
        TypeError, ValueError
            Shapes or dtypes that do not fit; ``"int8"`` with groups of more than 66311 inputs.
        FloatingPointError
            ``"int8"`` with NaN or Inf in x.
        """
        check_choice("activations", activations, ACTIVATIONS)
        x, code = _tokens(x, dtype)
        outputs, inputs = self.shape
        if x.ndim < 1 or x.shape[-1] != inputs:
            raise ValueError(f"x must have shape (..., {inputs}), not {x.shape}")
        y_shape = (*x.shape[:-1], outputs)
        if out is None:
            out = np.empty(y_shape, np.float32)
        elif out.shape != y_shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise ValueError(f"out must be a C-contiguous float32 array of shape {y_shape}")
        threads = check_threads(0 if threads is None else threads)
        self._multiply(x.reshape(-1, inputs), code, activations, out.reshape(-1, outputs), threads)
        return out

    def multiply_rows(self, x: np.ndarray, out: np.ndarray, dtype: str, activations: str) -> None:
        """Do as :meth:`matmul` for rows, without what costs as much as a small product.

        Parameters
        ----------
        x : ndarray, shape (tokens, in), rows contiguous
            Of the dtype that ``dtype`` names (uint16 for "bfloat16").
        out : ndarray of float32, shape (tokens, out), C-contiguous
            Written.
        dtype : {"float32", "float16", "bfloat16"}
        activations : {"float", "int8"}

        Raises
        ------
        TypeError, ValueError, FloatingPointError
            As of :meth:`matmul`: the core checks what it is given.
        """
        self._multiply(x, _DTYPES[dtype][1], activations, out, 0)

    def layer(self, activations: str, bias: np.ndarray | None = None) -> tuple[Any, ...]:
        """Return the matrix as a layer of :mod:`ptqkit.arrays.decoder`.

        Parameters
        ----------
        activations : {"float", "int8"}
            As in :meth:`matmul`, whose numbers the layer gives.
        bias : ndarray of the block's dtype, shape (out,), optional
        """
        self._check_activations(activations)
        return (ACTIVATIONS[activations], bias, *self._held)

    def _check_activations(self, activations: str) -> None:
        if activations == "int8" and self._longest_group > LONGEST_INT8_GROUP:
            raise ValueError(
                f"groups of more than {LONGEST_INT8_GROUP} inputs can leave int32: use "
                "activations='float'"
            )

    def _multiply(
        self, x: np.ndarray, code: int, activations: str, out: np.ndarray, threads: int
    ) -> None:
        self._check_activations(activations)
        _core.packed_matmul(x, code, ACTIVATIONS[activations], out, *self._held, threads)

    def dequantize(self) -> np.ndarray:
        """Return ``scale * (code - zero)`` as float32, shape (out, in)."""
        out = np.empty(self.shape, np.float32)
        _core.packed_dequantize(
            out, self.words, self._order, self.bits, self.scales, self.zeros, self._starts, 0
        )
        return out

    def unpack(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return what was packed.

        Returns
        -------
        codes : ndarray of uint8, shape (out, in)
        scales : ndarray of float32, shape (out, groups)
        zeros : ndarray of uint8, shape (out, groups)
        g_idx : ndarray of int32, shape (in,)
        """
        codes = np.empty(self.shape, np.uint8)
        _core.words_unpack(codes, self.words, self._order, self.bits, 0)
        scales = _rows(_float32(self.scales), self.shape[0])
        return codes, scales, _rows(self.zeros, self.shape[0]), self.g_idx.copy()


def _tokens(x: Any, dtype: str | None) -> tuple[np.ndarray, int]:
    """Return activations as an array that the core takes, and its dtype."""
    if dtype is None:
        x = as_array(x, "x")
        if x.dtype not in (np.float32, np.float16):
            if not np.issubdtype(x.dtype, np.floating):
                raise TypeError(f"x must be floating point, not {x.dtype}; bits need dtype=")
            x = x.astype(np.float32)
        dtype = str(x.dtype)
    check_choice("dtype", dtype, _DTYPES)
    kind, code = _DTYPES[dtype]
    x = np.asarray(x)
    if x.dtype != kind:
        raise TypeError(f"x of dtype={dtype!r} must be an array of {np.dtype(kind)}, not {x.dtype}")
    return np.require(x, kind, ["C", "A"]), code


def input_places(g_idx: np.ndarray, groups: int, bits: int) -> np.ndarray:
    """Return the place of each input in a lane, int64 (in,): the layout as a reader needs it."""
    order = _places(g_idx, groups, STEPS[bits][0])[1]
    if order is None:
        return np.arange(len(g_idx))
    at = np.empty(len(g_idx), np.int64)
    filled = np.flatnonzero(order >= 0)
    at[order[filled]] = filled
    return at
