"""Text that every Python has: the sources of its own standard library.

The demo needs words to calibrate on and words to measure on, without a download. The files
are those of the running interpreter, so their text differs a little between Python versions;
the split of a file depends on its relative path alone and is the same everywhere.

Three splits, about 90/5/5 by number of files:

- ``"train"`` and ``"calibration"``: the embedded model was trained on both. Calibration is the
  part to collect activations on, kept small and apart so that nothing else has to be read.
- ``"test"``: never trained on, in any version of Python. Measure here.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ptqkit.errors import check_choice

SPLITS = ("train", "calibration", "test")

EXTRA_FOLDERS = frozenset({"test", "tests", "idlelib", "lib2to3", "turtledemo"})
"""Python sources too, but no library code, or not installed everywhere."""

_FOREIGN_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "ensurepip", "__pycache__", "pydoc_data"}
)
_GENERATED = re.compile(
    r"(config-[^/]*|_sysconfigdata[^/]*|_sysconfig_vars[^/]*|sitecustomize\.py|usercustomize\.py"
    r"|encodings/(cp\d|iso8859|koi8|mac_|kz1048|ptcp154|tis_620|hp_roman8|palmos)[^/]*)"
)


def split_of(relpath: str) -> str:
    """Name the split of a file.

    The model was trained on the files of ``"train"`` and of ``"calibration"`` (the second is
    a part set aside for calibration, and counts as training text); files of ``"test"`` were
    never trained on.

    Parameters
    ----------
    relpath : str
        Path relative to the standard library's folder, with forward slashes.

    Returns
    -------
    str
        ``"train"``, ``"calibration"`` or ``"test"``: about 90, 5 and 5 files in a hundred.

    Examples
    --------
    >>> split_of("json/decoder.py") == split_of("json/decoder.py")
    True
    """
    part = _rank(relpath) % 100
    return "test" if part < 5 else "calibration" if part < 10 else "train"


def files(split: str, root: str | Path | None = None) -> list[Path]:
    """List the source files of one split.

    Parameters
    ----------
    split : str
        ``"train"``, ``"calibration"`` or ``"test"``; no file is in two of them.
    root : str or pathlib.Path, optional
        A standard library's folder; by default the running interpreter's.

    Returns
    -------
    list of pathlib.Path
        In a fixed order without meaning (by hash of the relative path), so that a beginning
        of the list is a fair sample.

    Raises
    ------
    ValueError
        For an unknown split.
    FileNotFoundError
        If the folder holds no sources, as in a zipped or stripped installation.
    """
    check_choice("split", split, SPLITS)
    folder = _folder(root)
    chosen = (path for path in _sources(folder, extra=False) if split_of(path) == split)
    return [folder / path for path in sorted(chosen, key=_rank)]


def text(
    split: str,
    max_chars: int | None = None,
    *,
    per_file: int | None = None,
    root: str | Path | None = None,
) -> str:
    r"""Join the text of one split, in the order of `files`.

    Parameters
    ----------
    split : str
        ``"train"``, ``"calibration"`` or ``"test"``.
    max_chars : int, optional
        Stop after this many characters; by default everything.
    per_file : int, optional
        Take at most this many characters from the beginning of each file, cut at the end of
        a line: more variety in the same length.
    root : str or pathlib.Path, optional
        A standard library's folder; by default the running interpreter's.

    Returns
    -------
    str
        Line ends are ``"\n"``.

    Raises
    ------
    ValueError, FileNotFoundError
        As `files` does.
    """
    parts: list[str] = []
    length = 0
    for path in files(split, root):
        part = path.read_text(encoding="utf-8")
        if per_file is not None and len(part) > per_file:
            part = part[: part.rfind("\n", 0, per_file) + 1]
        parts.append(part)
        length += len(part)
        if max_chars is not None and length >= max_chars:
            break
    return "".join(parts)[:max_chars]


def _rank(relpath: str) -> int:
    """Return a number that depends on the path's text alone, equal on every machine."""
    return int.from_bytes(hashlib.sha256(relpath.encode("utf-8")).digest()[:8], "big")


def _folder(root: str | Path | None) -> Path:
    """Return the standard library's folder, or say why there is none to read."""
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    if not (folder / "os.py").is_file():
        raise FileNotFoundError(
            f"no standard library sources in {folder}: this Python ships them zipped, stripped "
            "or not at all; give other text to the demo, or run it with another Python"
        )
    return folder


def _sources(folder: Path, *, extra: bool) -> Iterator[str]:
    """Yield the relative paths of the library's files, or of the extra folders' instead."""
    for where, below, names in os.walk(folder):
        below[:] = [name for name in below if name not in _FOREIGN_FOLDERS]
        parents = Path(where).relative_to(folder)
        if extra != bool(EXTRA_FOLDERS.intersection(parents.parts)):
            continue
        for name in (n for n in names if n.endswith(".py")):
            relpath = (parents / name).as_posix()
            if not _GENERATED.match(relpath) and _readable(folder / relpath):
                yield relpath


def _readable(path: Path) -> bool:
    """Say whether a file decodes as UTF-8 (some hold other encodings on purpose)."""
    try:
        path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True
