"""Run a quantized linear layer on the CPU from the codes, packed as they lie in memory."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import numpy as np
import torch

from ptqkit.arrays.activations import QuantizedActivations
from ptqkit.arrays.decoder import MOST_SIMULATED_INPUTS, simulated_layer
from ptqkit.arrays.matmul import LONGEST_SUM, int8_linear, int8_matmul
from ptqkit.arrays.packed import PackedMatrix
from ptqkit.arrays.packing import native_pack
from ptqkit.errors import check_choice
from ptqkit.nn.activations import input_codes, quantize_input
from ptqkit.nn.panels import (
    even_groups,
    pack_panels,
    panel_shapes,
    unpack_grid,
    unpack_panels,
)
from ptqkit.nn.qlinear import QLinear
from ptqkit.recipe.options import ActivationQuantization

__all__ = ["COMPUTE", "PackedLinear", "bits_of"]

#: Ways to compute; see :class:`PackedLinear`.
COMPUTE = ("auto", "packed", "int8", "dequantize")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a CPU tensor as an array over its memory; bfloat16, which NumPy lacks, as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


class PackedLinear(QLinear):
    """Compute a linear layer from codes that stay packed, on the CPU and without gradients.

    The arguments are those of :class:`QLinear`, and further:

    Parameters
    ----------
    compute : {"auto", "packed", "int8", "dequantize"}
        How a forward is computed. "packed": codes times float inputs, float32 sums over exact
        products of the codes, the weight not rounded to :attr:`dtype`. The error of an output is at
        most ``2 (in + 8) 2**-24 sum_g 2**bits |scale_g| sum |x|`` before the result is rounded to
        the dtype of the inputs. If the inputs are quantized to at most 8 bits, without outlier
        columns, and the weight has 8 bits and one grid per output, the product is one of integers:
        the very codes of the simulation and an exact sum.
        "int8": as "packed", but float inputs are rounded to 8 bits too, each token and group of
        inputs on a symmetric grid of its own: an input is wrong by at most 1/254 of the largest
        magnitude in its group.
        "dequantize": as :class:`QLinear` does it, with gradients for the inputs.
        "auto": "packed" where that is possible and "dequantize" elsewhere (gradients, GPUs,
        float64), which a warning says once.
    stored : {"panels", "rows"}
        Layout in which ``state_dict`` holds the tensors: that of memory, or that of
        :class:`QLinear`.

    Attributes
    ----------
    weight : int32 buffer in ``state_dict``, one-dimensional
        The words of :class:`ptqkit.PackedMatrix`, which may be mapped from a file.
    scales : float buffer, shape (panels, groups, 16)
    zero_points : uint8 buffer, shape (panels, groups, 16)
    """

    def __init__(
        self, *args: Any, compute: str = "auto", stored: str = "panels", **kwargs: Any
    ) -> None:
        check_choice("compute", compute, COMPUTE)
        super().__init__(*args, **kwargs)
        self.compute, self.stored = compute, stored
        self._matrix: PackedMatrix | None = None
        self._integers: tuple[Any, ...] | None = None
        self._viewed: tuple[Any, ...] = ()
        self._warned: set[str] = set()

    @classmethod
    def of(cls, layer: QLinear, compute: str = "auto") -> PackedLinear:
        """Pack a layer; the result is saved as the layer would be."""
        matrix = layer.read()
        with torch.device("meta"):
            packed = cls(
                layer.in_features,
                layer.out_features,
                bits=layer.bits,
                group_size=layer.group_size,
                symmetric=layer.symmetric,
                permuted=layer.g_idx is not None,
                bias=layer.bias is not None,
                kind=layer.kind,
                dtype=layer.dtype,
                scale_dtype=matrix.scale_dtype,
                per_tensor=layer.per_tensor,
                activations=layer.activations,
                compute=compute,
                stored="rows",
            )
        words, packed.scales, packed.zero_points = pack_panels(matrix)
        packed._buffers["weight"] = words.view(-1)
        packed.g_idx, packed.bias = layer.g_idx, layer.bias
        packed.input_scale = layer.input_scale
        packed.input_zero_point = layer.input_zero_point
        return packed.train(layer.training)

    def _register_codes(self, permuted: bool) -> None:
        shape = (self.out_features, self.in_features)
        words, grids = panel_shapes(shape, self.bits, self.group_size)
        size = words[0] * words[1] * words[2]
        self.register_buffer("weight", torch.zeros(size, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(grids, dtype=self._scale_dtype))
        self.register_buffer("zero_points", torch.zeros(grids, dtype=torch.uint8))
        self._register_order(permuted)

    def _groups_of_inputs(self) -> np.ndarray:
        if self.g_idx is not None:
            return self.g_idx.cpu().numpy()
        size = self.group_size or self.in_features
        return (np.arange(self.in_features) // size).astype(np.int32)

    def _words(self) -> torch.Tensor:
        panels, _, lanes = self.scales.shape
        return self._packed.view(panels, -1, lanes)

    def matrix(self) -> PackedMatrix:
        """Return the weight as the kernels take it: views of the module's own memory.

        Raises
        ------
        ValueError
            If the tensors do not belong together.
        """
        held = self._buffers  # Not by attribute: this is asked for at every token.
        now = (held["weight"], held["scales"], held["zero_points"], held["g_idx"])
        if self._matrix is None or any(map(operator.is_not, now, self._viewed)):
            scales = self.scales
            if scales.dtype == torch.bfloat16:  # NumPy has none: its bits
                grid = scales.view(torch.int16).numpy().view(np.uint16)
            else:
                grid = scales.numpy()
            self._matrix = PackedMatrix(
                self._words().numpy().view(np.uint32),
                grid,
                self.zero_points.numpy(),
                bits=self.bits,
                shape=(self.out_features, self.in_features),
                g_idx=self._groups_of_inputs(),
            )
            self._viewed = now
        return self._matrix

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the module has memory of its own, which its matrix must view.
        return {**self.__dict__, "_matrix": None, "_viewed": (), "_integers": None}

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        self._matrix, self._viewed = None, ()
        super()._apply(fn, recurse)
        return self

    def check(self) -> None:
        """Raise ValueError if a loaded tensor cannot be what was saved; the message names it."""
        super().check()
        groups = self._groups_of_inputs()
        if self.stored == "panels" and not even_groups(groups, self.group_size):
            raise ValueError("g_idx must hold each group group_size times")
        if self._packed.device.type == "cpu":
            self.matrix()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._matrix, self._viewed = None, ()
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stored == "panels" or self._packed.is_meta:
            return
        matrix = self.read()
        rows = {"weight": native_pack(matrix.codes, self.bits).reshape(-1)}
        if self.symmetric:
            del destination[f"{prefix}zero_points"]
        else:
            rows["zero_points"] = native_pack(matrix.zero_points, self.bits).reshape(-1)
        for name, values in rows.items():
            destination[prefix + name] = torch.from_numpy(values)
        destination[f"{prefix}scales"] = self.grids().contiguous()

    def codes(self) -> torch.Tensor:
        """Return the unpacked codes, uint8 (out, in), original column order."""
        if self._packed.device.type == "cpu":
            return torch.from_numpy(self.matrix().unpack()[0])
        return unpack_panels(
            self._words(),
            (self.out_features, self.in_features),
            self.bits,
            self._groups_of_inputs(),
            self.groups,
        )

    def zeros(self) -> torch.Tensor:
        """Return the zero-points, uint8 (out, groups)."""
        return unpack_grid(self.zero_points, self.out_features)

    def grids(self) -> torch.Tensor:
        """Return the scales, (out, groups)."""
        return unpack_grid(self.scales, self.out_features)

    def integers(self) -> bool:
        """Whether quantized inputs are multiplied as integers."""
        spec = self.activations
        return (
            spec is not None
            and spec.bits <= 8
            and spec.outlier_threshold is None
            and self.groups == 1
            and self.bits == 8
            and self.in_features <= LONGEST_SUM
        )

    def describe(self) -> str:
        """Say in a few words how forwards are computed."""
        if self.compute == "dequantize":
            return "dequantized"
        if self.integers():
            return "int8 inputs as simulated"
        if self.activations is not None:
            return "packed, simulated inputs"
        return "packed, int8 inputs" if self.compute == "int8" else "packed"

    def _obstacle(self, x: torch.Tensor) -> str:
        """Say what keeps the kernels from this input; empty if nothing does."""
        if not x.is_cpu or not self._buffers["scales"].is_cpu:
            return f"packed layers run on the CPU, the inputs are on {x.device}"
        if x.dtype not in _DTYPES:
            return f"packed layers take {', '.join(_DTYPES.values())} inputs, not {x.dtype}"
        bias = self._parameters["bias"]
        asked = x.requires_grad or (bias is not None and bias.requires_grad)
        if asked and torch.is_grad_enabled():
            return "packed layers have no gradient: run them under torch.no_grad()"
        return ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T + bias`` for ``x`` of shape (..., in).

        Raises
        ------
        RuntimeError
            If ``compute`` is "packed" or "int8" and that is not possible: a gradient is asked for,
            the module is not on the CPU, or the inputs have another dtype.
        """
        if self.compute == "dequantize":
            return super().forward(x)
        obstacle = self._obstacle(x)
        if not obstacle:
            return self._uncompiled(x) if torch.compiler.is_compiling() else self._product(x)
        if self.compute != "auto":
            raise RuntimeError(f"{obstacle}, or set compute='dequantize'")
        if obstacle not in self._warned:
            self._warned.add(obstacle)
            warnings.warn(f"{obstacle}; they are dequantized instead", stacklevel=2)
        return super().forward(x)

    @torch.compiler.disable
    def _uncompiled(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], self.out_features)
        if not x.numel():
            return x.new_empty(shape)
        if self.activations is not None and self.integers():
            flat = x.reshape(-1, self.in_features)
            y = self._integer_product(flat, self.activations).view(shape)
        else:
            y = self._float_product(x, shape)
        bias = self._parameters["bias"]
        if bias is not None:
            y += bias
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def _float_product(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        # For one token each call of torch costs as much as a small product: NumPy's are cheaper.
        activations = "int8" if self.compute == "int8" else "float"
        if self.activations is not None:
            x = x.reshape(-1, self.in_features)
            x = quantize_input(x, self.activations, self.input_scale, self.input_zero_point)
            activations = "float"
        x = x.contiguous()
        if x.requires_grad:  # under no_grad, which is nothing to NumPy
            x = x.detach()
        dtype = _DTYPES[x.dtype]
        values = bits_of(x)
        y = np.empty((values.size // self.in_features, self.out_features), np.float32)
        self.matrix().multiply_rows(values.reshape(-1, self.in_features), y, dtype, activations)
        return torch.from_numpy(y.reshape(shape))

    def _integer_product(self, x: torch.Tensor, spec: ActivationQuantization) -> torch.Tensor:
        symmetric, scale, zero = bool(spec.symmetric), self.input_scale, self.input_zero_point
        if x.dtype != torch.float16:
            # The simulation's arithmetic is that of its inputs.
            return self._packed_integers(x.contiguous(), **self._input_grid(spec, x.dtype))
        # The simulation makes codes in float16: a grid of step 1 finds them again, and the step is
        # multiplied by afterwards.
        codes, scales, zeros = input_codes(x, spec, scale, zero)
        if not bool(scales.isfinite().all() & x.isfinite().all()):
            raise ValueError("x holds NaN or Inf")
        if zeros is not None and zeros.numel() > 1:
            inputs = QuantizedActivations(
                codes.numpy(),
                scales.float().numpy(),
                zeros.to(torch.int8).numpy(),
                spec.bits,
                spec.granularity,
                symmetric,
            )
            return torch.from_numpy(int8_matmul(inputs, self.read()))
        steps = codes.float() if zeros is None else codes.float() - zeros.float()
        y = self._packed_integers(
            steps,
            symmetric=zeros is None,
            scale=1.0,
            zero_point=0 if zeros is None else int(zeros),
        )
        return y.mul_(scales.float())

    def _input_grid(self, spec: ActivationQuantization, dtype: torch.dtype) -> dict[str, Any]:
        """Return the grid of inputs of a dtype as the kernels take it."""
        scale, zero = self.input_scale, self.input_zero_point
        return {
            "bits": spec.bits,
            "symmetric": bool(spec.symmetric),
            "scale": None if scale is None else float(scale.to(dtype)),
            "zero_point": 0 if zero is None else int(zero),
            "arithmetic": "bfloat16" if dtype == torch.bfloat16 else "float32",
        }

    def _packed_integers(self, x: torch.Tensor, **grid: Any) -> torch.Tensor:
        """Multiply inputs that are rounded to this grid on the way."""
        matrix, scales, zeros, sums = self._integer_weights()
        y = int8_linear(
            x.numpy() if x.dtype == torch.float32 else x,
            matrix.words,
            scales,
            zeros,
            sums=sums,
            outputs=self.out_features,
            **grid,
        )
        return torch.from_numpy(y)

    def _integer_weights(self) -> tuple[Any, ...]:
        """Return the matrix, and scales, zero-points and sums of the codes of its outputs."""
        matrix = self.matrix()
        if self._integers is None or self._integers[0] is not matrix:
            codes, scales, zeros, _ = matrix.unpack()
            sums = codes.sum(axis=1, dtype=np.int64) - 128 * self.in_features
            column = (np.ascontiguousarray(scales[:, 0]), zeros[:, 0].astype(np.float32))
            self._integers = (matrix, *column, sums.astype(np.int32))
        return self._integers

    def takes_one_token(self, dtype: torch.dtype) -> bool:
        """Whether :meth:`one_token_layer` returns a layer for inputs of this dtype."""
        bias, spec = self._parameters["bias"], self.activations
        if self.compute == "dequantize" or not self._buffers["scales"].is_cpu:
            return False
        if bias is not None and (bias.dtype != dtype or not bias.is_cpu):
            return False
        simulated = spec is None or (self.integers() and self.in_features <= MOST_SIMULATED_INPUTS)
        return simulated and dtype in (torch.float32, torch.bfloat16)

    def one_token_layer(self, dtype: torch.dtype) -> tuple[Any, ...] | None:
        """Return the layer as :mod:`ptqkit.arrays.decoder` takes it, with inputs of ``dtype``.

        None if it cannot be one, as it is not packed, has simulated inputs that are no integers,
        or a bias of another dtype.
        """
        if not self.takes_one_token(dtype):
            return None
        bias, spec = self._parameters["bias"], self.activations
        added = None if bias is None else bits_of(bias.detach())
        if spec is None:
            return self.matrix().layer("int8" if self.compute == "int8" else "float", added)
        matrix, scales, zeros, sums = self._integer_weights()
        grid = self._input_grid(spec, dtype)
        return simulated_layer(matrix.words, scales, zeros, sums, **grid, bias=added)
