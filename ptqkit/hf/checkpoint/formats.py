"""Integer layouts of the checkpoint formats, on NumPy arrays.

All of them are one dense little-endian bit stream (:func:`ptqkit.pack_rows`) seen from
different sides; the ternary layout, five base-3 digits a byte, is the exception.

================== ======================== ===============================================
format             array                    layout
================== ======================== ===============================================
compressed-tensors weight_packed            int32 (out, ceil(in*b/32)), stream along ``in``
compressed-tensors weight_zero_point        int32 (ceil(out*b/32), groups), along ``out``
GPTQ               qweight                  int32 (in*b/32, out), stream along ``in``
GPTQ               qzeros                   int32 (groups, out*b/32), stream along ``out``
ptqkit             weight, zero_points      uint8, rows of ``b*ceil(n/8)`` bytes
ptqkit, ternary    weight, zero_points      uint8, rows of ``ceil(n/5)`` bytes
================== ======================== ===============================================
"""

from __future__ import annotations

import numpy as np

from ptqkit.arrays.packing import pack_rows, unpack_rows

__all__ = [
    "compressed_pack",
    "compressed_pack_zeros",
    "compressed_unpack",
    "compressed_unpack_zeros",
    "gptq_pack_weight",
    "gptq_pack_zeros",
    "gptq_unpack_weight",
    "gptq_unpack_zeros",
    "native_pack",
    "native_row_bytes",
    "native_unpack",
]

TRITS_PER_BYTE = 5
_TRIT_WEIGHTS = 3 ** np.arange(TRITS_PER_BYTE)


def _as_int32(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.int32)


def _as_uint32(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.uint32)


def compressed_pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned codes (rows, n) into int32 (rows, ceil(n*bits/32)).

    compressed-tensors writes ``q + 2**(bits-1)`` for a signed ``q``: that is the unsigned code.
    """
    return _as_int32(pack_rows(np.ascontiguousarray(codes, dtype=np.uint8), bits))


def compressed_unpack(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Inverse of :func:`compressed_pack`: uint8 codes (rows, columns)."""
    return unpack_rows(_as_uint32(packed), bits, columns)


