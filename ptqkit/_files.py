"""Write files that appear complete or not at all, and values that JSON can hold."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic_directory", "plain", "write_atomically"]


def plain(value: Any) -> Any:
    """Turn a result into what JSON can hold; numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, all at once or not at all; text as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"directory {target} is a file")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"directory {target} is not empty: give overwrite=True or a new name")
    if not (target / "config.json").is_file():
        raise FileExistsError(f"directory {target} holds no config.json: not a checkpoint, kept")


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
    if os.name == "posix":
        for path in (directory, directory.parent):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _put_in_place(temporary: Path, target: Path, old: Path) -> None:
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(temporary, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_directory(
    directory: str | os.PathLike[str], *, overwrite: bool = False, needed: int = 0
) -> Iterator[Path]:
    """Yield a new sibling directory that takes the final name when the block ends well.

    On any exception, Ctrl-C included, the sibling is removed and whatever stood under the final
    name is still there, untouched.

    Parameters
    ----------
    overwrite : bool
        Replace an existing checkpoint. A directory without ``config.json`` is never replaced.
    needed : int
        Bytes that will be written; checked against the free space first.

    Raises
    ------
    FileExistsError
        If the name is taken.
    OSError
        If there is not enough space.
    """
    target = Path(os.path.realpath(directory))
    _check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_space(target.parent, needed)
    token = secrets.token_hex(4)
    temporary = target.with_name(f".{target.name}.{token}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        _sync_tree(temporary)
        # Somebody may have taken the name while this was written.
        _check_target(target, overwrite)
        _put_in_place(temporary, target, target.with_name(f".{target.name}.{token}.old"))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
