"""Repeated calls, with and without errors, leave no memory and no references behind."""

from __future__ import annotations

import os

import pytest

COMMON = """
import gc, resource, sys
import numpy as np, ptqkit
import ptqkit._core as _core
from ptqkit.arrays.drift import moved_outputs
rng = np.random.default_rng(0)
n = 128
X = rng.normal(size=(300, n)).astype(np.float32)
W = rng.normal(size=(100, n)).astype(np.float32)
hessian = ptqkit.Hessian(n)
hessian.update(X)
H = hessian.matrix
ranges = ptqkit.ChannelRanges(n)
ranges.update(X)
bad = H.copy()
bad[0, 0] = -1e6
nan = np.full_like(W, np.nan)
codes = rng.integers(0, 8, W.shape, dtype=np.uint8)
signed = ptqkit.quantize_activations(X, symmetric=False)
ones = np.ones((len(W), 1), np.float32)
packed = ptqkit.PackedMatrix.pack(codes, ones, ones.astype(np.uint8), bits=3)
LAYER = (0, None, *ptqkit.PackedMatrix.pack(codes[:8, :8], ones[:8], ones[:8].astype(np.uint8),
                                            bits=3)._held)
EIGHT, FOUR = np.ones(8, np.float32), np.ones((2, 4), np.float32)
BEGIN = [(0, 8, 8, 2, 2, 4, 1e-5, 0.0), EIGHT, EIGHT[:4], EIGHT[:4], EIGHT, None, None]
BEGIN += [LAYER, LAYER, LAYER, FOUR, FOUR.copy(), FOUR.copy(), 0]
def fails(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception:
        return
    raise SystemExit("no error")
CALLS = {
    "hessian": lambda: (ptqkit.Hessian(n).update(X), hessian.copy().merge(hessian)),
    "hessian masked": lambda: ptqkit.Hessian(n).update(X, np.arange(300) % 3 > 0),
    "hessian errors": lambda: (fails(hessian.update, X * np.nan), fails(hessian.update, X[:, :3])),
    "ranges": lambda: (ptqkit.ChannelRanges(n).update(X, np.arange(300) % 3 > 0), ranges.copy()),
    "ranges errors": lambda: (fails(ranges.update, X * np.nan), fails(ranges.update, X[:, :3])),
    "statistics": lambda: (
        ptqkit.ActivationStatistics(n).update(X, np.arange(300) % 3 > 0),
        fails(ptqkit.ActivationStatistics(n).update, X * np.nan),
        fails(_core.activation_statistics, *[W] * 13),
    ),
    "equalization": lambda: ptqkit.search_equalization(
        [W, W], X[:40], ranges, per_tensor=True, activation_bits=8, alphas=[0.3]
    ),
    "equalization errors": lambda: (
        fails(ptqkit.search_equalization, nan, X, ranges),
        fails(ptqkit.search_equalization, W * 1e30, X * 1e30, ranges, alphas=[]),
        fails(_core.equalization_errors, *[W] * 9),
        fails(_core.equalization_errors, X, (W, W[0]), *[W] * 7),
        fails(_core.equalization_scales, *[W] * 6), fails(_core.channel_ranges, *[W] * 7),
    ),
    "factor": lambda: ptqkit.factorize(H, order="group-act"),
    "factor errors": lambda: fails(ptqkit.factorize, bad),
    "gptq": lambda: ptqkit.gptq(W, H, group_size=32, grid="hessian", refine_passes=1),
    "gptq refit": lambda: ptqkit.gptq(W, H, group_size=32, refit_rounds=1),
    "drift": lambda: (
        ptqkit.Drift(n, n).update(X, X, mask=np.arange(300) % 3 > 0),
        fails(ptqkit.Drift(n, n).update, X * np.nan, X),
        fails(_core.cross_update, *[X] * 7),
        moved_outputs(X @ W.T, W, X, X),
        fails(_core.moved_outputs, *[X] * 5),
    ),
    "target": lambda: (
        ptqkit.target_weights(W, H, 2.0 * H, W),
        fails(ptqkit.target_weights, W, bad, 2.0 * bad),
        fails(_core.target_correction, *[W] * 8),
    ),
    "gptq static": lambda: ptqkit.gptq(W, H, order="act", static_groups=True, grid="mse"),
    "gptq beam": lambda: (
        ptqkit.gptq(W, H, group_size=32, beam_width=4),
        fails(_core.best_paths, *[W] * 12),
    ),
    "coupled": lambda: (
        ptqkit.couple_rows(W, ptqkit.rtn(W), H, np.eye(len(W))),
        fails(_core.couple_rows, *[W] * 11),
    ),
    "gptq errors": lambda: (fails(ptqkit.gptq, nan, H), fails(ptqkit.gptq, W, bad)),
    "rtn": lambda: ptqkit.rtn(W, grid="hessian", H=H),
    "rtn errors": lambda: fails(ptqkit.rtn, W * 1e6, scale_dtype="float16", bits=2),
    "obq": lambda: ptqkit.obq(W[:2, :16], H[:16, :16]),
    "objective": lambda: ptqkit.objective(W, 0, H),
    "activations": lambda: (
        ptqkit.quantize_activations(X, outliers=ptqkit.outlier_columns(X, 3.0)),
        ptqkit.quantize_activations(X, 12, granularity="tensor", symmetric=False),
        ptqkit.activation_grid(-1.0, 2.0),
    ),
    "activation errors": lambda: (
        fails(ptqkit.quantize_activations, X * np.nan), fails(ptqkit.outlier_columns, X * np.nan),
        fails(ptqkit.quantize_activations, X * np.nan, granularity="tensor"),
        fails(_core.activations_quantize, X, 0, None, (99, 1, 0), 1, X, X, X, 0),
        fails(_core.signed_grid, 1, 2, None), fails(_core.int8_matmul, *[None] * 10),
        fails(_core.int8_pack, *[X] * 4), fails(_core.int8_linear, *[X] * 12),
    ),
    "int8": lambda: (
        ptqkit.int8_matmul(signed, ptqkit.quantize_activations(W)),
        fails(ptqkit.int8_matmul, signed, signed.codes),
    ),
    "bias correction": lambda: (
        ptqkit.bias_correction(W, W, X[0]), fails(ptqkit.bias_correction, W, nan, X[0]),
    ),
    "rtn per tensor": lambda: ptqkit.rtn(W, group_size=None, per_tensor=True),
    "packed": lambda: (
        packed.matmul(X), packed.matmul(X, activations="int8"), packed.dequantize(),
        packed.unpack(), fails(packed.matmul, X[:, 1:]), fails(_core.packed_matmul, *[None] * 11),
    ),
    "decoder": lambda: (
        _core.decoder_begin(*BEGIN), fails(_core.decoder_begin, *BEGIN[:8], None, *BEGIN[9:]),
        fails(_core.decoder_begin, *[None] * 14), fails(_core.decoder_end, *[None] * 14),
    ),
    "packing": lambda: ptqkit.unpack_rows(ptqkit.pack_rows(codes, 3), 3, n),
    "core errors": lambda: (
        fails(_core.rtn), fails(_core.rtn, *[None] * 8), fails(_core.gptq, *[W] * 12),
        fails(_core.factor, H, np.zeros(n, int), np.zeros(n), H.copy(), 0),
        fails(_core.finite_check, W.astype(">f4"), 0), fails(_core.objective, W, H, 1, 1),
        fails(_core.set_cpu_level, "none"), fails(_core.pack, codes, 99, codes, 1),
    ),
    "config": lambda: (ptqkit.show_config(), _core.use_scipy_blas(), _core.use_builtin_blas()),
}
"""

