"""The state of a run in a folder: finished blocks, the outputs of the last one, and of what.

A block counts as finished once its JSON file has its name, which it gets last. Every file and
folder is written under a temporary name, pushed to the disk and renamed, so a run that is killed
leaves what was finished, and at most one block is done again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptqkit._files import write_atomically
from ptqkit._folders import lock_folder, sync_folder, unlock_folder
from ptqkit._repr import one_line_repr
from ptqkit._units import show_bytes
from ptqkit.arrays.matrix import QuantizedMatrix, WeightGrid
from ptqkit.errors import PreflightError, Problem, UsageError
from ptqkit.hf.checkpoint.files import TensorPlan, write_file
from ptqkit.hf.checkpoint.tensors import Place, file_checksum, read_header, read_tensor
from ptqkit.hf.quantization.outputs import FileOutputs
from ptqkit.nn.activations import ActivationQuantizer
from ptqkit.recipe.options import ActivationQuantization

__all__ = ["FinishedBlock", "RunState", "check_room", "state_folder"]

_VERSION = 1
_NO_ROOM = {
    errno.ENOSPC: "no space left for",
    errno.EDQUOT: "no space left for",
    errno.EFBIG: "the limit of this process on files (ulimit -f) is too low for",
}
_ABOUT = "run.json"
_OWN = re.compile(r"run\.json|block-\d{5}\.(json|safetensors)|outputs-\d{5}")
_TEMPORARY = re.compile(
    r"\.(run|block-\d{5})\.json\.\w+|block-\d{5}\.safetensors\.tmp|outputs-\d{5}\.tmp"
)
_ARRAYS = ("codes", "scales", "zero_points", "g_idx", "row_objectives", "rtn_objectives")
_NUMBERS = ("damping", "damping_raised", "dead_inputs")


@dataclass
class FinishedBlock:
    """What a run has to keep of a block, or of the layers outside of the blocks.

    Attributes
    ----------
    matrices : dict of str to QuantizedMatrix
    activations : dict of str to ActivationQuantizer
    tensors : dict of str to Tensor
        Parameters that are no longer those of the model's files, such as corrected biases.
    rows : list of dict
        Of the report, as ``dataclasses.asdict`` gives them.
    warnings : list of str
    """

    __repr__ = one_line_repr

    matrices: dict[str, QuantizedMatrix] = field(default_factory=dict)
    activations: dict[str, ActivationQuantizer] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def state_folder(target: Path) -> Path:
    """Return where the state of a run lies that writes a checkpoint to ``target``."""
    return target.with_name(f"{target.name}.partial")


class RunState:
    """The state of a run in a folder of its own.

    Attributes
    ----------
    root : Path
    finished : int
        Blocks that are done.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.finished = 0
        self._lock: int | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[RunState]:
        """Make the folder unless it is there, and keep others out of it.

        Raises
        ------
        UsageError
            If the folder is not the state of a run, or another process works on it.
        """
        if self.root.exists() and not self._is_own():
            raise UsageError(
                f"{self.root} is where the state of this run belongs, but holds something else: "
                "move it away, or give another name for the output"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock_folder(self.root, wait=False)
        except BlockingIOError:
            raise UsageError(
                f"another process works on {self.root}: wait for it, or give another name for the "
                "output"
            ) from None
        try:
            yield self
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise OSError(
                error.errno,
                f"{_NO_ROOM[error.errno]} {self.root}: {self.finished} blocks are done and kept; "
                "make room, and give the same command again",
            ) from error
        finally:
            unlock_folder(self._lock)
            self._lock = None
            with contextlib.suppress(OSError):
                self.root.rmdir()  # nothing has been kept

    def _is_own(self) -> bool:
        if not self.root.is_dir():
            return False
        names = [p.name for p in self.root.iterdir()]
        return _ABOUT in names or all(_TEMPORARY.fullmatch(name) for name in names)

    def begin(self, about: Mapping[str, Any], blocks: int) -> None:
        """Start a run, or find out how far an equal one came.

        Parameters
        ----------
        about : mapping
            Everything that the results depend on, as JSON holds it.
        blocks : int

        Raises
        ------
        PreflightError
            If the state is that of another run; says what differs.
        ValueError
            If a file of the state is damaged.
        """
        for path in self.root.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                _remove(path)
        about = json.loads(json.dumps({"state_version": _VERSION, **about}))
        path = self.root / _ABOUT
        if not path.exists():
            self._write_json(path, about)
            return
        before = self._read_json(path)
        changed = list(_differences(before, about))
        if changed:
            more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise PreflightError(
                [
                    f"{self.root} is the state of another run: {'; '.join(changed[:5])}{more}. "
                    "Give the same input to go on with it, remove the folder to start again, or "
                    "give another name for the output"
                ]
            )
        while self.finished < blocks and self._json(self.finished).exists():
            self.finished += 1
        if 0 < self.finished < blocks:
            self._check_outputs()
        self._clear(blocks)

    def _clear(self, blocks: int) -> None:
        """Remove what is not needed to go on: earlier outputs, and what was not finished."""
        for path in self.root.iterdir():
            match = re.fullmatch(r"(block|outputs)-(\d{5})(\.\w+)?", path.name)
            if match is None:
                continue
            number = int(match[2])
            stale = number >= self.finished if match[1] == "block" else number != self.finished
            if stale or (match[1] == "outputs" and self.finished == blocks):
                _remove(path)

    def outputs(self, batches: int, device: torch.device, keep: bool) -> FileOutputs:
        """Return the outputs of the blocks that are finished, to go on with."""
        return FileOutputs(self.root, batches, device, keep, self.finished)

    def keep(self, block: FinishedBlock) -> FinishedBlock:
        """Write the next block; returns it with its matrices in the files themselves.

        The outputs that follow it are there already.
        """
        plans: list[TensorPlan] = []
        for name, matrix in block.matrices.items():
            for key in _ARRAYS:
                array = getattr(matrix, key)
                if array is not None:
                    plans.append(_array_plan(f"{name}/{key}", array))
        for name, tensor in block.tensors.items():
            plans.append(TensorPlan.of(f"{name}/tensor", tensor))
        for name, quantizer in block.activations.items():
            for key in ("scale", "zero_point"):
                value = getattr(quantizer, key)
                if value is not None:
                    plans.append(TensorPlan.of(f"{name}/{key}", value.cpu()))
        path = self._tensors(self.finished)
        temporary = path.with_name(f"{path.name}.tmp")
        write_file(temporary, plans)
        os.replace(temporary, path)
        sync_folder(self.root)
        folder = self._outputs(self.finished + 1)
        following = folder.iterdir() if folder.is_dir() else ()
        entry = {
            "matrices": {
                name: {"grid": asdict(m.grid), **{k: getattr(m, k) for k in _NUMBERS}}
                for name, m in block.matrices.items()
            },
            "activations": {n: q.spec.to_dict() for n, q in block.activations.items()},
            "tensors": list(block.tensors),
            "checksum": file_checksum(path),
            "outputs": {p.name: file_checksum(p) for p in sorted(following)},
            "rows": block.rows,
            "warnings": block.warnings,
        }
        self._write_json(self._json(self.finished), entry)
        earlier = self._outputs(self.finished)
        self.finished += 1
        _remove(earlier)
        return self.read(self.finished - 1)

    def _check_outputs(self) -> None:
        """Raise ValueError unless the outputs of the last finished block are as they were."""
        folder = self._outputs(self.finished)
        entry = self._read_json(self._json(self.finished - 1))
        wanted = entry.get("outputs") if isinstance(entry, dict) else None
        if not isinstance(wanted, dict):
            path = self._json(self.finished - 1)
            raise ValueError(f"{path} is damaged (it does not name its outputs): {_AGAIN}")
        for name, checksum in wanted.items():
            if not (folder / name).is_file() or file_checksum(folder / name) != checksum:
                raise ValueError(f"{folder / name} is damaged or missing: {_AGAIN}")
        if not wanted:
            raise ValueError(f"{self.root} lacks {folder.name}: {_AGAIN}")

    def read(self, number: int, check: bool = False) -> FinishedBlock:
        """Return a finished block; its matrices are mapped, and read only to ``check`` them.

        Raises
        ------
        ValueError
            If a file is damaged.
        """
        path = self._tensors(number)
        try:
            entry = self._read_json(self._json(number))
            places = read_header(path)[0]
            if check and file_checksum(path) != entry["checksum"]:
                raise ValueError("its checksum is another one")
            array = partial(_map_array, _mapped(path), places)
            block = FinishedBlock(rows=entry["rows"], warnings=entry["warnings"])
            for name, about in entry["matrices"].items():
                held: dict[str, Any] = {k: about[k] for k in _NUMBERS}
                held |= {k: array(f"{name}/{k}") for k in _ARRAYS if f"{name}/{k}" in places}
                block.matrices[name] = QuantizedMatrix(**held, grid=WeightGrid(**about["grid"]))
            for name in entry["tensors"]:
                block.tensors[name] = read_tensor(places[f"{name}/tensor"])
            for name, spec in entry["activations"].items():
                grid_of = {
                    k: read_tensor(places[f"{name}/{k}"])
                    for k in ("scale", "zero_point")
                    if f"{name}/{k}" in places
                }
                parsed = ActivationQuantization.parse(spec)
                block.activations[name] = ActivationQuantizer(parsed, **grid_of)
        except FileNotFoundError as error:
            raise ValueError(f"{self.root} lacks {path.name}: {_AGAIN}") from error
        except (KeyError, TypeError, ValueError) as error:
            text = f"block {number} of {self.root} is damaged ({error}): {_AGAIN}"
            raise ValueError(text) from error
        return block

    def remove(self) -> None:
        """Remove the state once the checkpoint is written; what is not of a run stays."""
        for path in self.root.iterdir():
            own = _OWN.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name)
            if own and path.name != _ABOUT:
                _remove(path)
        _remove(self.root / _ABOUT)
        with contextlib.suppress(OSError):
            self.root.rmdir()

    def _json(self, number: int) -> Path:
        return self.root / f"block-{number:05d}.json"

    def _tensors(self, number: int) -> Path:
        return self.root / f"block-{number:05d}.safetensors"

    def _outputs(self, finished: int) -> Path:
        return FileOutputs.folder(self.root, finished)

    def _write_json(self, path: Path, value: Any) -> None:
        write_atomically(path, json.dumps(value))
        sync_folder(self.root)

    def _read_json(self, path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): {_AGAIN}") from None


