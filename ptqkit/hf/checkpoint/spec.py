"""Which layer fits which checkpoint format, decided before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.nn.activations import ActivationQuantizer
from ptqkit.recipe.options import ActivationQuantization

__all__ = ["FORMATS", "LayerSpec", "choose_format", "describe_layers", "format_problems"]

FORMATS = ("compressed-tensors", "gptq", "gptq_v2", "ptqkit")
GPTQ_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class LayerSpec:
    """What a checkpoint format has to carry for one layer; no data, so a recipe suffices.

    Attributes
    ----------
    name : str
    out_features, in_features : int
    bits : int or "ternary"
    group_size : int or None
    symmetric : bool
    kind : str
        "linear" (nn.Linear), "conv1d" (GPT-2's Conv1D), or the class name of anything else.
    weight_dtype, scale_dtype : str
        "float32", "float16", "bfloat16" (or another torch name, which no format carries).
    permuted : bool
        Groups are not runs of consecutive inputs (act-order without static groups).
    tied : bool
        The weight is shared with another module, such as the embeddings.
    per_tensor : bool
        One scale for the whole matrix.
    activations : ActivationQuantization or None
        How the inputs are quantized.
    flat_input : bool or None
        Inputs come without the shape (batch, tokens, channels); None where that is not known.
    """

    name: str
    out_features: int
    in_features: int
    bits: int | str
    group_size: int | None
    symmetric: bool
    kind: str = "linear"
    weight_dtype: str = "float32"
    scale_dtype: str = "float32"
    permuted: bool = False
    tied: bool = False
    per_tensor: bool = False
    activations: ActivationQuantization | None = None
    flat_input: bool | None = False

    @property
    def compressed_layout(self) -> str:
        """Layout inside compressed-tensors: whole bytes, or packed where that is smaller."""
        if self.activations is None or (self.symmetric and int(self.bits) < 8):
            return "pack-quantized"
        return "int-quantized"

    def problems(self, format: str) -> list[str]:
        """Reasons why ``format`` cannot carry this layer; empty if it can."""
        found = []
        if self.kind not in ("linear", "conv1d"):
            found.append(f"a {self.kind} module is neither nn.Linear nor Conv1D")
        if self.weight_dtype not in ("float32", "float16", "bfloat16"):
            found.append(f"weights of dtype {self.weight_dtype} are not supported")
        if self.tied:
            found.append("its weight is tied to another module; untie it before quantizing")
        checks = {"compressed-tensors": self._compressed, "gptq": self._gptq, "gptq_v2": self._gptq}
        if format in checks:
            found += checks[format]()
        return [f"{self.name}: {reason}" for reason in found]

    def _shared_limits(self, format: str) -> list[str]:
        found = []
        if self.bits == "ternary":
            found.append(f"{format} has no ternary type")
        if self.kind == "conv1d":
            found.append(f"{format} loaders take nn.Linear only, not Conv1D")
        if self.group_size is not None and self.in_features % self.group_size:
            found.append(f"group_size {self.group_size} does not divide {self.in_features} inputs")
        return found

    def _compressed(self) -> list[str]:
        found = self._shared_limits("compressed-tensors")
        if not self.symmetric and self.activations is None:
            found.append("compressed-tensors loads asymmetric grids only with a loader option")
        if self.permuted:
            found.append("compressed-tensors cannot carry g_idx (use static groups)")
        return found + self._compressed_activations()

    def _compressed_activations(self) -> list[str]:
        if self.activations is None:
            return []
        found = []
        if self.activations.bits > 8 and self.weight_dtype != "float32":
            found.append(
                f"compressed-tensors has no room for activations of {self.activations.bits} bits "
                f"in {self.weight_dtype}"
            )
        if self.activations.outlier_threshold is not None:
            found.append(
                "compressed-tensors cannot leave outlier columns of activations as they are"
            )
        if self.activations.dynamic and self.flat_input:
            found.append(
                "its inputs have no batch axis, and there compressed-tensors takes one dynamic "
                "scale for the whole tensor, not one per token (use static activations)"
            )
        if self.activations.dynamic and self.flat_input is None:
            found.append(
                "the shape of its inputs is not known, and compressed-tensors has per-token scales "
                "for (batch, tokens, channels) alone; run the model once before saving"
            )
        return found

    def _gptq(self) -> list[str]:
        found = self._shared_limits("the GPTQ format")
        if self.activations is not None:
            found.append("the GPTQ format has no quantized activations")
        if self.bits != "ternary" and self.bits not in GPTQ_BITS:
            found.append(f"the GPTQ format has no {self.bits}-bit layout, only {GPTQ_BITS}")
        elif self.bits != "ternary":
            for side, size in (("in", self.in_features), ("out", self.out_features)):
                if size * int(self.bits) % 32:
                    found.append(f"{side}_features {size} times {self.bits} bits: not whole words")
        return found


def format_problems(specs: Sequence[LayerSpec], format: str) -> list[str]:
    """Every reason why ``format`` cannot carry the layers; empty if it can.

    Raises
    ------
    ValueError
        If ``format`` is not one of :data:`FORMATS`.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be 'auto' or one of {', '.join(FORMATS)}, not {format!r}")
    found = [problem for spec in specs for problem in spec.problems(format)]
    if format.startswith("gptq"):
        kinds = {(spec.bits, spec.group_size) for spec in specs}
        if len(kinds) > 1:
            listed = ", ".join(f"{b} bit group {g}" for b, g in sorted(kinds, key=str))
            found.append(f"the GPTQ format takes one bits and group_size for all layers: {listed}")
    return found


def describe_layers(
    model: Any,
    layers: Mapping[str, QuantizedMatrix],
    activations: Mapping[str, ActivationQuantizer] | None = None,
    flat_inputs: Mapping[str, bool] | None = None,
) -> list[LayerSpec]:
    """Return one :class:`LayerSpec` per quantized layer of the model.

    Parameters
    ----------
    flat_inputs : mapping of str to bool, optional
        Of every layer with dynamic activations: ``LayerSpec.flat_input``; missing is not known.

    Raises
    ------
    ValueError
        If a name is not a module of the model, or its shape differs from that of the codes.
    """
    if not layers:
        raise ValueError("layers is empty: there is nothing quantized to save")
    modules = dict(model.named_modules())
    tied = _tied_names(model)
    activations, flat_inputs = activations or {}, flat_inputs or {}
    specs = []
    for name, q in layers.items():
        if name not in modules:
            raise ValueError(f"layers names {name!r}, which is not a module of the model")
        module = modules[name]
        kind = _kind(module)
        weight = getattr(module, "weight", None)
        shape = None if weight is None else tuple(weight.shape)
        if kind == "conv1d" and shape is not None:
            shape = shape[::-1]
        if kind in ("linear", "conv1d") and shape != q.shape:
            raise ValueError(f"{name}: codes have shape {q.shape}, the module (out, in) = {shape}")
        quantizer = activations.get(name)
        dtype = "none" if weight is None else str(weight.dtype).removeprefix("torch.")
        specs.append(
            LayerSpec(
                name,
                *q.shape,
                bits=q.bits,
                group_size=q.group_size,
                symmetric=q.symmetric,
                kind=kind,
                weight_dtype=dtype,
                scale_dtype=q.scale_dtype,
                permuted=not _natural_groups(q),
                tied=f"{name}.weight" in tied,
                per_tensor=q.per_tensor,
                activations=None if quantizer is None else quantizer.spec,
                flat_input=flat_inputs.get(name),
            )
        )
    return specs


def _kind(module: Any) -> str:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "linear"
    return "conv1d" if isinstance(module, Conv1D) else type(module).__name__


def _natural_groups(q: QuantizedMatrix) -> bool:
    inputs = q.shape[1]
    return bool(np.array_equal(q.g_idx, np.arange(inputs) // (q.group_size or max(inputs, 1))))


def _tied_names(model: Any) -> set[str]:
    """Names of parameters that live under more than one name."""
    seen: dict[int, str] = {}
    tied: set[str] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if first != name:
            tied.update((first, name))
    return tied


def _data_problems(spec: LayerSpec, q: QuantizedMatrix, format: str) -> list[str]:
    """Reasons that only the numbers can tell."""
    found = []
    if not np.isfinite(q.scales).all():
        found.append("scales are not finite")
    stored = scale_dtype(spec, format)
    if not representable(q.scales, stored):
        found.append(
            f"scales are not exactly representable in {stored}; "
            f"quantize with scale_dtype={stored!r}"
        )
    if q.symmetric and not (q.zero_points == (q.max_code + 1) // 2).all():
        found.append("marked symmetric, but a zero-point is not the middle of the grid")
    if format == "gptq" and q.zero_points.size and q.zero_points.min() < 1:
        found.append(
            "GPTQ version 1 cannot carry a zero-point of 0: "
            "use format='gptq_v2' or quantize with min_zero_point=1"
        )
    return [f"{spec.name}: {reason}" for reason in found]


def _grid_problems(spec: LayerSpec, quantizer: ActivationQuantizer, format: str) -> list[str]:
    """Reasons that only the static grid of the activations can tell."""
    if format != "compressed-tensors" or quantizer.scale is None:
        return []
    scale = quantizer.scale.detach().float().cpu().numpy()
    if representable(scale, spec.weight_dtype):
        return []
    return [
        f"{spec.name}: the scale of its activations is not exactly representable in "
        f"{spec.weight_dtype}; calibrate with dtype=torch.{spec.weight_dtype}"
    ]


def scale_dtype(spec: LayerSpec, format: str) -> str:
    """Dtype in which ``format`` stores the scales of the layer."""
    if format == "compressed-tensors":
        return spec.weight_dtype
    return spec.scale_dtype if format == "ptqkit" else "float16"


def representable(scales: np.ndarray, dtype: str) -> bool:
    """True where every float32 scale survives a trip through ``dtype``."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return bool((scales.astype(np.float16).astype(np.float32) == scales).all())
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(scales, dtype=np.float32).view(np.uint32)
        return not (bits & 0xFFFF).any()
    return True


def choose_format(
    specs: Sequence[LayerSpec],
    layers: Mapping[str, QuantizedMatrix],
    format: str = "auto",
    activations: Mapping[str, ActivationQuantizer] | None = None,
    foreign: Sequence[str] = (),
) -> tuple[str, str]:
    """Return the format to write and the reason for it.

    Parameters
    ----------
    foreign : sequence of str
        Further reasons against every format but ptqkit's own.

    Raises
    ------
    ValueError
        If the format asked for cannot carry every layer exactly; lists each layer and reason.
    """

    def problems(candidate: str) -> list[str]:
        found = format_problems(specs, candidate)
        for spec in specs:
            found += _data_problems(spec, layers[spec.name], candidate)
            quantizer = (activations or {}).get(spec.name)
            if quantizer is not None:
                found += _grid_problems(spec, quantizer, candidate)
        return found if candidate == "ptqkit" else found + list(foreign)

    if format != "auto":
        found = problems(format)
        if found:
            raise ValueError(_listing(f"format {format!r} cannot carry this model", found))
        return format, "asked for"
    found = problems("compressed-tensors")
    if not found:
        return "compressed-tensors", "every layer fits it exactly; stock transformers loads it"
    own = problems("ptqkit")
    if own:
        raise ValueError(_listing("no checkpoint format can carry this model", own))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return "ptqkit", f"compressed-tensors cannot carry {found[0]}{more}"


def _listing(head: str, problems: Sequence[str]) -> str:
    return f"{head}, {len(problems)} problem(s):\n" + "\n".join(f"  - {p}" for p in problems)
