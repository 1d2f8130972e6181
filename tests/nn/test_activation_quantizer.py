"""Fake-quantized activations: the bits of compressed-tensors, and hooks that disturb nothing."""

from __future__ import annotations

import copy
import types

import numpy as np
import pytest
import torch
from helpers.checkpoint_models import build, logits
from torch import nn
from transformers.pytorch_utils import Conv1D

import ptqkit
from ptqkit.nn.activation_grids import dynamic_grid, fake_quantize, static_grid
from ptqkit.nn.activations import (
    ActivationQuantizer,
    install_quantizer,
    installed_quantizer,
    remove_quantizers,
)
from ptqkit.nn.forward import hooks
from ptqkit.recipe.options import ActivationQuantization

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _inputs(dtype, seed=0):
    """Tokens of very different sizes, one of zeros, two of a single sign, one of rounding ties."""
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 7, 24)))
    x = x * torch.logspace(-3, 2, 7, dtype=torch.float64)[:, None]
    x[0, 2] = 0
    x[0, 3] = x[0, 3].abs() + 1
    x[0, 4] = -x[0, 4].abs() - 1
    x[1, 4] = torch.arange(24) - 11.5
    x[1, 4, 0] = 127.5
    return x.to(dtype)


def _ranges(x):
    flat = x.double().reshape(-1, x.shape[-1]).numpy()
    return types.SimpleNamespace(
        minimum=flat.min(0).astype(np.float32),
        maximum=flat.max(0).astype(np.float32),
        tokens=len(flat),
    )


