"""Load checkpoints that ptqkit (or another GPTQ tool) wrote, and read their codes back."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ptqkit.arrays.matrix import QuantizedMatrix, WeightGrid
from ptqkit.errors import check_choice
from ptqkit.hf.checkpoint.base import CheckpointFormat, with_suffix
from ptqkit.hf.checkpoint.convert import converted_state
from ptqkit.hf.checkpoint.files import DTYPE_CODES, INDEX, SINGLE
from ptqkit.hf.checkpoint.formats import FORMATS, stored_format
from ptqkit.hf.checkpoint.native import METHOD
from ptqkit.nn.packed_linear import COMPUTE
from ptqkit.nn.quantized_mark import mark_quantized

__all__ = ["load", "model_class_of", "read_folder", "read_matrices"]

# Layers of experts, which the class holds joined: ptqkit's own format keeps them apart.
_EXPERT = re.compile(r"\.experts\.\d+\.")
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def _settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return ``quantization_config``, empty if there is none."""
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        kind = type(settings).__name__
        raise ValueError(f"{folder / 'config.json'}: quantization_config is not an object: {kind}")
    return settings


def _layers(
    folder: Path, stored: CheckpointFormat, settings: dict[str, Any], tensors: _Tensors
) -> dict[str, dict[str, Any]]:
    """Ask the format for the layers; whatever a malformed description does to it is one error."""
    try:
        layers = stored.layers(settings, tensors.files)
        for options in layers.values():
            WeightGrid(**{f.name: options.get(f.name, f.default) for f in fields(WeightGrid)})
        return layers
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{folder / 'config.json'}: quantization_config is malformed "
            f"({type(error).__name__}: {error})"
        ) from error


def read_folder(directory: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Return the path and the configuration of a model's folder.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no configuration in it.
    ValueError
        If the configuration is not a JSON object.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"directory {folder} does not exist (or is a file)")
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"directory {folder} has no config.json: not a checkpoint")
    return folder, _read_json(config)