def compressed_pack_zeros(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned zero-points (out, groups) into int32 (ceil(out*bits/32), groups)."""
    return np.ascontiguousarray(compressed_pack(zeros.T, bits).T)


def compressed_unpack_zeros(packed: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Inverse of :func:`compressed_pack_zeros`: uint8 zero-points (rows, groups)."""
    return np.ascontiguousarray(compressed_unpack(packed.T, bits, rows).T)


def gptq_pack_weight(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned codes (out, in) into ``qweight`` int32 (in*bits/32, out).

    Raises
    ------
    ValueError
        If a column of ``qweight`` does not fill whole 32-bit words.
    """
    if codes.shape[1] * bits % 32:
        raise ValueError(
            f"the GPTQ format needs in_features * bits to be a multiple of 32, "
            f"not {codes.shape[1]} * {bits}"
        )
    return np.ascontiguousarray(compressed_pack(codes, bits).T)


def gptq_unpack_weight(qweight: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of :func:`gptq_pack_weight`: uint8 codes (out, in)."""
    return compressed_unpack(qweight.T, bits, qweight.shape[0] * 32 // bits)


def gptq_pack_zeros(zeros: np.ndarray, bits: int, version: int) -> np.ndarray:
    """Pack zero-points (out, groups) into ``qzeros`` int32 (groups, out*bits/32).

    Parameters
    ----------
    version : {1, 2}
        1 (``"gptq"``) stores ``zero - 1``, 2 (``"gptq_v2"``) stores ``zero``.

    Raises
    ------
    ValueError
        If version 1 is asked to carry a zero-point of 0, which readers turn into a carry that
        shifts the neighbouring zero-points, or if the rows do not fill whole 32-bit words.
    """
    if version not in (1, 2):
        raise ValueError(f"version must be 1 or 2, not {version!r}")
    if zeros.shape[0] * bits % 32:
        raise ValueError(
            f"the GPTQ format needs out_features * bits to be a multiple of 32, "
            f"not {zeros.shape[0]} * {bits}"
        )
    if version == 1 and zeros.size and zeros.min() < 1:
        raise ValueError(
            "version 1 of the GPTQ format cannot carry a zero-point of 0: "
            "write version 2 or quantize with min_zero_point=1"
        )
    stored = zeros.T.astype(np.int16) - (1 if version == 1 else 0)
    return compressed_pack(stored, bits)


def gptq_unpack_zeros(qzeros: np.ndarray, bits: int, version: int) -> np.ndarray:
    """Inverse of :func:`gptq_pack_zeros`: uint8 zero-points (out, groups).

    Raises
    ------
    ValueError
        If version 1 holds the largest stored value: writers disagree whether it means a
        zero-point of 0 or of ``2**bits``.
    """
    if version not in (1, 2):
        raise ValueError(f"version must be 1 or 2, not {version!r}")
    stored = compressed_unpack(qzeros, bits, qzeros.shape[1] * 32 // bits)
    if version == 1:
        if stored.size and stored.max() == (1 << bits) - 1:
            raise ValueError(
                f"qzeros of GPTQ version 1 holds {(1 << bits) - 1}, which is a zero-point of 0 for "
                f"some writers and of {1 << bits} for others"
            )
        stored = stored + np.uint8(1)
    return np.ascontiguousarray(stored.T)


def native_row_bytes(columns: int, bits: int | str) -> int:
    """Bytes of one packed row of ``columns`` codes in ptqkit's own format."""
    if bits == "ternary":
        return -(-columns // TRITS_PER_BYTE)
    return int(bits) * -(-columns // 8)


def _pad_columns(codes: np.ndarray, multiple: int) -> np.ndarray:
    extra = -codes.shape[1] % multiple
    return np.pad(codes, ((0, 0), (0, extra))) if extra else codes


def native_pack(codes: np.ndarray, bits: int | str) -> np.ndarray:
    """Pack unsigned codes (rows, n) into uint8 (rows, native_row_bytes(n, bits)).

    Rows are padded to whole bytes of five ternary digits, or to whole blocks of eight codes
    (``bits`` bytes), so that a reader can unpack by strides alone.
    """
    if bits == "ternary":
        digits = _pad_columns(codes, TRITS_PER_BYTE)
        digits = digits.reshape(len(codes), digits.shape[1] // TRITS_PER_BYTE, TRITS_PER_BYTE)
        packed = np.zeros(digits.shape[:2], dtype=np.uint8)
        for place, weight in enumerate(_TRIT_WEIGHTS):
            packed += digits[:, :, place] * np.uint8(weight)
        return packed
    padded = np.ascontiguousarray(_pad_columns(codes, 8), dtype=np.uint8)
    words = pack_rows(padded, int(bits)).astype("<u4", copy=False)
    stream = np.ascontiguousarray(words).view(np.uint8)
    return np.ascontiguousarray(stream[:, : native_row_bytes(codes.shape[1], bits)])


def native_unpack(packed: np.ndarray, bits: int | str, columns: int) -> np.ndarray:
    """Inverse of :func:`native_pack`: uint8 codes (rows, columns)."""
    if packed.shape[1] != native_row_bytes(columns, bits):
        raise ValueError(
            f"packed rows of {columns} codes ({bits} bits) have {native_row_bytes(columns, bits)} "
            f"bytes, not {packed.shape[1]}"
        )
    if bits == "ternary":
        digits = packed[:, :, None] // _TRIT_WEIGHTS.astype(np.uint8) % np.uint8(3)
        return np.ascontiguousarray(digits.reshape(len(packed), -1)[:, :columns])
    stream = np.ascontiguousarray(np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4))))
    words = stream.view("<u4").astype(np.uint32, copy=False)
    whole = 8 * -(-columns // 8)
    return np.ascontiguousarray(unpack_rows(words, int(bits), whole)[:, :columns])
