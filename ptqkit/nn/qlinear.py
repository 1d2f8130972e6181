"""Stand in for a quantized linear layer: packed codes, and a weight on demand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ptqkit.arrays.matrix import QuantizedMatrix, WeightGrid
from ptqkit.arrays.packing import TRITS_PER_BYTE, native_row_bytes
from ptqkit.nn.activations import ActivationQuantizer, quantize_input
from ptqkit.recipe.options import ActivationQuantization

__all__ = ["QLinear", "unpack_codes"]

_GRIDS = ("scales", "input_scale")
SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _unpack_trits(packed: torch.Tensor, columns: int) -> torch.Tensor:
    digits = packed.new_empty((*packed.shape, TRITS_PER_BYTE))
    rest = packed
    for place in range(TRITS_PER_BYTE):
        digits[..., place] = rest % 3
        rest = torch.div(rest, 3, rounding_mode="floor")
    return digits.flatten(-2)[..., :columns]


def unpack_codes(packed: torch.Tensor, bits: int | str, columns: int) -> torch.Tensor:
    """Unpack rows of ptqkit's own format on the tensor's device.

    Parameters
    ----------
    packed : uint8 tensor, shape (rows, native_row_bytes(columns, bits))

    Returns
    -------
    uint8 tensor, shape (rows, columns)
    """
    if bits == "ternary":
        return _unpack_trits(packed, columns)
    bits = int(bits)
    blocks = packed.view(packed.shape[0], -1, bits)
    codes = packed.new_empty((packed.shape[0], blocks.shape[1], 8))
    # Eight codes fill exactly `bits` bytes, so code k starts at the same place in every block.
    for k in range(8):
        byte, shift = divmod(k * bits, 8)
        value = blocks[..., byte] >> shift
        if shift + bits > 8:
            value = value | (blocks[..., byte + 1] << (8 - shift))
        codes[..., k] = value & ((1 << bits) - 1)
    return codes.flatten(-2)[:, :columns]


class QLinear(nn.Module):
    """Compute a linear layer whose weight is kept as packed codes.

    The weight is dequantized in float32, rounded to :attr:`dtype` and used by the same operation
    as the layer it replaces (``F.linear``, or ``addmm`` for GPT-2's ``Conv1D``), so the output
    equals that of the fake-quantized float layer.

    Parameters
    ----------
    in_features, out_features : int
    bits : int or "ternary"
    group_size : int or None
        None: one scale per output channel.
    symmetric : bool
        True: no zero-points are stored, the zero is the middle of the grid.
    permuted : bool
        True: a ``g_idx`` buffer says which group an input belongs to.
    bias : bool
    kind : {"linear", "conv1d"}
    dtype : torch.dtype
        Type of the dequantized weight and of the bias. Follows ``module.to(dtype)``; the codes
        and the scales do not.
    scale_dtype : {"float32", "float16", "bfloat16"}
    per_tensor : bool
        All scales are one.
    activations : ActivationQuantization or None
        Quantize every input so before it is used.

    Attributes
    ----------
    weight : tensor, shape and dtype as in the float layer
        Dequantized anew whenever it is read (once if ``cache``), because model code reads it (T5)
        and initializes it (RWKV); writing into it changes nothing. The buffer of this name, which
        ``state_dict`` holds, are the packed codes, uint8 and one-dimensional, row after row.
        One-dimensional on purpose: software that does not know this format then stops with a size
        mismatch instead of taking codes for weights. On the meta device the codes are all there is.
    scales : float buffer, shape (out, groups)
    zero_points : uint8 buffer, one-dimensional, absent for symmetric grids
    g_idx : int32 buffer, shape (in,), absent unless ``permuted``
    input_scale : float32 buffer, shape (1,), absent unless the inputs have a static grid
    input_zero_point : int8 or int16 buffer, shape (1,), absent unless that grid is asymmetric
    bias : Parameter or None
    cache : bool
        Keep the dequantized weight after the first forward: faster, and as large as the float
        layer. False as built.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int | str,
        group_size: int | None,
        symmetric: bool,
        permuted: bool = False,
        bias: bool = True,
        kind: str = "linear",
        dtype: torch.dtype = torch.float32,
        scale_dtype: str = "float32",
        per_tensor: bool = False,
        activations: ActivationQuantization | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.kind, self.dtype = kind, dtype
        self.per_tensor, self.activations = per_tensor, activations
        self.groups = 1 if group_size is None else -(-in_features // group_size)
        self._scale_dtype = SCALE_DTYPES[scale_dtype]
        self.cache = False
        self._cached: torch.Tensor | None = None
        self._register_codes(permuted)
        self._register_input_grid()
        value = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False)
        self.register_parameter("bias", value if bias else None)

    def _register_codes(self, permuted: bool) -> None:
        out, groups = self.out_features, self.groups
        size = out * native_row_bytes(self.in_features, self.bits)
        self.register_buffer("weight", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("scales", torch.ones(out, groups, dtype=self._scale_dtype))
        zeros = None
        if not self.symmetric:
            size = out * native_row_bytes(groups, self.bits)
            zeros = torch.zeros(size, dtype=torch.uint8)
        self.register_buffer("zero_points", zeros)
        self._register_order(permuted)

    def _register_order(self, permuted: bool) -> None:
        g_idx = torch.zeros(self.in_features, dtype=torch.int32) if permuted else None
        self.register_buffer("g_idx", g_idx)

    def _register_input_grid(self) -> None:
        scale = zero_point = None
        if self.activations is not None and not self.activations.dynamic:
            scale = torch.ones(1, dtype=torch.float32)
            if not self.activations.symmetric:
                width = torch.int8 if self.activations.bits <= 8 else torch.int16
                zero_point = torch.zeros(1, dtype=width)
        self.register_buffer("input_scale", scale)
        self.register_buffer("input_zero_point", zero_point)

    @property
    def _packed(self) -> torch.Tensor:
        packed = self._buffers.get("weight")
        if packed is None:  # An AttributeError, as a module raises for what it does not have.
            raise AttributeError("weight")
        return packed

    @property
    def weight(self) -> torch.Tensor:
        """The weight as model code expects it, marked as initialized for transformers."""
        if self._packed.is_meta:
            return self._packed
        weight = self._operand()
        weight._is_hf_initialized = True
        return weight

    def input_quantizer(self) -> ActivationQuantizer | None:
        """Return what quantizes the inputs, or None.

        Raises
        ------
        ValueError
            If the static grid is not one: a scale that is not positive and finite.
        """
        if self.activations is None:
            return None
        zero_point = None if self.input_zero_point is None else self.input_zero_point.item()
        return ActivationQuantizer(self.activations, self.input_scale, zero_point)

    def check(self) -> None:
        """Raise ValueError if a loaded tensor cannot be what was saved; the message names it."""
        scales = self.scales
        if scales.dtype != self._scale_dtype:
            raise ValueError(f"scales must be {self._scale_dtype}, not {scales.dtype}")
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise ValueError("scales must be positive and finite")
        g_idx = self.g_idx
        if g_idx is not None and not bool(((g_idx >= 0) & (g_idx < self.groups)).all()):
            raise ValueError(f"g_idx must lie in [0, {self.groups})")
        self.input_quantizer()

    def _apply(self, fn: Any, recurse: bool = True) -> QLinear:
        self._cached = None
        # The weight exists only as codes, so an empty one shows what dtype it would be given.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self._packed.device)).dtype
        grids = {n: b for n in _GRIDS if (b := getattr(self, n)) is not None}
        # Scales change device with the module but never dtype: hidden from the cast as integers.
        for name, grid in grids.items():
            width = torch.int32 if grid.element_size() == 4 else torch.int16
            setattr(self, name, grid.view(width))
        try:
            super()._apply(fn, recurse)
        finally:
            for name, grid in grids.items():
                setattr(self, name, getattr(self, name).view(grid.dtype))
        return self

    def codes(self) -> torch.Tensor:
        """Return the unpacked codes, uint8 (out, in), original column order."""
        packed = self._packed.view(self.out_features, -1)
        return unpack_codes(packed, self.bits, self.in_features)

    def zeros(self) -> torch.Tensor:
        """Return the zero-points, uint8 (out, groups)."""
        if self.zero_points is None:
            middle = 1 if self.bits == "ternary" else 1 << (int(self.bits) - 1)
            shape = (self.out_features, self.groups)
            return torch.full(shape, middle, dtype=torch.uint8, device=self._packed.device)
        packed = self.zero_points.view(self.out_features, -1)
        return unpack_codes(packed, self.bits, self.groups)

    def grids(self) -> torch.Tensor:
        """Return the scales, (out, groups)."""
        return self.scales

    def read(self) -> QuantizedMatrix:
        """Return codes and grids as arrays, copies."""
        g_idx = self.g_idx
        if g_idx is None:
            g_idx = torch.arange(self.in_features, dtype=torch.int32)
            g_idx = g_idx.div(self.group_size or self.in_features, rounding_mode="floor")
        scales = self.grids()
        return QuantizedMatrix(
            self.codes().cpu().numpy(),
            scales.to("cpu", torch.float32).contiguous().numpy(),
            self.zeros().cpu().numpy(),
            g_idx.cpu().to(torch.int32).numpy().copy(),
            WeightGrid(
                self.bits,
                self.group_size,
                self.symmetric,
                self.per_tensor,
                str(scales.dtype).removeprefix("torch."),
            ),
        )

    def dequantize(self) -> torch.Tensor:
        """Return ``scale * (code - zero_point)``, (out, in), rounded once to ``dtype``."""
        steps = self.codes().to(torch.float32)
        zeros, scales = self.zeros().to(torch.float32), self.grids().to(torch.float32)
        if self.g_idx is None and steps.shape[1] % self.groups == 0:
            shape = (self.out_features, self.groups, -1)
            steps.view(shape).sub_(zeros[..., None]).mul_(scales[..., None])
        else:
            group = self.g_idx
            if group is None:
                columns = torch.arange(self.in_features, dtype=torch.long, device=steps.device)
                group = columns // self.group_size
            steps.sub_(zeros[:, group.long()]).mul_(scales[:, group.long()])
        return steps.to(self.dtype)

    def _operand(self) -> torch.Tensor:
        if self._cached is not None:
            return self._cached
        weight = self.dequantize()
        if self.kind == "conv1d":
            weight = weight.t().contiguous()
        if self.cache:
            self._cached = weight
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T + bias`` for ``x`` of shape (..., in)."""
        weight = self._operand()
        if self.activations is not None:
            x = quantize_input(x, self.activations, self.input_scale, self.input_zero_point)
        if self.kind != "conv1d":
            return F.linear(x, weight, self.bias)
        flat = x.reshape(-1, self.in_features)
        y = flat @ weight if self.bias is None else torch.addmm(self.bias, flat, weight)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return shape and grid, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}, "
            f"g_idx={self.g_idx is not None}, bias={self.bias is not None}, kind={self.kind}"
            + ("" if self.activations is None else f", {self.activations}")
        )
