"""Where a checkpoint may be written, and what it may replace."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ptqkit._folders import check_path, has_content, recover, resolve

__all__ = ["check_place", "claim_place", "source_folder"]

# What a checkpoint consists of: tensors, configuration, ptqkit's own files, and what tokenizers
# and processors write.
_WRITTEN = re.compile(
    r"""
    model(-\d+-of-\d+)?\.safetensors | model\.safetensors\.index\.json
    | ((generation|tokenizer|(video_)?preprocessor|processor)_)?config\.json | ptqkit_\w+\.json
    | tokenizer\.json | (special|added)_tokens(_map)?\.json | chat_template\.(jinja|json)
    | additional_chat_templates | vocab(-src|-tgt)?\.(json|txt) | merges\.txt | bpe\.codes
    | (tokenizer|spiece|sentencepiece(\.bpe)?)\.model | normalizer\.json | tekken\.json
    """,
    re.VERBOSE,
)
_HUB_PARTS = ("blobs", "refs", "snapshots")
_TAKEN = "is not empty: give overwrite=True or a new name"


def source_folder(model: Any) -> str | None:
    """Return the folder that a model was loaded from, if it is known."""
    name = getattr(model, "name_or_path", None)
    return name if isinstance(name, str) and name and os.path.isdir(name) else None


def claim_place(
    directory: str | os.PathLike[str],
    overwrite: bool = False,
    source: str | os.PathLike[str] | None = None,
    taken: str = _TAKEN,
    label: str = "",
) -> Path:
    """Resolve the name, clear up what a killed run left of it, and check the place.

    Parameters and exceptions are those of :func:`check_place`.
    """
    target = resolve(directory, label)
    recover(target)
    check_place(target, overwrite, source, taken, label)
    return target


def check_place(
    target: Path,
    overwrite: bool = False,
    source: str | os.PathLike[str] | None = None,
    taken: str = _TAKEN,
    label: str = "",
) -> None:
    """Check that a checkpoint may appear under a resolved name.

    Parameters
    ----------
    target : Path
    overwrite : bool
        Replace a checkpoint: a folder with a quantized model and nothing but files that
        checkpoints consist of.
    source : path, optional
        Folder of the float model, which stays.
    taken : str
        What the message says of a name that is taken.
    label : str
        What messages call the place, such as the name of an option.

    Raises
    ------
    UsageError, OSError
        If it may not; one line that says why and what to do.
    """
    label = label or f"directory {target}"
    if source is not None:
        _check_source(target, resolve(source), label)
    for path in (target, *target.parents):
        if path.name in _HUB_PARTS and path.parent.name.startswith(("models--", "datasets--")):
            raise FileExistsError(
                f"{label} lies in the cache of the Hugging Face Hub, kept: give another name"
            )
    check_path(target, label)
    if target.is_dir():
        _check_exchange(target, label)
    if has_content(target):
        if not overwrite:
            raise FileExistsError(f"{label} {taken}")
        _check_content(target, label)


def _check_source(target: Path, source: Path, label: str) -> None:
    if target == source or (os.path.exists(target) and os.path.samefile(target, source)):
        what = "is the folder of the model itself"
    elif target in source.parents:
        what = f"holds the folder of the model, {source}"
    elif source in target.parents and has_content(target):
        what = f"lies in the folder of the model, {source}"
    else:
        return
    raise FileExistsError(f"{label} {what}, kept: give another name")


def _check_exchange(target: Path, label: str) -> None:
    """Refuse a folder that another cannot take the place of, even if it is empty."""
    cwd = Path(os.path.realpath("."))
    if cwd == target or target in cwd.parents:
        what = "is" if cwd == target else "holds"
        raise FileExistsError(f"{label} {what} the current directory, kept: give another name")
    if os.path.ismount(target):
        raise FileExistsError(
            f"{label} is a mount point, which cannot be replaced: give the name of "
            "a new folder inside it"
        )


def _check_content(target: Path, label: str) -> None:
    """Refuse to replace anything but a quantized checkpoint."""
    config = target / "config.json"
    if not config.is_file():
        raise FileExistsError(f"{label} holds no config.json: not a checkpoint, kept")
    others = sorted(p.name for p in target.iterdir() if not _WRITTEN.fullmatch(p.name))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise FileExistsError(
            f"{label} holds what no checkpoint consists of, kept: "
            f"{', '.join(others[:3])}{more}; move that away or give another name"
        )
    try:
        quantized = "quantization_config" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        quantized = False
    if not quantized:
        raise FileExistsError(
            f"{label} holds a float model, not a quantized one, kept: remove it "
            "yourself or give another name"
        )
