"""Write safetensors files one tensor at a time, and a directory all at once or not at all.

The safetensors layout is eight bytes of header length, a JSON header and the raw tensors, so a
tensor can be packed, written and dropped before the next one is made: memory holds one layer,
whatever the size of a shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

__all__ = ["DTYPE_CODES", "INDEX", "SINGLE", "TensorPlan", "write_file", "write_tensors"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Widest types first keeps every tensor aligned to its own size; in this order, then by name, the
# safetensors writer does it, so that a model that is saved again gives the same bytes.
DTYPE_CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorPlan:
    """Describe a tensor to be written: what the header needs, and how to make the data later.

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
        """Return the size of the data in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorPlan:
        """Return the plan for a tensor that exists already."""
        if tensor.dtype not in DTYPE_CODES:
            raise ValueError(f"{name}: dtype {tensor.dtype} has no safetensors code")
        if tensor.device.type == "meta":
            raise ValueError(f"{name}: on the meta device, there is no data to save")
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_file(
    path: Path, plans: Sequence[TensorPlan], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as one safetensors file, and push it to the disk."""
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPE_CODES)}
    ordered = sorted(plans, key=lambda p: (ranks[p.dtype], p.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for plan in ordered:
        header[plan.name] = {
            "dtype": DTYPE_CODES[plan.dtype],
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


def write_tensors(
    directory: Path, plans: Sequence[TensorPlan], max_shard_size: int = 5 * 10**9
) -> list[str]:
    """Write the tensors as ``model.safetensors``, or as shards with an index.

    Parameters
    ----------
    directory : Path
    plans : sequence of TensorPlan
    max_shard_size : int
        Bytes; a larger tensor has a file of its own.

    Returns
    -------
    list of str
        Names of the files written.
    """
    names = [plan.name for plan in plans]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"tensor names occur twice: {', '.join(twice)}")
    by_name = {plan.name: plan for plan in plans}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda plan: plan.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, members in split.filename_to_tensors.items():
        write_file(directory / file, [by_name[name] for name in members])
    files = list(split.filename_to_tensors)
    if not split.is_sharded:
        return files
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, INDEX]
