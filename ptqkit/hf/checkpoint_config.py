"""``quantization_config`` of ``config.json`` for each checkpoint format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptqkit.hf.checkpoint_spec import LayerSpec

__all__ = ["FORMAT_VERSION", "layer_options", "quantization_config"]

FORMAT_VERSION = 1
_SHARED = ("bits", "group_size", "symmetric", "permuted", "kind", "scale_dtype")


def quantization_config(
    specs: Sequence[LayerSpec], format: str, *, linears: Sequence[str], act_order: bool = False
) -> dict[str, Any]:
    """Return the ``quantization_config`` of ``config.json``.

    Parameters
    ----------
    linears : sequence of str
        Names of all linear modules of the model; those without a spec stay float.
    act_order : bool
        Whether inputs were visited by decreasing diagonal; information only.
    """
    if format == "ptqkit":
        return _native_config(specs)
    if format == "compressed-tensors":
        return _compressed_config(specs, linears, act_order)
    return _gptq_config(specs, format, linears)


def _native_config(specs: Sequence[LayerSpec]) -> dict[str, Any]:
    values = [{key: getattr(spec, key) for key in _SHARED} for spec in specs]
    # The most frequent setting becomes the default, so `layers` shows what is special.
    keys = [repr(v) for v in values]
    defaults = values[keys.index(max(keys, key=keys.count))]
    layers = {
        spec.name: {
            "shape": [spec.out_features, spec.in_features],
            **{k: v for k, v in value.items() if v != defaults[k]},
        }
        for spec, value in zip(specs, values, strict=True)
    }
    return {
        "quant_method": "ptqkit",
        "format_version": FORMAT_VERSION,
        "defaults": defaults,
        "layers": layers,
    }


def layer_options(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Expand a ``ptqkit`` configuration to every option of every layer.

    Raises
    ------
    ValueError
        If the format version is not known, or an option is missing.
    """
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint is of ptqkit format version {version!r}, this ptqkit reads version "
            f"{FORMAT_VERSION}: install a newer ptqkit"
        )
    expanded = {}
    for name, changes in config["layers"].items():
        options = {**config["defaults"], **changes}
        keys = ("shape", *_SHARED)
        missing = [key for key in keys if key not in options]
        if missing:
            raise ValueError(f"{name}: quantization_config lacks {', '.join(missing)}")
        expanded[name] = {key: options[key] for key in keys}
    return expanded


def _compressed_config(
    specs: Sequence[LayerSpec], linears: Sequence[str], act_order: bool
) -> dict[str, Any]:
    schemes: dict[tuple[int, int | None], list[str]] = {}
    for spec in specs:
        schemes.setdefault((int(spec.bits), spec.group_size), []).append(spec.name)
    rest = sorted(set(linears) - {spec.name for spec in specs})
    groups = {}
    for number, ((bits, group_size), names) in enumerate(schemes.items()):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if group_size is None else "group",
            "group_size": group_size,
            "dynamic": False,
        }
        if act_order and group_size is not None:
            weights["actorder"] = "weight"
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else names,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": rest,
        "kv_cache_scheme": None,
        "config_groups": groups,
    }


def _split_block(name: str) -> tuple[str, str] | None:
    """Split ``model.layers.3.mlp.up`` at its first number into ``model.layers.3``, ``mlp.up``."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: place + 1]), ".".join(parts[place + 1 :])
    return None


def block_pattern(specs: Sequence[LayerSpec], linears: Sequence[str]) -> list[list[str]] | None:
    """Return ``modules_in_block_to_quantize``: None where every linear of a block is quantized.

    Raises
    ------
    ValueError
        If the blocks differ, which the GPTQ format has no way to say.
    """
    chosen = {spec.name for spec in specs}
    outside = sorted(name for name in chosen if _split_block(name) is None)
    if outside:
        raise ValueError(
            f"format 'gptq' takes layers inside the repeated blocks only, not {', '.join(outside)}"
        )
    blocks: dict[str, list[str]] = {}
    for name in linears:
        split = _split_block(name)
        if split is not None:
            blocks.setdefault(split[0], []).append(split[1])
    stacks = {block.rpartition(".")[0] for block in blocks if _uses(block, blocks, chosen)}
    patterns = {}
    for block, names in blocks.items():
        if block.rpartition(".")[0] in stacks:
            patterns[block] = tuple(n for n in names if f"{block}.{n}" in chosen)
    if len(set(patterns.values())) > 1:
        first = next(iter(patterns.values()))
        odd = next(block for block, names in patterns.items() if names != first)
        raise ValueError(
            f"format 'gptq' needs the same layers quantized in every block; {odd} differs"
        )
    pattern = next(iter(patterns.values()))
    block = next(iter(patterns))
    return None if len(pattern) == len(blocks[block]) else [list(pattern)]


def _uses(block: str, blocks: Mapping[str, list[str]], chosen: set[str]) -> bool:
    return any(f"{block}.{name}" in chosen for name in blocks[block])


def _gptq_config(specs: Sequence[LayerSpec], format: str, linears: Sequence[str]) -> dict[str, Any]:
    first = specs[0]
    return {
        "quant_method": "gptq",
        "bits": first.bits,
        "group_size": -1 if first.group_size is None else first.group_size,
        "desc_act": any(spec.permuted for spec in specs),
        "sym": all(spec.symmetric for spec in specs),
        "checkpoint_format": format,
        "damp_percent": 0.01,
        "true_sequential": True,
        "lm_head": False,
        "modules_in_block_to_quantize": block_pattern(specs, linears),
    }
