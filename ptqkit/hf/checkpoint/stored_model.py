"""A model whose parameters stay in its files: built on the meta device, read by name."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ptqkit._repr import one_line_repr
from ptqkit.errors import UnsupportedModuleError
from ptqkit.hf.checkpoint.reader import model_class_of, read_folder
from ptqkit.hf.checkpoint.tensors import StoredTensors

__all__ = ["StoredModel", "open_stored"]


@dataclass(frozen=True)
class _Sources:
    """Tensors of the files that become one or several in memory, as transformers converts them."""

    first: str
    converter: Any
    tensors: tuple[tuple[str, str], ...]


@dataclass(eq=False)
class StoredModel:
    """A transformers model on the meta device, and where its tensors lie.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        In eval mode; buffers that no file holds are real.
    tensors : StoredTensors
    device : torch.device
        Where the model is to run.
    names : dict of str to str
        Names in the files of what is read as it is, by names in memory.
    converted : dict of str to _Sources
        What is joined or split on loading, such as experts.
    """

    __repr__ = one_line_repr

    model: Any
    tensors: StoredTensors
    device: torch.device
    names: dict[str, str] = field(default_factory=dict, repr=False)
    converted: dict[str, _Sources] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.tensors.folder

    def again(self) -> StoredModel:
        """Return another model on the meta device, of the same class, settings and files."""
        settings = copy.deepcopy(self.model.config)
        return open_stored(self.folder, self.model.dtype, type(self.model), settings, self.device)

    def files_of(self, name: str) -> list[str]:
        """Return the names in the files of the tensors that a tensor is made of."""
        if name in self.names:
            return [self.names[name]]
        return [stored for stored, _ in self.converted[name].tensors]

    def read(self, names: Iterable[str], dtypes: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
        """Read tensors by their names in memory, in the dtypes they have there."""
        found: dict[str, torch.Tensor] = {}
        for name in names:
            if name in found:
                continue
            if name in self.names:
                made = {name: self.tensors.read(self.names[name])}
            else:
                made = self._convert(self.converted[name], dtypes[name])
            found |= {n: t.to(dtypes.get(n, t.dtype)) for n, t in made.items()}
        return found

    def _convert(self, sources: _Sources, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(sources.converter)
        for stored, pattern in sources.tensors:
            value = self.tensors.read(stored).to(dtype)
            converter.add_tensor(sources.first, stored, pattern, value)
        made = converter.convert(sources.first, model=self.model, config=self.model.config)
        return {n: (t[0] if isinstance(t, list) else t).contiguous() for n, t in made.items()}


def open_stored(
    folder: str | os.PathLike[str],
    dtype: torch.dtype,
    model_class: Any = None,
    config: Any = None,
    device: torch.device | None = None,
) -> StoredModel:
    """Build the model of a folder without its parameters.

    Parameters
    ----------
    folder : path
    dtype : torch.dtype
        Of its arithmetic, as for ``from_pretrained``.
    model_class, config : optional
        Those of the folder by default.
    device : torch.device, optional
        Where the model is to run; the host by default.

    Raises
    ------
    FileNotFoundError
        If a shard is missing.
    ValueError
        If a file is damaged, or the files do not cover the model.
    UnsupportedModuleError
        If the folder holds a quantized model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, GenerationConfig

    path, settings = read_folder(folder)
    if settings.get("quantization_config"):
        raise UnsupportedModuleError(f"{path} is quantized already; give the float model")
    tensors = StoredTensors(path)
    if config is None:
        config = AutoConfig.from_pretrained(path)
    if model_class is None:
        model_class = model_class_of(path, settings)
    with init_empty_weights(include_buffers=False):
        built = getattr(model_class, "_from_config", None)  # AutoModel* say from_config
        model = (built or model_class.from_config)(config, dtype=dtype)
    model.tie_weights()
    model.name_or_path = str(folder)
    _keep_wide(model, dtype)
    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    stored = StoredModel(model.eval(), tensors, device or torch.device("cpu"))
    _find_names(stored)
    return stored


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Give parameters the dtype that the class asks for, whatever the model's is."""
    patterns = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    for name, parameter in model.named_parameters():
        wide = next((d for p, d in patterns.items() if p in name), None)
        if wide is not None:
            parameter.data = parameter.data.to(wide)


def _find_names(stored: StoredModel) -> None:
    """Follow the names of the files to those in memory, as ``from_pretrained`` does."""
    model = stored.model
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    state, prefix = model.state_dict(), getattr(model, "base_model_prefix", "")
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(stored.tensors.places, key=dot_natural_key):
        found, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if found not in state and name in state:
            found, pattern = rename_source_key(name, [], [], prefix, state)
        if found not in state:
            continue  # from_pretrained leaves it too
        if pattern is None:
            stored.names[found] = name
        else:
            groups.setdefault(found, []).append((name, pattern))
    for first, sources in groups.items():
        converter = by_pattern[sources[0][1]]
        entry = _Sources(first, converter, tuple(sources))
        targets = {
            first.replace(converter.target_patterns[0], t) for t in converter.target_patterns
        }
        stored.converted |= dict.fromkeys((targets & state.keys()) | {first}, entry)
    _check_cover(stored, state)


def _check_cover(stored: StoredModel, state: dict[str, torch.Tensor]) -> None:
    model, folder = stored.model, stored.folder
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    known = stored.names.keys() | stored.converted.keys()
    # A tied tensor is in the files under either name.
    for target, source in tied.items():
        if source in stored.names and target not in known:
            stored.names[target] = stored.names[source]
        elif target in stored.names and source not in known:
            stored.names[source] = stored.names[target]
    known = stored.names.keys() | stored.converted.keys()
    missing = sorted(state.keys() - known)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{folder} lacks {', '.join(missing[:3])}{more}, which would be random numbers: the "
            "files are not complete, or the model class is another one"
        )
    for name, held in stored.names.items():
        shape = stored.tensors.places[held].shape
        if shape != tuple(state[name].shape):
            raise ValueError(
                f"{held} in {folder} has shape {shape}, the model's is {tuple(state[name].shape)}: "
                "the files are those of another model"
            )
