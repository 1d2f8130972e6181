"""How much memory there is, how much was needed, and giving back what is free."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

__all__ = [
    "HeapPages",
    "MemoryLimit",
    "available_memory",
    "container_memory",
    "memory_limit",
    "peak_memory",
    "spare_memory",
]

SPARE = 32 << 20
"""Bytes by which the process may grow, at most, before free pages are given back."""
# So much of what a run needs may it grow by as well.
_SPARE_SHARE = 8

# Per version of control groups: limits, usage, and the part of the usage in ``memory.stat`` that
# the kernel drops before a limit is felt (file pages not in active use).
_GROUP_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    # Above memory.high nothing is killed, but the process is slowed until it hardly runs.
    2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
}


def available_memory(device: torch.device) -> int:
    """Return the memory of the activations' device that can be used, in bytes.

    On the host, it is what the whole system has free or what a container's limit leaves, whichever
    is less.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    room = container_memory()
    return free if room is None else min(free, room)


class MemoryLimit(NamedTuple):
    """What bounds a run: bytes, what they are called in messages, and what is free."""

    bytes: int
    whose: str
    free: int


def memory_limit(device: torch.device, budget: int | None) -> MemoryLimit:
    """Return the bound of a run with a budget in bytes, or None for the free memory.

    No budget makes a container larger: what is beyond its limit is killed.
    """
    free, room = available_memory(device), None if device.type != "cpu" else container_memory()
    limit, whose = (free, "free memory") if budget is None else (budget, "memory budget")
    if room is not None and room <= limit:
        limit, whose = room, "memory that the container's limit leaves"
    return MemoryLimit(limit, whose, free)


def container_memory(root: str | Path = "/") -> int | None:
    """Return what the limits of this process's control groups leave, in bytes.

    Containers and batch systems set such limits (Linux, versions 1 and 2); the free memory of the
    system does not show them.

    Parameters
    ----------
    root : path
        Of the file system that holds ``/proc`` and ``/sys``.

    Returns
    -------
    int or None
        At least 0; None if no limit is set.
    """
    rooms = []
    for version, folder in _memory_groups(Path(root)):
        limits, usage, dropped = _GROUP_FILES[version]
        with contextlib.suppress(OSError, ValueError):
            texts = [(folder / n).read_text().strip() for n in limits if (folder / n).exists()]
            limit = min((int(text) for text in texts if text != "max"), default=None)
            # Version 1 has no word for "no limit": it shows the largest multiple of a page.
            if limit is not None and limit < 2**62:
                used = int((folder / usage).read_text())
                rooms.append(max(0, limit - max(0, used - _statistic(folder, dropped))))
    return min(rooms, default=None)


def _memory_groups(root: Path) -> Iterator[tuple[int, Path]]:
    """Yield the folders of the control groups that count this process's memory, up to the top."""
    try:
        own = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    paths = {}
    for line in own:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths[2] = path
        elif "memory" in controllers.split(","):
            paths[1] = path
    for line in mounts:
        # id, parent, device, root within the hierarchy, mount point ... - type, source, options
        fields, _, kind = line.partition(" - ")
        top, mounted = (f.replace("\\040", " ") for f in fields.split()[3:5])
        kind, _, options = kind.split()
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        if version not in paths or (version == 1 and "memory" not in options.split(",")):
            continue
        point, path = root / mounted.lstrip("/"), paths[version]
        # A container may see its own group alone, under a path that the host gave it.
        inside = Path(path.removeprefix(top) if path.startswith(top) else "/")
        below = [part for part in inside.parts if part not in ("/", "..")]
        for depth in range(len(below), -1, -1):
            yield version, point.joinpath(*below[:depth])


def _statistic(folder: Path, name: str) -> int:
    """Return a number of ``memory.stat``; 0 if it is not there."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(v) for k, v in (line.split() for line in lines) if k == name), 0)


def peak_memory(device: torch.device) -> int:
    """Return this process's largest memory so far, in bytes: resident, or allocated on a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # psutil has no peak on other systems

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def spare_memory(device: torch.device, needed: int) -> int:
    """Return by how many bytes a run that needs so many may grow before free pages are given back.

    0 for a GPU, where none are.
    """
    return min(SPARE, needed // _SPARE_SHARE) if device.type == "cpu" else 0


class HeapPages:
    """The free pages of the C library's heap, which :meth:`release` gives back to the system.

    Once activations of some MB have been freed, glibc takes further ones from its heap (it raises
    its threshold for memory of their own). Where batches wait in turn at layers of unlike widths,
    the holes that freed ones leave fit the next ones badly: more than half of the heap was free in
    the end, and all of it resident. But a page that is given back costs a page fault when it is
    needed again (a sixth of the time of small models), so nothing happens before the process has
    grown by more than half of the ``expected`` bytes and ``spare`` ones: between two looks it grows
    too, and is not to need more than was expected. Does nothing with other C libraries, and if the
    activations are on another device. No setting changes.
    """

    def __init__(self, device: torch.device, spare: int = SPARE, expected: int = 0) -> None:
        self.spare = spare
        self._trim = _malloc_trim() if device.type == "cpu" else None
        self._start = 0 if self._trim is None else _resident()
        self._least = self._start + expected // 2

    def release(self, ended: bool = False) -> None:
        """Give free pages back, if the process has grown enough, or by ``spare`` bytes at the end.

        What cannot be given back counts as if it had been expected.
        """
        least = self._start if ended else self._least
        if self._trim is not None and _resident() > least + self.spare:
            self._trim(0)
            self._least = max(self._least, _resident())


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


@cache
def _malloc_trim() -> Any:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
