"""Write a quantized model as a checkpoint directory."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ptqkit._folders import atomic_directory, resolve
from ptqkit._places import check_place, source_folder
from ptqkit._repr import one_line_repr
from ptqkit._units import parse_bytes
from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.hf.checkpoint.base import CheckpointFormat, Fetch
from ptqkit.hf.checkpoint.biases import GainedBiases, find_gained_biases
from ptqkit.hf.checkpoint.experts import converted_problems, packed_problems
from ptqkit.hf.checkpoint.files import TensorPlan, write_tensors
from ptqkit.hf.checkpoint.formats import choose_format
from ptqkit.hf.checkpoint.inputs import check_activations, measure_flat_inputs
from ptqkit.hf.checkpoint.names import SavedNames, convert_plans, saved_names
from ptqkit.hf.checkpoint.siblings import CheckpointWarning, sibling_warnings
from ptqkit.hf.checkpoint.skeleton import absent_modules, skeleton_problems
from ptqkit.hf.checkpoint.spec import LayerSpec, describe_layers
from ptqkit.hf.models.experts import ExpertSwap, wanted_for
from ptqkit.hf.softmax.files import check_installed, write_installed
from ptqkit.nn.activations import ActivationQuantizer
from ptqkit.nn.linear import is_linear

__all__ = ["CheckpointInfo", "check_savable", "room_needed", "save_checkpoint", "saved_tensors"]


# Of the largest file, as in transformers.
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class CheckpointInfo:
    """Describe what was written, and why in this form.

    Attributes
    ----------
    directory : Path
    format : str
        "compressed-tensors", "gptq", "gptq_v2", "ptqkit" or "ptqkit_v3".
    reason : str
    files : tuple of str
    bytes : int
        All files together.
    tensor_bytes : int
        Tensors alone.
    quantized_layers : int
    warnings : tuple of str
        What readers other than transformers refuse.
    """

    __repr__ = one_line_repr

    directory: Path
    format: str
    reason: str
    files: tuple[str, ...]
    bytes: int
    tensor_bytes: int
    quantized_layers: int
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.directory}: {self.format} ({self.reason}), "
            f"{self.quantized_layers} quantized layers, {self.bytes:,} bytes"
        )


def save_checkpoint(
    model: Any,
    layers: Mapping[str, QuantizedMatrix],
    recipe: Any,
    directory: str | os.PathLike[str],
    *,
    checkpoint_format: str = "auto",
    tokenizer: Any = None,
    report: Any = None,
    overwrite: bool = False,
    max_shard_size: int | str = SHARD_BYTES,
    activations: Mapping[str, ActivationQuantizer] | None = None,
    flat_inputs: Mapping[str, bool] | None = None,
    fetch: Fetch | None = None,
) -> CheckpointInfo:
    """Write ``model`` with the weights of ``layers`` replaced by their packed codes.

    Everything is written under a temporary name next to ``directory`` and renamed at the end; on
    any error nothing is left. Tensors are packed one at a time, so no second copy of the model is
    held. Loading the result gives the fake-quantized model exactly.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model whose layers hold ``q.dequantize()`` already.
    layers : mapping of str to QuantizedMatrix
        By module name, (out, in) also for GPT-2's Conv1D.
    recipe : Recipe, dict or None
        Written as ``ptqkit_recipe.json``.
    directory : path
    checkpoint_format : {"auto", "compressed-tensors", "gptq", "gptq_v2", "ptqkit", "ptqkit_v3"}
        "auto" takes compressed-tensors if it carries every layer exactly, otherwise "ptqkit".
    tokenizer : optional
        Saved along.
    report : optional
        Written as ``ptqkit_report.json``.
    overwrite : bool
        Replace a quantized checkpoint, and nothing else: see
        :func:`ptqkit._places.check_place`.
    max_shard_size : int or str
        Largest safetensors file, in bytes or text such as "5GB".
    activations : mapping of str to ActivationQuantizer, optional
        What quantizes the inputs, by module name; every name is one of ``layers``. The file loads
        as the model with these quantizers installed.
    flat_inputs : mapping of str to bool, optional
        Which layers get inputs without a batch axis; measured by running the model if not given.
    fetch : callable, optional
        Returns a tensor of the float model by its name, if it is on the meta device.

    Raises
    ------
    ValueError
        If the format cannot carry a layer, or a weight is not what its codes say, or the model
        quantizes inputs otherwise; names the layers. Raised before anything is written.
    FileExistsError, OSError
        If the name is taken, or there is not enough space.
    """
    # The layers of experts are linear ones while they are written.
    with ExpertSwap(model, wanted_for(layers)):
        return _write_checkpoint(
            model,
            layers,
            recipe,
            directory,
            checkpoint_format,
            tokenizer,
            report,
            overwrite,
            max_shard_size,
            dict(activations or {}),
            flat_inputs,
            fetch,
        )


def _write_checkpoint(
    model: Any,
    layers: Mapping[str, QuantizedMatrix],
    recipe: Any,
    directory: str | os.PathLike[str],
    checkpoint_format: str,
    tokenizer: Any,
    report: Any,
    overwrite: bool,
    max_shard_size: int | str,
    activations: Mapping[str, ActivationQuantizer],
    flat_inputs: Mapping[str, bool] | None,
    fetch: Fetch | None,
) -> CheckpointInfo:
    check_savable(model, layers, fetch is not None)
    shard_bytes = parse_bytes(max_shard_size or 0, "max_shard_size")
    check_activations(model, layers, activations)
    dynamic = [name for name, q in activations.items() if q.spec.dynamic]
    if flat_inputs is None:
        flat_inputs = measure_flat_inputs(model, dynamic)
    specs = describe_layers(model, layers, activations, flat_inputs)
    biases, names = find_gained_biases(model), saved_names(model)
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    chosen, reason = choose_format(
        specs,
        layers,
        checkpoint_format,
        activations,
        biases.problems(),
        linears,
        absent_modules(model, layers),
        partial(skeleton_problems, model, list(layers), names),
        lambda: [*converted_problems(model, names), *packed_problems(model, specs)],
    )
    _check_weights(model, specs, layers)
    notes = sibling_warnings(specs, linears) if chosen.foreign else []
    for note in notes:
        warnings.warn(note, CheckpointWarning, stacklevel=2)
    saved = [_as_saved(spec, names) for spec in specs]
    linears = list(dict.fromkeys([*linears, *map(names.module, linears)]))
    config = _model_config(model, saved, chosen, recipe, biases, linears)
    plans = _plan(model, saved, layers, chosen, activations, names, fetch)
    if chosen.foreign:
        plans += _zero_plans(model, biases)
    tensor_bytes = sum(plan.nbytes for plan in plans)
    needed = room_needed(tensor_bytes, len(layers), tokenizer)
    target = resolve(directory)
    check = partial(check_place, overwrite=overwrite, source=source_folder(model))
    with atomic_directory(target, check=check, needed=needed) as folder:
        write_tensors(folder, plans, shard_bytes)
        config.save_pretrained(folder)
        if model.can_generate() and getattr(model, "generation_config", None) is not None:
            # Straight to the file: save_pretrained refuses settings that loaded without complaint.
            model.generation_config.to_json_file(folder / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _write_json(folder / "ptqkit_recipe.json", recipe)
        _write_json(folder / "ptqkit_report.json", report)
        write_installed(model, folder)
        written = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
        total = sum(path.stat().st_size for path in written.values())
    files = tuple(sorted(written))
    return CheckpointInfo(
        target, chosen.name, reason, files, total, tensor_bytes, len(specs), tuple(notes)
    )


def check_savable(model: Any, layers: Container[str] = (), stored: bool = False) -> None:
    """Check what the writer needs of a model, as far as it does not depend on the format.

    Parameters
    ----------
    layers : container of str
        Modules whose weights are replaced by codes.
    stored : bool
        What is on the meta device is read from files.

    Raises
    ------
    ValueError
        If the model cannot be saved.
    """
    if getattr(model, "config", None) is None or not hasattr(model, "can_generate"):
        raise ValueError(
            f"{type(model).__name__} is no transformers model with a configuration, which a "
            "checkpoint needs; quantize it without saving"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            "model is loaded from a quantized checkpoint already: save_pretrained it, or use "
            "ptqkit.hf.save_loaded for another format"
        )
    for name, tensor in saved_tensors(model).items():
        if name.removesuffix(".weight") not in layers:
            if not (stored and tensor.device.type == "meta"):
                TensorPlan.of(name, tensor)
    check_installed(model)


def room_needed(tensor_bytes: int, layers: int, tokenizer: Any = None) -> int:
    """Return the bytes of a checkpoint: of its tensors, configuration, tokenizer and reports."""
    try:
        words = 0 if tokenizer is None else len(tokenizer)
    except TypeError:
        words = 0
    # Generous: a token is some 130 bytes of tokenizer.json, a layer less than 2 kB of the report
    # and 300 bytes of a header.
    return tensor_bytes + (16 << 20) + 256 * words + 4096 * layers


def saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that a checkpoint of the float model would hold, by name."""
    skipped = _tied_copies(model) | set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return {name: t for name, t in model.state_dict().items() if name not in skipped}


