"""Packed linear layers: exact against the arrays, close to the float layer, and careful."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from ptqkit.arrays.activations import QuantizedActivations
from ptqkit.arrays.matmul import int8_matmul
from ptqkit.arrays.matrix import QuantizedMatrix, WeightGrid
from ptqkit.arrays.packing import native_pack
from ptqkit.nn.activation_grids import dynamic_grid
from ptqkit.nn.activations import ActivationQuantizer, quantize_input
from ptqkit.nn.packed_linear import COMPUTE, PackedLinear
from ptqkit.nn.panels import panel_shapes, unpack_panels
from ptqkit.nn.qlinear import QLinear
from ptqkit.recipe.options import ActivationQuantization

BITS = [2, 3, 4, 8, "ternary"]
SHAPES = [((37, 96), 32), ((16, 70), 24), ((5, 64), None), ((1, 33), 16), ((48, 128), 128)]


def case(
    bits, shape, group_size, *, permuted=False, symmetric=False, scale_dtype="float32", seed=0
):
    rng = np.random.default_rng(seed)
    out, inputs = shape
    top = 3 if bits == "ternary" else 1 << bits
    groups = -(-inputs // (group_size or inputs))
    g_idx = (np.arange(inputs) // (group_size or inputs)).astype(np.int32)
    scales = torch.from_numpy(rng.uniform(0.01, 0.1, (out, groups)).astype(np.float32))
    grid = WeightGrid(bits, group_size, symmetric, scale_dtype=scale_dtype)
    zeros = rng.integers(0, top, (out, groups), dtype=np.uint8)
    return QuantizedMatrix(
        rng.integers(0, top, shape, dtype=np.uint8),
        scales.to(getattr(torch, scale_dtype)).float().numpy(),
        np.full_like(zeros, grid.middle) if symmetric else zeros,
        rng.permutation(g_idx) if permuted else g_idx,
        grid,
    )


def rows(q, *, bias=None, activations=None, quantizer=None, **kwargs):
    """The layer that the file formats of versions 1 and 2 give."""
    permuted = q.permuted_groups
    module = QLinear(
        *q.shape[::-1],
        bits=q.bits,
        group_size=q.group_size,
        symmetric=q.symmetric,
        permuted=permuted,
        bias=bias is not None,
        scale_dtype=q.scale_dtype,
        activations=activations,
        **kwargs,
    )
    module.state_dict()["weight"].copy_(torch.from_numpy(native_pack(q.codes, q.bits).reshape(-1)))
    if not q.symmetric:
        zeros = native_pack(q.zero_points, q.bits).reshape(-1)
        module.zero_points.copy_(torch.from_numpy(zeros))
    module.scales.copy_(torch.from_numpy(q.scales))
    if permuted:
        module.g_idx.copy_(torch.from_numpy(q.g_idx))
    if bias is not None:
        module.bias.data.copy_(bias)
    if quantizer is not None and quantizer.scale is not None:
        module.input_scale.copy_(quantizer.scale)
        if quantizer.zero_point is not None:
            module.input_zero_point.copy_(quantizer.zero_point)
    return module.eval()


def inputs_of(q, tokens=7, dtype=torch.float32, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, q.shape[1], generator=rng).to(dtype)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_holds_the_same_weight_and_computes_within_the_bound(bits, shape, size, permuted):
    q = case(bits, shape, size, permuted=permuted)
    bias = torch.linspace(-1, 1, shape[0])
    layer = rows(q, bias=bias)
    packed = PackedLinear.of(layer, "packed")
    assert packed.state_dict().keys() == layer.state_dict().keys()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(packed.state_dict()[name], tensor), name
    for field in ("codes", "scales", "zero_points", "g_idx"):
        np.testing.assert_array_equal(getattr(packed.read(), field), getattr(q, field))
    assert torch.equal(packed.dequantize(), layer.dequantize())
    x = inputs_of(q)
    exact = x.double().numpy() @ q.dequantize(np.float64).T + bias.double().numpy()
    steps = 4 if bits == "ternary" else 1 << bits
    per_group = np.zeros((*x.shape[:-1], q.scales.shape[1]))
    for group in range(q.scales.shape[1]):
        per_group[..., group] = np.abs(x.double().numpy())[..., q.g_idx == group].sum(-1)
    places = panel_shapes(shape, bits, size)[0][1] * 16
    bound = 2 * (places + 8) * 2.0**-24 * steps * (per_group @ np.abs(q.scales.T)) + 1e-6
    assert (np.abs(packed(x).double().numpy() - exact) <= bound).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("permuted", [False, True])
def test_other_devices_unpack_the_same_codes(bits, permuted):
    for shape, size in SHAPES:
        q = case(bits, shape, size, permuted=permuted)
        packed = PackedLinear.of(rows(q))
        found = unpack_panels(packed._words(), shape, bits, q.g_idx, packed.groups)
        np.testing.assert_array_equal(found.numpy(), q.codes)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtypes_of_inputs_and_scales(dtype, scale_dtype):
    q = case(4, (37, 96), 32, scale_dtype=scale_dtype)
    layer = rows(q, bias=torch.ones(37))
    packed = PackedLinear.of(layer, "packed").to(dtype)
    assert packed.scales.dtype == getattr(torch, scale_dtype)
    x = inputs_of(q, dtype=dtype)
    y = packed(x)
    assert y.dtype == dtype and y.shape == (2, 7, 37)
    exact = x.double() @ torch.from_numpy(q.dequantize(np.float64)).T + 1
    # One rounding of the result to its dtype, next to which the float32 sums are exact.
    unit = torch.finfo(dtype).eps / 2
    assert ((y.double() - exact).abs() <= 1.01 * unit * exact.abs() + 1e-5).all()


@torch.no_grad()
def test_conv1d_and_empty_and_single_tokens():
    q = case(4, (48, 128), 128)
    layer = rows(q, bias=torch.ones(48), kind="conv1d")
    packed = PackedLinear.of(layer, "packed")
    assert packed.weight.shape == (128, 48) and torch.equal(packed.weight, layer.weight)
    x = inputs_of(q)
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
    # one token takes another path than many: the same but for rounding
    torch.testing.assert_close(packed(x[0, 0]), packed(x)[0, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(packed(x.transpose(0, 1)), packed(x).transpose(0, 1))
    assert packed(x[:, :0]).shape == (2, 0, 48)


def test_inputs_and_weights_are_not_copied(monkeypatch):
    q = case(4, (48, 128), 128)
    packed = PackedLinear.of(rows(q), "packed")
    x, seen = inputs_of(q), []
    real = type(packed.matrix()).multiply_rows

    def spy(self, values, *rest):
        seen.append(values.__array_interface__["data"][0])
        return real(self, values, *rest)

    monkeypatch.setattr(type(packed.matrix()), "multiply_rows", spy)
    packed(x)
    half = x.bfloat16()
    packed(half)
    assert seen == [x.data_ptr(), half.data_ptr()]
    assert packed.matrix().words.__array_interface__["data"][0] == packed._packed.data_ptr()
    assert packed.matrix().scales.__array_interface__["data"][0] == packed.scales.data_ptr()


def test_gradients_are_refused_or_dequantized():
    q = case(4, (48, 128), 128)
    layer = rows(q)
    x = inputs_of(q).requires_grad_()
    for compute in ("packed", "int8"):
        with pytest.raises(RuntimeError, match=r"no gradient: run them under torch.no_grad\(\)"):
            PackedLinear.of(layer, compute)(x)
    packed = PackedLinear.of(layer, "auto")
    with pytest.warns(UserWarning, match="no gradient.*dequantized instead"):
        packed(x).sum().backward()
    torch.testing.assert_close(x.grad[0, 0], layer.dequantize().sum(0))
    packed(x)  # warned once
    exact = PackedLinear.of(layer, "dequantize")
    assert torch.equal(exact(x), layer(x))
    with torch.no_grad(), pytest.raises(RuntimeError, match="float32, bfloat16, float16 inputs"):
        PackedLinear.of(layer, "packed")(x.double())
    with pytest.raises(RuntimeError, match="run on the CPU, the inputs are on meta"):
        PackedLinear.of(layer, "packed")(x.to("meta"))
    assert "auto" in COMPUTE
    with pytest.raises(ValueError, match="compute"):
        PackedLinear.of(layer, "fast")


@torch.no_grad()
def test_copies_and_pickles_have_memory_of_their_own():
    q = case(3, (37, 96), 32, permuted=True)
    packed = PackedLinear.of(rows(q), "packed")
    x = inputs_of(q)
    y = packed(x)
    file = io.BytesIO()
    pickle.dump(packed, file)
    file.seek(0)
    for twin in (copy.deepcopy(packed), pickle.load(file)):
        assert torch.equal(twin(x), y)
        assert twin.matrix().words.__array_interface__["data"][0] == twin._packed.data_ptr()
        twin.scales.zero_()
        assert torch.equal(twin(x), torch.zeros_like(y)) and torch.equal(packed(x), y)


SPECS = {
    "token": ActivationQuantization(8),
    "token asym": ActivationQuantization(8, symmetric=False),
    "tensor": ActivationQuantization(8, "tensor"),
    "tensor sym": ActivationQuantization(8, "tensor", True),
    "tensor 6 bit": ActivationQuantization(6, "tensor"),
    "token 4 bit": ActivationQuantization(4),
}


class _Ranges:
    tokens = 1

    def __init__(self, x):
        self.minimum, self.maximum = x.float().numpy(), x.float().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_integers_are_those_of_the_simulation(name, symmetric, dtype):
    spec, q = SPECS[name], case(8, (37, 96), None, symmetric=symmetric)
    x = inputs_of(q, dtype=dtype)
    x[0, 0], x[0, 1, 0], x[0, 2] = 0, 40.0, x[0, 2].abs()  # all zeros, an outlier, one sign
    quantizer = ActivationQuantizer.calibrate(spec, _Ranges(x), dtype)
    layer = rows(q, bias=torch.ones(37), activations=spec, quantizer=quantizer).to(dtype)
    packed = PackedLinear.of(layer, "packed")
    assert packed.integers() and packed.describe() == "int8 inputs as simulated"

    # What the simulation multiplies is scale * (code - zero): the integers can be read off.
    simulated = quantize_input(x, spec, quantizer.scale, quantizer.zero_point)
    if spec.dynamic:
        scale, zero = dynamic_grid(x, spec.bits, spec.symmetric)
    else:
        scale, zero = quantizer.scale.to(dtype), quantizer.zero_point
    steps = simulated.double() / scale.double()
    whole = steps.round()
    assert ((steps - whole).abs() < 0.01 + 2.0**-8 * whole.abs()).all()
    if dtype == torch.bfloat16:  # x_hat is rounded there: take the code nearest to what was rounded
        moved = x / scale + (0 if zero is None else zero.to(dtype))
        half = 1 << (spec.bits - 1)
        whole = moved.clamp(-half, half - 1).round().double()
        whole -= 0 if zero is None else zero.double()
    weight = q.codes.astype(np.int64) - q.zero_points
    sums = whole.numpy().astype(np.int64) @ weight.T
    scales = scale.float().numpy() * q.scales.T[:1].repeat(1, 0)
    expected = sums * scales.astype(np.float64)
    found = packed(x)
    bound = np.abs(expected) * 2.0**-22 + 1e-6
    if dtype == torch.float32:
        assert (np.abs(found.double().numpy() - (expected + 1)) <= bound + 2.0**-23).all()
    codes = whole + (0 if zero is None else zero.double())
    exact = QuantizedActivations(
        codes.to(torch.int8).numpy(),
        scale.float().numpy(),
        (torch.zeros_like(scale) if zero is None else zero).to(torch.int8).numpy(),
        spec.bits,
        spec.granularity,
        spec.symmetric,
    )
    y = torch.from_numpy(int8_matmul(exact, q)) + layer.bias
    assert torch.equal(found, y.to(dtype))


@torch.no_grad()
def test_what_integers_cannot_say_is_simulated():
    x_of = inputs_of
    for bits, size, spec in (
        (4, 32, ActivationQuantization(8)),
        (8, None, ActivationQuantization(8, outlier_threshold=1.5)),
        (8, None, ActivationQuantization(12)),
    ):
        q = case(bits, (37, 96), size)
        layer = rows(q, activations=spec)
        packed = PackedLinear.of(layer, "packed")
        assert packed.describe() == "packed, simulated inputs"
        torch.testing.assert_close(packed(x_of(q)), layer(x_of(q)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_int8_inputs_are_asked_for_and_their_error_is_as_stated():
    q = case(4, (37, 96), 32, symmetric=True)
    packed = PackedLinear.of(rows(q), "int8")
    assert packed.describe() == "packed, int8 inputs"
    x = inputs_of(q)
    exact = x.double() @ torch.from_numpy(q.dequantize(np.float64)).T
    largest = x.view(2, 7, 3, 32).abs().amax(-1).double() / 254
    weights = torch.from_numpy(np.abs(q.dequantize(np.float64))).view(37, 3, 32).sum(-1)
    error = (packed(x).double() - exact).abs()
    assert (error <= 1.001 * largest @ weights.T + 1e-5).all() and error.max() > 1e-3
    x[0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        packed(x)


def test_tensors_that_do_not_belong_together_are_refused():
    q = case(3, (37, 96), 32, permuted=True)
    packed = PackedLinear.of(rows(q))
    packed.check()
    for name, change in (
        ("g_idx", lambda t: t.index_fill_(0, (t == 1).nonzero()[0], 0)),  # 33 inputs in a group
        ("g_idx", lambda t: t.fill_(3)),
        ("g_idx", lambda t: t.fill_(-1)),
        ("scales", lambda t: t.fill_(float("nan"))),
        ("zero_points", lambda t: t.fill_(8)),
    ):
        damaged = copy.deepcopy(packed)
        change(getattr(damaged, name))
        with pytest.raises(ValueError):
            damaged.check()


@torch.no_grad()
def test_stands_in_a_module():
    q = case(4, (64, 64), 32)
    net = nn.Sequential(rows(q), nn.ReLU())
    net[0] = PackedLinear.of(net[0], "packed")
    assert "bits=4" in repr(net) and net(inputs_of(q)).shape == (2, 7, 64)
    assert net.state_dict()["0.weight"].dtype == torch.uint8
    net[0].stored = "panels"
    assert net.state_dict()["0.weight"].dtype == torch.int32