def _weight_map(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor.

    Raises
    ------
    FileNotFoundError
        If a shard, or every weights file, is missing.
    """
    if (folder / INDEX).is_file():
        names = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map of tensor names to file names")
        outside = sorted({f for f in names.values() if f != os.path.basename(f) or f in ("", "..")})
        if outside:
            raise ValueError(
                f"{folder / INDEX} names {_some(outside)}: a weights file must lie in the folder "
                "of its index"
            )
        missing = sorted({file for file in names.values() if not (folder / file).is_file()})
        if missing:
            raise FileNotFoundError(f"directory {folder} lacks {', '.join(missing)}")
        return {name: folder / file for name, file in names.items()}
    single = folder / SINGLE
    if not single.is_file():
        raise FileNotFoundError(f"directory {folder} has neither {SINGLE} nor {INDEX}")
    with _open_weights(single) as file:
        return dict.fromkeys(file.keys(), single)


def _open_weights(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or not a safetensors file: {error}") from error


class _Tensors:
    """Fetch tensors by name; each shard is opened once."""

    def __init__(self, folder: Path) -> None:
        self.files = _weight_map(folder)
        self._open: dict[Path, Any] = {}
        self._held: dict[Path, frozenset[str]] = {}

    def __call__(self, name: str) -> torch.Tensor:
        return self._file(name).get_tensor(name)

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype of a tensor from the header; None if ptqkit writes no such dtype."""
        return _DTYPES.get(self._file(name).get_slice(name).get_dtype())

    def _file(self, name: str) -> Any:
        if name not in self.files:
            raise ValueError(f"the checkpoint has no tensor {name}")
        path = self.files[name]
        if path not in self._open:
            self._open[path] = _open_weights(path).__enter__()
            # Listed once: of thousands of experts it takes long.
            self._held[path] = frozenset(self._open[path].keys())
        if name not in self._held[path]:
            raise ValueError(f"{path} has no tensor {name}, which the index says it has")
        return self._open[path]

    def close(self) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open.clear()


def read_matrices(directory: str | os.PathLike[str]) -> dict[str, QuantizedMatrix]:
    """Return the quantized matrices of a checkpoint by module name.

    Understands ``ptqkit``, compressed-tensors ``pack-quantized`` and ``int-quantized`` (symmetric
    or not) and GPTQ (``checkpoint_format`` "gptq" or "gptq_v2") directories.

    Raises
    ------
    FileNotFoundError
        If the directory, its configuration or a weights file is missing.
    ValueError
        If the checkpoint is not quantized, or in a way this function does not know, or if it is
        damaged: a dtype is not that of the format, a scale is not positive and finite, a group is
        out of range.
    """
    folder, config = read_folder(directory)
    settings = _settings(folder, config)
    if not settings:
        raise ValueError(f"{folder} is not a quantized checkpoint: no quantization_config")
    tensors = _Tensors(folder)
    try:
        stored = stored_format(settings)
        layers = _layers(folder, stored, settings, tensors)
        _check_layers(folder, stored, layers, tensors)
        return {name: stored.read(name, tensors, options) for name, options in layers.items()}
    finally:
        tensors.close()


def load(
    directory: str | os.PathLike[str],
    *,
    cache: bool = False,
    compute: str | None = None,
    fused: bool = True,
    **kwargs: Any,
) -> Any:
    """Load a checkpoint directory with the model class it names.

    The method ``"ptqkit"`` is registered with transformers first. GPTQ checkpoints are read by
    ptqkit itself and come back as a float model of the dequantized weights, so neither gptqmodel
    nor optimum is needed.

    Parameters
    ----------
    directory : path
    cache : bool
        Keep each dequantized weight after its first use: generation is then as fast as with a
        float model, and takes the memory of one. Only for the format ``"ptqkit"``.
    compute : {"auto", "packed", "int8", "dequantize"}, optional
        How quantized layers compute (:class:`ptqkit.nn.PackedLinear`); ``model.ptqkit_compute``
        tells what became of each. "packed": from packed codes on the CPU, faster for single tokens,
        smaller than a float model, within float32 rounding of it. "int8": with inputs rounded to 8
        bits, a different model. "auto": packed where that is possible. "dequantize": exactly the
        simulated model, bit for bit. By default "auto" for files of version 3, which are written
        to be run, and "dequantize" for all others.
    fused : bool
        Generate faster on the CPU: blocks of Llama, Mistral, Qwen2 and Qwen3 whose layers are all
        packed take a single token in two calls of the core, around the model's own cache. Their
        numbers are those of the modules up to float32 rounding; other inputs go through the
        modules.
    **kwargs
        Passed to ``from_pretrained``: ``dtype`` (by default that of the checkpoint),
        ``device_map``, ``attn_implementation``, ...

    Returns
    -------
    transformers.PreTrainedModel, in eval mode
        As ``from_pretrained``: with ``output_loading_info=True``, a pair of model and dict.

    Raises
    ------
    FileNotFoundError
        If the directory, its configuration or a weights file is missing.
    ValueError
        If the format version is not known, or the weights do not cover the model (transformers
        would fill the rest with random numbers), or the files are damaged, as for
        :func:`read_matrices`.
    """
    folder, config = read_folder(directory)
    settings = _settings(folder, config)
    known = next((f for f in FORMATS.values() if f.reads(settings)), None)
    compute = _chosen_compute(folder, compute, settings, known is not None)
    model_class = model_class_of(folder, config)
    tensors = _Tensors(folder)
    try:
        layers = {} if known is None else _layers(folder, known, settings, tensors)
        if known is not None:
            _check_layers(folder, known, layers, tensors)
    finally:
        tensors.close()
    from ptqkit.hf.checkpoint.plugin import register_format
    from ptqkit.hf.checkpoint.running import set_compute
    from ptqkit.nn.qlinear import QLinear

    register_format()
    want_info = kwargs.pop("output_loading_info", False)
    kwargs.setdefault("dtype", "auto")
    one_by_one = compute != "dequantize" or any(_EXPERT.search(name) for name in layers)
    if known is not None and known.foreign and one_by_one:
        model, info = _load_converted(folder, model_class, known, layers, kwargs)
    elif known is not None and known.float_parts:
        model, info = _load_float(folder, model_class, known, kwargs)
    else:
        if (
            known is not None
            and known.foreign
            and not {"config", "quantization_config"} & set(kwargs)
        ):
            from transformers import AutoConfig

            from ptqkit.hf.checkpoint.experts import with_float_experts

            kwargs["config"] = with_float_experts(AutoConfig.from_pretrained(folder))
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    missing = sorted(info["missing_keys"]) + sorted(str(k[0]) for k in info["mismatched_keys"])
    if missing:
        raise ValueError(
            f"{folder} lacks {_some(missing)}, which would be random numbers: "
            "the files are not complete, or the model class is another one"
        )
    # Corrections of the softmax, which no checkpoint format holds.
    from ptqkit.hf.softmax.driver import load_softmax

    load_softmax(model, folder)
    if known is not None:
        set_compute(model, compute, fused=fused)
    if cache:
        for module in model.modules():
            if isinstance(module, QLinear):
                module.cache = True
    return (model, info) if want_info else model


def _chosen_compute(
    folder: Path, compute: str | None, settings: dict[str, Any], known: bool
) -> str:
    if compute is None:
        newest = settings.get("quant_method") == METHOD and settings.get("format_version") == 3
        return "auto" if newest else "dequantize"
    check_choice("compute", compute, COMPUTE)
    if compute in ("packed", "int8") and not known:
        raise ValueError(f"{folder} is no quantized checkpoint that compute={compute!r} could run")
    return compute


def _check_layers(
    folder: Path,
    stored: CheckpointFormat,
    layers: dict[str, dict[str, Any]],
    tensors: _Tensors,
) -> None:
    """Refuse quantized layers whose tensors are missing or cannot be what was written."""
    parts = {name: stored.parts(options) for name, options in layers.items()}
    expected = {
        f"{n}.{part}": dtypes for n, found in parts.items() for part, dtypes in found.items()
    }
    missing = [name for name in expected if name not in tensors.files]
    if missing:
        raise ValueError(f"{folder} lacks {_some(missing)}: the files are not complete")

    def damaged(name: str, reason: str) -> ValueError:
        return ValueError(f"{name} {reason}: the files in {folder} are damaged")

    for name, dtypes in expected.items():
        if tensors.dtype(name) not in dtypes:
            allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise damaged(name, f"must be {allowed}, not {tensors.dtype(name)}")
    inputs = [f"{name}.input_scale" for name in with_suffix(tensors.files, ".input_scale")]
    for name in {*expected, *inputs}:
        if name.endswith(("scale", "scales")):
            scale = tensors(name).float()
            bad = scale[~(scale.isfinite() & (scale > 0))]
            if len(bad):
                values = ", ".join(str(v) for v in bad[:3].tolist())
                raise damaged(name, f"must be positive and finite, not {values}")
    for name, options in layers.items():
        if "g_idx" in parts[name]:
            g_idx, size = tensors(f"{name}.g_idx"), options["group_size"]
            groups = 1 if size is None else -(-len(g_idx) // size)
            if len(g_idx) and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
                values = f"{int(g_idx.min())} to {int(g_idx.max())}"
                raise damaged(f"{name}.g_idx", f"must lie in [0, {groups}), not {values}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def model_class_of(folder: Path, config: dict[str, Any]) -> Any:
    """Return the class that a configuration names; that of causal models if it names none."""
    import transformers

    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / 'config.json'}: architectures must be a list of class names")
    for name in names:
        found = getattr(transformers, name, None)
        if found is None:
            continue
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
            raise ValueError(f"{folder / 'config.json'}: architectures names {name}, not a model")
        return found
    return transformers.AutoModelForCausalLM


def _load_converted(
    folder: Path,
    model_class: Any,
    stored: CheckpointFormat,
    layers: dict[str, dict[str, Any]],
    kwargs: dict[str, Any],
) -> tuple[Any, Any]:
    """Build the model with the layers of another format as those of ptqkit's own."""
    from transformers import AutoConfig

    tensors = _Tensors(folder)
    try:
        settings, state = converted_state(stored, layers, tensors.files, tensors)
    finally:
        tensors.close()
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = settings
    return model_class.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, **kwargs
    )


def _load_float(
    folder: Path, model_class: Any, stored: CheckpointFormat, kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """Build the float model from dequantized layers and the remaining tensors."""
    from transformers import AutoConfig

    layers = read_matrices(folder)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    dtype = kwargs["dtype"] if kwargs["dtype"] != "auto" else config.dtype or "float32"
    dtype = getattr(torch, str(dtype).removeprefix("torch."))
    tensors = _Tensors(folder)
    packed = {f"{n}.{part}" for n in layers for part in stored.float_parts}
    try:
        state = {name: tensors(name) for name in tensors.files if name not in packed}
    finally:
        tensors.close()
    for name, q in layers.items():
        state[f"{name}.weight"] = torch.from_numpy(q.dequantize()).to(dtype)
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, **kwargs
    )
    modules = dict(model.named_modules())
    for name in layers.keys() & modules.keys():
        mark_quantized(modules[name])
    return model, info