def _plain(value: Any) -> Any:
    """Turn a recipe or report into what json writes."""
    for method in ("to_dict", "to_dicts"):
        if hasattr(value, method):
            return getattr(value, method)()
    return value


def _write_json(path: Path, value: Any) -> None:
    if value is None:
        return
    if hasattr(value, "to_json"):
        value.to_json(path)
        return
    path.write_text(json.dumps(_plain(value), indent=2) + "\n", encoding="utf-8")


def _model_config(
    model: Any,
    specs: list[LayerSpec],
    chosen: CheckpointFormat,
    recipe: Any,
    biases: GainedBiases,
    linears: list[str],
) -> Any:
    """Copy the model's configuration, with the quantization and what save_pretrained adds."""
    settings = _plain(recipe)
    act_order = isinstance(settings, dict) and settings.get("order") == "act"
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.quantization_config = chosen.config(
        specs, linears=linears, act_order=act_order, gained_biases=biases.names
    )
    if chosen.foreign:
        biases.apply(config)
    return config


def _zero_plans(model: Any, biases: GainedBiases) -> list[TensorPlan]:
    """Plan biases that only exist because a setting that another layer needs creates them."""
    plans = []
    for name, shape in biases.zeros.items():
        dtype = model.get_submodule(name.rpartition(".")[0]).weight.dtype
        plans.append(TensorPlan(name, dtype, shape, partial(torch.zeros, shape, dtype=dtype)))
    return plans


