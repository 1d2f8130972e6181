"""Load checkpoints that ptqkit (or another GPTQ tool) wrote, and read their codes back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.hf.checkpoint.base import CheckpointFormat, with_suffix
from ptqkit.hf.checkpoint.files import INDEX, SINGLE
from ptqkit.hf.checkpoint.formats import FORMATS, stored_format
from ptqkit.hf.checkpoint.native import METHOD, layer_options

__all__ = ["load", "read_matrices"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _check_directory(directory: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"directory {folder} does not exist (or is a file)")
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"directory {folder} has no config.json: not a checkpoint")
    return folder, _read_json(config)


def _weight_map(folder: Path) -> dict[str, Path]:
    """File of every tensor.

    Raises
    ------
    FileNotFoundError
        If a shard, or every weights file, is missing.
    """
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        names = _read_json(folder / INDEX)["weight_map"]
        missing = sorted({file for file in names.values() if not (folder / file).is_file()})
        if missing:
            raise FileNotFoundError(f"directory {folder} lacks {', '.join(missing)}")
        return {name: folder / file for name, file in names.items()}
    single = folder / SINGLE
    if not single.is_file():
        raise FileNotFoundError(f"directory {folder} has neither {SINGLE} nor {INDEX}")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


class _Tensors:
    """Tensors by name, each shard opened once."""

    def __init__(self, folder: Path) -> None:
        self.files = _weight_map(folder)
        self._open: dict[Path, Any] = {}

    def __call__(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self.files:
            raise ValueError(f"the checkpoint has no tensor {name}")
        path = self.files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        return self._open[path].get_tensor(name)

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
        If the checkpoint is not quantized, or in a way this function does not know.
    """
    folder, config = _check_directory(directory)
    settings = config.get("quantization_config")
    if not settings:
        raise ValueError(f"{folder} is not a quantized checkpoint: no quantization_config")
    tensors = _Tensors(folder)
    try:
        stored = stored_format(settings)
        layers = stored.layers(settings, tensors.files)
        return {name: stored.read(name, tensors, options) for name, options in layers.items()}
    finally:
        tensors.close()


def load(directory: str | os.PathLike[str], *, cache: bool = False, **kwargs: Any) -> Any:
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
        If the format version is not known, or the weights do not cover the model: transformers
        would fill the rest with random numbers.
    """
    folder, config = _check_directory(directory)
    _check_input_grids(folder, config.get("quantization_config") or {})
    from ptqkit.hf.checkpoint.plugin import register_format
    from ptqkit.nn.qlinear import QLinear

    register_format()
    want_info = kwargs.pop("output_loading_info", False)
    kwargs.setdefault("dtype", "auto")
    model_class = _model_class(config)
    settings = config.get("quantization_config") or {}
    known = next((f for f in FORMATS.values() if f.reads(settings)), None)
    if known is not None and known.float_parts:
        model, info = _load_float(folder, model_class, known, kwargs)
    else:
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
    if cache:
        for module in model.modules():
            if isinstance(module, QLinear):
                module.cache = True
    return (model, info) if want_info else model


def _check_input_grids(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse static grids of activations that are not there or would turn every input into NaN."""
    tensors = _Tensors(folder)
    options = layer_options(settings) if settings.get("quant_method") == METHOD else {}
    expected = []
    for name, option in options.items():
        spec = option["activations"]
        if spec is not None and not spec.dynamic:
            expected += [f"{name}.input_scale"]
            expected += [] if spec.symmetric else [f"{name}.input_zero_point"]
    missing = [name for name in expected if name not in tensors.files]
    if missing:
        raise ValueError(f"{folder} lacks {_some(missing)}: the files are not complete")
    try:
        for layer in with_suffix(tensors.files, ".input_scale"):
            scale = tensors(f"{layer}.input_scale").float()
            if not bool((scale.isfinite() & (scale > 0)).all()):
                raise ValueError(
                    f"{layer}.input_scale must be positive and finite, not {scale.tolist()}: "
                    f"the files in {folder} are damaged"
                )
    finally:
        tensors.close()


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _model_class(config: dict[str, Any]) -> Any:
    import transformers

    for name in config.get("architectures") or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM


def _load_float(
    folder: Path, model_class: Any, stored: CheckpointFormat, kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """Build the float model from dequantized layers and the remaining tensors."""
    import torch
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
    return model_class.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, **kwargs
    )
