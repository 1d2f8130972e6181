"""Folders that appear complete or not at all, and what a run that was killed left of one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ptqkit.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "atomic_directory",
    "check_path",
    "has_content",
    "lock_folder",
    "new_parents",
    "recover",
    "resolve",
    "sync_folder",
    "unlock_folder",
]

# Of linux/fs.h and fcntl.h.
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
# Bytes that a temporary name has more than the final one, ".NAME.01234567.tmp", and that the
# longest name of a file inside may have.
_DECORATION, _INSIDE = 14, 64


def resolve(directory: str | os.PathLike[str], label: str = "") -> Path:
    """Return the absolute path with all links followed.

    Parameters
    ----------
    directory : path
    label : str
        What messages call it, such as the name of an option.

    Raises
    ------
    UsageError
        If the text cannot be a path, or links lead in a circle.
    """
    try:
        target = Path(os.path.realpath(directory))
    except ValueError as error:
        label = label or f"directory {os.fspath(directory)!r}"
        raise UsageError(f"{label} cannot be the name of a folder: {error}") from None
    # Every link that leads anywhere, even to nothing, has been followed.
    loop = next((p for p in (target, *target.parents) if os.path.islink(p)), None)
    if loop is not None:
        raise UsageError(f"{label or f'directory {target}'}: the links of {loop} lead in a circle")
    return target


def has_content(target: Path) -> bool:
    """Whether something stands under the name, other than an empty folder."""
    return os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir()))


def check_path(target: Path, label: str = "") -> None:
    """Check that a folder of this name can be made, or renamed if it is there.

    Parameters
    ----------
    target : Path
        As :func:`resolve` returns it.
    label : str
        What messages call it, such as the name of an option.

    Raises
    ------
    UsageError
        If the name is too long.
    OSError
        If the system would refuse: the name of a file or of a device, a place without permission.
    """
    label = label or f"directory {target}"
    if os.path.lexists(target) and not target.is_dir():
        kind = "file" if target.is_file() else "device or the like"
        raise FileExistsError(f"{label} is a {kind}: give another name")
    above = next((p for p in target.parents if os.path.lexists(p)), target)
    if not above.is_dir():
        raise NotADirectoryError(f"{label}: {above} is a file; give another name")
    if hasattr(os, "pathconf"):
        longest = os.pathconf(above, "PC_NAME_MAX")
        sizes = [len(os.fsencode(part)) for part in target.relative_to(above).parts]
        whole = len(os.fsencode(target)) + _DECORATION + _INSIDE
        if sizes and max(sizes[-1] + _DECORATION, *sizes) > longest:
            raise UsageError(
                f"{label}: the name is too long, {longest - _DECORATION} bytes at most"
            )
        if whole > os.pathconf(above, "PC_PATH_MAX"):
            raise UsageError(f"{label}: the path is too long; give a shorter one")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=above))
    except OSError as error:
        raise PermissionError(f"{label} cannot be created in {above}: {error.strerror}") from None


@contextmanager
def new_parents(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; on any error those that are new and empty go again."""
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()
        raise


def lock_folder(folder: Path, *, wait: bool) -> int | None:
    """Lock a folder until the handle is closed or the process ends; None where that is impossible.

    Raises
    ------
    BlockingIOError
        If a living process holds the lock, and ``wait`` is False.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle


def unlock_folder(handle: int | None) -> None:
    """Give back what :func:`lock_folder` returned."""
    if handle is not None:
        os.close(handle)


def recover(target: Path) -> None:
    """Clear up what a run that was killed while it wrote ``target`` left beside it.

    An unfinished folder is removed. One that was being replaced is put back if its name is free;
    otherwise a warning names it. What a living process works on is left alone; where the file
    system has no locks, which would show that, a warning names what lies there.
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    try:
        found = [p for p in target.parent.iterdir() if name.fullmatch(p.name) and p.is_dir()]
    except OSError:
        return
    found.sort(key=lambda p: p.stat().st_mtime, reverse=True)
    for path in found:
        try:
            handle = lock_folder(path, wait=False)
        except OSError:
            continue
        try:
            if path.suffix == ".old" and not has_content(target):
                if os.name == "nt" and target.exists():
                    target.rmdir()
                os.rename(path, target)
                warnings.warn(
                    f"{target} is back: a run was killed while it replaced this folder",
                    stacklevel=3,
                )
            elif path.suffix == ".tmp" and handle is not None:
                shutil.rmtree(path, ignore_errors=True)
            else:
                warnings.warn(
                    f"{path} seems to be what a run that was killed left: remove it if no run is "
                    "writing and you do not need it",
                    stacklevel=3,
                )
        finally:
            unlock_folder(handle)


def _check_space(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"no space for the checkpoint: {needed:,} bytes needed, {free:,} free"
        )


def _sync_tree(directory: Path) -> None:
    """Push files (and on POSIX the directory itself) to the disk before the rename."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    for path in (directory, directory.parent):
        sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Push the names in a folder to the disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _create(target: Path) -> tuple[Path, int | None]:
    """Make a new folder beside the target, and lock it as the work of a living process."""
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        path.mkdir()
        # In between another process may take it for a leftover: then there is nothing to lock.
        with contextlib.suppress(FileNotFoundError):
            handle = lock_folder(path, wait=True)
            if handle is None or os.path.exists(path):
                return path, handle
            os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot (Linux alone can)."""
    if sys.platform != "linux":
        return False
    try:
        call = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):  # an old C library
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return call(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0


def _put_in_place(temporary: Path, target: Path) -> None:
    """Give the target's name to the temporary folder, which may get what stood there before.

    Where two folders cannot be exchanged, the old one is renamed first, so that for a moment
    nothing has the name; :func:`recover` puts it back if the process ends just there.
    """
    if not has_content(target):
        if os.name == "nt" and target.exists():
            target.rmdir()
        os.rename(temporary, target)
        return
    if _exchange(temporary, target):
        return
    old = temporary.with_suffix(".old")
    handle = lock_folder(target, wait=True)
    try:
        try:
            os.rename(target, old)
            os.rename(temporary, target)
        except BaseException:
            if old.exists() and not target.exists():
                os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        unlock_folder(handle)


@contextmanager
def atomic_directory(
    directory: str | os.PathLike[str], *, check: Callable[[Path], None], needed: int = 0
) -> Iterator[Path]:
    """Yield a new sibling directory that takes the final name when the block ends well.

    On any exception, Ctrl-C included, the sibling is removed and whatever stood under the final
    name is still there, untouched. What an earlier run left that was killed is cleared up first.

    Parameters
    ----------
    check : callable
        Called with the resolved path, before and after the block; raises unless the name is free,
        or what has it may be replaced.
    needed : int
        Bytes that will be written; checked against the free space first.

    Raises
    ------
    OSError
        If there is not enough space.
    """
    target = resolve(directory)
    recover(target)
    check(target)
    with new_parents(target.parent):
        _check_space(target.parent, needed)
        temporary, handle = _create(target)
        try:
            yield temporary
            _sync_tree(temporary)
            # Somebody may have taken the name while this was written.
            check(target)
            _put_in_place(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            unlock_folder(handle)
