"""The compiled core: positional arguments only, C-contiguous arrays, nothing converted.

Sizes: rows = outputs, n = inputs, groups = n / group_size, tokens = calibration tokens. ``threads``
lies in [0, 1024], 0 meaning automatic. ``grid`` is (max_code, symmetric, method, steps, candidates,
scale_type, min_zero, min_shrink, norm). All raise TypeError or ValueError for what does not fit,
KeyboardInterrupt when interrupted, MemoryError.
"""

import numpy as np
from numpy.typing import NDArray

_F32 = NDArray[np.float32]
_F64 = NDArray[np.float64]
_U8 = NDArray[np.uint8]
_U32 = NDArray[np.uint32]
_I64 = NDArray[np.int64]
_Grid = tuple[int, int, int, int, int, int, int, float, float]

def hessian_update(
    S: _F32,  # (n, n), upper triangle added to
    X: _F32 | NDArray[np.float16] | NDArray[np.uint16],  # (tokens, n), rows may be strided
    dtype: int,  # 0 float32, 1 float16, 2 bfloat16 (bits as uint16)
    rows: _I64 | None,  # (any,), tokens that count
    threads: int,
    /,
) -> None: ...  # FloatingPointError: NaN or Inf, S is left as it was
def hessian_finish(
    S: _F32,  # (n, n), upper triangle read
    out: _F32,  # (n, n), written: factor * S, symmetric
    factor: float,
    threads: int,
    /,
) -> None: ...
def symmetric_check(
    H: _F32,  # (n, n)
    tolerance: float,
    threads: int,
    /,
) -> int: ...  # 0 fine, 1 NaN or Inf, 2 not symmetric
def finite_check(
    x: _F32,  # (any, any)
    threads: int,
    /,
) -> bool: ...
def factor(
    H: _F32,  # (n, n)
    order: _I64,  # (n,), a permutation
    shift: _F64,  # (n,), added to the diagonal, original order
    R: _F32,  # (n, n), upper triangle written
    threads: int,
    /,
) -> int: ...  # -1, or the original index of the pivot that failed
def gptq(
    W: _F32,  # (rows, n)
    H: _F32,  # (n, n), undamped
    R: _F32,  # (n, n), of factor() with the same order
    order: _I64,  # (n,), a permutation
    # (group_size, block, static, runs, feedback, sweeps, damping)
    options: tuple[int, int, int, int, int, int, float],
    grid: _Grid,
    codes: _U8,  # (rows, n), written
    scales: _F32,  # (rows, groups), written
    zeros: _U8,  # (rows, groups), written
    g_idx: NDArray[np.int32],  # (n,), written
    history: _F64,  # (sweeps + 1, rows), written
    threads: int,
    /,
) -> None: ...  # FloatingPointError: the solve overflowed
def rtn(
    W: _F32,  # (rows, n)
    group_size: int,
    grid: _Grid,
    H: _F32 | None,  # (n, n), needed by method 2
    codes: _U8,  # (rows, n), written
    scales: _F32,  # (rows, groups), written
    zeros: _U8,  # (rows, groups), written
    threads: int,
    /,
) -> None: ...
def obq(
    W: _F64,  # (rows, n)
    inverse: _F64,  # (n, n), of the damped Hessian
    scale: _F64,  # (rows, n)
    zero: _F64,  # (rows, n)
    max_code: int,
    codes: _U8,  # (rows, n), written
    threads: int,
    /,
) -> None: ...
def objective(
    E: _F32,  # (rows, n)
    H: _F32,  # (n, n)
    out: _F64,  # (rows,), written
    threads: int,
    /,
) -> None: ...
def pack(
    codes: _U8,  # (rows, columns), below 2**bits
    bits: int,
    words: _U32,  # (rows, ceil(columns * bits / 32)), written
    threads: int,
    /,
) -> None: ...
def unpack(
    codes: _U8,  # (rows, columns), written
    bits: int,
    words: _U32,  # (rows, ceil(columns * bits / 32))
    threads: int,
    /,
) -> None: ...
def softmax_quantize(
    scores: _F32,  # (batch, heads, q, k)
    allowed: NDArray[np.bool_] | None,  # (batch or 1, heads or 1, q or 1, k)
    causal: int,
    grid: tuple[float, int, int],  # (scale, zero, max_code)
    correction: int,  # 0 none, 1 table, 2 row sum
    table: _F64,  # (heads or 1, k + 1 or 1), by head and number of allowed keys
    out: _F32 | _U8 | NDArray[np.uint16],  # as scores, written: values (may be scores), or codes
    corrections: _F32 | None,  # (batch * heads * q,), written
    threads: int,
    /,
) -> tuple[int, int]: ...  # first row that was refused or -1, number of empty rows
def softmax_statistics(
    P: _F32,  # (batch, heads, q, k)
    allowed: NDArray[np.bool_] | None,  # (batch or 1, heads or 1, q or 1, k)
    queries: NDArray[np.bool_] | None,  # (batch, q)
    causal: int,
    grid: tuple[float, int, int],  # (scale, zero, max_code)
    tolerance: float,  # of the sum of a row
    sums: _I64,  # (heads, 240, 4), written
    threads: int,
    /,
) -> tuple[int, int]: ...  # first row that was refused or -1, number of empty rows
def softmax_exp(
    x: _F32,  # (n,), not above 0
    out: _F32,  # (n,), written
    threads: int,
    /,
) -> None: ...
def energy(
    reference: _F32 | _F64,  # (rows, n)
    quantized: _F32 | _F64,  # (rows, n), of the same type
    out: _F64,  # (rows, 2), written
    threads: int,
    /,
) -> None: ...
def energy_columns(
    reference: _F32 | _F64,  # (rows, n)
    quantized: _F32 | _F64,  # (rows, n), of the same type
    out: _F64,  # (2, n), written
    threads: int,
    /,
) -> None: ...
def use_scipy_blas() -> bool: ...  # False where SciPy offers no fitting ssyrk and spotrf
def use_builtin_blas() -> None: ...
def set_cpu_level(name: str, /) -> str: ...  # "" means the best; ValueError
def cpu_supports(name: str, /) -> bool: ...
def config() -> tuple[str, str, int, bool]: ...  # level, blas, threads, openmp
