"""Write files that appear complete or not at all, and values that JSON can hold."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ptqkit.errors import UsageError

__all__ = ["JsonReport", "check_file", "plain", "write_atomically"]


def plain(value: Any) -> Any:
    """Turn a result into what JSON can hold; numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value


class JsonReport:
    """Base of the dataclasses that report on work, and are written as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that are valid JSON (NaN and infinity become None)."""
        fields: Any = self
        return plain(asdict(fields))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the report as JSON text, and write it to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text + "\n")
        return text


def check_file(path: Path, label: str) -> None:
    """Refuse, before any work, a file that :func:`write_atomically` could not or must not write.

    Parameters
    ----------
    path : Path
    label : str
        What messages call it, such as the name of an option.

    Raises
    ------
    UsageError
        If it is a folder or a device, or no file can be made there.
    """
    name = os.path.abspath(path)
    folder = os.path.dirname(name)
    if not os.path.isdir(folder) or (os.path.exists(name) and not os.path.isfile(name)):
        raise UsageError(f"{label}: it must be a file in a folder that exists")
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(name)}.")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{label}: it cannot be written ({reason})") from None
    os.close(handle)
    os.unlink(temporary)


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
