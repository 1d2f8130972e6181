"""The weights of the float model next to those of the one being quantized, in one pass.

With ``error_propagation`` every batch has two coroutines, a float one and a quantized one, that
pause at the same layers of the one model. The weights in the model are the quantized ones; while
the float coroutines go on, the weights they are about to run are the original ones.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from ptqkit.hf.models.structure import Target

__all__ = ["OriginalWeights"]


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
            self._kept[name] = self._targets[name].view.weight.clone()

    def ran(self, name: str) -> None:
        """Note that one float coroutine has come to a layer that is quantized already."""
        self._runs[name] += 1

    @contextlib.contextmanager
    def in_place(self, waiting: str | None) -> Iterator[None]:
        """Put the kept weights into the model; the quantized ones again on leaving.

        ``waiting`` is the layer that all float coroutines go on from: once they have, it is done.
        """
        weights = {n: self._targets[n].view.weight for n in self._kept}
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
