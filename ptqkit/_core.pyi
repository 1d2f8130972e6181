"""The compiled core: positional arguments only, C-contiguous arrays, nothing converted.

Sizes: rows = outputs, n = inputs, groups = n / group_size, tokens = calibration tokens. ``threads``
lies in [0, 1024]: 0 means automatic, and the core uses no more than there are processors.

All functions raise TypeError or ValueError if an argument does not fit, KeyboardInterrupt if
interrupted, and MemoryError. Numbers are int, float or NumPy scalars: objects with ``__index__`` or
``__float__`` are refused.

The GIL is released during the work. Index arrays (``order``, ``rows``) are copied and checked
beforehand, ``g_idx`` is copied out at the end if the call succeeds, and NumPy refuses to resize any
array of a call until it returns. An output that shares memory with another array (unless it is said
that it may), or an array that another thread writes meanwhile, gives wrong numbers but no crash.
What no caller may do meanwhile: free the memory below an array (close a mapped file, release a
foreign buffer, ``__setstate__``), or, in a build of Python without the GIL, set the shape, strides
or dtype of an array.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

_F32: TypeAlias = NDArray[np.float32]
_F64: TypeAlias = NDArray[np.float64]
_U8: TypeAlias = NDArray[np.uint8]
_U16: TypeAlias = NDArray[np.uint16]
_U32: TypeAlias = NDArray[np.uint32]
_I8: TypeAlias = NDArray[np.int8]
_I16: TypeAlias = NDArray[np.int16]
_I32: TypeAlias = NDArray[np.int32]
_I64: TypeAlias = NDArray[np.int64]
_Bool: TypeAlias = NDArray[np.bool_]
_Values: TypeAlias = _F32 | _U16  # uint16: the bits of bfloat16
_Tokens: TypeAlias = _F32 | NDArray[np.float16] | _U16  # uint16: the bits of bfloat16

# GridSpec: max_code, symmetric, method (0 min-max, 1 MSE, 2 Hessian), steps, candidates,
# scale_type (0 float32, 1 float16, 2 bfloat16), min_zero, min_shrink, norm
_Grid: TypeAlias = tuple[int, int, int, int, int, int, int, float, float]
# Block of a decoder: dtype (0 float32, 2 bfloat16), hidden, inner, heads, kv_heads, head_dim, eps,
# head_eps
_Block: TypeAlias = tuple[int, int, int, int, int, int, float, float]
# Its layers: (mode, bias, words, order, bits, scales, zeros, starts) of packed_matmul with int8 as
# mode, or (2, bias, words, w_scales, w_zeros, w_sums, grid, x_scale or None, x_zero + 128) of
# int8_linear; bias (outputs,) of the block's dtype or None
_Layer: TypeAlias = tuple[object, ...]
# SolverOptions: group_size, block_size, static_groups, groups_follow_order, feedback,
# refine_passes, refit_rounds, shift
_SolverOptions: TypeAlias = tuple[int, int, int, int, int, int, int, float]
# group_size, per_tensor, activation_max_code (0: as they are), activation_symmetric,
# activation_per_tensor
_EqualizationOptions: TypeAlias = tuple[int, int, int, int, int]
_SignedGrid: TypeAlias = tuple[int, bool, bool, bool]  # bits, symmetric, narrow, bf16
_SoftmaxGrid: TypeAlias = tuple[float, int, int]  # scale, zero, max_code

def hessian_update(
    S: _F32,  # (n, n), upper triangle added to
    X: _Tokens,  # (tokens, n), rows may be strided
    dtype: int,  # 0 float32, 1 float16, 2 bfloat16 (bits as uint16)
    rows: _I64 | None,  # (count,), tokens that count
    threads: int,
    /,
) -> None: ...  # FloatingPointError (NaN or Inf), OverflowError: S is left as it was
def hessian_finish(
    S: _F32,  # (n, n), upper triangle read
    out: _F32,  # (n, n), written: factor * S, symmetric; may be S
    factor: float,
    threads: int,
    /,
) -> None: ...
def cross_update(
    S: _F32,  # (m, n), added to
    A: _Tokens,  # (tokens, m), rows may be strided, as those of B and X
    B: _Tokens,  # (tokens, m)
    X: _Tokens,  # (tokens, n)
    dtype: int,  # of all three: 0 float32, 1 float16, 2 bfloat16 (bits as uint16)
    rows: _I64 | None,  # (count,), tokens that count
    threads: int,
    /,
) -> None: ...  # FloatingPointError (NaN or Inf), OverflowError: S is left as it was
def moved_outputs(
    Y: _F32,  # (tokens, n), rows may be strided, as those of X
    X: _F32,  # (tokens, n)
    W: _F32,  # (m, n)
    out: _F32,  # (tokens, m), added to: (Y - X) W^T
    threads: int,
    /,
) -> None: ...
def channel_ranges(
    X: _Tokens,  # (tokens, n), rows may be strided
    dtype: int,  # 0 float32, 1 float16, 2 bfloat16 (bits as uint16)
    rows: _I64 | None,  # (count,), tokens that count; at least one
    minimum: _F32,  # (n,), written
    maximum: _F32,  # (n,), written
    sum: _F64,  # (n,), written
    threads: int,
    /,
) -> None: ...  # FloatingPointError: NaN or Inf, nothing is written
def equalization_scales(
    rx: _F64,  # (n,), not negative
    rw: _F64,  # (n,), not negative
    alpha: float,  # in [0, 1]
    lowest: float,
    highest: float,
    scales: _F32,  # (n,), written
    /,
) -> None: ...
def equalization_errors(
    X: _F32,  # (tokens, n)
    weights: tuple[_F32, ...],  # (rows, n) each
    scales: _F32,  # (candidates, n), positive
    options: _EqualizationOptions,
    grid: _Grid,  # method 0
    minimum: _F32,  # (n,)
    maximum: _F32,  # (n,)
    errors: _F64,  # (candidates,), written
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
    x: _F32,  # (rows, n)
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
def target_correction(
    W: _F32 | None,  # (rows, n)
    F: _F64 | None,  # (n, n), given with W
    D: _F64 | None,  # (rows, n)
    H: _F32,  # (n, n)
    shift: _F64,  # (n,), added to its diagonal
    below: int,  # 1, for rows = n: D L^-T, L L^T = H + shift, keeps what is below its diagonal
    out: _F64,  # (rows, n), written
    threads: int,
    /,
) -> int: ...  # -1, or the pivot that failed
def gptq(
    W: _F32,  # (rows, n)
    H: _F32,  # (n, n), undamped
    R: _F32,  # (n, n), of factor() with the same order
    order: _I64,  # (n,), a permutation; keeps groups together that get their grids on the way
    options: _SolverOptions,
    grid: _Grid,
    codes: _U8,  # (rows, n), written
    scales: _F32,  # (rows, groups), written
    zeros: _U8,  # (rows, groups), written
    g_idx: _I32,  # (n,), written; may share memory with order
    history: _F64,  # (1 + refine_passes + 2 * refit_rounds, rows), written
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
def best_paths(
    W: _F32,  # (rows, n)
    H: _F32,  # (n, n), undamped
    R: _F32,  # (n, n), of factor() with the same order
    order: _I64,  # (n,), a permutation
    g_idx: _I32,  # (n,), from 0 to groups - 1
    scales: _F32,  # (rows, groups)
    zeros: _U8,  # (rows, groups)
    chosen: _I64,  # (count,), rows, each once
    options: tuple[int, int],  # max_code, paths (1 to 16)
    codes: _U8,  # (rows, n), read and written
    objective: _F64,  # (rows,), read and written
    threads: int,
    /,
) -> None: ...
def couple_rows(
    W: _F32,  # (rows, n)
    H: _F32,  # (n, n), undamped
    B: _F64,  # (rows, rows), symmetric
    order: _I64,  # (n,), a permutation
    g_idx: _I32,  # (n,), from 0 to groups - 1
    scales: _F32,  # (rows, groups)
    zeros: _U8,  # (rows, groups)
    options: tuple[int, int],  # max_code, passes
    codes: _U8,  # (rows, n), read and written
    objective: _F64,  # (rows,), written
    threads: int,
    /,
) -> None: ...
def couple_block(
    S: _F32,  # (runs * columns, rows), B E H
    B: _F32 | None,  # (runs * rows, rows), a symmetric matrix per run; None: rows alone
    H: _F32,  # (columns, columns)
    scales: _F32,  # (runs * columns, rows)
    max_code: int,
    codes: _U8,  # (runs * columns, rows), read and written
    moved: _F32,  # (runs * columns, rows), written
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
def codes_on_grid(
    W: _F32,  # (rows, n)
    scales: _F32,  # (rows,)
    zeros: _U8,  # (rows,)
    max_code: int,
    codes: _U8,  # (rows, n), written
    threads: int,
    /,
) -> None: ...
def signed_grid(low: float, high: float, grid: _SignedGrid, /) -> tuple[float, int]: ...
def activation_range(
    X: _Tokens,  # (tokens, n)
    dtype: int,  # 0 float32, 1 float16, 2 bfloat16
    skip: _Bool | None,  # (n,), columns that count as zeros
    threads: int,
    /,
) -> tuple[float, float]: ...  # FloatingPointError: NaN or Inf, here and below
def activations_quantize(
    X: _Tokens,  # (tokens, n)
    dtype: int,
    skip: _Bool | None,  # (n,)
    grid: _SignedGrid,
    per_token: int,  # 1: a grid is fitted to each token; 0: the one grid is read
    codes: _I8 | _I16,  # (tokens, n), written; int16 above 8 bits
    scales: _F32,  # (tokens,) written, or (1,) read
    zeros: _I16,  # the same
    threads: int,
    /,
) -> None: ...
def outlier_columns(
    X: _Tokens,  # (tokens, n)
    dtype: int,
    threshold: float,
    outliers: _Bool,  # (n,), written
    threads: int,
    /,
) -> None: ...
def bias_correction(
    W: _F32 | _F64,  # (rows, n)
    W_hat: _F32 | _F64,  # (rows, n), of the same type
    mean: _F64,  # (n,)
    out: _F64,  # (rows,), written
    threads: int,
    /,
) -> None: ...
def int8_matmul(
    x: _I8,  # (tokens, n)
    x_scales: _F32,  # (tokens,) or (1,)
    x_zeros: _I8,  # the same
    w: _I8,  # (outputs, n)
    w_scales: _F32,  # (outputs,) or (1,)
    w_zeros: _I8,  # the same
    x_float: _F32 | None,  # (tokens, columns), multiplied in float32 and added
    w_float: _F32 | None,  # (columns, outputs)
    y: _F32,  # (tokens, outputs), written
    threads: int,
    /,
) -> None: ...
def int8_pack(
    codes: _U8 | _I8,  # (outputs, n); to int8 128 is added
    words: _U32,  # (ceil(outputs / 16), ceil(n / 4), 16), written
    sums: _I32,  # (outputs,), written: of codes less 128
    threads: int,
    /,
) -> None: ...
def int8_linear(
    X: _Tokens,  # (tokens, n), rows may lie apart
    dtype: int,
    grid: _SignedGrid,  # at most 8 bits
    x_scales: _F32 | None,  # (1,), or None: a grid is fitted to each token
    x_zeros: _I8 | None,  # the same
    words: _U32,  # of int8_pack
    sums: _I32 | None,  # of int8_pack; None: summed when needed
    w_scales: _F32,  # (outputs,) or (1,)
    w_zeros: _F32,  # the same, of codes from 0 to 255
    bias: _F32 | None,  # (outputs,)
    y: _F32,  # (tokens, outputs), written
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
def words_pack(
    codes: _U8,  # (outputs, inputs)
    words: _U32,  # (panels, lane words, 16), written
    order: _I32 | None,  # (places,), the input at each place; -1: padding
    bits: int,  # 2, 3, 4 or 8
    threads: int,
    /,
) -> None: ...
def words_unpack(
    codes: _U8,  # (outputs, inputs), written where the order has the input
    words: _U32,  # (panels, lane words, 16)
    order: _I32 | None,  # (places,)
    bits: int,
    threads: int,
    /,
) -> None: ...
def packed_dequantize(
    out: _F32,  # (outputs, inputs), written where the order has the input
    words: _U32,  # (panels, lane words, 16)
    order: _I32 | None,  # (places,)
    bits: int,
    scales: _Tokens,  # (panels, groups, 16)
    zeros: _U8,  # (panels, groups, 16)
    starts: _I32,  # (groups + 1,), first place of each group
    threads: int,
    /,
) -> None: ...
def packed_matmul(
    X: _Tokens,  # (tokens, inputs), rows may be strided
    dtype: int,  # 0 float32, 1 float16, 2 bfloat16 (bits as uint16)
    int8: int,  # 1: X is quantized to int8 per token and group
    y: _F32,  # (tokens, outputs), written
    words: _U32,  # (panels, lane words, 16)
    order: _I32 | None,  # (places,)
    bits: int,
    scales: _Tokens,  # (panels, groups, 16)
    zeros: _U8,  # (panels, groups, 16)
    starts: _I32,  # (groups + 1,)
    threads: int,
    /,
) -> None: ...  # FloatingPointError: NaN or Inf in X, with int8
def decoder_begin(
    block: _Block,
    x: _Values,  # (hidden,)
    cos: _Values,  # (head_dim,)
    sin: _Values,  # (head_dim,)
    norm: _Values,  # (hidden,)
    q_norm: _Values | None,  # (head_dim,)
    k_norm: _Values | None,  # (head_dim,)
    q: _Layer,
    k: _Layer,
    v: _Layer,
    query: _F32,  # (heads, head_dim), written
    key: _Values,  # (kv_heads, head_dim), written
    value: _Values,  # (kv_heads, head_dim), written
    threads: int,
    /,
) -> None: ...  # FloatingPointError: NaN or Inf in an input that a layer rounds
def decoder_end(
    block: _Block,
    query: _F32,  # (heads, head_dim)
    keys: _Values,  # (kv_heads, tokens, head_dim)
    values: _Values,  # (kv_heads, tokens, head_dim)
    allowed: _U8 | None,  # (tokens,)
    scaling: float,
    x: _Values,  # (hidden,)
    norm: _Values,  # (hidden,)
    o: _Layer,
    gate: _Layer,
    up: _Layer,
    down: _Layer,
    y: _Values,  # (hidden,), written
    threads: int,
    /,
) -> None: ...  # ValueError: every key is hidden
def decoder_blocks(
    block: _Block,
    x: _Values,  # (hidden,)
    cos: _Values,  # (head_dim,)
    sin: _Values,  # (head_dim,)
    blocks: tuple[tuple[object, ...], ...],  # norm, q_norm, k_norm, last_norm, scaling, layers ...
    allowed: _U8 | None,  # (tokens + 1,)
    new: _Values,  # (blocks, 2, kv_heads * head_dim), written
    y: _Values,  # (blocks, hidden), written
    threads: int,
    /,
) -> None: ...  # ValueError: every key is hidden
def softmax_quantize(
    scores: _F32,  # (batch, heads, q, k)
    allowed: _Bool | None,  # (batch or 1, heads or 1, q or 1, k)
    causal: int,
    grid: _SoftmaxGrid,
    correction: int,  # 0 none, 1 table, 2 row sum, 3 code sum (not with of 0)
    table: _F64,  # (heads or 1, k + 1 or 1), by head and number of allowed keys
    out: _F32 | _U8 | _U16,  # as scores, written: values (may be scores), or codes
    corrections: _F32 | None,  # (batch * heads * q,), written
    scales: _F32 | None,  # (batch * heads * q,), written: of a row's codes
    of: int,  # the grid's: 0 probabilities, 1 e = exp(x - the row's largest x), 2 sqrt(e)
    threads: int,
    /,
) -> tuple[int, int]: ...  # first row that was refused or -1, number of empty rows
def softmax_statistics(
    P: _F32,  # (batch, heads, q, k)
    allowed: _Bool | None,  # (batch or 1, heads or 1, q or 1, k)
    queries: _Bool | None,  # (batch, q)
    causal: int,
    grid: _SoftmaxGrid,
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
def activation_statistics(
    X: _Tokens,  # (tokens, n), rows may be strided
    dtype: int,  # 0 float32, 1 float16, 2 bfloat16 (bits as uint16)
    rows: _I64 | None,  # (count,), tokens that count, at least one
    bits: int,  # of the grids, 2 to 16
    threshold: float,  # magnitude of an outlier
    absmax: float,  # of the tensor's grid; 0: that of X
    sums: _F64,  # (6,), written: sums over tokens, see ptq.h
    most: _F32,  # (n,), written: largest magnitudes
    counts: _I64,  # (n,), written: tokens with |x| >= threshold
    histogram: _I64,  # (8192,), written: by the upper 13 bits of |x|
    largest: _F32,  # (3,), written
    places: _I64,  # (3, 2), written: token and channel of each
    threads: int,
    /,
) -> None: ...  # FloatingPointError: NaN or Inf; nothing is written
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
def use_scipy_blas() -> bool: ...  # False where SciPy offers no fitting routines
def use_builtin_blas() -> None: ...
def set_cpu_level(name: str, /) -> str: ...  # "" means the best; ValueError
def cpu_supports(name: str, /) -> bool: ...
def config() -> tuple[str, str, int, bool]: ...  # level, blas, threads, openmp
