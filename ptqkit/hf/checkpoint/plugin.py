"""``quant_method: "ptqkit"`` for transformers: importing this module registers it.

transformers meets the method only if it has been registered. Without it ``from_pretrained`` warns
that the quantization type is unknown and then stops with a size mismatch, because packed codes
are one-dimensional; use :func:`ptqkit.load`, or ``import ptqkit.hf`` first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers import auto as _auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptqkit.hf.checkpoint.loaded_experts import LoadedExperts
from ptqkit.hf.checkpoint.native import METHOD, layer_options
from ptqkit.hf.checkpoint.skeleton import memory_names
from ptqkit.nn.activations import install_quantizer
from ptqkit.nn.packed_linear import PackedLinear
from ptqkit.nn.qlinear import QLinear

__all__ = ["METHOD", "PtqkitConfig", "PtqkitQuantizer", "register_format"]


class PtqkitConfig(QuantizationConfigMixin):
    """Hold which modules are quantized, and how; ``defaults`` and ``layers`` as on disk.

    Raises
    ------
    ValueError
        If the format version is not known or the layers are not fully described.
    """

    def __init__(
        self,
        format_version: int | None = None,
        defaults: dict[str, Any] | None = None,
        layers: dict[str, dict[str, Any]] | None = None,
        gained_biases: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        self.format_version = format_version
        self.defaults, self.layers = dict(defaults or {}), dict(layers or {})
        if gained_biases:
            self.gained_biases = list(gained_biases)
        layer_options(vars(self))

    def options(self) -> dict[str, dict[str, Any]]:
        """Return every option of every quantized module."""
        return layer_options(vars(self))


class PtqkitQuantizer(HfQuantizer):
    """Puts a :class:`QLinear` in the place of each quantized module before weights are loaded."""

    requires_calibration = True

    def is_serializable(self, **kwargs: Any) -> bool:
        """``save_pretrained`` writes the packed tensors again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return False: integer codes have no gradient."""
        return False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        modules = dict(model.named_modules())
        for name in getattr(self.quantization_config, "gained_biases", ()):
            _add_bias(name, modules.get(name))
        options_of = self.quantization_config.options()
        self._experts = LoadedExperts(model, options_of)
        if self._experts.names:
            modules = dict(model.named_modules())
        # Files have the names of save_pretrained, which may differ from those in memory.
        known = modules.keys() | self._experts.names.keys()
        renamed = [f"{name}.weight" for name in options_of if name not in known]
        held = memory_names(model, renamed) if renamed else {}
        for saved, options in options_of.items():
            name = held.get(f"{saved}.weight", f"{saved}.weight").removesuffix(".weight")
            name = self._experts.names.get(saved, name)
            module = modules.get(name)
            if module is None:
                raise ValueError(
                    f"{saved}: quantized in the checkpoint, but {type(model).__name__} has no such "
                    "module; load with the class named under `architectures` in config.json"
                )
            model.set_submodule(name, _replacement(name, module, options))
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], *args: Any, **kwargs: Any
    ) -> list[Any]:
        """Load the layers of experts one by one, as they are stored."""
        # Older versions of transformers do not pass the model.
        found = super().update_weight_conversions(weight_conversions, *args, **kwargs)
        return self._experts.conversions(found)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, QLinear):
                try:
                    module.check()
                except ValueError as error:
                    raise ValueError(f"{name}: {error}; the checkpoint is damaged") from None
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, QLinear):
                model.set_submodule(name, float_module(module, dtype))
        return model


def _add_bias(name: str, module: nn.Module | None) -> None:
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"{name}: saved with a bias of its own, but it is {type(module).__name__} here, not "
            "nn.Linear; load with the class named under `architectures` in config.json"
        )
    bias = torch.empty(module.out_features, dtype=module.weight.dtype, device="meta")
    module.bias = nn.Parameter(bias, requires_grad=False)


def _replacement(name: str, module: nn.Module, options: dict[str, Any]) -> QLinear:
    kind = "conv1d" if isinstance(module, Conv1D) else "linear"
    if kind != options["kind"] or not isinstance(module, (nn.Linear, Conv1D)):
        raise ValueError(
            f"{name}: saved from a {options['kind']} module, found {type(module).__name__}"
        )
    shape = list(module.weight.shape[::-1] if kind == "conv1d" else module.weight.shape)
    if shape != list(options["shape"]):
        raise ValueError(f"{name}: saved with shape {options['shape']}, the model has {shape}")
    kwargs = {k: v for k, v in options.items() if k not in ("shape", "layout")}
    layer_class = PackedLinear if options["layout"] == "panels" else QLinear
    with torch.device("meta"):
        replacement = layer_class(
            shape[1],
            shape[0],
            bias=module.bias is not None,
            dtype=module.weight.dtype,
            **kwargs,
        )
    return replacement.train(module.training)


def float_module(module: QLinear, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the float layer that ``module`` stands for (nn.Linear or Conv1D)."""
    dtype = module.dtype if dtype is None else dtype
    weight = module.dequantize().to(dtype)
    out, inputs, bias = module.out_features, module.in_features, module.bias
    with torch.device("meta"):
        if module.kind == "conv1d":
            result: nn.Module = Conv1D(out, inputs)
        else:
            result = nn.Linear(inputs, out, bias=bias is not None)
    if module.kind == "conv1d":
        weight = weight.t().contiguous()
    result.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        result.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    quantizer = module.input_quantizer()
    if quantizer is not None:
        install_quantizer(result, quantizer)
    return result.train(module.training)


def register_format() -> None:
    """Make ``quant_method: "ptqkit"`` known to transformers; calling it again does nothing.

    Raises
    ------
    RuntimeError
        If another package has taken the name.
    """
    for mapping, cls in (
        (_auto.AUTO_QUANTIZATION_CONFIG_MAPPING, PtqkitConfig),
        (_auto.AUTO_QUANTIZER_MAPPING, PtqkitQuantizer),
    ):
        known = mapping.get(METHOD)
        # After a reload the old class of this very module stands there and is replaced.
        if known is not None and known.__module__ != cls.__module__:
            raise RuntimeError(f"the quantization method {METHOD!r} is taken by {known!r}")
        mapping[METHOD] = cls


register_format()
