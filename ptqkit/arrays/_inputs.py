"""Convert what users pass (arrays, torch tensors) to what the core takes, and check it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import ptqkit._core as _core

F32, F16, BF16 = 0, 1, 2  # ptq_dtype
NOT_FINITE = (
    "X holds NaN or Inf; the batch was not added. Check the calibration data and the model's "
    "dtype (float16 overflows easily)"
)
TOO_LARGE = (
    "X holds values so large (about 1e19) that their squares add up beyond float32; the batch was "
    "not added. Check the calibration data, or scale it down"
)


def label(name: str | None) -> str:
    """Return the prefix of an error message: the layer's name if the caller gave one."""
    return f"{name}: " if name else ""


def check_count(value: Any, what: str, least: int, most: int) -> int:
    """Return an integer in [least, most], or raise TypeError or ValueError naming ``what``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{what} must be an integer, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{what} must lie in [{least}, {most}], not {value!r}")
    return int(value)


def check_number(value: Any, what: str) -> float:
    """Return a real number as a float, or raise TypeError naming ``what``."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{what} must be a number, not {value!r}")
    return float(value)


def check_threads(threads: int) -> int:
    """Return ``threads`` (0: automatic) or raise TypeError or ValueError."""
    return check_count(threads, "threads", 0, 1024)


def _tensor_bits(x: Any) -> tuple[np.ndarray, bool]:
    """Return a NumPy view of a tensor, and whether its bits are bfloat16 (then dtype uint16)."""
    torch = sys.modules["torch"]
    x = x.detach()
    if x.device.type != "cpu":
        x = x.cpu()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16), True
    return x.numpy(), False


def _bits(x: Any, what: str) -> tuple[np.ndarray, bool]:
    """Return any input as an array, and whether it holds the bits of bfloat16."""
    if hasattr(x, "detach"):
        return _tensor_bits(x)
    try:
        return np.asarray(x), False
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{what} must be an array: {error}") from None


