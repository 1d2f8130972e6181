"""Products of numbers of 16 bits, summed in float32 by the units of a GPU that are made for them.

A product of two bfloat16 numbers (8 bits of fraction) or of two float16 ones (11) is exact in
float32, so the sums are float32's to rounding, without widening the operands first: on a GPU with
tensor cores that is an order of magnitude faster.
"""

from __future__ import annotations

from functools import cache

import torch

from ptqkit.nn.kernels.choice import products_on

__all__ = ["add_difference_products", "add_products", "multiplies_halves"]

_HALVES = (torch.bfloat16, torch.float16)
# So many numbers of bfloat16 add up to one of float32, exactly.
_PARTS = 3
# Tokens per product: tensor cores cut the bits off that a long sum shifts out. Sums of 2,048 were
# 9e-6 too small on an H200.
_TOKENS = 256
# The same where the sum only says how far a weight is to be moved: bits of it are no loss, and each
# product reads and writes the whole sum.
_MOVED_TOKENS = 1024


def add_products(total: torch.Tensor, values: torch.Tensor) -> None:
    """Add values^T values to a sum, at and above its diagonal; what is below has no meaning.

    Parameters
    ----------
    total : Tensor of float32, shape (in, in)
    values : Tensor of bfloat16 or float16, shape (tokens, in)
        On the same device, for which :func:`multiplies_halves` is true.
    """
    products = products_on(values.device)
    if products is not None:
        products.add_upper_products(total, values)
        return
    for part in values.split(_TOKENS):
        _add(total, part, part)


def add_difference_products(
    total: torch.Tensor, differences: torch.Tensor, values: torch.Tensor
) -> None:
    """Add differences^T values to a sum.

    Parameters
    ----------
    total : Tensor of float32, shape (features, in)
    differences : Tensor of float32, shape (tokens, features)
        Each is taken as the sum of three numbers of bfloat16, which is exact.
    values : Tensor of bfloat16, shape (tokens, in)
        On a device for which :func:`multiplies_halves` is true.
    """
    parts = (v.split(_MOVED_TOKENS) for v in (differences, values))
    for left, right in zip(*parts, strict=True):
        rest = left
        for part in range(_PARTS):
            half = rest.to(values.dtype)
            _add(total, half, right)
            if part < _PARTS - 1:
                rest = rest - half


def _add(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if _adds_in_place(right.device, right.dtype):
        torch.addmm(total, left.T, right, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(left.T, right, out_dtype=torch.float32)


@cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the sum may be of float32 already; the first versions of torch wanted 16 bits."""
    values = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, values.T, values, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


@cache
def multiplies_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device sums such products in float32; it is asked once, by a small product.

    torch has the operation since 2.8, for CUDA alone.
    """
    if dtype not in _HALVES:
        return False
    # 1 + 2^-7 and its square have 8 and 15 bits; their sums are exact in float32 alone.
    values = torch.full((64, 64), 1 + 2**-7, dtype=dtype, device=device)
    total = torch.ones(64, 64, dtype=torch.float32, device=device)
    try:
        _add(total, values, values)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 1 + 64 * (1 + 2**-7) ** 2).all())
