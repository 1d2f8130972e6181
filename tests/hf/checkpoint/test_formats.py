"""Integer layouts: against published vectors, by round trips, and the refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.data import SHARED

from ptqkit.arrays.packing import native_pack, native_row_bytes, native_unpack
from ptqkit.hf.checkpoint import compressed_tensors, gptq

VECTORS = SHARED / "vectors"
BITS = [2, 3, 4, 5, 6, 7, 8]


def _vector(name: str) -> Path:
    path = VECTORS / name
    if not path.exists():
        pytest.skip(f"{name} is not here (expected under ../shared/data/vectors)")
    return path


def _codes(rows: int, columns: int, bits: int | str, seed: int = 0) -> np.ndarray:
    top = 3 if bits == "ternary" else 1 << bits
    return np.random.default_rng(seed).integers(0, top, (rows, columns), dtype=np.uint8)


def test_published_compressed_tensors_cases():
    cases = json.loads(_vector("compressed_tensors_pack.json").read_text())["cases"]
    assert len(cases) == 10
    for case in cases:
        bits, values = case["num_bits"], np.array(case["values"])
        codes = (values + (1 << (bits - 1))).astype(np.uint8)
        expected = np.array(case["packed"], dtype=np.int64).astype(np.int32)
        packed = compressed_tensors.compressed_pack(codes, bits)
        assert packed.dtype == np.int32
        np.testing.assert_array_equal(packed, expected)
        unpacked = compressed_tensors.compressed_unpack(packed, bits, codes.shape[1])
        np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("case", ["k1024", "k256"])
def test_published_autogptq_layer(case):
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(_vector("autogptq_q4.safetensors"))
    found = {key.rsplit("/", 1)[-1]: v for key, v in tensors.items() if case in key}
    if not found:
        pytest.fail(f"no tensors for {case} among {sorted(tensors)}")
    codes = gptq.gptq_unpack_weight(found["qweight"], 4)
    zeros = gptq.gptq_unpack_zeros(found["qzeros"], 4, version=1)
    assert set(np.unique(zeros)) == {1}
    scales = found["scales"].astype(np.float32).T
    group = np.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
    weight = (codes.astype(np.float32) - zeros[:, group]) * scales[:, group]
    output = found["input_fitted"].astype(np.float32).reshape(-1) @ weight.T
    difference = np.abs(output - found["published_output"].astype(np.float32).reshape(-1))
    assert difference.max() < 0.004
    np.testing.assert_array_equal(gptq.gptq_pack_weight(codes, 4), found["qweight"])
    np.testing.assert_array_equal(gptq.gptq_pack_zeros(zeros, 4, 1), found["qzeros"])


@pytest.mark.parametrize("bits", [*BITS, "ternary"])
@pytest.mark.parametrize("columns", [1, 5, 7, 8, 9, 31, 32, 33, 64, 100])
def test_native_round_trip(bits, columns):
    codes = _codes(3, columns, bits)
    packed = native_pack(codes, bits)
    assert packed.shape == (3, native_row_bytes(columns, bits))
    np.testing.assert_array_equal(native_unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_native_bytes_are_the_documented_stream(bits):
    codes = _codes(2, 24, bits)
    for row, packed in zip(codes, native_pack(codes, bits), strict=True):
        stream = sum(int(c) << (i * bits) for i, c in enumerate(row))
        assert int.from_bytes(packed.tobytes(), "little") == stream


def test_ternary_bytes_are_base_three():
    codes = np.array([[1, 2, 0, 2, 1, 2]], dtype=np.uint8)
    expected = [[1 + 2 * 3 + 0 * 9 + 2 * 27 + 1 * 81, 2]]
    np.testing.assert_array_equal(native_pack(codes, "ternary"), expected)


@pytest.mark.parametrize("bits", [*BITS, "ternary"])
@pytest.mark.parametrize("columns", [5, 8, 33, 64])
def test_torch_unpacks_what_numpy_packs(bits, columns):
    torch = pytest.importorskip("torch")
    from ptqkit.nn.qlinear import unpack_codes

    codes = _codes(4, columns, bits, seed=1)
    packed = torch.from_numpy(native_pack(codes, bits))
    np.testing.assert_array_equal(unpack_codes(packed, bits, columns).numpy(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_compressed_round_trip(bits):
    codes = _codes(5, 37, bits)
    packed = compressed_tensors.compressed_pack(codes, bits)
    assert packed.shape == (5, -(-37 * bits // 32))
    np.testing.assert_array_equal(compressed_tensors.compressed_unpack(packed, bits, 37), codes)
    zeros = np.ascontiguousarray(compressed_tensors.compressed_pack(codes.T, bits).T)
    assert zeros.shape == (-(-5 * bits // 32), 37)
    np.testing.assert_array_equal(compressed_tensors.compressed_unpack_zeros(zeros, bits, 5), codes)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_round_trip(bits, version):
    codes = _codes(64, 96, bits)
    qweight = gptq.gptq_pack_weight(codes, bits)
    assert qweight.shape == (96 * bits // 32, 64) and qweight.dtype == np.int32
    np.testing.assert_array_equal(gptq.gptq_unpack_weight(qweight, bits), codes)
    zeros = np.maximum(_codes(64, 3, bits, seed=2), 1)
    qzeros = gptq.gptq_pack_zeros(zeros, bits, version)
    assert qzeros.shape == (3, 64 * bits // 32)
    np.testing.assert_array_equal(gptq.gptq_unpack_zeros(qzeros, bits, version), zeros)


def test_gptq_symmetric_zero_is_stored_as_seven():
    zeros = np.full((8, 1), 8, dtype=np.uint8)
    assert gptq.gptq_pack_zeros(zeros, 4, 1).view(np.uint32).item() == 0x77777777
    assert gptq.gptq_pack_zeros(zeros, 4, 2).view(np.uint32).item() == 0x88888888


def test_gptq_refusals():
    zeros = np.ones((8, 1), dtype=np.uint8)
    zeros[3] = 0
    with pytest.raises(ValueError, match="zero-point of 0.*version 2"):
        gptq.gptq_pack_zeros(zeros, 4, 1)
    gptq.gptq_pack_zeros(zeros, 4, 2)
    with pytest.raises(ValueError, match="zero-point of 0 for some writers"):
        gptq.gptq_unpack_zeros(np.full((1, 1), -1, dtype=np.int32), 4, 1)
    with pytest.raises(ValueError, match="version must be 1 or 2"):
        gptq.gptq_pack_zeros(zeros, 4, 3)
    with pytest.raises(ValueError, match="multiple of 32, not 9 . 4"):
        gptq.gptq_pack_weight(_codes(8, 9, 4), 4)
    with pytest.raises(ValueError, match="multiple of 32, not 7 . 4"):
        gptq.gptq_pack_zeros(np.ones((7, 1), dtype=np.uint8), 4, 2)


def test_native_unpack_checks_the_row_length():
    with pytest.raises(ValueError, match="have 3 bytes, not 4"):
        native_unpack(np.zeros((1, 4), dtype=np.uint8), 3, 8)
