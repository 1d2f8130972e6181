"""Read single tensors of safetensors files, into memory of their own or mapped.

``safe_open`` maps a whole file for each reader. Here a tensor is read by its place in the file, so
that the memory of a process is that of the tensors it holds.
"""

from __future__ import annotations

import json
import mmap
import os
import warnings
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ptqkit._repr import one_line_repr
from ptqkit.hf.checkpoint.files import DTYPE_CODES, INDEX, SINGLE

__all__ = ["Place", "StoredTensors", "file_checksum", "read_header", "read_tensor"]

_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
# Longer headers are refused by other readers too.
_LONGEST_HEADER = 100_000_000
_PIECE = 1 << 24


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes
    ----------
    path : Path
    start : int
        First byte in the file.
    dtype : torch.dtype
    shape : tuple of int
    """

    __repr__ = one_line_repr

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return self.dtype.itemsize * prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """Return the places of all tensors of a file, and its metadata.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a safetensors file, or shorter than its header says.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= _LONGEST_HEADER:
                raise ValueError("the length of the header makes no sense")
            header = json.loads(file.read(size))
            total = os.fstat(file.fileno()).st_size
        metadata = header.pop("__metadata__", None) or {}
        places = {name: _place(path, 8 + size, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, or not a safetensors file: {error}") from None
    end = max((p.start + p.nbytes for p in places.values()), default=0)
    if end > total:
        raise ValueError(f"{path} is damaged: it has {total:,} bytes, its header names {end:,}")
    return places, metadata


def _place(path: Path, data: int, entry: dict[str, Any]) -> Place:
    start, end = entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not read")
    place = Place(path, data + start, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
    if end - start != place.nbytes:
        raise ValueError(f"{end - start} bytes for a tensor of {place.nbytes}")
    return place


def read_tensor(place: Place) -> torch.Tensor:
    """Read a tensor into memory of its own.

    Raises
    ------
    OSError
        If the file ends before the tensor does.
    """
    tensor = torch.empty(place.shape, dtype=place.dtype)
    if not place.nbytes:
        return tensor
    target = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    with open(place.path, "rb", buffering=0) as file:
        file.seek(place.start)
        done = 0
        while done < place.nbytes:
            count = file.readinto(target[done : done + _PIECE])
            if not count:
                raise OSError(f"{place.path} has become shorter while it was read")
            done += count
    return tensor


class StoredTensors:
    """The tensors of a folder of safetensors files.

    Attributes
    ----------
    places : dict of str to Place
        By the names in the files.

    Raises
    ------
    FileNotFoundError
        If a shard, or every weights file, is missing; names what is.
    ValueError
        If a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, Place] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        if (folder / INDEX).is_file():
            self._read_index()
        elif (folder / SINGLE).is_file():
            self.places = read_header(folder / SINGLE)[0]
        else:
            raise FileNotFoundError(
                f"directory {folder} has neither {SINGLE} nor {INDEX}; other kinds of files cannot "
                "be read tensor by tensor: save the model as safetensors first"
            )

    def _read_index(self) -> None:
        path = self.folder / INDEX
        try:
            names = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
            files = sorted(set(names.values()))
            inside = all(f == os.path.basename(f) and f not in ("", "..") for f in files)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} has no weight_map of tensor names to files: {error}"
            ) from None
        if not inside:
            raise ValueError(f"{path} names files outside of its folder")
        missing = [file for file in files if not (self.folder / file).is_file()]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise FileNotFoundError(
                f"directory {self.folder} lacks {', '.join(missing[:3])}{more} of {len(files)} "
                "weights files: get the model again"
            )
        found = {file: read_header(self.folder / file)[0] for file in files}
        for name, file in names.items():
            if name not in found[file]:
                raise ValueError(
                    f"{self.folder / file} has no tensor {name}, which {INDEX} says it has"
                )
            self.places[name] = found[file][name]

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of its own."""
        return read_tensor(self.places[name])

    def map(self, name: str) -> torch.Tensor | None:
        """Return a tensor in the file itself, which must not be written to.

        None if it is empty, or does not lie at a multiple of the size of its elements.
        """
        place = self.places[name]
        if not place.nbytes or place.start % place.dtype.itemsize:
            return None
        if place.path not in self._maps:
            with open(place.path, "rb") as file:
                self._maps[place.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it must not be written to
            flat = torch.frombuffer(
                self._maps[place.path],
                dtype=place.dtype,
                count=prod(place.shape),
                offset=place.start,
            )
        return flat.view(place.shape)

    def checksum(self, name: str) -> int:
        """Return the CRC-32 of a tensor's bytes, read piece by piece."""
        place = self.places[name]
        return _checksum(place.path, place.start, place.nbytes)


def file_checksum(path: Path) -> int:
    """Return the CRC-32 of a file, read piece by piece."""
    return _checksum(path, 0, path.stat().st_size)


def _checksum(path: Path, start: int, size: int) -> int:
    value = 0
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while size:
            piece = file.read(min(size, _PIECE))
            if not piece:
                raise OSError(f"{path} has become shorter while it was read")
            value, size = zlib.crc32(piece, value), size - len(piece)
    return value
