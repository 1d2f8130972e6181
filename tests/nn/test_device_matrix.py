"""Matrices on a device: there and back, rows of them."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers.core_cases import layer

import ptqkit
from ptqkit.nn.device_matrix import matrix_on
from ptqkit.nn.on_grid import dequantize_on, nearest, rtn_on_grid
from ptqkit.nn.transfer import HostCopies

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def same(one, two):
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ["natural", "act"])
def test_there_and_back(device, order):
    W, H = layer(37, 48)
    q = ptqkit.gptq(W, H, bits=3, group_size=16, order=order, refine_passes=1, compare_rtn=True)
    there = matrix_on(torch.device(device), q)
    assert there.codes.device.type == device and (there.shape, there.max_code) == ((37, 48), 7)
    copies = HostCopies()
    later = there.finish(copies)
    copies.wait()
    for found in (there.finish(), later):
        same(found, q)
    same(there.rows(5, 20).finish(), q.rows(5, 20))
    assert matrix_on(there.codes.device, there) is there
    weight = torch.tensor(W, device=device)
    np.testing.assert_array_equal(dequantize_on(weight.device, there).cpu(), q.dequantize())
    np.testing.assert_array_equal(nearest(weight, there).cpu(), rtn_on_grid(W.copy(), q))


def test_without_objectives():
    W, _ = layer(20, 48)
    q = ptqkit.rtn(W, bits=4, group_size=16)
    same(matrix_on(torch.device("cpu"), q).finish(), q)
