"""Kernels that Triton compiles, or interprets with TRITON_INTERPRET=1, against plain torch."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from ptqkit.arrays._grids import SEARCH, grid_spec, named_grid
from ptqkit.nn import device_gptq
from ptqkit.nn.device_grids import GridFit
from ptqkit.nn.device_solver import factorize_on
from ptqkit.nn.kernels import choice, compiled, groups, plain, products
from ptqkit.recipe.recipe import Recipe

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
        moved, change = steps.descend_columns(P, H, scales, group, codes, 15)
        assert (codes != before).any()
        found.append((codes, moved))
        exact = (moved * (2 * P + moved @ H)).double().sum(1)
        torch.testing.assert_close(change.double(), exact, rtol=1e-4, atol=1e-4)
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


@pytest.mark.parametrize("shape", [(500, 128), (300, 200), (70, 30)])
def test_upper_products_are_exact_but_for_sums(shape):
    draw = Draw(*shape, 1)
    kinds = [torch.float16]
    if DEVICE.type == "cuda":  # the interpreter has no such numbers
        kinds.append(torch.bfloat16)
    for kind in kinds:
        x, total = draw.normal(*shape).to(kind), draw.normal(shape[1], shape[1])
        expected = total.double() + x.double().T @ x.double()
        products.add_upper_products(total, x)
        torch.testing.assert_close(total.double().triu(), expected.triu(), rtol=0, atol=1e-3)
        with pytest.raises(AssertionError):  # 1e-3 is a bound that a token would break
            torch.testing.assert_close(
                (total.double() + x[:1].double().T @ x[:1].double()).triu(),
                expected.triu(),
                rtol=0,
                atol=1e-3,
            )


@pytest.mark.parametrize("method", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES[::2])
def test_a_group_at_once_is_its_steps(shape, method, symmetric):
    draw = Draw(*shape)
    width, W, T = draw.width, draw.columns(), draw.normal(draw.rows, draw.width) * 0.1
    R = (draw.normal(width, width) * 0.2).triu(1) + 2 * torch.eye(width, device=DEVICE)
    inverse, block = torch.linalg.inv(R.double()).float().contiguous(), draw.hessian().contiguous()
    spec = grid_spec(named_grid(4, width, symmetric, scale_dtype="float16"), method, 1, **SEARCH)
    fit, found = GridFit(spec, DEVICE), []
    group = torch.full((width,), 1, dtype=torch.int32, device=DEVICE)
    for at_once in (False, True):
        scales, zeros = (torch.zeros(draw.rows, 3, device=DEVICE) for _ in range(2))
        sums, codes = T.clone(), torch.zeros(draw.rows, width, dtype=torch.uint8, device=DEVICE)
        if at_once:
            own, place = fit.of_group(groups), group[:1]
            groups.quantize_groups(
                W, sums, R, inverse[None], block[None], own, scales, zeros, place, codes
            )
        else:
            scales[:, 1], zeros[:, 1] = fit(W + T @ inverse, [block])
            plain.quantize_columns(W, sums, R, scales, zeros, group, codes, 15)
        assert len(codes.unique()) > 8 and not scales[:, [0, 2]].any()
        found.append((codes, scales, zeros))
    for one, two in zip(*found, strict=True):
        assert_near(one, two)


@pytest.mark.parametrize("add", [True, False])
def test_rows_are_multiplied(add):
    draw = Draw(150, 300, 1)
    left, right = draw.normal(150, 300), draw.normal(300, 210)[:, 3:203]
    wide = draw.normal(150, 230)
    to, expected = wide[:, 7:207], left.double() @ right.double()
    if add:
        expected += to.double()
    before = wide.clone()
    groups.add_rows(to, left, right, add)
    torch.testing.assert_close(to.double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(wide[:, :7], before[:, :7]) and torch.equal(wide[:, 207:], before[:, 207:])
    rows = torch.empty(20, 200, device=DEVICE)
    whole = torch.empty(150, 200, device=DEVICE)
    groups.add_rows(rows, left[:20], right, False)
    groups.add_rows(whole, left, right, False)
    assert torch.equal(rows, whole[:20])


@pytest.mark.parametrize("order", ["natural", "group-act"])
def test_a_solve_by_kernels_is_that_of_plain_torch(order, monkeypatch):
    draw = Draw(20, 160, 1)
    W, X = draw.normal(20, 160), draw.normal(400, 160) + draw.normal(400, 3) @ draw.normal(3, 160)
    H = (X.T @ X / 200).cpu().numpy()
    monkeypatch.setattr(device_gptq, "_WIDE", 128)  # and a part of another one
    options = Recipe(group_size=32, order=order, grid="hessian", scale_dtype="float16")
    factor, found = factorize_on(DEVICE, H, order=order, group_size=32), []
    for reason in ("none", ""):
        monkeypatch.setattr(choice, "why_no_kernels", lambda device, reason=reason: reason)
        found.append(device_gptq.gptq_on(W, factor, options).finish())
    assert (found[0].codes == found[1].codes).mean() > 0.99
    assert found[1].objective == pytest.approx(found[0].objective, rel=1e-3)
    part = device_gptq.gptq_on(W[:7], factor, options).finish()
    assert (part.codes == found[1].codes[:7]).all()
