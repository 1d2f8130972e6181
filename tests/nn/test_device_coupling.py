"""Rows that make up for each other's errors, column by column, against its twin and the core's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.core_cases import layer

import ptqkit
from ptqkit.nn import device_descent
from ptqkit.nn.device_coupling import couple_rows_on
from ptqkit.nn.device_matrix import matrix_on

RUNS = [slice(0, 20), slice(20, 40), slice(44, 52)]


def moments(rows, seed):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(4 * rows, rows)) @ rng.normal(size=(rows, rows))
    return g.T @ g


PARTS = [(rows, moments(rows.stop - rows.start, i)) for i, rows in enumerate(RUNS)]


def damped(B, damping):
    return B / np.diagonal(B).mean() + damping * np.eye(len(B))


def coupled(W, q, H, parts, **options):
    start = matrix_on(torch.device("cpu"), q)
    return couple_rows_on(torch.tensor(W), start, H, parts, **options).finish()


def loss(W, H, q, damping=0.1):
    E = W.astype(np.float64) - q.dequantize(np.float64)
    return [
        float(((damped(B, damping) @ E[r] @ H.astype(np.float64)) * E[r]).sum()) for r, B in PARTS
    ]


def twin(W, q, H, rows, B, passes, damping):
    """The descent in float64, of one run."""
    B, H = damped(B, damping), H.astype(np.float64)
    scale, zero = (v[rows][:, q.g_idx].astype(np.float64) for v in (q.scales, q.zero_points))
    codes = q.codes[rows].astype(np.float64)
    E = W[rows] - scale * (codes - zero)
    for _ in range(passes):
        for j in np.argsort(-np.diagonal(H), kind="stable"):
            if H[j, j] <= 0:
                continue
            for i in range(len(E)):
                gradient, curve = B[i] @ E @ H[:, j], B[i, i] * H[j, j]
                found = np.clip(
                    np.rint(codes[i, j] + gradient / curve / scale[i, j]), 0, q.max_code
                )
                d = scale[i, j] * (codes[i, j] - found)
                if d * (2 * gradient + d * curve) < 0:
                    codes[i, j], E[i, j] = found, E[i, j] + d
    return codes


@pytest.mark.parametrize("kind", ["correlated", "dead"])
@pytest.mark.parametrize(("size", "order"), [(None, "act"), (16, "act"), (16, "group-act")])
def test_equals_the_twin(kind, size, order, monkeypatch):
    monkeypatch.setattr(device_descent, "_COUPLED", 20)
    W, H = layer(56, 48, kind)
    q = ptqkit.gptq(W, H, bits=3, group_size=size, order=order)
    found = coupled(W, q, H, PARTS, passes=2)
    for rows, B in PARTS:
        expected = twin(W, q, H, rows, B, 2, 0.1)
        assert (expected != q.codes[rows]).any()
        assert (expected == found.codes[rows]).mean() > 0.995  # float32 rounds what lies on a tie
    left = np.r_[40:44, 52:56]
    np.testing.assert_array_equal(found.codes[left], q.codes[left])
    np.testing.assert_array_equal(found.row_objectives[:-1], q.row_objectives)
    expected = ptqkit.objective(W, found.dequantize(), H)
    np.testing.assert_allclose(found.row_objectives[-1], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["correlated", "outlier", "ill"])
def test_lowers_the_loss_as_the_core_does(kind):
    W, H = layer(56, 64, kind)
    q = ptqkit.gptq(W, H, bits=3, group_size=16, order="group-act", refine_passes=3)
    before, last = loss(W, H, q), loss(W, H, q)
    for passes in (1, 2, 3, 50):
        found = coupled(W, q, H, PARTS, passes=passes)
        now = loss(W, H, found)
        assert all(b <= a * (1 + 1e-5) for a, b in zip(last, now, strict=True))
        last = now
    for (rows, B), a, b in zip(PARTS, before, last, strict=True):
        core = ptqkit.couple_rows(W[rows], q.rows(rows.start, rows.stop), H, B, passes=50)
        E = W[rows] - core.dequantize()
        expected = float(((damped(B, 0.1) @ E @ H) * E).sum())
        assert b < 0.9 * a and b < 1.1 * expected


def test_nothing_known_leaves_all():
    W, H = layer(56, 48)
    q = ptqkit.gptq(W, H, bits=3, group_size=16)
    found = coupled(W, q, H, [])
    np.testing.assert_array_equal(found.codes, q.codes)
    with pytest.raises(ValueError, match="layer: B must have the shape"):
        coupled(W, q, H, [(RUNS[0], np.ones((20, 3)))], name="layer")
