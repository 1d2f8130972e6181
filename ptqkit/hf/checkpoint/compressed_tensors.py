"""Define the compressed-tensors format, which stock transformers and vLLM load.

The layout of a layer ``P`` is ``pack-quantized``, codes in a dense bit stream, or
``int-quantized``, one int8 per code, for layers with quantized activations whose weights have
8 bits or zero-points.

========================  ====================================================================
``P.weight_packed``       int32 (out, ceil(in*b/32)): unsigned codes, a stream along ``in``
``P.weight``              int8 (out, in), of ``int-quantized``: signed codes
``P.weight_scale``        model dtype (out, groups), or (1,) for one scale per tensor
``P.weight_shape``        int64 (2,): out, in; of ``pack-quantized``
``P.weight_zero_point``   packed: int32 (ceil(out*b/32), groups), a stream along ``out``; else
                          int8 (out, groups) or (1,), signed; absent if symmetric
``P.input_scale``         model dtype (1,); with ``P.input_zero_point``, int8 (1,): the static
                          grid of the inputs
========================  ====================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.arrays.packing import pack_rows, unpack_rows
from ptqkit.hf.checkpoint.base import (
    FLOATS,
    CheckpointFormat,
    Fetch,
    build_matrix,
    float_plan,
    input_plans,
    int_plan,
    middle_zeros,
    representable,
    shared_limits,
    with_suffix,
)
from ptqkit.hf.checkpoint.files import TensorPlan
from ptqkit.hf.checkpoint.spec import LayerSpec
from ptqkit.nn.activations import ActivationQuantizer
from ptqkit.recipe.options import ActivationQuantization

__all__ = ["CompressedTensorsFormat", "compressed_pack", "compressed_unpack"]

_FORMATS = ("pack-quantized", "int-quantized", "mixed-precision")


class CompressedTensorsFormat(CheckpointFormat):
    """``quant_method: "compressed-tensors"``."""

    name = method = "compressed-tensors"

    def _limits(self, spec: LayerSpec) -> list[str]:
        found = shared_limits(spec, self.name)
        if not spec.grid.symmetric and spec.activations is None:
            found.append(
                "compressed-tensors loads asymmetric grids only with a loader option "
                "(use symmetric=True)"
            )
        if spec.permuted:
            found.append("compressed-tensors cannot carry g_idx (use static groups)")
        if spec.activations is None:
            return found
        if spec.activations.bits > 8 and spec.weight_dtype != "float32":
            found.append(
                f"compressed-tensors has no room for activations of {spec.activations.bits} bits "
                f"in {spec.weight_dtype}"
            )
        if spec.activations.outlier_threshold is not None:
            found.append(
                "compressed-tensors cannot leave outlier columns of activations as they are "
                "(use 'ptqkit')"
            )
        if spec.activations.dynamic and spec.flat_input:
            found.append(
                "its inputs have no batch axis, and there compressed-tensors takes one dynamic "
                "scale for the whole tensor, not one per token (use static activations)"
            )
        if spec.activations.dynamic and spec.flat_input is None:
            found.append(
                "the shape of its inputs could not be measured, and compressed-tensors has "
                "per-token scales for (batch, tokens, channels) alone"
            )
        return found

    def scale_dtype(self, spec: LayerSpec) -> str:
        """Return the dtype in which the scales of the layer are stored."""
        return spec.weight_dtype

    def _data_limits(
        self, spec: LayerSpec, matrix: QuantizedMatrix, quantizer: ActivationQuantizer | None
    ) -> list[str]:
        if quantizer is None or quantizer.scale is None:
            return []
        if representable(quantizer.scale.detach().float().cpu().numpy(), spec.weight_dtype):
            return []
        return [
            "the scale of its activations is not exactly representable in "
            f"{spec.weight_dtype}; calibrate with dtype=torch.{spec.weight_dtype}"
        ]

    def config(
        self,
        specs: Sequence[LayerSpec],
        *,
        linears: Sequence[str],
        act_order: bool = False,
        gained_biases: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Return the ``quantization_config`` of ``config.json``."""
        schemes: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for spec in specs:
            scheme = _scheme(spec, act_order)
            schemes.setdefault(repr(scheme), (scheme, []))[1].extend(spec.names)
        layouts = sorted({layout(spec) for spec in specs})
        groups = {}
        for number, (scheme, names) in enumerate(schemes.values()):
            # Exact names: other readers match "Linear" against their own classes, so that a
            # router they build otherwise is taken for quantized, or a quantized head for float.
            # Where names in memory differ, transformers looks for those, others for the saved.
            groups[f"group_{number}"] = {"targets": _joined_experts(names, linears), **scheme}
        return {
            "quant_method": "compressed-tensors",
            "format": layouts[0] if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": sorted(set(linears) - {name for spec in specs for name in spec.names}),
            "kv_cache_scheme": None,
            "config_groups": groups,
        }

    def plans(
        self,
        spec: LayerSpec,
        matrix: QuantizedMatrix,
        quantizer: ActivationQuantizer | None = None,
    ) -> list[TensorPlan]:
        """Return the tensors that replace the weight of one layer; nothing is packed yet."""
        make = _packed_plans if layout(spec) == "pack-quantized" else _int_plans
        return make(spec, matrix) + input_plans(spec, quantizer, spec.weight_dtype)

    def layers(
        self, settings: Mapping[str, Any], tensors: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        """Return what a reader must know of every quantized layer, by module name."""
        if settings.get("format") not in _FORMATS:
            raise ValueError(f"compressed-tensors format {settings.get('format')!r} is not read")
        names = set(tensors)
        return {
            name: {**_stored_scheme(name, settings), "packed": f"{name}.weight_packed" in names}
            for name in with_suffix(tensors, ".weight_scale")
        }

    def parts(self, options: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, ...]]:
        """Return the tensors of a layer by the end of the name, with the dtypes each may have."""
        found: dict[str, tuple[torch.dtype, ...]] = {"weight_scale": FLOATS}
        if options["packed"]:
            found |= {"weight_packed": (torch.int32,), "weight_shape": (torch.int64,)}
        else:
            found["weight"] = (torch.int8,)
        if not options["symmetric"]:
            found["weight_zero_point"] = (torch.int32,) if options["packed"] else (torch.int8,)
        return found

    def read(self, name: str, fetch: Fetch, options: Mapping[str, Any]) -> QuantizedMatrix:
        """Read one layer back."""
        bits, scales = options["bits"], fetch(f"{name}.weight_scale")
        if options["packed"]:
            out, inputs = (int(n) for n in fetch(f"{name}.weight_shape"))
            codes = compressed_unpack(fetch(f"{name}.weight_packed").numpy(), bits, inputs)
            if out != len(codes):
                raise ValueError(
                    f"{name}.weight_shape says {out} outputs, but there are {len(codes)}: the "
                    "files are damaged"
                )
        else:
            codes = _unsigned(fetch(f"{name}.weight"), bits, f"{name}.weight")
            out = len(codes)
        groups = 1 if scales.dim() == 1 else scales.shape[1]
        if options["symmetric"]:
            zeros = middle_zeros(bits, (out, groups))
        elif options["packed"]:
            packed = fetch(f"{name}.weight_zero_point").numpy()
            zeros = compressed_unpack_zeros(packed, bits, out)
        else:
            stored = f"{name}.weight_zero_point"
            zeros = np.broadcast_to(_unsigned(fetch(stored), bits, stored), (out, groups)).copy()
        if options["per_tensor"]:
            scales = scales.expand(out, 1)
        return build_matrix(codes, scales, zeros, None, options)


