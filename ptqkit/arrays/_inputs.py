"""From what users pass (arrays, torch tensors) to what the core takes; all checks of inputs."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

import ptqkit._core as _core

__all__ = [
    "BF16",
    "F16",
    "F32",
    "as_mask",
    "as_matrix",
    "as_tokens",
    "check_count",
    "check_number",
    "check_threads",
    "label",
]

F32, F16, BF16 = 0, 1, 2  # ptq_dtype


def label(name: str | None) -> str:
    """Prefix of an error message: the layer's name, where the caller gave one."""
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


def _is_tensor(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "torch" or hasattr(x, "detach")


def _from_tensor(x: Any) -> tuple[np.ndarray, bool]:
    """A NumPy view of a tensor, and whether its bits are bfloat16 (then dtype uint16)."""
    torch = sys.modules["torch"]
    x = x.detach()
    if x.device.type != "cpu":
        x = x.cpu()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16), True
    return x.numpy(), False


def as_tokens(X: Any, in_features: int) -> tuple[np.ndarray, int, tuple[int, ...]]:
    """Return X as (tokens, in_features) with contiguous rows, its dtype for the core, its shape.

    float32, float16 and bfloat16 go as they are; float64 is rounded to float32.
    """
    bf16 = False
    if _is_tensor(X):
        X, bf16 = _from_tensor(X)
    X = np.asarray(X)
    if X.ndim == 0 or X.shape[-1] != in_features:
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


def as_mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return the int64 indices of the tokens whose mask is true; shape: that of the tokens."""
    if _is_tensor(mask):
        mask = mask.detach().cpu().numpy()
    mask = np.asarray(mask)
    if mask.dtype != bool and not np.issubdtype(mask.dtype, np.integer):
        raise TypeError(f"mask must be boolean or integer (1 = counts), not {mask.dtype}")
    # One of the two may be flat; but the same size in two shapes would leave out the wrong tokens.
    both_shaped = mask.ndim > 1 and len(shape) > 1
    if mask.size != math.prod(shape) or (both_shaped and mask.shape != shape):
        raise ValueError(f"mask must have the shape {shape} of X's tokens, not {mask.shape}")
    return np.flatnonzero(mask.reshape(-1)).astype(np.int64, copy=False)


def as_matrix(x: Any, what: str, name: str | None = None, threads: int = 0) -> np.ndarray:
    """Return a finite, C-contiguous float32 matrix; the input is never modified.

    Raises
    ------
    TypeError
        If it is not floating point.
    ValueError
        If it is not 2-D, is empty, or holds NaN or Inf.
    """
    where = label(name)
    if _is_tensor(x):
        torch = sys.modules["torch"]
        x = x.detach().cpu()
        x = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
    try:
        x = np.asarray(x)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{where}{what} must be a matrix: {error}") from None
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(f"{where}{what} must be floating point, not {x.dtype}")
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"{where}{what} must be a non-empty matrix, but has shape {x.shape}")
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, np.float32)
    if not x.flags.aligned:
        x = x.copy()
    if not _core.finite_check(x, threads):
        raise ValueError(f"{where}{what} holds NaN or Inf (or values beyond float32)")
    return x
