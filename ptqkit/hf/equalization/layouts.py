"""Which rows of a layer may be what another layer reads, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import nn

__all__ = ["channel_layouts", "head_sizes", "row_layouts"]


def head_sizes(model: nn.Module) -> list[int]:
    """Return the head sizes that the configuration suggests, the most likely first."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = [getattr(config, "head_dim", None), getattr(config, "d_kv", None)]
    width, heads = (getattr(config, k, None) for k in ("hidden_size", "num_attention_heads"))
    if isinstance(width, int) and isinstance(heads, int) and heads > 0:
        found.append(width // heads)
    return list(dict.fromkeys(n for n in found if isinstance(n, int) and n > 0))


def _divisors(number: int, first: Sequence[int]) -> list[int]:
    """All divisors of a number, the preferred ones first, then the large ones."""
    every = {d for k in range(1, int(number**0.5) + 1) if number % k == 0 for d in (k, number // k)}
    preferred = [d for d in first if d in every]
    return [*preferred, *(d for d in sorted(every, reverse=True) if d not in preferred)]


def row_layouts(rows: int, channels: int, heads: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the rows of a layer that may be what a consumer of so many channels reads.

    A plain layer; the halves of a fused gate and up projection, one after the other or in turn;
    the values of a fused query, key and value projection, one after the other or head by head.

    Parameters
    ----------
    rows : int
        Outputs of the producer.
    channels : int
        Inputs of the consumer.
    heads : sequence of int
        Head sizes to try first.
    """
    if rows <= channels:
        if channels % rows == 0:
            yield np.arange(rows)
        return
    if rows == 2 * channels:
        yield np.arange(channels, rows)
        yield np.arange(channels)
        yield np.arange(1, rows, 2)
        yield np.arange(0, rows, 2)
    values = (rows - channels) // 2
    if (rows - channels) % 2 or channels % values:
        return
    # Queries per value head; every group of heads holds its queries, its key and its value.
    queries = channels // values
    for size in [values, *(d for d in _divisors(values, heads) if d != values)]:
        groups = np.arange(values // size)[:, None] * (queries + 2) * size
        yield (groups + (queries + 1) * size + np.arange(size)).reshape(-1)


def channel_layouts(producers: int, channels: int, heads: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield, for every input channel of a consumer, the producer channel it may come from.

    One to one; or, as in grouped-query attention, heads of the producer repeated, each one in a
    row or all in turn.

    Parameters
    ----------
    producers, channels : int
        ``channels`` is a multiple of ``producers``.
    heads : sequence of int
        Head sizes to try first.

    Yields
    ------
    ndarray of int64, shape (channels,)
    """
    if producers == channels:
        yield np.arange(channels)
        return
    repeats = channels // producers
    for size in _divisors(producers, heads):
        by_head = np.arange(producers).reshape(-1, size)
        yield np.repeat(by_head, repeats, axis=0).reshape(-1)
        yield np.tile(by_head, (repeats, 1)).reshape(-1)