def _joined_experts(names: Sequence[str], linears: Sequence[str]) -> list[str]:
    """Return targets: names, but one pattern for the experts of a mixture that are all among them.

    Readers that join experts look for names of their own below that of the mixture.
    """
    given, found = set(names), dict.fromkeys(map(_mixture, names))
    whole = {m for m in found if m}
    for name in linears:
        if name not in given:
            whole.discard(_mixture(name))
    kept = [f"re:{re.escape(m)}\\..*" if m in whole else "" for m in map(_mixture, names)]
    return list(dict.fromkeys(new or name for new, name in zip(kept, names, strict=True)))


def _mixture(name: str) -> str:
    """Return the name of the mixture that a layer is an expert of; empty if of none."""
    found = re.fullmatch(r"(.*\.experts)\.\d+\.\w+", name)
    return found[1] if found else ""


def layout(spec: LayerSpec) -> str:
    """Return the layout of a layer: whole bytes, or packed if that is smaller."""
    if spec.activations is None or (spec.grid.symmetric and int(spec.grid.bits) < 8):
        return "pack-quantized"
    return "int-quantized"


def _scheme(spec: LayerSpec, act_order: bool) -> dict[str, Any]:
    channel = "tensor" if spec.grid.per_tensor else "channel"
    weights = {
        "num_bits": int(spec.grid.bits),
        "type": "int",
        "symmetric": spec.grid.symmetric,
        "strategy": channel if spec.grid.group_size is None else "group",
        "group_size": spec.grid.group_size,
        "dynamic": False,
    }
    if act_order and spec.grid.group_size is not None:
        weights["actorder"] = "weight"
    inputs = None
    if spec.activations is not None:
        inputs = {
            "num_bits": spec.activations.bits,
            "type": "int",
            "symmetric": spec.activations.symmetric,
            "strategy": spec.activations.granularity,
            "dynamic": spec.activations.dynamic,
        }
    return {
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        # A reader fills a missing one from the top level, which may say "mixed-precision".
        "format": layout(spec),
    }


