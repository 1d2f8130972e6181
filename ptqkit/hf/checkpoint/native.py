"""Define ptqkit's own checkpoint format: everything that a quantized layer can be.

FORMAT of ``quant_method: "ptqkit"``, versions 1 to 3
----------------------------------------------------
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
``P.zero_points``  uint8 (out * rowbytes(g))   packed like the codes; absent if ``symmetric``,
                                               whose zero-point is 2**(bits-1) (ternary: 1)
``P.g_idx``        int32 (in)                  group of each input; only if ``permuted``, else
                                               input i is in group i // group_size
``P.bias``         as in the float model
=================  ==========================  ====================================================

Version 3 adds ``layout``: ``"rows"`` is the table above, ``"panels"`` holds the tensors of a layer
as kernels read them (:mod:`ptqkit.arrays.packed`), so that a file is mapped and not converted. With
``p = ceil(out / 16)`` panels, of which the last is filled up, and ``w`` words per output:

=================  ==========================  ====================================================
``P.weight``       int32 (p * w * 16)          words (p, w, 16); 2, 3, 4 or 8 bits, ternary as 2.
                                               Groups start at whole steps of 16, 32, 8 or 4 inputs
                                               (1, 3, 1 or 1 words); all but the last are full
``P.scales``       scale_dtype (p, g, 16)      1 beyond the last output
``P.zero_points``  uint8 (p, g, 16)            always there
=================  ==========================  ====================================================

The weight is ``scale * (code - zero_point)`` in float32, rounded once to the model's dtype. A layer
whose inputs have a static grid holds it as ``P.input_scale``, float32 (1), and if it is
asymmetric ``P.input_zero_point``, signed, int8 (1), or int16 for more than 8 bits. All other
tensors are those that ``save_pretrained`` writes of the float model; all names are the names
there, which in some classes are not those in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch

from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.arrays.packing import native_pack, native_row_bytes, native_unpack
from ptqkit.hf.checkpoint.base import (
    CheckpointFormat,
    Fetch,
    build_matrix,
    float_plan,
    g_idx_plan,
    input_plans,
    int_plan,
    middle_zeros,
    static_parts,
)
from ptqkit.hf.checkpoint.files import TensorPlan
from ptqkit.hf.checkpoint.spec import LayerSpec
from ptqkit.nn.activations import ActivationQuantizer
from ptqkit.nn.panels import (
    even_groups,
    has_panels,
    pack_panels,
    panel_shapes,
    scale_panels,
    unpack_grid,
    unpack_panels,
    zero_panels,
)
from ptqkit.nn.qlinear import SCALE_DTYPES
from ptqkit.recipe.options import ActivationQuantization

__all__ = [
    "FORMAT_VERSION",
    "METHOD",
    "NativeFormat",
    "PanelFormat",
    "layer_options",
]

METHOD = "ptqkit"
# Version 2 adds quantized activations and gained biases, which a reader of version 1 would drop;
# version 3 the layout in panels. A checkpoint that has none of these is written as version 1.
FORMAT_VERSION = 3
_SHARED = ("bits", "group_size", "symmetric", "permuted", "kind", "scale_dtype")
_OPTIONAL: dict[str, Any] = {"per_tensor": False, "activations": None, "layout": "rows"}
_LAYOUTS = ("rows", "panels")


class NativeFormat(CheckpointFormat):
    """``quant_method: "ptqkit"``."""

    name = method = METHOD
    foreign: ClassVar[bool] = False

    def scale_dtype(self, spec: LayerSpec) -> str:
        """Return the dtype in which the scales of the layer are stored."""
        return spec.grid.scale_dtype

    def layout(self, spec: LayerSpec) -> str:
        """Return how this object writes the layer: ``"rows"`` or ``"panels"``."""
        return "rows"

    def config(
        self,
        specs: Sequence[LayerSpec],
        *,
        linears: Sequence[str],
        act_order: bool = False,
        gained_biases: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Return the ``quantization_config`` of ``config.json``."""
        values = [{**_native_values(spec), "layout": self.layout(spec)} for spec in specs]
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
        version = 1
        if gained_biases or any(spec.activations is not None for spec in specs):
            version = 2
        if any(value["layout"] != "rows" for value in values):
            version = 3
        config = {
            "quant_method": METHOD,
            "format_version": version,
            "defaults": {
                k: v for k, v in defaults.items() if k not in _OPTIONAL or v != _OPTIONAL[k]
            },
            "layers": layers,
        }
        if gained_biases:
            config["gained_biases"] = list(gained_biases)
        return config

    def plans(
        self,
        spec: LayerSpec,
        matrix: QuantizedMatrix,
        quantizer: ActivationQuantizer | None = None,
    ) -> list[TensorPlan]:
        """Return the tensors that replace the weight of one layer; nothing is packed yet."""
        name, (out, inputs), groups = spec.name, matrix.shape, matrix.scales.shape[1]

        def flat(array: np.ndarray) -> Callable[[], np.ndarray]:
            return lambda: native_pack(array, matrix.bits).reshape(-1)

        size = out * native_row_bytes(inputs, matrix.bits)
        plans = [
            int_plan(f"{name}.weight", torch.uint8, (size,), flat(matrix.codes)),
            float_plan(f"{name}.scales", matrix.scales, matrix.scale_dtype),
        ]
        if not matrix.symmetric:
            size = out * native_row_bytes(groups, matrix.bits)
            zeros = flat(matrix.zero_points)
            plans.append(int_plan(f"{name}.zero_points", torch.uint8, (size,), zeros))
        if spec.permuted:
            plans.append(g_idx_plan(spec, matrix))
        return plans + input_plans(spec, quantizer, "float32")

    def layers(
        self, settings: Mapping[str, Any], tensors: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        """Return what a reader must know of every quantized layer, by module name."""
        return layer_options(settings)

    def parts(self, options: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, ...]]:
        """Return the tensors of a layer by the end of the name, with the dtypes each may have."""
        found: dict[str, tuple[torch.dtype, ...]] = {
            "weight": (torch.uint8,),
            "scales": (SCALE_DTYPES[options["scale_dtype"]],),
        }
        if options["layout"] == "panels":
            found["weight"] = (torch.int32,)
        if not options["symmetric"] or options["layout"] == "panels":
            found["zero_points"] = (torch.uint8,)
        if options["permuted"]:
            found["g_idx"] = (torch.int32,)
        return found | static_parts(options["activations"])

    def read(self, name: str, fetch: Fetch, options: Mapping[str, Any]) -> QuantizedMatrix:
        """Read one layer back."""
        if options["layout"] == "panels":
            return _read_panels(name, fetch, options)
        bits, scales = options["bits"], fetch(f"{name}.scales")
        if scales.dim() != 2:
            raise ValueError(f"{name}.scales must have 2 dimensions, not {scales.dim()}")
        out, groups = scales.shape

        def unpack(tensor: torch.Tensor, columns: int) -> np.ndarray:
            return native_unpack(tensor.numpy().reshape(out, -1), bits, columns)

        codes = unpack(fetch(f"{name}.weight"), options["shape"][1])
        if options["symmetric"]:
            zeros = middle_zeros(bits, (out, groups))
        else:
            zeros = unpack(fetch(f"{name}.zero_points"), groups)
        g_idx = fetch(f"{name}.g_idx").numpy() if options["permuted"] else None
        return build_matrix(codes, scales, zeros, g_idx, options)


