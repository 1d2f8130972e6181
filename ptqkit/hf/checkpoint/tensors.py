"""The three layouts on disk: configuration and tensors of each, writing and reading.

FORMAT of ``quant_method: "ptqkit"``, versions 1 and 2
------------------------------------------------------
``config.json`` holds under ``quantization_config``::

    {"quant_method": "ptqkit", "format_version": 1,
     "defaults": {"bits": 3, "group_size": 64, "symmetric": false, "permuted": false,
                  "kind": "linear", "scale_dtype": "float32"},
     "layers": {"model.layers.0.mlp.down_proj": {"shape": [512, 1376], "bits": 4}, ...}}

``layers`` names every quantized module: its shape (out, in), and what differs from ``defaults``.
``bits`` is 2 to 8 or ``"ternary"``; ``group_size`` null means one grid per output channel; ``kind``
is ``"linear"`` or ``"conv1d"`` (GPT-2's transposed layer; codes are stored (out, in) all the same);
``per_tensor`` true says that all scales of the layer are one. Version 2 adds ``activations``, null
or an object with ``bits``, ``granularity``, ``symmetric`` and ``outlier_threshold``
(:class:`ptqkit.ActivationQuantization`), and beside ``layers`` a list ``gained_biases`` of the
modules with a bias that the model class does not create. A file with neither is of version 1.

For a layer ``P`` with weight (out, in) and ``g = ceil(in / group_size)`` groups:

=================  ==========================  ====================================================
``P.weight``       uint8 (out * rowbytes(in))  unsigned codes, rows one after the other, each of
                                               ``bits * ceil(in/8)`` bytes: code i of a row is at
                                               bits [i*b, i*b+b), least significant bit first.
                                               Ternary: ``ceil(in/5)`` bytes, code i is digit i % 5
                                               (least significant first) of byte i // 5 in base 3
``P.scales``       scale_dtype (out, g)
``P.zero_points``  uint8 (out * rowbytes(g))   packed like the codes; absent where ``symmetric``,
                                               whose zero-point is 2**(bits-1) (ternary: 1)
``P.g_idx``        int32 (in)                  group of each input; only where ``permuted``, else
                                               input i is in group i // group_size
``P.bias``         as in the float model
=================  ==========================  ====================================================

The weight is ``scale * (code - zero_point)`` in float32, rounded once to the model's dtype. A layer
whose inputs have a static grid holds it as ``P.input_scale``, float32 (1), and where it is
asymmetric ``P.input_zero_point``, signed, int8 (1), or int16 for more than 8 bits. All other
tensors are those of the float model, under its own names.

The other two layouts are described in :mod:`ptqkit.hf.formats` and, at length, by their authors:
compressed-tensors (``pack-quantized``, and ``int-quantized``, one int8 per code, for layers with
quantized activations whose weights have 8 bits or zero-points) and GPTQ (``gptq``: zero-points
stored minus one; ``gptq_v2``: as they are).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ptqkit.arrays.matrix import QuantizedMatrix, WeightGrid
from ptqkit.hf.checkpoint import formats
from ptqkit.hf.checkpoint.files import TensorPlan
from ptqkit.hf.checkpoint.spec import LayerSpec, scale_dtype
from ptqkit.nn.activations import ActivationQuantizer

__all__ = ["read_layer", "tensor_plans"]

_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Fetch = Callable[[str], torch.Tensor]


def _float_plan(name: str, values: np.ndarray, dtype: str) -> TensorPlan:
    target = _TORCH[dtype]
    return TensorPlan(
        name, target, values.shape, lambda: torch.from_numpy(np.array(values)).to(target)
    )


def _int_plan(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], np.ndarray]
) -> TensorPlan:
    return TensorPlan(name, dtype, shape, lambda: torch.from_numpy(make()))


def tensor_plans(
    spec: LayerSpec,
    q: QuantizedMatrix,
    format: str,
    quantizer: ActivationQuantizer | None = None,
) -> list[TensorPlan]:
    """Return the tensors that replace the weight of one layer; nothing is packed yet."""
    if format == "ptqkit":
        return _native_plans(spec, q) + _input_plans(spec, quantizer, "float32")
    if format == "compressed-tensors":
        packed = spec.compressed_layout == "pack-quantized"
        plans = _compressed_plans(spec, q) if packed else _int_quantized_plans(spec, q)
        return plans + _input_plans(spec, quantizer, spec.weight_dtype)
    return _gptq_plans(spec, q, 1 if format == "gptq" else 2)


def _input_plans(
    spec: LayerSpec, quantizer: ActivationQuantizer | None, dtype: str
) -> list[TensorPlan]:
    """Static grid of the inputs; the same names in both formats that have it."""
    if quantizer is None or quantizer.scale is None:
        return []
    scale = quantizer.scale.detach().cpu().to(_TORCH[dtype])
    plans = [TensorPlan.of(f"{spec.name}.input_scale", scale)]
    if quantizer.zero_point is not None:
        plans.append(
            TensorPlan.of(f"{spec.name}.input_zero_point", quantizer.zero_point.detach().cpu())
        )
    return plans


def _native_plans(spec: LayerSpec, q: QuantizedMatrix) -> list[TensorPlan]:
    name, (out, inputs), groups = spec.name, q.shape, q.scales.shape[1]

    def flat(array: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: formats.native_pack(array, q.bits).reshape(-1)

    size = out * formats.native_row_bytes(inputs, q.bits)
    plans = [
        _int_plan(f"{name}.weight", torch.uint8, (size,), flat(q.codes)),
        _float_plan(f"{name}.scales", q.scales, q.scale_dtype),
    ]
    if not q.symmetric:
        size = out * formats.native_row_bytes(groups, q.bits)
        zeros = _int_plan(f"{name}.zero_points", torch.uint8, (size,), flat(q.zero_points))
        plans.append(zeros)
    if spec.permuted:
        plans.append(_g_idx_plan(name, q))
    return plans


def _g_idx_plan(name: str, q: QuantizedMatrix) -> TensorPlan:
    return _int_plan(f"{name}.g_idx", torch.int32, q.g_idx.shape, lambda: q.g_idx.astype(np.int32))


def _compressed_plans(spec: LayerSpec, q: QuantizedMatrix) -> list[TensorPlan]:
    name, (out, inputs), bits = spec.name, q.shape, int(q.bits)
    return [
        _int_plan(
            f"{name}.weight_packed",
            torch.int32,
            (out, -(-inputs * bits // 32)),
            lambda: formats.compressed_pack(q.codes, bits),
        ),
        _compressed_scale(spec, q),
        _int_plan(
            f"{name}.weight_shape", torch.int64, (2,), lambda: np.array(q.shape, dtype=np.int64)
        ),
    ]


def _compressed_scale(spec: LayerSpec, q: QuantizedMatrix) -> TensorPlan:
    scales = q.scales[0] if spec.per_tensor else q.scales
    dtype = scale_dtype(spec, "compressed-tensors")
    return _float_plan(f"{spec.name}.weight_scale", scales, dtype)


def _signed(codes: np.ndarray, bits: int) -> np.ndarray:
    return (codes.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def _int_quantized_plans(spec: LayerSpec, q: QuantizedMatrix) -> list[TensorPlan]:
    name, bits = spec.name, int(q.bits)
    plans = [
        _int_plan(f"{name}.weight", torch.int8, q.shape, lambda: _signed(q.codes, bits)),
        _compressed_scale(spec, q),
    ]
    if not q.symmetric:
        zeros = q.zero_points[0] if spec.per_tensor else q.zero_points
        plans.append(
            _int_plan(
                f"{name}.weight_zero_point", torch.int8, zeros.shape, lambda: _signed(zeros, bits)
            )
        )
    return plans


def _gptq_plans(spec: LayerSpec, q: QuantizedMatrix, version: int) -> list[TensorPlan]:
    name, (out, inputs), bits = spec.name, q.shape, int(q.bits)
    groups = q.scales.shape[1]
    return [
        _int_plan(
            f"{name}.qweight",
            torch.int32,
            (inputs * bits // 32, out),
            lambda: formats.gptq_pack_weight(q.codes, bits),
        ),
        _int_plan(
            f"{name}.qzeros",
            torch.int32,
            (groups, out * bits // 32),
            lambda: formats.gptq_pack_zeros(q.zero_points, bits, version),
        ),
        _float_plan(f"{name}.scales", q.scales.T, "float16"),
        _g_idx_plan(name, q),
    ]


def read_layer(name: str, fetch: Fetch, options: Mapping[str, Any], format: str) -> QuantizedMatrix:
    """Read one layer back.

    Parameters
    ----------
    fetch : callable
        Returns the tensor of a given name.
    options : mapping
        ``bits``, ``group_size``, ``symmetric`` and, for the own format, ``shape``, ``permuted``.
    """
    readers = {"ptqkit": _read_native, "compressed-tensors": _read_compressed}
    return readers.get(format, _read_gptq)(name, fetch, options, format)


def _build(
    codes: np.ndarray,
    scales: torch.Tensor,
    zeros: np.ndarray,
    g_idx: np.ndarray | None,
    options: Mapping[str, Any],
) -> QuantizedMatrix:
    inputs, group_size = codes.shape[1], options["group_size"]
    if g_idx is None:
        g_idx = np.arange(inputs) // (group_size or max(inputs, 1))
    return QuantizedMatrix(
        codes=codes,
        scales=np.ascontiguousarray(scales.to(torch.float32).numpy()),
        zero_points=zeros,
        g_idx=g_idx.astype(np.int32),
        grid=WeightGrid(
            bits=options["bits"],
            group_size=group_size,
            symmetric=options["symmetric"],
            per_tensor=options.get("per_tensor", False),
            scale_dtype=str(scales.dtype).removeprefix("torch."),
        ),
    )


def _middle(options: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    bits = options["bits"]
    return np.full(shape, 1 if bits == "ternary" else 1 << (bits - 1), dtype=np.uint8)


def _read_native(
    name: str, fetch: Fetch, options: Mapping[str, Any], format: str
) -> QuantizedMatrix:
    bits, scales = options["bits"], fetch(f"{name}.scales")
    out, groups = scales.shape
    inputs = options["shape"][1]

    def unpack(tensor: torch.Tensor, columns: int) -> np.ndarray:
        return formats.native_unpack(tensor.numpy().reshape(out, -1), bits, columns)

    codes = unpack(fetch(f"{name}.weight"), inputs)
    if options["symmetric"]:
        zeros = _middle(options, (out, groups))
    else:
        zeros = unpack(fetch(f"{name}.zero_points"), groups)
    g_idx = fetch(f"{name}.g_idx").numpy() if options["permuted"] else None
    return _build(codes, scales, zeros, g_idx, options)


def _read_compressed(
    name: str, fetch: Fetch, options: Mapping[str, Any], format: str
) -> QuantizedMatrix:
    bits, scales = options["bits"], fetch(f"{name}.weight_scale")
    if options["packed"]:
        out, inputs = (int(n) for n in fetch(f"{name}.weight_shape"))
        codes = formats.compressed_unpack(fetch(f"{name}.weight_packed").numpy(), bits, inputs)
    else:
        codes = _unsigned(fetch(f"{name}.weight"), bits, f"{name}.weight")
        out = len(codes)
    groups = 1 if scales.dim() == 1 else scales.shape[1]
    if options["symmetric"]:
        zeros = _middle(options, (out, groups))
    elif options["packed"]:
        packed = fetch(f"{name}.weight_zero_point").numpy()
        zeros = formats.compressed_unpack_zeros(packed, bits, out)
    else:
        stored = f"{name}.weight_zero_point"
        zeros = np.broadcast_to(_unsigned(fetch(stored), bits, stored), (out, groups)).copy()
    if options["per_tensor"]:
        scales = scales.expand(out, 1)
    return _build(codes, scales, zeros, None, options)


def _unsigned(codes: torch.Tensor, bits: int, name: str) -> np.ndarray:
    shifted = codes.numpy().astype(np.int16) + (1 << (bits - 1))
    if shifted.size and not (shifted.min() >= 0 and shifted.max() < 1 << bits):
        raise ValueError(f"{name} holds numbers that are no signed codes of {bits} bits")
    return shifted.astype(np.uint8)


def _read_gptq(name: str, fetch: Fetch, options: Mapping[str, Any], format: str) -> QuantizedMatrix:
    bits = options["bits"]
    version = 1 if format == "gptq" else 2
    try:
        zeros = formats.gptq_unpack_zeros(fetch(f"{name}.qzeros").numpy(), bits, version)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    codes = formats.gptq_unpack_weight(fetch(f"{name}.qweight").numpy(), bits)
    g_idx = fetch(f"{name}.g_idx").numpy()
    return _build(codes, fetch(f"{name}.scales").T, zeros, g_idx, options)