def widen(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 bits (uint16), exactly."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def as_array(x: Any, what: str) -> np.ndarray:
    """Return an array of the same values; bfloat16 becomes float32."""
    array, bf16 = _bits(x, what)
    return widen(array) if bf16 else array


def as_floating(x: Any, what: str) -> np.ndarray:
    """Return an array of the same values, or raise TypeError unless they are floating point."""
    x = as_array(x, what)
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(f"{what} must be floating point, not {x.dtype}")
    return x


def as_float32(x: Any, what: str) -> np.ndarray:
    """Return an aligned, C-contiguous float32 array; halves are widened, doubles rounded.

    Raises
    ------
    TypeError
        If it is not floating point.
    """
    x = as_floating(x, what)
    with np.errstate(over="ignore"):  # an overflow is refused later, as an infinity
        x = np.asarray(x, np.float32, order="C")  # unlike ascontiguousarray, keeps 0-D
    return x if x.flags.aligned else x.copy()


def as_pair(x: Any, y: Any, x_name: str, y_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays of one shape, both float64 if either is, else float32.

    Raises
    ------
    TypeError, ValueError
        If one is not floating point, or their shapes differ.
    """
    x, y = as_floating(x, x_name), as_floating(y, y_name)
    if x.shape != y.shape:
        raise ValueError(f"{y_name} must have the shape {x.shape} of {x_name}, not {y.shape}")
    dtype = np.float64 if max(x.itemsize, y.itemsize) > 4 else np.float32
    return np.require(x, dtype, ["C", "A"]), np.require(y, dtype, ["C", "A"])


def as_vector(x: Any, what: str, dtype: type = np.float64) -> np.ndarray:
    """Return a finite copy of a vector of floating-point numbers, one per channel."""
    x = as_floating(x, what)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{what} must have shape (channels,), but has shape {x.shape}")
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    if not np.isfinite(x).all():
        raise ValueError(f"{what} holds NaN or Inf (or values beyond {np.dtype(dtype)})")
    return x


def as_extreme(value: Any, what: str, reduce: Callable[[Any], Any]) -> np.float32:
    """Return the minimum or maximum of a number or an array of numbers; it must be finite."""
    value = as_array(value, what)
    if value.dtype == bool or not np.issubdtype(value.dtype, np.number) or value.dtype.kind == "c":
        raise TypeError(f"{what} must be a number or an array of numbers, not {value.dtype}")
    if value.size == 0:
        raise ValueError(f"{what} is empty")
    with np.errstate(over="ignore"):
        extreme = np.float32(reduce(value))
    if not np.isfinite(extreme):
        raise ValueError(f"{what} must be finite (in float32), but is {reduce(value)}")
    return extreme


def as_tokens(X: Any, in_features: int | None = None) -> tuple[np.ndarray, int, tuple[int, ...]]:
    """Return X as (tokens, in_features) with contiguous rows, its dtype for the core, its shape.

    float32, float16 and bfloat16 go as they are; float64 is rounded to float32. Without
    ``in_features``, the last axis of X says how many there are.
    """
    X, bf16 = _bits(X, "X")
    if in_features is None and (X.ndim == 0 or X.shape[-1] == 0):
        raise ValueError(f"X must have shape (..., channels), but has {X.shape}")
    if in_features is None:
        in_features = X.shape[-1]
    elif X.ndim == 0 or X.shape[-1] != in_features:
        raise ValueError(
            f"X must have shape (..., {in_features}): the last axis is the layer's inputs, "
            f"but it has shape {X.shape}"
        )
    native = X.dtype.newbyteorder("=")
    if not bf16 and native == np.float64:
        with np.errstate(over="ignore"):  # the core refuses the infinity
            X = X.astype(np.float32)
    elif not bf16 and native not in (np.float32, np.float16):
        raise TypeError(f"X must be floating point (float16, bfloat16, float32), not {X.dtype}")
    shape = X.shape
    X = X.reshape(-1, in_features)
    size = X.itemsize
    rows_ok = X.shape[1] <= 1 or X.strides[1] == size
    rows_ok = rows_ok and X.strides[0] >= X.shape[1] * size and X.strides[0] % size == 0
    if not (rows_ok and X.flags.aligned and X.dtype.isnative):
        X = np.ascontiguousarray(X, X.dtype.newbyteorder("="))
        X = X if X.flags.aligned else X.copy()
    return X, BF16 if bf16 else F16 if X.dtype == np.float16 else F32, shape


def as_bool(x: Any, what: str, hint: str = "") -> np.ndarray:
    """Return a boolean array; integers count if they are not 0."""
    x = as_array(x, what)
    if x.dtype == bool:
        return x
    if not np.issubdtype(x.dtype, np.integer):
        raise TypeError(f"{what} must be boolean or integer (1 = counts), not {x.dtype}{hint}")
    return x != 0


def as_mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return the int64 indices of the tokens whose mask is true; shape: that of the tokens."""
    mask = as_bool(mask, "mask")
    # One of the two may be flat; but the same size in two shapes would leave out the wrong tokens.
    both_shaped = mask.ndim > 1 and len(shape) > 1
    if mask.size != math.prod(shape) or (both_shaped and mask.shape != shape):
        raise ValueError(f"mask must have the shape {shape} of X's tokens, not {mask.shape}")
    return np.flatnonzero(mask.reshape(-1)).astype(np.int64, copy=False)


def as_batch(X: Any, mask: Any, in_features: int) -> tuple[np.ndarray, int, np.ndarray | None, int]:
    """Return X as :func:`as_tokens` does, its dtype, the rows that count (None: all), how many."""
    X, dtype, shape = as_tokens(X, in_features)
    rows = None if mask is None else as_mask(mask, shape[:-1])
    if rows is None or len(rows) == len(X):
        return X, dtype, None, len(X)
    return X, dtype, rows, len(rows)


def as_matrix(x: Any, what: str, name: str | None = None, threads: int = 0) -> np.ndarray:
    """Return a finite, C-contiguous float32 matrix; the input is never modified.

    Raises
    ------
    TypeError
        If it is not floating point.
    ValueError
        If it is not 2-D, is empty, or holds NaN or Inf.
    """
    what = label(name) + what
    x = as_floating(x, what)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"{what} must be a non-empty matrix, but has shape {x.shape}")
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, np.float32)
    if not x.flags.aligned:
        x = x.copy()
    if not _core.finite_check(x, threads):
        raise ValueError(f"{what} holds NaN or Inf (or values beyond float32)")
    return x
