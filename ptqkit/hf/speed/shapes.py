"""The sizes of a language model, and a plain model of the memory that they need."""

from __future__ import annotations

from dataclasses import dataclass

from ptqkit._repr import one_line_repr

__all__ = ["ONE_B", "SHAPES", "ModelShape"]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

    Attributes
    ----------
    hidden, intermediate, layers, heads, vocabulary : int
    kv_heads : int
        Heads of keys and values.
    gated : bool
        The MLP has three matrices (LLaMA), not two (OPT).
    tied : bool
        The head is the embedding.
    positions : int
        Rows of a learned table of positions, 0 without one.
    """

    __repr__ = one_line_repr

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    gated: bool = True
    tied: bool = False
    positions: int = 0

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads

    @property
    def linear_weights(self) -> int:
        """Weights of the linear layers in the blocks."""
        kv = self.kv_heads * self.head_size
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * kv
        mlp = (3 if self.gated else 2) * self.hidden * self.intermediate
        return self.layers * (attention + mlp)

    @property
    def other_weights(self) -> int:
        """Embeddings, head, positions and norms; biases are left out."""
        tables = self.vocabulary * (1 if self.tied else 2) + self.positions
        return self.hidden * (tables + 2 * self.layers + 1)

    def weight_bytes(
        self,
        bits: float = 16,
        group_size: int | None = None,
        *,
        grid_bits: float = 24,
        other_bits: float = 16,
    ) -> float:
        """Bytes of all weights.

        Parameters
        ----------
        bits : float
            Of the linear layers in the blocks.
        group_size : int, optional
            Inputs per grid; None: grids are left out (one per output is next to nothing).
        grid_bits : float
            Of a scale and a zero-point: 16 and 8 as packed layers hold them.
        other_bits : float
            Of everything else.
        """
        per_weight = bits + (grid_bits / group_size if group_size else 0.0)
        return (self.linear_weights * per_weight + self.other_weights * other_bits) / 8

    def cache_bytes(
        self, tokens: int, batch: int = 1, *, bits: float = 16, scale_bits: float = 0
    ) -> float:
        """Bytes of keys and values.

        Parameters
        ----------
        bits : float
            Of a number.
        scale_bits : float
            Per token and head: 32 in :class:`ptqkit.hf.Int8Cache`.
        """
        numbers = 2 * self.layers * self.kv_heads * tokens * batch
        return numbers * (self.head_size * bits + scale_bits) / 8


#: A LLaMA of 1.1 billion weights (the sizes of TinyLlama).
ONE_B = ModelShape(2048, 5632, 22, 32, 4, 32000)

#: Shapes for which the memory is told without running them.
SHAPES = {
    "LLaMA 1.1B": ONE_B,
    "LLaMA 7B": ModelShape(4096, 11008, 32, 32, 32, 32000),
    "LLaMA 13B": ModelShape(5120, 13824, 40, 40, 40, 32000),
    "LLaMA 70B": ModelShape(8192, 28672, 80, 64, 8, 32000),
    "OPT-6.7B": ModelShape(4096, 16384, 32, 32, 32, 50272, False, True, 2050),
    "OPT-175B": ModelShape(12288, 49152, 96, 96, 96, 50272, False, True, 2050),
}
