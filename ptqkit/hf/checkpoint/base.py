"""Define what a checkpoint format is: its limits, its configuration, its tensors and its reader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from ptqkit.arrays.matrix import QuantizedMatrix, WeightGrid
from ptqkit.hf.checkpoint.files import TensorPlan
from ptqkit.hf.checkpoint.spec import LayerSpec
from ptqkit.nn.activations import ActivationQuantizer
from ptqkit.nn.qlinear import SCALE_DTYPES
from ptqkit.recipe.recipe import Recipe

__all__ = ["CheckpointFormat", "Fetch"]

FLOATS = tuple(SCALE_DTYPES.values())
# Returns the tensor of a given name.
Fetch = Callable[[str], torch.Tensor]


class CheckpointFormat(ABC):
    """Store quantized layers in one way; each format is one object of a class in a file of its own.

    Attributes
    ----------
    name : str
        What ``checkpoint_format`` calls it.
    method : str
        ``quant_method`` in ``config.json``.
    foreign : bool
        True if software that does not know ptqkit reads it.
    float_parts : tuple of str
        Ends of the names of a layer's tensors, if :func:`ptqkit.load` must replace them by the
        dequantized weight; empty if ``from_pretrained`` reads the format.
    """

    name: str
    method: str
    foreign: ClassVar[bool] = True
    float_parts: ClassVar[tuple[str, ...]] = ()

    def adapt(self, recipe: Recipe) -> Recipe:
        """Return the recipe with what its numbers need to fit the format."""
        return recipe

    def problems(self, spec: LayerSpec) -> list[str]:
        """Return the reasons why the format cannot carry the layer; empty if it can.

        No data is needed, so a description made from a recipe suffices.
        """
        found = []
        if spec.kind not in ("linear", "conv1d"):
            found.append(f"a {spec.kind} module is neither nn.Linear nor Conv1D")
        if spec.weight_dtype not in SCALE_DTYPES:
            found.append(
                f"weights of dtype {spec.weight_dtype} are not supported; convert the model, as in "
                "model.float()"
            )
        if spec.tied:
            found.append("its weight is tied to another module; untie it before quantizing")
        return [f"{spec.name}: {reason}" for reason in found + self._limits(spec)]

    def _limits(self, spec: LayerSpec) -> list[str]:
        """Return the reasons of this format alone, without the layer's name."""
        return []

    def joint_problems(self, specs: Sequence[LayerSpec], linears: Sequence[str]) -> list[str]:
        """Return the reasons why the format cannot carry these layers in one model."""
        return []

    def forecast(self, spec: LayerSpec) -> list[str]:
        """Return the problems that the data will have, as far as a recipe tells them."""
        return [
            f"{spec.name}: {reason}" for reason in self._scale_problems(spec, spec.grid.scale_dtype)
        ]

    def _scale_problems(self, spec: LayerSpec, held: str) -> list[str]:
        stored = self.scale_dtype(spec)
        # float16 holds what bfloat16 does, unless a scale is very small.
        enough = {"float16": ("float16", "bfloat16"), "bfloat16": ("bfloat16",)}
        if stored not in enough or held in enough[stored]:
            return []
        return [
            f"scales are not exactly representable in {stored}; "
            f"quantize with scale_dtype={stored!r}"
        ]

    def data_problems(
        self, spec: LayerSpec, matrix: QuantizedMatrix, quantizer: ActivationQuantizer | None
    ) -> list[str]:
        """Return the reasons that only the numbers can tell."""
        found = []
        if not np.isfinite(matrix.scales).all():
            found.append("scales are not finite")
        if not representable(matrix.scales, self.scale_dtype(spec)):
            found += self._scale_problems(spec, "")
        if matrix.symmetric and not (matrix.zero_points == matrix.grid.middle).all():
            found.append("marked symmetric, but a zero-point is not the middle of the grid")
        return [
            f"{spec.name}: {reason}"
            for reason in found + self._data_limits(spec, matrix, quantizer)
        ]

    def _data_limits(
        self, spec: LayerSpec, matrix: QuantizedMatrix, quantizer: ActivationQuantizer | None
    ) -> list[str]:
        """Return the reasons of this format alone, without the layer's name."""
        return []

    @abstractmethod
    def scale_dtype(self, spec: LayerSpec) -> str:
        """Return the dtype in which the scales of the layer are stored."""

    @abstractmethod
    def config(
        self,
        specs: Sequence[LayerSpec],
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
            Modules whose bias the model class does not create; formats that cannot say so
            leave them out.
        """

    @abstractmethod
    def plans(
        self,
        spec: LayerSpec,
        matrix: QuantizedMatrix,
        quantizer: ActivationQuantizer | None = None,
    ) -> list[TensorPlan]:
        """Return the tensors that replace the weight of one layer; nothing is packed yet."""

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Whether this is the format of a file with this ``quantization_config``."""
        return settings.get("quant_method") == self.method

    @abstractmethod
    def layers(
        self, settings: Mapping[str, Any], tensors: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        """Return what a reader must know of every quantized layer, by module name.

        Parameters
        ----------
        settings : mapping
            ``quantization_config`` of ``config.json``.
        tensors : iterable of str
            Names of all tensors of the checkpoint.

        Raises
        ------
        ValueError
            If the settings are not those of a format this class reads.
        """

    @abstractmethod
    def parts(self, options: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, ...]]:
        """Return the tensors of a layer by the end of the name, with the dtypes each may have.

        Parameters
        ----------
        options : mapping
            What :meth:`layers` says of this layer.
        """

    @abstractmethod
    def read(self, name: str, fetch: Fetch, options: Mapping[str, Any]) -> QuantizedMatrix:
        """Read one layer back.

        Parameters
        ----------
        name : str
        fetch : callable
            Returns the tensor of a given name.
        options : mapping
            What :meth:`layers` says of this layer.
        """


def shared_limits(spec: LayerSpec, format_name: str) -> list[str]:
    """Return the limits that the formats of others have in common."""
    found = []
    if spec.grid.bits == "ternary":
        found.append(f"{format_name} has no ternary type (use 'ptqkit')")
    if spec.kind == "conv1d":
        found.append(f"{format_name} loaders take nn.Linear only, not Conv1D (use 'ptqkit')")
    if spec.grid.group_size is not None and spec.in_features % spec.grid.group_size:
        found.append(f"group_size {spec.grid.group_size} does not divide {spec.in_features} inputs")
    return found


def static_parts(spec: Any) -> dict[str, tuple[torch.dtype, ...]]:
    """Return the tensors of a static grid of inputs as :meth:`CheckpointFormat.parts` does."""
    if spec is None or spec.dynamic:
        return {}
    width = torch.int8 if spec.bits <= 8 else torch.int16
    zero: dict[str, tuple[torch.dtype, ...]] = {"input_zero_point": (width,)}
    return {"input_scale": (torch.float32,)} | ({} if spec.symmetric else zero)


def representable(scales: np.ndarray, dtype: str) -> bool:
    """Whether every float32 scale survives a trip through ``dtype``."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return bool((scales.astype(np.float16).astype(np.float32) == scales).all())
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(scales, dtype=np.float32).view(np.uint32)
        return not (bits & 0xFFFF).any()
    return True


def with_suffix(names: Iterable[str], suffix: str) -> list[str]:
    """Return the modules that have a tensor ``suffix``, from the names of all tensors."""
    return [name.removesuffix(suffix) for name in names if name.endswith(suffix)]


def float_plan(name: str, values: np.ndarray, dtype: str) -> TensorPlan:
    """Plan a tensor of floats from float32 values."""
    target = SCALE_DTYPES[dtype]
    return TensorPlan(
        name, target, values.shape, lambda: torch.from_numpy(np.array(values)).to(target)
    )


def int_plan(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], np.ndarray]
) -> TensorPlan:
    """Plan a tensor of integers that ``make`` returns as an array."""
    return TensorPlan(name, dtype, shape, lambda: torch.from_numpy(make()))


def g_idx_plan(spec: LayerSpec, matrix: QuantizedMatrix) -> TensorPlan:
    """Plan the group of every input, int32 (in,)."""
    g_idx = matrix.g_idx
    return int_plan(f"{spec.name}.g_idx", torch.int32, g_idx.shape, lambda: g_idx.astype(np.int32))


def input_plans(
    spec: LayerSpec, quantizer: ActivationQuantizer | None, dtype: str
) -> list[TensorPlan]:
    """Plan the static grid of the inputs, under the names that every format with one uses."""
    if quantizer is None or quantizer.scale is None:
        return []
    scale = quantizer.scale.detach().cpu().to(SCALE_DTYPES[dtype])
    plans = [TensorPlan.of(f"{spec.name}.input_scale", scale)]
    if quantizer.zero_point is not None:
        zero = quantizer.zero_point.detach().cpu()
        plans.append(TensorPlan.of(f"{spec.name}.input_zero_point", zero))
    return plans


def middle_zeros(bits: int | str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the zero-points of a symmetric grid, which no file stores."""
    return np.full(shape, WeightGrid(bits, None).middle, dtype=np.uint8)


def build_matrix(
    codes: np.ndarray,
    scales: torch.Tensor,
    zeros: np.ndarray,
    g_idx: np.ndarray | None,
    options: Mapping[str, Any],
) -> QuantizedMatrix:
    """Put what was read together; without ``g_idx`` groups are runs of consecutive inputs.

    Raises
    ------
    ValueError
        If the shapes do not belong together, or a group is out of range.
    """
    (out, inputs), group_size = codes.shape, options["group_size"]
    groups = 1 if group_size is None else -(-inputs // group_size)
    if scales.shape != (out, groups) or zeros.shape != (out, groups):
        raise ValueError(
            f"scales {tuple(scales.shape)} and zero-points {zeros.shape} must have shape "
            f"{(out, groups)} for codes of shape {codes.shape}: the files are damaged"
        )
    if g_idx is None:
        g_idx = np.arange(inputs) // (group_size or max(inputs, 1))
    elif g_idx.shape != (inputs,) or (inputs and not 0 <= g_idx.min() <= g_idx.max() < groups):
        raise ValueError(f"g_idx must be {inputs} numbers in [0, {groups}): the files are damaged")
    return QuantizedMatrix(
        codes=codes,
        scales=np.ascontiguousarray(scales.to(torch.float32).numpy()),
        zero_points=zeros,
        g_idx=g_idx.astype(np.int32),
        grid=WeightGrid(
            options["bits"],
            group_size,
            options["symmetric"],
            options.get("per_tensor", False),
            str(scales.dtype).removeprefix("torch."),
        ),
    )
