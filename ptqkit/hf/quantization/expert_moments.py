"""What experts with too few tokens are quantized with: the moments of other tokens mixed in.

The rule: a layer of an expert that was given n tokens, fewer than its c inputs, has a Hessian that
is singular, or none at all. It is quantized with ``(n H + (c - n) P) / c`` instead, in which H are
the moments of its own tokens and P those of the pool: of all tokens that came to the module of the
experts, for its first projections as they came, for its last one as its (already quantized) first
projections make them of them. So the missing tokens are made up for by ones that another expert
got. The report says so of every such layer.
"""

from __future__ import annotations

import numpy as np

from ptqkit.arrays.hessian import Hessian

__all__ = ["fill_up", "rule_text"]


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
