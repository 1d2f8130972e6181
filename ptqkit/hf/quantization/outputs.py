"""Outputs of blocks in files: what a run that was killed goes on from, and what saves memory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ptqkit._folders import sync_folder
from ptqkit.errors import UnsupportedModuleError
from ptqkit.hf.checkpoint.files import TensorPlan, write_file
from ptqkit.hf.checkpoint.tensors import read_header, read_tensor
from ptqkit.hf.models.recorded import copy_tensors

__all__ = ["FileOutputs"]

_SPEC = "value"


class FileOutputs:
    """Outputs in a folder per finished block, a file per batch; the next ones become it at once.

    Parameters
    ----------
    root : Path
        Folder that holds them.
    batches : int
    device : torch.device
        Where the model runs.
    keep : bool
        Keep them in memory too, and read no file but those of an earlier process.
    finished : int
        Blocks whose outputs are there already.
    """

    def __init__(
        self, root: Path, batches: int, device: torch.device, keep: bool, finished: int = 0
    ) -> None:
        self.root, self.device, self.keep, self.finished = root, device, keep, finished
        self._held: list[dict[str, Any]] = [{} for _ in range(batches)]
        self._next: Path | None = None
        if finished and keep:
            self._held = [self._read(index) for index in range(batches)]

    @staticmethod
    def folder(root: Path, finished: int) -> Path:
        """Return where the outputs of the last of so many finished blocks are."""
        return root / f"outputs-{finished:05d}"

    def get(self, index: int, stack: str) -> Any:
        """Return a copy of what a batch's last finished block of a stack returned."""
        return copy_tensors(self._held[index][stack]) if self.keep else self._read(index)[stack]

    def put(self, index: int, outputs: dict[str, Any]) -> None:
        """Write new outputs of a batch, with those of other stacks, next to the present ones."""
        if self._next is None:
            self._next = self.folder(self.root, self.finished + 1).with_suffix(".tmp")
            shutil.rmtree(self._next, ignore_errors=True)
            self._next.mkdir()
        before = self._held[index] if self.keep or not self.finished else self._read(index)
        now = {**before, **outputs}
        tensors: list[torch.Tensor] = []
        spec = _describe(now, tensors)
        plans = [TensorPlan.of(f"{i:04d}", t) for i, t in enumerate(tensors)]
        write_file(self._file(self._next, index), plans, {_SPEC: json.dumps(spec)})
        if self.keep:
            self._held[index] = now

    def turn(self) -> None:
        """Make what has been written the present outputs; the earlier ones stay until the end."""
        assert self._next is not None
        sync_folder(self._next)
        final = self.folder(self.root, self.finished + 1)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(self._next, final)
        sync_folder(self.root)
        self._next, self.finished = None, self.finished + 1

    @staticmethod
    def _file(folder: Path, index: int) -> Path:
        return folder / f"{index:05d}.safetensors"

    def _read(self, index: int) -> dict[str, Any]:
        path = self._file(self.folder(self.root, self.finished), index)
        places, metadata = read_header(path)
        try:
            spec = json.loads(metadata[_SPEC])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        tensors = [read_tensor(places[name]).to(self.device) for name in sorted(places)]
        return _rebuild(spec, tensors)


def _describe(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Return the form of a value as JSON; its tensors are appended to the list."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_describe(v, tensors) for v in value]}
    if type(value) is dict and all(isinstance(k, str) for k in value):
        return {"dict": {k: _describe(v, tensors) for k, v in value.items()}}
    if value is None or type(value) in (bool, int, float, str):
        return {"plain": value}
    raise UnsupportedModuleError(
        f"a block returns a {type(value).__name__}, which cannot be kept in a file: quantize the "
        "model in memory (stream=False; on the command line --no-stream)"
    )


def _rebuild(spec: Any, tensors: list[torch.Tensor]) -> Any:
    ((kind, value),) = spec.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "plain":
        return value
    if kind == "dict":
        return {k: _rebuild(v, tensors) for k, v in value.items()}
    items = [_rebuild(v, tensors) for v in value]
    return tuple(items) if kind == "tuple" else items
