"""Group sizes that divide the inputs of layers."""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["common_group_size", "group_size_problem"]


def _divisors(columns: int) -> list[int]:
    return [d for d in range(2, columns) if columns % d == 0]


def group_size_problem(name: str, columns: int, group_size: int | None) -> str:
    """Return why a layer cannot have groups of this size, and which it can have; '' if it can."""
    if group_size is None or columns % group_size == 0:
        return ""
    found = _divisors(columns)
    near = [d for d in found if d > group_size][:1] + [d for d in found if d < group_size][-1:]
    use = f"use {' or '.join(map(str, near))}, or" if near else "use"
    return (
        f"{name}: group_size {group_size} does not divide its {columns} inputs; {use} 'channel' "
        "(one scale per output), for this layer alone by an override"
    )


def common_group_size(columns: Iterable[int], largest: int) -> int | None:
    """Return the largest group size up to ``largest`` that divides all; None if only 1 does."""
    common = math.gcd(*columns)
    return max((d for d in (*_divisors(common), common) if 1 < d <= largest), default=None)
