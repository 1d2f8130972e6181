"""One token through a decoder block of LLaMA's kind, from packed weights, in two calls.

Between the calls lies the cache of keys and values, which is the model's own. The tuples that the
core takes are made here; :mod:`ptqkit.hf.models.one_token` makes them of the modules of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

import ptqkit._core as _core
from ptqkit._repr import one_line_repr
from ptqkit.arrays._inputs import BF16, F32

__all__ = ["MOST_SIMULATED_INPUTS", "BlockSizes", "begin", "blocks", "end", "simulated_layer"]

MOST_SIMULATED_INPUTS = 65792  # PTQ_DOTS_PLACES, whole quads
_DTYPES = {"float32": F32, "bfloat16": BF16}


@dataclass(frozen=True)
class BlockSizes:
    """Sizes and constants of a block.

    Attributes
    ----------
    dtype : {"float32", "bfloat16"}
        Of the model: what its modules return. Arrays of bfloat16 travel as their bits, uint16.
    hidden, inner, heads, kv_heads, head_dim : int
        ``inner`` is the width of the MLP.
    eps, head_eps : float
        Of the norms, and of the norms of heads.
    """

    __repr__ = one_line_repr

    dtype: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    head_eps: float = 0.0

    @cached_property
    def core(self) -> tuple[Any, ...]:
        """As the core takes them."""
        sizes = (self.hidden, self.inner, self.heads, self.kv_heads, self.head_dim)
        return (_DTYPES[self.dtype], *sizes, self.eps, self.head_eps)


def simulated_layer(
    words: np.ndarray,
    w_scales: np.ndarray,
    w_zeros: np.ndarray,
    w_sums: np.ndarray,
    *,
    bits: int,
    symmetric: bool,
    arithmetic: str,
    scale: float | None = None,
    zero_point: int = 0,
    bias: Any = None,
) -> tuple[Any, ...]:
    """Return a layer whose inputs are rounded to a grid, as by :func:`ptqkit.int8_linear`.

    The arguments are those of that function, with one scale, zero and sum per output.
    """
    grid = (bits, int(symmetric), 0, int(arithmetic == "bfloat16"))
    return (2, bias, words, w_scales, w_zeros, w_sums, grid, scale, zero_point + 128)


def begin(
    block: BlockSizes,
    x: np.ndarray,
    angles: tuple[np.ndarray, np.ndarray],
    norms: tuple[np.ndarray, np.ndarray | None, np.ndarray | None],
    layers: tuple[Any, Any, Any],
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    threads: int = 0,
) -> None:
    """Norm, products with the weights of query, key and value, norms of heads, rotation.

    Every number is rounded to the block's dtype where the modules of a model round it.

    Parameters
    ----------
    block : BlockSizes
    x : ndarray of its dtype, shape (hidden,)
    angles : pair of ndarrays of its dtype, shape (head_dim,)
        Cosines and sines of the rotation.
    norms : ndarrays of its dtype, shapes (hidden,), (head_dim,), (head_dim,)
        Weights of the norm and of those of query and key heads, which may be None.
    layers : tuple of three
        Of :meth:`PackedMatrix.layer` or :func:`simulated_layer`: query, key, value.
    query : ndarray of float32, shape (heads, head_dim)
        Written, as are the next.
    key, value : ndarray of the block's dtype, shape (kv_heads, head_dim)

    Raises
    ------
    TypeError, ValueError
        Shapes or dtypes that do not belong together.
    FloatingPointError
        A layer rounds its input, which holds NaN or Inf.
    """
    norm, q_norm, k_norm = norms
    _core.decoder_begin(
        block.core, x, *angles, norm, q_norm, k_norm, *layers, query, key, value, threads
    )


def end(
    block: BlockSizes,
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    allowed: np.ndarray | None,
    scaling: float,
    x: np.ndarray,
    norm: np.ndarray,
    layers: tuple[Any, Any, Any, Any],
    y: np.ndarray,
    threads: int = 0,
) -> None:
    """Attention of one query, product, residual, norm, MLP (SiLU), residual.

    Scores and their softmax are in float32; the rest as in :func:`begin`.

    Parameters
    ----------
    query : ndarray of float32, shape (heads, head_dim)
        Of :func:`begin`.
    keys, values : ndarray of the block's dtype, shape (kv_heads, tokens, head_dim)
        Channels contiguous.
    allowed : ndarray of uint8, shape (tokens,), optional
        0 where a key is hidden.
    scaling : float
        Factor of the scores.
    x : ndarray of the block's dtype, shape (hidden,)
        The block's input.
    norm : ndarray of the block's dtype, shape (hidden,)
        Weight of the norm before the MLP.
    layers : tuple of four
        Output of the attention, gate, up, down.
    y : ndarray of the block's dtype, shape (hidden,)
        Written.

    Raises
    ------
    TypeError, ValueError, FloatingPointError
        As of :func:`begin`; ValueError if no key is allowed.
    """
    _core.decoder_end(
        block.core, query, keys, values, allowed, scaling, x, norm, *layers, y, threads
    )


def blocks(
    block: BlockSizes,
    x: np.ndarray,
    angles: tuple[np.ndarray, np.ndarray],
    parts: tuple[tuple[Any, ...], ...],
    allowed: np.ndarray | None,
    new: np.ndarray,
    y: np.ndarray,
    threads: int = 0,
) -> None:
    """Take a token through blocks, one after the other, as :func:`begin` and :func:`end` would.

    Parameters
    ----------
    block : BlockSizes
        Of every block.
    x : ndarray of its dtype, shape (hidden,)
        Input of the first block.
    angles : pair of ndarrays of its dtype, shape (head_dim,)
    parts : tuple of tuples, one for each block
        Norms as for :func:`begin`, the norm of :func:`end`, its scaling, the seven layers (query,
        key, value, output of the attention, gate, up, down), and keys and values without those of
        this token.
    allowed : ndarray of uint8, shape (tokens + 1,), optional
        Keys that are seen, this token's last.
    new : ndarray of the dtype, shape (blocks, 2, kv_heads * head_dim)
        Written: key and value of the token in each block.
    y : ndarray of the dtype, shape (blocks, hidden)
        Written: the output of each block.

    Raises
    ------
    TypeError, ValueError, FloatingPointError
        As of :func:`end`.
    """
    _core.decoder_blocks(block.core, x, *angles, parts, allowed, new, y, threads)
