"""Solving several groups of layers at once, while what does not depend on them goes on.

A schedule yields groups whose moments are complete. Most of them must be written into the model
before the next group's moments can be accumulated: its inputs are what the quantized layers give.
Of some a schedule says that they need not: experts of one mixture do not see each other, and with
calibration on the float model's inputs nothing is written before the end. Such groups are solved by
threads of the host, several at once, while the caller asks for the next ones, which may run on a
device. They are written, and reported, in their order, by the caller alone.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ptqkit.hf.quantization.work import Step, Steps

__all__ = ["Begin", "each_group", "helpers"]

T = TypeVar("T")

#: Begins a call, and returns what waits for its result or raises its error.
Begin = Callable[[Callable[[], Any]], Callable[[], Any]]


@contextlib.contextmanager
def helpers(at_once: int) -> Iterator[Begin]:
    """Yield what begins calls on so many threads; calls that have not begun are dropped on leaving.

    Parameters
    ----------
    at_once : int
        0: a call is made by the caller when its result is asked for.
    """
    if not at_once:
        yield lambda call: call
        return
    pool = concurrent.futures.ThreadPoolExecutor(at_once, thread_name_prefix="ptqkit-solver")
    try:
        yield lambda call: pool.submit(call).result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def each_group(
    steps: Steps, begin: Callable[[Step], T], take: Callable[[T], None], ahead: int = 0
) -> str | None:
    """Go through all groups of a schedule; return why it leaves the rest, None if it does not.

    Parameters
    ----------
    steps : generator of Step
        Closed on leaving.
    begin : callable
        Begins to solve a group.
    take : callable
        Waits for what was begun, and writes it; called in the order of the groups, and before the
        schedule goes on wherever it says that this must be.
    ahead : int
        Groups that may wait to be taken when the schedule goes on.
    """
    waiting: deque[T] = deque()
    with contextlib.closing(steps):
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                reason = end.value
                break
            room = ahead if step.independent else 0
            waiting.append(begin(step))
            del step  # its moments go when it is solved
            while len(waiting) > room:
                take(waiting.popleft())
        while waiting:
            take(waiting.popleft())
    return reason
