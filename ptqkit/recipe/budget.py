"""Share a budget of average bits out among layers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

__all__ = ["LEAST_BITS", "MOST_BITS", "candidate_bits", "share_budget"]

#: Bits that a layer of a mixed model may have.
LEAST_BITS, MOST_BITS = 2, 8

#: Entries of the table that is searched, and parts of the budget that it has at most.
_TABLE, _PARTS = 2**26, 2**16


def candidate_bits(budget: float) -> tuple[int, ...]:
    """Return the bits that layers may have: from one below the budget to two above it.

    Layers further away are rare: a bit more or less changes a layer's loss by a factor of about 4.
    """
    low = max(LEAST_BITS, math.floor(budget) - 1)
    return tuple(range(low, min(MOST_BITS, math.ceil(budget) + 2) + 1))


def share_budget(
    losses: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], budget: float
) -> dict[str, int]:
    """Return the bits of every layer with the least sum of losses that the budget allows.

    A knapsack with one choice per layer, solved exactly by dynamic programming if the common
    divisor of the sizes makes the budget at most 65,536 parts (fewer if there are more than 1,024
    layers); otherwise sizes are rounded up to such parts. Of choices that cost the same the one
    with fewer bits is taken.

    Parameters
    ----------
    losses : mapping of str to mapping of int to float
        What each layer costs at each number of bits, all layers on one scale.
    sizes : mapping of str to int
        Weights of each layer.
    budget : float
        Average bits per weight over these layers; not exceeded.

    Raises
    ------
    ValueError
        If the budget is below the fewest bits, or a loss is not finite.
    """
    for name, curve in losses.items():
        for bits, loss in curve.items():
            if not math.isfinite(loss):
                raise ValueError(f"{name}: the loss at {bits} bits is {loss}, not a finite number")
    room = math.floor(budget * sum(sizes.values()) + 1e-6)
    room -= sum(min(curve) * sizes[name] for name, curve in losses.items())
    if room < 0:
        raise ValueError(f"{budget:g} bits on average are fewer than the fewest that layers have")
    if not losses:
        return {}
    part = math.gcd(*sizes.values())
    part = max(part, math.ceil(room / max(1, min(_PARTS, _TABLE // len(losses)))))
    # best[r]: least loss of the layers so far if r parts of the room may be used.
    best = np.zeros(room // part + 1)
    chosen = []
    for name, curve in losses.items():
        levels = sorted(curve)
        found = np.full(len(best), np.inf)
        choice = np.zeros(len(best), np.int8)
        for bits in levels:
            used = math.ceil((bits - levels[0]) * sizes[name] / part)
            if used >= len(best):
                break
            new = np.full(len(best), np.inf)
            new[used:] = best[: len(best) - used] + curve[bits]
            better = new < found
            found[better], choice[better] = new[better], bits
        best = found
        chosen.append(choice)
    left, shared = len(best) - 1, {}
    for (name, curve), choice in zip(reversed(list(losses.items())), reversed(chosen), strict=True):
        bits = shared[name] = int(choice[left])
        left -= math.ceil((bits - min(curve)) * sizes[name] / part)
    return {name: shared[name] for name in losses}
