"""A model of what a run costs: seconds and bytes from width, depth, tokens, experts, processes.

Every part of a run is a sum of a few counts (operations, mostly), each times a number of seconds.
The numbers are fitted to measured runs (:func:`fit`), or known of another machine; the counts are
known from the shapes (:func:`count`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.large.models import Size

__all__ = ["PARTS", "Cost", "Group", "bytes_of", "count", "fit", "groups_of", "seconds_of"]

PARTS = ("forward", "hessian", "solve", "diagnostics")
# Counts of each part, whose factors are not negative.
FEATURES = {
    "forward": ("products", "elements", "calls"),
    "hessian": ("sums", "matrices"),
    "solve": ("factors", "rows", "weights"),
    "diagnostics": ("rows", "weights"),
}
#: Seconds per count, by part and count.
Cost = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Group:
    """Layers of one block that are fed by one tensor.

    Attributes
    ----------
    inputs, outputs : int
        Of all of them together.
    share : float
        Of the tokens: below 1 for an expert.
    copies : int
        Groups of this shape in the block: experts.
    """

    inputs: int
    outputs: int
    share: float = 1.0
    copies: int = 1


def groups_of(size: Size) -> list[Group]:
    """Return the groups of one block, in order of execution."""
    head = size.hidden // size.heads
    attention = size.heads * head
    found = [
        Group(size.hidden, attention + 2 * size.kv_heads * head),
        Group(attention, size.hidden),
    ]
    copies = max(1, size.experts)
    share = size.chosen / size.experts if size.experts else 1.0
    return [
        *found,
        Group(size.hidden, 2 * size.intermediate, share, copies),
        Group(size.intermediate, size.hidden, share, copies),
    ]


def count(
    size: Size, tokens: int, length: int, schedule: str = "one-pass", rows_of_batch: int = 4
) -> dict[str, float]:
    """Return the counts of a run.

    Parameters
    ----------
    tokens, length : int
        All of them, and those of a sample.
    schedule : {"one-pass", "replay", "streamed"}
    rows_of_batch : int
        Samples that run at once.

    Returns
    -------
    dict of str to float
        ``products`` (multiplications and additions of forward passes), ``elements`` (tokens times
        width, per block), ``calls`` (groups times batches), ``sums`` (tokens x inputs^2),
        ``matrices`` (inputs^2 times batches, each of which is added to H), ``factors`` (inputs^3 /
        3), ``rows`` (outputs x inputs^2), ``weights``.
    """
    groups = groups_of(size)
    products = [2.0 * tokens * g.share * g.copies * g.inputs * g.outputs for g in groups]
    products[1] += 4.0 * tokens * length * groups[1].inputs  # scores and their use, not causal
    whole, passes, batches = sum(products), 1.0, tokens / length / rows_of_batch
    copies = sum(g.copies for g in groups)
    if schedule == "one-pass":
        # Nothing runs after the last layer that is quantized.
        forward = whole * size.layers - products[-1]
    else:
        before = [sum(products[:i]) for i in range(len(groups))]
        forward = sum(before) * size.layers + whole * (size.layers - 1)
        passes = 1 + sum(before) / whole
    return {
        "products": forward,
        "elements": passes * tokens * size.hidden * size.layers,
        "calls": passes * batches * copies * size.layers,
        "sums": size.layers * sum(tokens * g.share * g.copies * g.inputs**2 for g in groups),
        "matrices": batches * size.layers * sum(g.copies * g.inputs**2 for g in groups),
        "factors": size.layers * sum(g.copies * g.inputs**3 / 3 for g in groups),
        "rows": float(size.layers * sum(g.copies * g.outputs * g.inputs**2 for g in groups)),
        "weights": float(size.layers * sum(g.copies * g.outputs * g.inputs for g in groups)),
    }


def fit(runs: Sequence[Mapping[str, Any]]) -> Cost:
    """Fit the seconds per count to runs of :mod:`benchmarks.large.sizes`, by relative errors."""
    from scipy.optimize import nnls

    counts = [counts_of(run) for run in runs]
    cost = {}
    for part, names in FEATURES.items():
        seconds = np.array([run["seconds"][part] for run in runs])
        values = np.array([[c[name] for name in names] for c in counts])
        scale = values.max(0)
        factors, _ = nnls(values / scale / seconds[:, None], np.ones(len(runs)))
        cost[part] = dict(zip(names, (factors / scale).tolist(), strict=True))
    return cost


def counts_of(run: Mapping[str, Any]) -> dict[str, float]:
    """Return the counts of a measured run."""
    tokens = run["samples"] * run["length"]
    return count(Size(**run["size"]), tokens, run["length"], run["schedule"])


def seconds_of(
    counts: Mapping[str, float], cost: Cost, processes: int = 1, *, share_factors: bool = False
) -> dict[str, float]:
    """Return the seconds of every part.

    Parameters
    ----------
    counts : mapping
        Of the whole run.
    cost : mapping
    processes : int
        They share the tokens, and the rows of every matrix; each factors every H.
    share_factors : bool
        Or they share whole matrices, as experts would allow: each factors its share.
    """
    found = {}
    for part, factors in cost.items():
        found[part] = sum(
            counts[name] * f / (1 if name == "factors" and not share_factors else processes)
            for name, f in factors.items()
        )
    return found


def bytes_of(size: Size, tokens: int, dtype_bytes: int = 2) -> dict[str, float]:
    """Return the bytes of what a run holds and moves.

    Returns
    -------
    dict of str to float
        ``model``; ``block`` (the largest); ``outputs`` (of one block, for all tokens, twice: the
        old and the new ones); ``moments`` (the largest H in float32); ``reduced`` (what processes
        add up in float64, of all layers); ``solver`` (its copies of H and of the weights).
    """
    groups = groups_of(size)
    weights = sum(g.copies * g.inputs * g.outputs for g in groups)
    widest = max(g.inputs for g in groups)
    return {
        "model": float(dtype_bytes) * (weights * size.layers + 2 * size.vocabulary * size.hidden),
        "block": float(dtype_bytes) * weights,
        "outputs": 2.0 * dtype_bytes * tokens * size.hidden,
        "moments": 4.0 * widest**2,
        "reduced": 8.0 * size.layers * sum(g.copies * g.inputs**2 for g in groups),
        "solver": max(4.0 * g.inputs * (4 * g.inputs + 4 * g.outputs) for g in groups),
    }
