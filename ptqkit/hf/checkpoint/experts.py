"""Tell what transformers makes of experts in compressed-tensors files, and read float ones.

Files hold the weights of experts one by one, as ``save_pretrained`` writes them. transformers joins
them on loading, but its quantizer for compressed-tensors (5.23) takes every weight that it joins
for a packed one, and stops at float ones; so :func:`ptqkit.load` registers a quantizer that leaves
them alone under a name of its own. Packed ones it unpacks and joins, if all have one scheme.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import auto as _auto
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig

from ptqkit.hf.checkpoint.names import SavedNames
from ptqkit.hf.checkpoint.spec import LayerSpec
from ptqkit.hf.models.experts import expert_modules, saved_expert_names

__all__ = ["converted_problems", "packed_problems", "with_float_experts"]

_METHOD = "ptqkit-compressed-tensors"


class _Config(CompressedTensorsConfig):
    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("quant_method", None)
        super().__init__(**kwargs)
        self.quant_method = _METHOD


class _Quantizer(CompressedTensorsHfQuantizer):
    def get_load_operations(self) -> dict[str, Any]:
        """Unpack while loading only if asked to dequantize the model."""
        return super().get_load_operations() if self.quantization_config.dequantize else {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs) or model
        # Saved again, the file is what it was.
        self.quantization_config.quant_method = "compressed-tensors"
        return model


def with_float_experts(config: Any) -> Any:
    """Return ``config``, changed so that ``from_pretrained`` takes the quantizer of this file."""
    _auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = _Config
    _auto.AUTO_QUANTIZER_MAPPING[_METHOD] = _Quantizer
    config.quantization_config = {**config.quantization_config, "quant_method": _METHOD}
    return config


def converted_problems(model: Any, names: SavedNames) -> list[str]:
    """Return the reason why transformers' own quantizer stops at float weights; empty if not."""
    if not names.converted:
        return []
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    settings = CompressedTensorsConfig(
        config_groups={"group_0": {"targets": ["none"], "weights": weights}},
        format="pack-quantized",
        quantization_status="compressed",
    )
    quantizer = CompressedTensorsHfQuantizer(settings, pre_quantized=True)
    quantizer.validate_environment()
    with torch.device("meta"):
        own = get_model_conversion_mapping(model)
        changed = quantizer.update_weight_conversions(own, model)
    held = [c for c in own if isinstance(c, WeightConverter)]
    kept = {id(c) for c in changed}
    # A converter that it replaces unpacks before it joins.
    replaced = [c for c in held if id(c) not in kept]
    if not any(_reaches(c, names) for c in replaced):
        return []
    return [
        f"{type(model).__name__}: it joins float weights while it loads (experts), which the "
        "compressed-tensors loader of transformers takes for packed; vLLM and ptqkit.load read "
        "such files: ask for them by checkpoint_format='compressed-tensors'"
    ]


def packed_problems(model: Any, specs: Iterable[LayerSpec]) -> list[str]:
    """Return the reasons why transformers alone would not unpack packed experts as they are meant.

    It finds all layers of all mixtures by one scheme, and joins them where it knows how.
    """
    modules = expert_modules(model)
    layers = {spec.names[-1]: spec for spec in specs}
    packed = {n: s for n, s in layers.items() if n.rsplit(".", 2)[0] in modules}
    if not packed:
        return []
    used = {name: m for name, m in modules.items() if any(n.startswith(f"{name}.") for n in packed)}
    split = saved_expert_names(model, {name: module.shape for name, module in used.items()})
    found = []
    for name, module in used.items():
        kind = type(module.fused).__name__
        if not split[name] and kind not in MODULES_TO_PATCH_FOR_QUANTIZATION:
            found.append(f"{name}: transformers has no place for single experts of {kind}")
        elif any(f"{name}.{inside}" not in packed for inside, _ in module.linears()):
            found.append(f"{name}: transformers joins experts only if all of them are packed")
    schemes = {(spec.grid, spec.activations) for spec in packed.values()}
    if len(schemes) > 1:
        found.append(
            f"{next(iter(packed))}: transformers unpacks all experts by one scheme, these have "
            f"{len(schemes)}"
        )
    return found


def _reaches(converter: WeightConverter, names: SavedNames) -> bool:
    reverse = converter.reverse_transform()
    return any(reverse.rename_source_key(name)[1] is not None for name in names.converted)
