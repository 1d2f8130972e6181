"""What experts with too few tokens are quantized with: the moments of other tokens mixed in.

The rule: a layer of an expert that was given n tokens, fewer than its c inputs, has a Hessian that
is singular, or none at all. It is quantized with ``(n H + (c - n) P) / c`` instead, in which H are
the moments of its own tokens and P those of the pool: of all tokens that came to the module of the
experts, for its first projections as they came, for its last one as its (already quantized) first
projections make them of them. So the missing tokens are made up for by ones that another expert
got. The report says so of every such layer.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np

from ptqkit.arrays.hessian import Hessian

__all__ = ["fill_up", "is_expert", "rule_text", "solved_together"]

#: Weights of experts that are solved as one matrix at most, if they are fed by one tensor.
MOST_WEIGHTS = 1 << 26


def fill_up(own: Hessian, pool: Hessian) -> Hessian:
    """Return the moments of an expert's own tokens, filled up with those of the pool.

    Parameters
    ----------
    own : Hessian
        Of fewer tokens than inputs, possibly none.
    pool : Hessian

    Returns
    -------
    Hessian
        Of as many tokens as inputs.
    """
    inputs = own.in_features
    missing = inputs - own.tokens
    mixed = pool.matrix * np.float32(missing / inputs)
    if own.tokens:
        mixed += own.matrix * np.float32(own.tokens / inputs)
    return Hessian.from_matrix(mixed, inputs)


def rule_text(tokens: int, inputs: int) -> str:
    """Return what the report says of a layer that was quantized by the rule."""
    routed = f"{tokens} tokens" if tokens else "no token"
    return (
        f"{routed} routed to it for {inputs} inputs: the moments of all tokens of the mixture fill "
        f"up {inputs - tokens} of {inputs}"
    )


def is_expert(layer: str, mixtures: Container[str]) -> bool:
    """Whether a layer belongs to an expert of one of these mixtures."""
    return layer.rsplit(".", 2)[0] in mixtures


def solved_together(
    group: Sequence[str], shapes: Mapping[str, tuple[int, int]], mixtures: Container[str]
) -> list[list[str]]:
    """Split a group of layers fed by one tensor into parts that are solved at once.

    That is the whole group, but for experts that all see every token: of these as many as have
    :data:`MOST_WEIGHTS` weights, or one layer. No code depends on it.

    Parameters
    ----------
    group : sequence of str
    shapes : mapping of str to tuple of int
        (out, in) of every layer.
    mixtures : container of str
        Names of the mixtures.
    """
    parts: list[list[str]] = [[]]
    weights = 0
    for name in group:
        size = shapes[name][0] * shapes[name][1]
        if parts[-1] and is_expert(name, mixtures) and weights + size > MOST_WEIGHTS:
            parts.append([])
            weights = 0
        parts[-1].append(name)
        weights += size
    return parts
