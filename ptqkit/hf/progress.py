"""Progress of long work: one kind of event for callbacks, and a bar for terminals and notebooks."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ptqkit._repr import one_line_repr

__all__ = ["Progress", "ProgressEvent", "ProgressStage", "close_progress", "make_progress"]


@dataclass(frozen=True)
class ProgressEvent:
    """One finished step: a layer, an equalized group of layers, a case, a window of text.

    Attributes
    ----------
    name : str
        What is finished.
    index, total : int
        Number of finished steps in this stage, and of all its steps.
    loss : float
        Result of the step: of a quantized layer tr((W - Q) H (W - Q)^T), of an equalized group the
        quantized output error. NaN if the step has none.
    elapsed, seconds_left : float
        Seconds since the work began, and an estimate of those left, scaled by the cost of the
        steps that are finished and of those that are not.
    stage : str
        "quantizing", "equalizing", "measuring", ...
    """

    __repr__ = one_line_repr

    name: str
    index: int
    total: int
    loss: float = math.nan
    elapsed: float = 0.0
    seconds_left: float = 0.0
    stage: str = "quantizing"

    def __str__(self) -> str:
        stage = "" if self.stage == "quantizing" else f"{self.stage} "
        loss = "" if math.isnan(self.loss) else f"  loss {self.loss:.4g}"
        left = f"{self.seconds_left:.0f} s left"
        return f"{stage}[{self.index}/{self.total}] {self.name}{loss}  {left}"


Progress = Callable[[ProgressEvent], None]


class ProgressStage:
    """Count the steps of a stage of work and report each of them.

    Parameters
    ----------
    progress : callable or None
        Receives a :class:`ProgressEvent` per step.
    stage : str
    total : int
        Number of steps.
    cost : float, optional
        Sum of the steps' costs, in any unit; ``total`` by default, a step costing 1.
    start : float, optional
        ``time.perf_counter()`` when the work began; now by default.
    """

    def __init__(
        self,
        progress: Progress | None,
        stage: str,
        total: int,
        cost: float | None = None,
        start: float | None = None,
    ) -> None:
        self._progress, self._stage, self._total = progress, stage, total
        self._cost = float(total) if cost is None else cost
        self._start = time.perf_counter() if start is None else start
        self._steps, self._spent = 0, 0.0

    def skip(self, cost: float = 1.0) -> None:
        """Count a step without reporting it."""
        self._steps += 1
        self._spent += cost

    def step(self, name: str, loss: float = math.nan, cost: float = 1.0) -> None:
        """Count a finished step and report it."""
        self.skip(cost)
        if self._progress is None:
            return
        elapsed = time.perf_counter() - self._start
        left = max(0.0, elapsed * (self._cost / self._spent - 1.0))
        event = ProgressEvent(name, self._steps, self._total, loss, elapsed, left, self._stage)
        self._progress(event)


def make_progress(progress: bool | Progress | None) -> Progress | None:
    """Resolve the ``progress`` argument.

    False is silent, a callable is used as it is, and None or True gives a bar: None only if
    standard error is a terminal or a notebook runs, True always.
    """
    if progress is False:
        return None
    if progress is None and not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        return None
    if progress is None or progress is True:
        try:
            return _RichBar()
        except ImportError:
            return _print_line
    if callable(progress):
        return progress
    raise TypeError(f"progress must be True, False, None or a callable, not {progress!r}")


def close_progress(progress: Progress | None) -> None:
    """Restore the terminal if a bar is open, also after an error."""
    close = getattr(progress, "close", None)
    if close is not None:
        close()


def _print_line(event: ProgressEvent) -> None:
    print(event, file=sys.stderr)


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
            TextColumn("{task.fields[left]} left{task.fields[loss]}  {task.fields[step]}"),
            console=Console(stderr="ipykernel" not in sys.modules),
        )

    def __call__(self, event: ProgressEvent) -> None:
        shown = {
            "left": f"{event.seconds_left:.0f} s",
            "loss": "" if math.isnan(event.loss) else f"  loss {event.loss:.4g}",
            "step": event.name,
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
        """Restore the terminal."""
        self._bar.stop()
        self._task = None
