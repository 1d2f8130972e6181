"""``quantization_config`` of ``config.json`` for each checkpoint format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptqkit.hf.checkpoint.spec import LayerSpec
from ptqkit.recipe.options import ActivationQuantization

__all__ = ["FORMAT_VERSION", "layer_options", "quantization_config"]

# Version 2 adds quantized activations and gained biases, which a reader of version 1 would drop;
# a checkpoint that has neither is written as version 1.
FORMAT_VERSION = 2
_SHARED = ("bits", "group_size", "symmetric", "permuted", "kind", "scale_dtype")
_OPTIONAL: dict[str, Any] = {"per_tensor": False, "activations": None}


def quantization_config(
    specs: Sequence[LayerSpec],
    format: str,
    *,
    linears: Sequence[str],
    act_order: bool = False,
    gained_biases: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the ``quantization_config`` of ``config.json``.

    Parameters
    ----------
    linears : sequence of str
        Names of all linear modules of the model; those without a spec stay float.
    act_order : bool
        Whether inputs were visited by decreasing diagonal; information only.
    gained_biases : sequence of str
        Modules whose bias the model class does not create; ptqkit's own format alone uses it.
    """
    if format == "ptqkit":
        return _native_config(specs, gained_biases)
    if format == "compressed-tensors":
        return _compressed_config(specs, linears, act_order)
    return _gptq_config(specs, format, linears)


def _native_config(specs: Sequence[LayerSpec], gained_biases: Sequence[str]) -> dict[str, Any]:
    values = [_native_values(spec) for spec in specs]
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
    newer = bool(gained_biases) or any(spec.activations is not None for spec in specs)
    config = {
        "quant_method": "ptqkit",
        "format_version": FORMAT_VERSION if newer else 1,
        "defaults": {k: v for k, v in defaults.items() if k not in _OPTIONAL or v != _OPTIONAL[k]},
        "layers": layers,
    }
    if gained_biases:
        config["gained_biases"] = list(gained_biases)
    return config


def _native_values(spec: LayerSpec) -> dict[str, Any]:
    values = {key: getattr(spec, key) for key in (*_SHARED, "per_tensor")}
    values["activations"] = None if spec.activations is None else spec.activations.to_dict()
    return values


def layer_options(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Expand a ``ptqkit`` configuration to every option of every layer.

    ``activations`` is None or an ActivationQuantization.

    Raises
    ------
    ValueError
        If the format version is not known, an option is missing, or the activations are not
        described as this version describes them.
    """
    version = config.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(
            f"the checkpoint is of ptqkit format version {version!r}, this ptqkit reads versions "
            f"1 to {FORMAT_VERSION}: install a newer ptqkit"
        )
    expanded = {}
    for name, changes in config["layers"].items():
        options = {**_OPTIONAL, **config["defaults"], **changes}
        keys = ("shape", *_SHARED, *_OPTIONAL)
        missing = [key for key in keys if key not in options]
        if missing:
            raise ValueError(f"{name}: quantization_config lacks {', '.join(missing)}")
        expanded[name] = {key: options[key] for key in keys}
        if options["activations"] is not None:
            try:
                expanded[name]["activations"] = ActivationQuantization.parse(options["activations"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from None
    return expanded


def _compressed_config(
    specs: Sequence[LayerSpec], linears: Sequence[str], act_order: bool
) -> dict[str, Any]:
    schemes: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for spec in specs:
        scheme = _compressed_scheme(spec, act_order)
        schemes.setdefault(repr(scheme), (scheme, []))[1].append(spec.name)
    layouts = sorted({spec.compressed_layout for spec in specs})
    groups = {}
    for number, (scheme, names) in enumerate(schemes.values()):
        targets = ["Linear"] if len(schemes) == 1 else names
        groups[f"group_{number}"] = {"targets": targets, **scheme}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts[0] if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": sorted(set(linears) - {spec.name for spec in specs}),
        "kv_cache_scheme": None,
        "config_groups": groups,
    }


def _compressed_scheme(spec: LayerSpec, act_order: bool) -> dict[str, Any]:
    channel = "tensor" if spec.per_tensor else "channel"
    weights = {
        "num_bits": int(spec.bits),
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": channel if spec.group_size is None else "group",
        "group_size": spec.group_size,
        "dynamic": False,
    }
    if act_order and spec.group_size is not None:
        weights["actorder"] = "weight"
    scheme = {"weights": weights, "input_activations": None, "output_activations": None}
    if spec.activations is not None:
        scheme["input_activations"] = {
            "num_bits": spec.activations.bits,
            "type": "int",
            "symmetric": spec.activations.symmetric,
            "strategy": spec.activations.granularity,
            "dynamic": spec.activations.dynamic,
        }
        # Left out, the loader takes every layer with quantized activations for int-quantized.
        scheme["format"] = spec.compressed_layout
    return scheme


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
