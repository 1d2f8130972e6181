"""Progress of a run: events for a callback, and a bar for terminals and notebooks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Progress", "ProgressEvent", "make_progress"]


@dataclass(frozen=True)
class ProgressEvent:
    """One finished layer, or one equalized group of layers.

    Attributes
    ----------
    name : str
    index, total : int
        Layers done in this stage, of how many.
    loss : float
        The layer's objective; NaN where there is none.
    elapsed, seconds_left : float
        ``seconds_left`` is scaled by the work of the layers done and still to do.
    stage : {"equalizing", "quantizing"}
    """

    name: str
    index: int
    total: int
    loss: float
    elapsed: float
    seconds_left: float
    stage: str = "quantizing"


Progress = Callable[[ProgressEvent], None]


def make_progress(progress: bool | Progress | None) -> Progress | None:
    """Resolve the ``progress`` argument.

    False is silent, a callable is used as it is, and None or True gives a bar: None only where
    standard error is a terminal or a notebook runs, True always.
    """
    if progress is False:
        return None
    if callable(progress):
        return progress
    if progress is None and not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        return None
    if progress not in (None, True):
        raise TypeError(f"progress must be True, False, None or a callable, not {progress!r}")
    try:
        return _RichBar()
    except ImportError:
        return _plain


def _plain(event: ProgressEvent) -> None:
    print(
        f"{event.stage} {event.index}/{event.total} {event.name} loss {event.loss:.4g} "
        f"{event.seconds_left:.0f} s left",
        file=sys.stderr,
    )


class _RichBar:
    """A rich progress bar that opens with a stage's first event and closes with its last."""

    def __init__(self) -> None:
        self._bar = self._make()
        self._task: int | None = None

    @staticmethod
    def _make() -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        return Progress(
            TextColumn("{task.fields[stage]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]} left  loss {task.fields[loss]}  {task.fields[layer]}"),
            console=Console(stderr="ipykernel" not in sys.modules),
        )

    def __call__(self, event: ProgressEvent) -> None:
        shown = {
            "left": f"{event.seconds_left:.0f} s",
            "loss": f"{event.loss:.4g}",
            "layer": event.name,
            "stage": event.stage,
        }
        if self._task is None:
            self._bar = self._make()
            self._bar.start()
            self._task = self._bar.add_task("", total=event.total, **shown)
        self._bar.update(self._task, completed=event.index, **shown)
        if event.index >= event.total:
            self.close()

    def close(self) -> None:
        """Restore the terminal; called also when the run ends with an error."""
        self._bar.stop()
        self._task = None