def check_room(root: Path, needed: int) -> None:
    """Check that the disk has room for the state of a run, less what is there already.

    Raises
    ------
    PreflightError
        If it has not.
    """
    present = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    free = shutil.disk_usage(root).free
    if free < needed - present:
        text = (
            f"{root} needs about {show_bytes(needed - present)} while the run goes on, the disk "
            f"has {show_bytes(free)} free: make room, or give another place for the output"
        )
        raise PreflightError([Problem(text, OSError)])


_AGAIN = "remove the folder to start again"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _array_plan(name: str, array: np.ndarray) -> TensorPlan:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return TensorPlan.of(name, tensor)


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _map_array(mapped: mmap.mmap, places: Mapping[str, Place], name: str) -> np.ndarray:
    place = places[name]
    dtype = np.dtype(str(place.dtype).removeprefix("torch."))
    count = place.nbytes // dtype.itemsize
    return np.frombuffer(mapped, dtype, count, place.start).reshape(place.shape)


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Yield what differs between two nested mappings, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(k for k in now if k not in before)]:
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(before.get(key), now.get(key), inner)
    elif before != now:
        shown = [json.dumps(v) for v in (before, now)]
        if all(len(text) <= 60 for text in shown):
            yield f"{name} was {shown[0]}, is {shown[1]}"
        else:
            yield f"{name} differs"
