"""Write safetensors files one tensor at a time, and a directory all at once or not at all.

The safetensors layout is eight bytes of header length, a JSON header and the raw tensors, so a
tensor can be packed, written and dropped before the next one is made: memory holds one layer,
whatever the size of a shard.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

__all__ = ["TensorPlan", "atomic_directory", "parse_size", "write_tensors"]

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: everything the header needs, and how to make it when its turn comes.

    Attributes
    ----------
    name : str
    dtype : torch.dtype
    shape : tuple of int
    make : callable
        Returns the tensor, of exactly this dtype and shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorPlan:
        """Plan for a tensor that exists already."""
        if tensor.dtype not in _CODES:
            raise ValueError(f"{name}: dtype {tensor.dtype} has no safetensors code")
        if tensor.device.type == "meta":
            raise ValueError(f"{name}: on the meta device, there is no data to save")
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def parse_size(size: int | str) -> int:
    """Return a number of bytes from ``5_000_000`` or ``"5GB"``, ``"500 MiB"``.

    Raises
    ------
    ValueError
        If the text is not a positive number with a known unit.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size.strip())
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"max_shard_size {size!r} is not a size such as '5GB' or '500MiB'")
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ValueError(f"max_shard_size must be a positive number of bytes, not {size!r}")
    return size


def _write_file(path: Path, plans: Sequence[TensorPlan]) -> None:
    # Widest types first keeps every tensor aligned to its own size, as the safetensors writer does.
    ordered = sorted(plans, key=lambda p: (-p.dtype.itemsize, p.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for plan in ordered:
        header[plan.name] = {
            "dtype": _CODES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [start, start + plan.nbytes],
        }
        start += plan.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for plan in ordered:
            tensor = plan.make().detach()
            if tensor.dtype != plan.dtype or tuple(tensor.shape) != plan.shape:
                raise ValueError(
                    f"{plan.name}: planned {plan.dtype} {plan.shape}, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
            flat = tensor.to("cpu").contiguous().reshape(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())


def _shards(plans: Sequence[TensorPlan], limit: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.nbytes
    return shards


def write_tensors(
    directory: Path, plans: Sequence[TensorPlan], max_shard_size: int | str = "5GB"
) -> list[str]:
    """Write the tensors as ``model.safetensors``, or as shards with an index.

    Returns
    -------
    list of str
        Names of the files written.
    """
    names = [plan.name for plan in plans]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"tensor names occur twice: {', '.join(twice)}")
    shards = _shards(plans, parse_size(max_shard_size))
    if len(shards) == 1:
        _write_file(directory / "model.safetensors", shards[0])
        return ["model.safetensors"]
    files, weight_map = [], {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, shard)
        files.append(file)
        weight_map.update(dict.fromkeys((plan.name for plan in shard), file))
    total = sum(plan.nbytes for plan in plans)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    name = "model.safetensors.index.json"
    (directory / name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, name]


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
