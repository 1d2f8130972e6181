"""Forward passes that pause at a layer and go on later."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Coroutine", "pause"]


class Coroutine:
    """A forward pass that can be paused in a hook with :func:`pause` and resumed later.

    Attributes
    ----------
    name : str or None
        Layer it waits at; None once it has ended.
    value : Tensor or None
        Input of that layer.
    stream : Tensor or None
        What the next writer of the block adds its output to, if that is known.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        import greenlet

        self._greenlet = greenlet.greenlet(run)
        # A greenlet starts with an empty context; the model must see the caller's.
        self._greenlet.gr_context = contextvars.copy_context()
        self.name: str | None = None
        self.value: torch.Tensor | None = None
        self.stream: torch.Tensor | None = None
        self.keys: dict[int, tuple[Any, ...]] = {}

    def step(self) -> None:
        """Run to the next pause, or to the end."""
        self.name = self.value = None
        paused = self._greenlet.switch()
        if not self._greenlet.dead:
            self.name, self.value = paused

    def close(self) -> None:
        """Unwind the forward pass if it is still paused."""
        self.name = self.value = self.stream = None
        if self._greenlet and not self._greenlet.dead:
            self._greenlet.throw()


def pause(name: str, value: torch.Tensor) -> None:
    """Hand control back to the caller of :meth:`Coroutine.step`."""
    import greenlet

    greenlet.getcurrent().parent.switch((name, value))