class PanelFormat(NativeFormat):
    """``quant_method: "ptqkit"`` of version 3: layers as they are computed with, for mapping.

    Layers that have no such layout (5 to 7 bits) are written in rows.
    """

    name = f"{METHOD}_v3"

    def layout(self, spec: LayerSpec) -> str:
        """Return how this object writes the layer: ``"rows"`` or ``"panels"``."""
        return "panels" if has_panels(spec.grid.bits) else "rows"

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Return False: :class:`NativeFormat` reads every version."""
        return False

    def _data_limits(
        self, spec: LayerSpec, matrix: QuantizedMatrix, quantizer: ActivationQuantizer | None
    ) -> list[str]:
        if self.layout(spec) == "rows" or even_groups(matrix.g_idx, matrix.group_size):
            return []
        return ["version 3 has groups of one size alone (use 'ptqkit')"]

    def plans(
        self,
        spec: LayerSpec,
        matrix: QuantizedMatrix,
        quantizer: ActivationQuantizer | None = None,
    ) -> list[TensorPlan]:
        """Return the tensors that replace the weight of one layer; nothing is packed yet."""
        if self.layout(spec) == "rows":
            return super().plans(spec, matrix, quantizer)
        words, grids = panel_shapes(matrix.shape, matrix.bits, matrix.group_size)
        scales = SCALE_DTYPES[matrix.scale_dtype]
        plans = [
            TensorPlan(
                f"{spec.name}.weight",
                torch.int32,
                (prod(words),),
                lambda: pack_panels(matrix)[0].view(-1),
            ),
            TensorPlan(f"{spec.name}.scales", scales, grids, lambda: scale_panels(matrix)),
            TensorPlan(f"{spec.name}.zero_points", torch.uint8, grids, lambda: zero_panels(matrix)),
        ]
        if spec.permuted:
            plans.append(g_idx_plan(spec, matrix))
        return plans + input_plans(spec, quantizer, "float32")


def _read_panels(name: str, fetch: Fetch, options: Mapping[str, Any]) -> QuantizedMatrix:
    shape, bits = tuple(options["shape"]), options["bits"]
    words, grids = panel_shapes(shape, bits, options["group_size"])
    tensors = {part: fetch(f"{name}.{part}") for part in ("weight", "scales", "zero_points")}
    wanted = {"weight": (prod(words),), "scales": grids, "zero_points": grids}
    for part, tensor in tensors.items():
        if tuple(tensor.shape) != wanted[part]:
            raise ValueError(
                f"{name}.{part} must have shape {wanted[part]}, not {tuple(tensor.shape)}"
            )
    g_idx = fetch(f"{name}.g_idx").numpy() if options["permuted"] else None
    groups = np.arange(shape[1]) // (options["group_size"] or shape[1]) if g_idx is None else g_idx
    if (
        groups.shape != shape[1:]
        or groups.min() < 0
        or not even_groups(groups, options["group_size"])
    ):
        raise ValueError(f"{name}.g_idx must hold each group group_size times: it is damaged")
    zeros = unpack_grid(tensors["zero_points"], shape[0]).contiguous().numpy()
    scales = unpack_grid(tensors["scales"], shape[0])
    codes = unpack_panels(tensors["weight"].view(words), shape, bits, groups, grids[1]).numpy()
    return build_matrix(codes, scales, zeros, g_idx, options)


def _native_values(spec: LayerSpec) -> dict[str, Any]:
    values = {**asdict(spec.grid), "permuted": spec.permuted, "kind": spec.kind}
    values["activations"] = None if spec.activations is None else spec.activations.to_dict()
    return {key: values[key] for key in (*_SHARED, *_OPTIONAL) if key in values}


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
        if options["layout"] not in _LAYOUTS or (
            options["layout"] == "panels" and not has_panels(options["bits"])
        ):
            raise ValueError(
                f"{name}: layout {options['layout']!r} of {options['bits']} bits is not read"
            )
        if options["activations"] is not None:
            try:
                expanded[name]["activations"] = ActivationQuantization.parse(options["activations"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from None
    return expanded
