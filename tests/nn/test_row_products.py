"""Products by runs of rows, the last of which is filled up."""

from __future__ import annotations

import pytest
import torch

from ptqkit.nn import row_products
from ptqkit.nn.row_products import add_product, row_product


@pytest.mark.parametrize("rows", [1, 16, 37, 48])
def test_are_those_of_all_rows(rows, monkeypatch):
    shapes = []
    monkeypatch.setattr(row_products, "_ROWS", 16)
    monkeypatch.setattr(row_products, "_fills_up", lambda device: not shapes.append(device))
    generator = torch.Generator().manual_seed(rows)
    left, right, wide = (
        torch.randn(*shape, generator=generator) for shape in ((rows, 24), (24, 10), (rows, 15))
    )
    torch.testing.assert_close(row_product(left, right), left @ right)
    expected = wide.clone()
    expected[:, 3:13] += left @ right
    add_product(wide[:, 3:13], left, right)
    torch.testing.assert_close(wide, expected)
    assert bool(shapes) == (rows % 16 > 0)
    cut = rows // 2
    parts = [row_product(part, right) for part in (left[:cut], left[cut:])]
    assert torch.equal(torch.cat(parts), row_product(left, right))