def _scale_plan(spec: LayerSpec, matrix: QuantizedMatrix) -> TensorPlan:
    scales = matrix.scales[0] if spec.grid.per_tensor else matrix.scales
    return float_plan(f"{spec.name}.weight_scale", scales, spec.weight_dtype)


def _packed_plans(spec: LayerSpec, matrix: QuantizedMatrix) -> list[TensorPlan]:
    name, (out, inputs), bits = spec.name, matrix.shape, int(matrix.bits)
    shape = (out, -(-inputs * bits // 32))
    return [
        int_plan(
            f"{name}.weight_packed",
            torch.int32,
            shape,
            lambda: compressed_pack(matrix.codes, bits),
        ),
        _scale_plan(spec, matrix),
        int_plan(
            f"{name}.weight_shape", torch.int64, (2,), lambda: np.array(matrix.shape, np.int64)
        ),
    ]


def _int_plans(spec: LayerSpec, matrix: QuantizedMatrix) -> list[TensorPlan]:
    name, bits = spec.name, int(matrix.bits)
    plans = [
        int_plan(f"{name}.weight", torch.int8, matrix.shape, lambda: _signed(matrix.codes, bits)),
        _scale_plan(spec, matrix),
    ]
    if not matrix.symmetric:
        zeros = matrix.zero_points[0] if spec.grid.per_tensor else matrix.zero_points
        plans.append(
            int_plan(
                f"{name}.weight_zero_point", torch.int8, zeros.shape, lambda: _signed(zeros, bits)
            )
        )
    return plans


def _stored_scheme(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    groups = list(settings["config_groups"].values())
    matches = [g for g in groups if _is_target(name, g["targets"])]
    if not matches:
        matches = [g for g in groups if g["targets"] == ["Linear"]]
    if len(matches) != 1:
        raise ValueError(f"{name}: {len(matches)} config_groups match, by name or as 'Linear'")
    weights = matches[0]["weights"]
    size = weights.get("group_size")
    strategy = weights["strategy"]
    if strategy not in ("tensor", "channel", "group") or weights.get("type", "int") != "int":
        raise ValueError(f"{name}: weights of type {weights['type']}, {strategy} are not read")
    per_channel = strategy != "group" or size in (None, -1)
    return {
        "bits": weights["num_bits"],
        "group_size": None if per_channel else size,
        "symmetric": weights["symmetric"],
        "per_tensor": strategy == "tensor",
        "activations": _stored_inputs(name, matches[0].get("input_activations")),
    }


def _is_target(name: str, targets: Sequence[str]) -> bool:
    if name in targets:
        return True
    patterns = (t.removeprefix("re:") for t in targets if t.startswith("re:"))
    return any(re.match(pattern, name) for pattern in patterns)


def _stored_inputs(name: str, inputs: Mapping[str, Any] | None) -> ActivationQuantization | None:
    if inputs is None:
        return None
    dynamic = inputs["strategy"] == "token"
    if bool(inputs.get("dynamic")) != dynamic or inputs.get("type", "int") != "int":
        raise ValueError(f"{name}: input_activations {dict(inputs)} are not read")
    try:
        return ActivationQuantization(
            inputs["num_bits"], inputs["strategy"], bool(inputs["symmetric"])
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _signed(codes: np.ndarray, bits: int) -> np.ndarray:
    return (codes.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def _unsigned(codes: torch.Tensor, bits: int, name: str) -> np.ndarray:
    shifted = codes.numpy().astype(np.int16) + (1 << (bits - 1))
    if shifted.size and not (shifted.min() >= 0 and shifted.max() < 1 << bits):
        raise ValueError(f"{name} holds numbers that are no signed codes of {bits} bits")
    return shifted.astype(np.uint8)


def _as_int32(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.int32)


def _as_uint32(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.uint32)


def compressed_pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned codes (rows, n) into int32 (rows, ceil(n*bits/32)).

    compressed-tensors writes ``q + 2**(bits-1)`` for a signed ``q``: that is the unsigned code.
    """
    return _as_int32(pack_rows(np.ascontiguousarray(codes, dtype=np.uint8), bits))


def compressed_unpack(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Inverse of :func:`compressed_pack`: uint8 codes (rows, columns)."""
    return unpack_rows(_as_uint32(packed), bits, columns)


def compressed_unpack_zeros(packed: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Return the zero-points (rows, groups), uint8, of int32 (ceil(rows*bits/32), groups)."""
    return np.ascontiguousarray(compressed_unpack(packed.T, bits, rows).T)
