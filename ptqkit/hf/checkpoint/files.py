"""Write safetensors files one tensor at a time, and a directory all at once or not at all.

The safetensors layout is eight bytes of header length, a JSON header and the raw tensors, so a
tensor can be packed, written and dropped before the next one is made: memory holds one layer,
whatever the size of a shard.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

__all__ = ["TensorPlan", "parse_size", "write_tensors"]

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
