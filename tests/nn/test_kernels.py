"""Kernels that Triton compiles, or interprets with TRITON_INTERPRET=1, against plain torch."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from ptqkit.nn.kernels import compiled, plain

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(16, 16, 1), (19, 24, 3), (37, 50, 4)]


class Draw:
    """Random tensors that hold more columns than are used."""

    def __init__(self, rows, width, groups):
        self.rows, self.width, self.groups = rows, width, groups
        self.generator = torch.Generator().manual_seed(rows)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(DEVICE)

    def whole(self, high, *shape, dtype=torch.uint8):
        found = torch.randint(0, high, shape, generator=self.generator, dtype=dtype)
        return found.to(DEVICE)

    def columns(self):
        return self.normal(self.rows, self.width + 9)[:, 5 : 5 + self.width]

    def grids(self, count):
        scales = self.normal(self.rows, count).abs() * 0.3 + 0.05
        return scales, self.whole(16, self.rows, count).float()

    def group(self):
        return self.whole(self.groups, self.width, dtype=torch.int32)

    def hessian(self):
        H = self.normal(self.width + 9, self.width + 9)
        return (H @ H.T / len(H))[3 : 3 + self.width, 3 : 3 + self.width]


def assert_near(one, two):
    """All but single codes on ties, and what follows from them in their rows."""
    assert (one == two).float().mean() > 0.99


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("feedback", [True, False])
def test_columns_are_rounded(shape, feedback):
    draw, found = Draw(*shape), []
    W, T, R = draw.columns(), draw.columns() * 0.1, draw.hessian().triu(1) * 3
    R += 2 * torch.eye(draw.width, device=DEVICE)
    scales, zeros = draw.grids(draw.groups)
    group = draw.group()
    for steps in (plain, compiled):
        sums, codes = T.clone(), torch.zeros(draw.rows, draw.width + 2, dtype=torch.uint8)
        codes = codes.to(DEVICE)
        own = codes[:, 1:-1]
        steps.quantize_columns(W, sums, R, scales, zeros, group, own, 15, feedback)
        assert not codes[:, [0, -1]].any() and len(own.unique()) > 8
        found.append((own, sums))
    assert_near(found[0][0], found[1][0])
    near = torch.isclose(found[0][1], found[1][1], atol=1e-4)
    assert near.float().mean() > 0.99


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", [None, 2.0, 2.4])
def test_candidates_are_compared(shape, norm):
    draw = Draw(*shape)
    values, weight = draw.columns(), draw.normal(draw.width).abs()
    scales, zeros = draw.grids(7)
    one, two = (
        steps.candidate_errors(
            values, scales, zeros, weight if norm is None else None, 15, norm or 1.0
        )
        for steps in (plain, compiled)
    )
    torch.testing.assert_close(one, two, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_descend(shape):
    draw, found = Draw(*shape), []
    P, H, group = draw.columns(), draw.hessian(), draw.group()
    scales, _ = draw.grids(draw.groups)
    before = draw.whole(16, draw.rows, draw.width)
    for steps in (plain, compiled):
        codes = before.clone()
        moved = steps.descend_columns(P, H, scales, group, codes, 15)
        assert (codes != before).any()
        found.append((codes, moved))
    assert_near(found[0][0], found[1][0])
    assert torch.isclose(found[0][1], found[1][1], atol=1e-4).float().mean() > 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_coupled_rows_descend(shape):
    draw, found, runs = Draw(*shape), [], 2
    B = draw.normal(runs, draw.rows, draw.rows + 20)
    B = B @ B.transpose(1, 2) / draw.rows
    B[0, 3] = B[0, :, 3] = 0  # a row without a gradient
    sums, H = draw.normal(runs, draw.width, draw.rows) * 0.3, draw.hessian()
    scales = draw.normal(runs, draw.width, draw.rows).abs() * 0.3
    before = draw.whole(16, runs, draw.width, draw.rows)
    for steps in (plain, compiled):
        codes = before.clone()
        moved = steps.couple_columns(sums, B, H, scales, codes, 15)
        assert (codes != before).any() and (codes[0, :, 3] == before[0, :, 3]).all()
        found.append((codes, moved))
    assert_near(found[0][0], found[1][0])
    assert torch.isclose(found[0][1], found[1][1], atol=1e-4).float().mean() > 0.99
