"""The float model beside the one being quantized: its layers' inputs, and its weights.

With ``error_propagation`` every batch has two coroutines, a float one and a quantized one, that
pause at the same layers of the one model. The weights in the model are the quantized ones; while
the float coroutines go on, the weights they are about to run are the original ones.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ptqkit.errors import UnsupportedModuleError
from ptqkit.hf.models.structure import Target

__all__ = ["Moments", "OriginalWeights", "check_same_tokens"]


@dataclass
class Moments:
    """What a group's layers are quantized with.

    Attributes
    ----------
    hessian : Hessian
    moment : ndarray of float64, shape (in, in), or None
        G = (2/N) sum x x~^T, with error propagation.
    ranges : ChannelRanges or None
        Of the inputs, where a layer's activation grid or bias correction needs them.
    seconds, seconds_moment : float
        Spent on H and on G.
    """

    hessian: Any
    moment: np.ndarray | None = None
    ranges: Any = None
    seconds: float = 0.0
    seconds_moment: float = 0.0

    @property
    def tokens(self) -> int:
        """Calibration tokens behind H."""
        return 0 if self.hessian is None else int(self.hessian.tokens)


def check_same_tokens(
    name: str, floats: torch.Tensor, quantized: torch.Tensor, batch: Mapping[str, torch.Tensor]
) -> None:
    """Raise UnsupportedModuleError unless row t of both inputs belongs to the same token.

    That is so where every token of the batch, or one value per sample, comes in order; an expert
    that each path chooses other tokens for has other leading shapes.
    """
    leading = tuple(quantized.shape[:-1])
    shapes = [tuple(batch[k].shape) for k in ("input_ids", "decoder_input_ids") if k in batch]
    in_order = any(leading[:1] == s[:1] or leading == (s[0] * s[1],) for s in shapes)
    if floats.shape != quantized.shape or not in_order:
        raise UnsupportedModuleError(
            f"{name}: error_propagation needs every token's input in both models, but the inputs "
            f"have shapes {tuple(floats.shape)} and {tuple(quantized.shape)}; leave this layer out "
            "with an override 'skip', or quantize with error_propagation=0"
        )


class OriginalWeights:
    """Float weights of layers that some float coroutine has yet to run.

    A layer is kept from before it is quantized until all float coroutines have run it, which may
    be several pauses later: layers that share an input need not run next to each other.
    """

    def __init__(self, targets: Mapping[str, Target], coroutines: int) -> None:
        self._targets, self._coroutines = targets, coroutines
        self._kept: dict[str, torch.Tensor] = {}
        self._runs: Counter[str] = Counter()

    def keep(self, names: Sequence[str]) -> None:
        """Keep the weights of layers that are about to be quantized."""
        for name in names:
            self._kept[name] = self._targets[name].module.weight.detach().clone()

    def ran(self, name: str) -> None:
        """Note that one float coroutine has come to a layer that is quantized already."""
        self._runs[name] += 1

    @contextlib.contextmanager
    def in_place(self, waiting: str | None) -> Iterator[None]:
        """Put the kept weights into the model; the quantized ones again on leaving.

        ``waiting`` is the layer that all float coroutines go on from: once they have, it is done.
        """
        weights = {n: self._targets[n].module.weight.detach() for n in self._kept}
        quantized = {n: w.clone() for n, w in weights.items()}
        try:
            for name, weight in weights.items():
                weight.copy_(self._kept[name])
            yield
        finally:
            for name, weight in weights.items():
                weight.copy_(quantized[name])
        for name in list(self._kept):
            if name == waiting or self._runs[name] == self._coroutines:
                del self._kept[name]
