"""Read compressed-tensors files with float weights that transformers converts on loading.

Files hold the weights of experts one by one, as ``save_pretrained`` writes them. transformers joins
them on loading, but its quantizer for compressed-tensors (5.23) takes every weight that it joins
for a packed one, and stops at float ones. ptqkit packs no such weight, so :func:`ptqkit.load`
registers a quantizer that leaves them alone under a name of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import auto as _auto
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig

from ptqkit.hf.checkpoint.names import SavedNames

__all__ = ["converted_problems", "with_float_experts"]

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


def _reaches(converter: WeightConverter, names: SavedNames) -> bool:
    reverse = converter.reverse_transform()
    return any(reverse.rename_source_key(name)[1] is not None for name in names.converted)