def _library(x, spec, scale=None, zero_point=None):
    """What compressed-tensors computes for the input of a layer with this scheme."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = quantization.QuantizationArgs(
        num_bits=spec.bits,
        symmetric=spec.symmetric,
        strategy=spec.granularity,
        dynamic=spec.dynamic,
    )
    module = types.SimpleNamespace(
        quantization_status=quantization.QuantizationStatus.COMPRESSED,
        input_scale=scale,
        input_zero_point=zero_point,
    )
    return forward.forward_quantize(module, x, "input", args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dynamic_tokens_have_the_bits_of_compressed_tensors(bits, symmetric, dtype):
    spec = ActivationQuantization(bits, "token", symmetric)
    for seed in range(3):
        x = _inputs(dtype, seed)
        found = ActivationQuantizer(spec)(x)
        assert found.dtype == dtype and not found.isnan().any()
        assert torch.equal(found, _library(x, spec))
        assert not torch.equal(found, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_static_tensors_have_the_bits_of_compressed_tensors(bits, symmetric, dtype):
    spec = ActivationQuantization(bits, "tensor", symmetric)
    x = _inputs(dtype)
    q = ActivationQuantizer.calibrate(spec, _ranges(x), dtype)
    assert q.scale.dtype == dtype and (q.zero_point is None) == symmetric
    # Values beyond the calibrated range are clamped.
    for value in (x, 3 * x):
        assert torch.equal(q(value), _library(value, spec, q.scale, q.zero_point))
    # A model cast after calibration casts its grid too.
    wide = x.float()
    expected = _library(wide, spec, q.scale.float(), q.zero_point)
    assert torch.equal(q(wide), expected)


def test_sixteen_bits_float32_has_the_bits_of_compressed_tensors():
    for symmetric in (True, False):
        spec = ActivationQuantization(16, "token", symmetric)
        x = _inputs(torch.float32)
        assert torch.equal(ActivationQuantizer(spec)(x), _library(x, spec))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [9, 16])
def test_wide_codes_of_half_precision_are_computed_in_float32(bits, dtype):
    x = _inputs(dtype)
    for granularity in ("token", "tensor"):
        spec = ActivationQuantization(bits, granularity)
        q = ActivationQuantizer.calibrate(spec, _ranges(x), dtype)
        again = ActivationQuantizer(
            spec, None if q.scale is None else q.scale.float(), q.zero_point
        )
        assert torch.equal(q(x), again(x.float()).to(dtype))
    # Sixteen bits are finer than the type itself: only what rounds to the same value may differ.
    if bits == 16:
        token = ActivationQuantizer(ActivationQuantization(16))(x).double()
        step = x.double().abs().amax(-1, keepdim=True) / 32767.5
        spacing = torch.finfo(dtype).eps * x.double().abs()
        assert ((token - x.double()).abs() <= step / 2 + spacing).all()


def test_formulas_in_float64_numpy():
    x = _inputs(torch.float64)
    for bits in (3, 8):
        for symmetric in (True, False):
            found = ActivationQuantizer(ActivationQuantization(bits, "token", symmetric))(x).numpy()
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            for row, y in zip(x.numpy().reshape(-1, 24), found.reshape(-1, 24), strict=True):
                bottom, top = min(row.min(), 0.0), max(row.max(), 0.0)
                if bottom == top:
                    assert (y == 0).all()
                    continue
                zero = 0
                scale = 2 * max(-bottom, top) / (high - low)
                if not symmetric:
                    scale = (top - bottom) / (high - low)
                    zero = np.round(low - bottom / scale)
                codes = np.round(np.clip(row / scale + zero, low, high))
                np.testing.assert_allclose(y, (codes - zero) * scale, rtol=1e-12, atol=0)


def test_halves_are_rounded_to_even():
    scale = torch.ones(1)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 200.0, -200.0])
    assert fake_quantize(x, scale, None, 8).tolist() == [0, 2, 2, 0, -2, 127, -128]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros_with_a_positive_scale(dtype):
    x = torch.zeros(1, 3, 8, dtype=dtype)
    for symmetric in (True, False):
        scale, _ = dynamic_grid(x, 8, symmetric)
        assert (scale > 0).all()
        for granularity in ("token", "tensor"):
            spec = ActivationQuantization(8, granularity, symmetric)
            q = ActivationQuantizer.calibrate(spec, _ranges(x), dtype)
            assert q.scale is None or q.scale.item() > 0
            assert torch.equal(q(x), x)


def test_a_range_without_zero_is_widened_to_hold_it():
    scale, zero = static_grid(2.0, 5.0, bits=8, symmetric=False, dtype=torch.float32)
    assert (scale, zero) == (np.float32(5 / 255), -128)
    scale, zero = static_grid(-5.0, -2.0, bits=8, symmetric=False, dtype=torch.float32)
    assert (scale, zero) == (np.float32(5 / 255), 127)
    scale, zero = static_grid(-1e-30, 1e-30, bits=8, symmetric=True, dtype=torch.float16)
    assert scale > 0 and zero == 0


def test_outlier_columns_stay_and_do_not_stretch_the_scale():
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 5, 16)).astype(np.float32))
    x[1, 3, 4], x[0, 0, 9] = -50.0, 6.0
    found = ActivationQuantizer(ActivationQuantization(8, outlier_threshold=6.0))(x)
    rest = [i for i in range(16) if i not in (4, 9)]
    assert torch.equal(found[..., [4, 9]], x[..., [4, 9]])
    expected = ActivationQuantizer(ActivationQuantization(8))(x[..., rest])
    assert torch.equal(found[..., rest], expected)
    # Above the largest magnitude nothing is an outlier.
    high = ActivationQuantizer(ActivationQuantization(8, outlier_threshold=50.001))(x)
    assert torch.equal(high, ActivationQuantizer(ActivationQuantization(8))(x))
    everything = ActivationQuantizer(ActivationQuantization(8, outlier_threshold=1e-9))(x)
    assert torch.equal(everything, x)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 8, 16])
def test_float32_agrees_with_the_array_function(bits, symmetric):
    x = _inputs(torch.float32)
    x[1, 2, 5] = 30.0
    for threshold in (None, 6.0):
        spec = ActivationQuantization(bits, "token", symmetric, threshold)
        outliers = None if threshold is None else ptqkit.outlier_columns(x, threshold)
        codes = ptqkit.quantize_activations(x, bits, symmetric=symmetric, outliers=outliers)
        found = ActivationQuantizer(spec)(x).numpy()
        np.testing.assert_array_equal(found, codes.dequantize())
    q = ActivationQuantizer.calibrate(ActivationQuantization(bits, "tensor", symmetric), _ranges(x))
    zero = None if symmetric else q.zero_point.item()
    codes = ptqkit.quantize_activations(
        x, bits, granularity="tensor", symmetric=symmetric, scale=q.scale.item(), zero_point=zero
    )
    np.testing.assert_array_equal(q(x).numpy(), codes.dequantize())
    from_data = ptqkit.quantize_activations(x, bits, granularity="tensor", symmetric=symmetric)
    np.testing.assert_array_equal(codes.codes, from_data.codes)


@pytest.mark.parametrize(
    "values",
    [
        {"bits": 1},
        {"bits": 17},
        {"bits": True},
        {"bits": 8.0},
        {"granularity": "channel"},
        {"symmetric": 1},
        {"outlier_threshold": 0},
        {"outlier_threshold": float("nan")},
        {"outlier_threshold": "6"},
        {"outlier_threshold": 6.0, "granularity": "tensor"},
    ],
)
def test_bad_specs_are_refused(values):
    name = "outlier_threshold" if "outlier_threshold" in values else next(iter(values))
    with pytest.raises(ValueError, match=name):
        ActivationQuantization(**values)


def test_spec_as_plain_values():
    spec = ActivationQuantization(8, "tensor")
    assert spec.symmetric is False and ActivationQuantization().symmetric is True
    for one in (spec, ActivationQuantization(4, outlier_threshold=6.0)):
        assert ActivationQuantization.parse(one.to_dict()) == one
        assert ActivationQuantization.parse(one) is one
    with pytest.raises(ValueError, match=r"no option 'bit' \(did you mean 'bits'\?\)"):
        ActivationQuantization.parse({"bit": 8})
    with pytest.raises(TypeError, match="must be ActivationQuantization or a mapping, not int"):
        ActivationQuantization.parse(8)


def test_bad_grids_are_refused():
    static, dynamic = ActivationQuantization(8, "tensor"), ActivationQuantization(8)
    for scale in (float("nan"), float("inf"), 0.0, -1.0, torch.ones(2), torch.ones(1).int()):
        with pytest.raises(ValueError, match="activation scale must be"):
            ActivationQuantizer(static, scale)
    for zero in (128, -129, 0.5):
        with pytest.raises(ValueError, match="zero_point must be an integer from -128 to 127"):
            ActivationQuantizer(static, 1.0, zero)
    with pytest.raises(ValueError, match="zero_point 0, not 3"):
        ActivationQuantizer(ActivationQuantization(8, "tensor", True), 1.0, 3)
    with pytest.raises(ValueError, match="need a scale"):
        ActivationQuantizer(static)
    with pytest.raises(ValueError, match="per token while the model runs"):
        ActivationQuantizer(dynamic, 1.0)
    with pytest.raises(TypeError, match="must be ActivationQuantization, not dict"):
        ActivationQuantizer({"bits": 8})
    empty = types.SimpleNamespace(minimum=np.zeros(3), maximum=np.zeros(3), tokens=0)
    for ranges in (None, empty):
        with pytest.raises(ValueError, match="need the ranges of calibration data"):
            ActivationQuantizer.calibrate(static, ranges)
    for low, high in ((0.0, float("inf")), (float("nan"), 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="must be finite|lies above"):
            static_grid(low, high, bits=8, symmetric=True, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"too large for torch\.float16"):
        static_grid(0, 1e9, bits=8, symmetric=True, dtype=torch.float16)


@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 4), lambda: Conv1D(4, 6)])
def test_installed_quantizers_act_on_the_input_alone(layer):
    module = layer()
    reference = copy.deepcopy(module)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    q = ActivationQuantizer(ActivationQuantization(4))
    names, kind = list(module.state_dict()), type(module)
    install_quantizer(module, q)
    assert installed_quantizer(module) is q and installed_quantizer(reference) is None
    assert list(module.state_dict()) == names and type(module) is kind
    expected = reference(ActivationQuantizer(ActivationQuantization(4))(x))
    assert torch.equal(module(x), expected)
    by_name = module(input=x) if isinstance(module, nn.Linear) else module(x=x)
    assert torch.equal(by_name, expected)
    with pytest.raises(ValueError, match="already: call remove_quantizers"):
        install_quantizer(module, q)
    assert remove_quantizers(module) == 1 and remove_quantizers(module) == 0
    assert installed_quantizer(module) is None
    assert not module._forward_pre_hooks and not module._forward_pre_hooks_with_kwargs
    assert torch.equal(module(x), reference(x))
    install_quantizer(module, q)


def test_only_linear_layers_take_a_quantizer():
    with pytest.raises(TypeError, match="nn.Linear or Conv1D, not LayerNorm"):
        install_quantizer(nn.LayerNorm(4), ActivationQuantizer(ActivationQuantization()))
    with pytest.raises(TypeError, match="an ActivationQuantizer, not ActivationQuantization"):
        install_quantizer(nn.Linear(4, 4), ActivationQuantization())


def test_capture_hooks_see_what_stands_before_them():
    module = nn.Linear(6, 4)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    before, after = [], []
    with hooks({"a": module}, lambda name, value: before.append(value)):
        install_quantizer(module, ActivationQuantizer(ActivationQuantization(4)))
        with hooks({"a": module}, lambda name, value: after.append(value)):
            y = module(x)
    assert before[0] is x
    assert torch.equal(after[0], ActivationQuantizer(ActivationQuantization(4))(x))
    assert torch.equal(y, module(x))


def test_a_copied_model_has_quantizers_of_its_own():
    model = build("llama")
    plain = logits(model)
    name = "model.layers.0.mlp.down_proj"
    q = ActivationQuantizer(ActivationQuantization(4, "tensor"), 0.05, -3)
    install_quantizer(model.get_submodule(name), q)
    changed = logits(model)
    assert not torch.equal(changed, plain)
    twin = copy.deepcopy(model)
    other = installed_quantizer(twin.get_submodule(name))
    assert other is not q and other.scale is not q.scale and torch.equal(other.scale, q.scale)
    assert torch.equal(logits(twin), changed)
    assert remove_quantizers(twin) == 1
    assert torch.equal(logits(twin), plain) and torch.equal(logits(model), changed)
    assert not any("scale" in key for key in model.state_dict())


def test_empty_inputs_pass():
    for spec, scale in (
        (ActivationQuantization(), None),
        (ActivationQuantization(8, "tensor"), 1.0),
    ):
        x = torch.empty(1, 0, 8)
        assert ActivationQuantizer(spec, scale)(x).shape == x.shape
