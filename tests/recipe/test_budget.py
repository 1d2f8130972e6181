"""Sharing average bits out among layers."""

import itertools

import numpy as np
import pytest

from ptqkit.recipe.budget import candidate_bits, share_budget


def test_candidates_surround_the_budget():
    assert candidate_bits(3.2) == (2, 3, 4, 5, 6)
    assert candidate_bits(3.0) == (2, 3, 4, 5)
    assert candidate_bits(2.0) == (2, 3, 4)
    assert candidate_bits(8.0) == (7, 8)


def _curves(seed):
    # Convex, with another height per layer.
    return {f"l{i}": {b: (1 + seed * i % 7) * 4.0**-b for b in (2, 3, 4)} for i in range(5)}


@pytest.mark.parametrize("seed", [2, 3, 5])
@pytest.mark.parametrize("budget", [2.0, 2.4, 3.2, 4.0])
def test_least_loss_for_layers_of_one_size(seed, budget):
    curves, sizes = _curves(seed), dict.fromkeys(_curves(seed), 10)
    found = share_budget(curves, sizes, budget)

    def cost(bits):
        return sum(curves[name][b] for name, b in bits.items())

    every = (dict(zip(curves, b, strict=True)) for b in itertools.product((2, 3, 4), repeat=5))
    allowed = [bits for bits in every if sum(bits.values()) <= budget * 5]
    assert sum(found.values()) <= budget * 5
    assert cost(found) == pytest.approx(min(map(cost, allowed)), rel=1e-12)


def test_the_average_is_weighted_by_size_and_not_exceeded():
    sizes = {"small": 1, "large": 99}
    curves = {"small": {2: 1.0, 3: 0.1, 4: 0.0}, "large": {2: 2.0, 3: 1.0, 4: 0.5}}
    # The small layer gains more per stored bit; going by that would leave no room for the large.
    assert share_budget(curves, sizes, 2.98) == {"small": 4, "large": 2}
    assert share_budget(curves, sizes, 3.0) == {"small": 3, "large": 3}


@pytest.mark.parametrize("seed", range(4))
def test_least_loss_for_any_sizes_and_losses(seed):
    random = np.random.default_rng(seed)
    sizes = {f"l{i}": int(n) for i, n in enumerate(random.integers(1, 9, 5))}
    curves = {name: dict(zip((2, 3, 4), random.random(3), strict=True)) for name in sizes}
    every = [dict(zip(sizes, b, strict=True)) for b in itertools.product((2, 3, 4), repeat=5)]

    def stored(bits):
        return sum(sizes[name] * b for name, b in bits.items())

    for budget in (2.2, 2.9, 3.5):
        allowed = [bits for bits in every if stored(bits) <= budget * sum(sizes.values())]
        best = min(sum(curves[n][b] for n, b in bits.items()) for bits in allowed)
        found = share_budget(curves, sizes, budget)
        assert stored(found) <= budget * sum(sizes.values())
        assert sum(curves[n][b] for n, b in found.items()) == pytest.approx(best, rel=1e-12)


def test_sizes_without_a_common_divisor_are_rounded_up():
    sizes = {"a": 1_000_003, "b": 999_983, "c": 7}
    curves = {n: {2: 1.0, 3: 0.2, 4: 0.1} for n in sizes}
    found = share_budget(curves, sizes, 3.001)
    assert sum(sizes[n] * b for n, b in found.items()) <= 3.001 * sum(sizes.values())
    assert found == {"a": 3, "b": 3, "c": 4}


def test_bits_that_gain_nothing_are_not_spent():
    curves = {"a": {2: 1.0, 3: 2.0, 4: 1.0}, "b": {2: 1.0, 3: 0.9, 4: 0.9}}
    assert share_budget(curves, {"a": 1, "b": 1}, 4.0) == {"a": 2, "b": 3}


def test_a_loss_that_is_not_finite_names_its_layer():
    with pytest.raises(ValueError, match="b: the loss at 3 bits is nan"):
        share_budget({"b": {2: 1.0, 3: float("nan")}}, {"b": 1}, 3.0)


def test_a_budget_below_the_fewest_bits_is_refused():
    with pytest.raises(ValueError, match="fewer than the fewest"):
        share_budget({"b": {2: 1.0, 3: 0.5}}, {"b": 1}, 1.9)