MEMORY = (
    COMMON
    + """
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, call in CALLS.items():
    for _ in range(20):
        call()
    gc.collect()
    before = peak()
    for _ in range(60):
        call()
    grown = peak() - before
    # an array of 100 x 128 floats lost in each call would be 3 MiB
    assert grown < 1500, f"{name}: {grown} KiB"
"""
)

REFERENCES = (
    COMMON
    + """
if not hasattr(sys, "gettotalrefcount"):
    # not float64: in NumPy 2.4 np.zeros(n) itself takes a reference to that dtype in each call
    objects = [W, H, X, bad, nan, codes, None, np.dtype(np.float32), np.dtype(">f4"),
               np.dtype(np.uint8), np.dtype(np.int64), np.ndarray, KeyboardInterrupt, ValueError]
for name, call in CALLS.items():
    for _ in range(10):
        call()
    grown, moved = [], []
    # What grows or is freed once in the beginning is no leak: that takes a block or a reference a
    # call in every window.
    while len(grown) < 40 and (not grown or grown[-1] >= 15 or moved[-1][0] >= 15):
        gc.collect()
        before, blocks = [sys.getrefcount(o) for o in objects], sys.getallocatedblocks()
        for _ in range(20):
            call()
        gc.collect()
        grown.append(sys.getallocatedblocks() - blocks)
        after = [sys.getrefcount(o) for o in objects]
        moved.append(max((abs(b - a), str(type(o))) for o, a, b in zip(objects, before, after)))
    assert min(grown) < 15 and min(moved)[0] < 15, (name, grown, moved)
"""
)


@pytest.mark.parametrize("blas", ["builtin", "scipy"])
def test_memory_does_not_grow(script, blas):
    pytest.importorskip("resource")
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer holds back freed memory, so the resident size grows")
    script(MEMORY, timeout=180, PTQKIT_BLAS=blas, OMP_WAIT_POLICY="passive")


def test_references_do_not_grow(script):
    pytest.importorskip("resource")
    script(REFERENCES, timeout=180, OMP_WAIT_POLICY="passive")