def _check_weights(
    model: Any, specs: list[LayerSpec], layers: Mapping[str, QuantizedMatrix]
) -> None:
    """Refuse a model whose weights are not those of the codes: the file would be another model."""
    different = []
    for spec in specs:
        weight = model.get_submodule(spec.name).weight.detach()
        if weight.device.type == "meta":
            continue
        expected = torch.from_numpy(layers[spec.name].dequantize()).to(weight.dtype)
        if spec.kind == "conv1d":
            weight = weight.t()
        if not torch.equal(weight.to("cpu"), expected):
            different.append(spec.name)
    if different:
        raise ValueError(
            "the weights of the model are not the dequantized codes for "
            f"{len(different)} layer(s): {', '.join(different[:5])}"
            f"{' ...' if len(different) > 5 else ''}; assign q.dequantize() first"
        )


def _plan(
    model: Any,
    specs: list[LayerSpec],
    layers: Mapping[str, QuantizedMatrix],
    chosen: CheckpointFormat,
    activations: Mapping[str, ActivationQuantizer],
    names: SavedNames,
    fetch: Fetch | None,
) -> list[TensorPlan]:
    by_weight = {f"{spec.names[-1]}.weight": spec for spec in specs}
    kept = saved_tensors(model)
    floats: list[TensorPlan] = []
    plans: list[TensorPlan] = []
    for name, tensor in model.state_dict().items():
        if name in by_weight:
            spec = by_weight[name]
            held = spec.names[-1]
            plans += chosen.plans(spec, layers[held], activations.get(held))
        elif name in kept:
            floats.append(_float_plan(name, tensor, fetch))
    return plans + convert_plans(model, floats, names)


def _float_plan(name: str, tensor: torch.Tensor, fetch: Fetch | None) -> TensorPlan:
    """Plan a float tensor; one on the meta device is fetched when it is written."""
    if fetch is None or tensor.device.type != "meta":
        return TensorPlan.of(name, tensor)
    dtype, shape = tensor.dtype, tuple(tensor.shape)
    return TensorPlan(name, dtype, shape, lambda: fetch(name).to(dtype))


def _as_saved(spec: LayerSpec, names: SavedNames) -> LayerSpec:
    """Return the layer under the name that it has in the files."""
    saved = names.module(spec.name)
    return spec if saved == spec.name else replace(spec, name=saved, module=spec.name)


def _tied_copies(model: Any) -> set[str]:
    """Return names that loading ties to another tensor again, so that one copy is enough."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        target
        for target, source in tied.items()
        if target in parameters and parameters.get(source) is parameters[target]
    }
