"""A key-value cache of 8-bit integers for ``generate``."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

__all__ = ["Int8Cache", "Int8Tokens"]

_LARGEST = 127
_ROOM = 256  # tokens, at least, by which a full buffer grows


class Int8Tokens:
    """Keys or values as signed codes, a scale per token and head: ``x = scale * code``.

    ``scale`` is the largest magnitude of the token's head / 127, in float32, so every number is
    wrong by at most ``scale / 2``; a head of zeros stays zero.

    Attributes
    ----------
    length : int
        Tokens held.
    """

    def __init__(self) -> None:
        self.length = 0
        self._codes: torch.Tensor | None = None
        self._scales: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales of the tokens held, without what is kept free behind them."""
        if self._codes is None or self._scales is None:
            return 0
        codes, scales = self._held()
        return codes.numel() * codes.element_size() + scales.numel() * scales.element_size()

    def _held(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._codes is not None and self._scales is not None
        return self._codes[..., : self.length, :], self._scales[..., : self.length, :]

    @torch.no_grad()
    def append(self, x: torch.Tensor) -> None:
        """Add tokens, (batch, heads, tokens, channels)."""
        largest = x.abs().amax(-1, keepdim=True).float()
        # A head of zeros divides by 1.
        scales = torch.where(largest == 0, torch.ones_like(largest), largest / _LARGEST)
        codes = (x.float() / scales).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
        self._reserve(codes, scales)
        assert self._codes is not None and self._scales is not None
        end = self.length + x.shape[-2]
        self._codes[..., self.length : end, :] = codes
        self._scales[..., self.length : end, :] = scales
        self.length = end

    def _reserve(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Make room for more tokens; what is there stays."""
        needed = self.length + codes.shape[-2]
        held = self._codes
        if held is not None and held.shape[-2] >= needed:
            return
        size = needed + max(_ROOM, needed // 4)
        buffers = []
        for like, old in ((codes, self._codes), (scales, self._scales)):
            new = like.new_empty((*like.shape[:-2], size, like.shape[-1]))
            if old is not None:
                new[..., : self.length, :] = old[..., : self.length, :]
            buffers.append(new)
        self._codes, self._scales = buffers

    @torch.no_grad()
    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """Return all tokens, (batch, heads, tokens, channels)."""
        codes, scales = self._held()
        # Through float32, so that a half-precision result is rounded once.
        return (codes * scales).to(dtype)

    def crop(self, length: int) -> None:
        """Forget what comes after the first ``length`` tokens."""
        self.length = min(self.length, length)

    def select(self, rows: torch.Tensor) -> None:
        """Take sequences of the batch in this order."""
        if self._codes is not None and self._scales is not None:
            rows = rows.to(self._codes.device)
            self._codes, self._scales = (
                t.index_select(0, rows) for t in (self._codes, self._scales)
            )

    def to(self, device: Any) -> None:
        """Move to a device."""
        if self._codes is not None and self._scales is not None:
            self._codes, self._scales = self._codes.to(device), self._scales.to(device)


class Int8Layer(CacheLayerMixin):
    """The tokens of one attention layer."""

    is_sliding = False
    is_croppable = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lazy_initialization(None, None)
        self.is_initialized = False

    def lazy_initialization(self, key_states: Any, value_states: Any = None) -> None:
        """Start empty."""
        self.stored = (Int8Tokens(), Int8Tokens())
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the tokens of a call and return all, from their codes: the new ones too.

        So what is attended to does not depend on how the tokens are spread over calls.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.stored
        keys.append(key_states)
        values.append(value_states)
        return keys.read(key_states.dtype), values.read(value_states.dtype)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return length and offset of the cache for the mask of a call."""
        # Up to transformers 5.2 the argument is the positions.
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + new, 0

    def get_seq_length(self, *args: Any) -> int:
        """Return the tokens held."""
        return self.stored[0].length

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: there is no limit (name in older versions of transformers)."""
        return -1

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens``, or, below 0, drop so many at the end."""
        for part in self.stored:
            part.crop(tokens if tokens > 0 else max(part.length + tokens, 0))

    def reset(self) -> None:
        """Forget all tokens."""
        self.lazy_initialization(None, None)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the beams in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences of the batch."""
        for part in self.stored:
            part.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        held = self.stored[0]._codes
        if held is not None:
            rows = torch.arange(held.shape[0], dtype=torch.long)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def offload(self) -> None:
        """Move to the CPU."""
        for part in self.stored:
            part.to("cpu")

    def prefetch(self) -> None:
        """Do nothing: what is read follows the inputs."""


class Int8Cache(Cache):
    """A key-value cache that holds 8-bit integers and a float32 scale per token and head.

    It takes (d + 4) / (2 d) of the memory of a bfloat16 cache with heads of d channels: 0.53 for
    64, 0.52 for 128. Every key and value is wrong by at most 1/254 of the largest magnitude in its
    token's head. Each call turns the codes of a layer to floats, one layer at a time. For models
    whose layers all attend to keys and values; sliding windows are kept whole.

    Examples
    --------
    >>> model.generate(**inputs, past_key_values=ptqkit.hf.Int8Cache(), max_new_tokens=100)
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=Int8Layer)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held, codes and scales."""
        return sum(part.nbytes for layer in self.layers for part in layer.stored)
