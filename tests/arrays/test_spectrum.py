"""Spectral norm and stable rank against the full singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest

import ptqkit
import ptqkit.reference as reference
from ptqkit.arrays import spectrum


def _matrix(rows, n, kind, seed=0):
    rng = np.random.default_rng([seed, rows, n])
    W = rng.normal(size=(rows, n))
    if kind == "outlier":
        W[:, :: max(2, n // 3)] *= 30
    if kind == "rank 1":
        W = np.outer(W[:, 0], W[0])
    if kind == "equal":  # the two largest singular values are the same
        W = np.linalg.qr(W if rows >= n else W.T)[0]
        W = W if rows >= n else W.T
    return W.astype(np.float32)


@pytest.mark.parametrize("lanczos", [False, True])
@pytest.mark.parametrize("kind", ["white", "outlier", "rank 1", "equal"])
@pytest.mark.parametrize("shape", [(2, 3), (17, 5), (64, 64), (40, 200), (300, 70)])
def test_against_the_decomposition(shape, kind, lanczos, monkeypatch):
    if lanczos:
        monkeypatch.setattr(spectrum, "_EXACT", 1)
    W = _matrix(*shape, kind)
    expected = reference.spectral_norm(W)
    # The stated bounds; the decomposition itself is good to some 1e-15.
    np.testing.assert_allclose(ptqkit.spectral_norm(W), expected, rtol=5e-9 if lanczos else 1e-13)
    np.testing.assert_allclose(ptqkit.stable_rank(W), reference.stable_rank(W), rtol=2e-8)
    np.testing.assert_allclose(
        ptqkit.stable_rank(W, ptqkit.spectral_norm(W)), ptqkit.stable_rank(W), rtol=1e-14
    )
    np.testing.assert_allclose(ptqkit.spectral_norm(W.T), ptqkit.spectral_norm(W), rtol=1e-8)


def test_beyond_the_exact_size():
    W = _matrix(1100, 1030, "white")
    np.testing.assert_allclose(ptqkit.spectral_norm(W), reference.spectral_norm(W), rtol=5e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_scale_overflows(scale):
    W = _matrix(20, 30, "white")
    np.testing.assert_allclose(
        ptqkit.spectral_norm(W * np.float32(scale)), reference.spectral_norm(W) * scale, rtol=1e-6
    )


def test_one_row_and_one_column_and_zeros():
    w = np.arange(1, 9, dtype=np.float32)[None]
    for W in (w, w.T):
        np.testing.assert_allclose(
            ptqkit.spectral_norm(W), np.linalg.norm(w.astype(np.float64)), rtol=1e-14
        )
        np.testing.assert_allclose(ptqkit.stable_rank(W), 1.0, rtol=1e-14)
    assert ptqkit.spectral_norm(w * 0) == 0 and ptqkit.stable_rank(w * 0) == 0


def test_dtypes():
    torch = pytest.importorskip("torch")
    W = _matrix(30, 20, "white")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensor = torch.from_numpy(W).to(dtype)
        expected = reference.spectral_norm(tensor.float().numpy())
        np.testing.assert_allclose(ptqkit.spectral_norm(tensor), expected, rtol=1e-13)


def test_what_is_refused():
    for bad, error in (
        (np.full((2, 2), np.nan, np.float32), ValueError),
        (np.ones((2, 2), int), TypeError),
        (np.ones(4), ValueError),
    ):
        with pytest.raises(error, match="W"):
            ptqkit.spectral_norm(bad)
