"""Linear layers as matrices (out, in), whichever way their modules store them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import pytorch_utils

from ptqkit.nn.linear import LinearView, is_linear


def layers(dtype=torch.float32):
    """The same layer (3, 5), stored both ways."""
    plain, turned = torch.nn.Linear(5, 3), pytorch_utils.Conv1D(3, 5)
    with torch.no_grad():
        plain.weight.copy_(torch.arange(15.0).reshape(3, 5))
        turned.weight.copy_(plain.weight.T)
        plain.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
        turned.bias.copy_(plain.bias)
    return plain.to(dtype), turned.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_both_read_and_write_alike(dtype):
    for module, transposed in zip(layers(dtype), (False, True), strict=True):
        assert is_linear(module)
        view = LinearView(module)
        assert view.shape == (3, 5) and view.transposed == transposed
        read = view.read()
        assert read.dtype == np.float32 and read.flags.c_contiguous
        np.testing.assert_array_equal(read, np.arange(15.0).reshape(3, 5))
        parameter, values = module.weight, -read - 1
        view.write(values)
        assert module.weight is parameter and parameter.requires_grad and parameter.dtype == dtype
        np.testing.assert_array_equal(view.read(), values)


def test_reading_takes_no_copy_if_it_can():
    plain, turned = layers()
    assert np.shares_memory(LinearView(plain).read(), plain.weight.detach().numpy())
    assert not np.shares_memory(LinearView(turned).read(), turned.weight.detach().numpy())


def test_the_bias_is_subtracted_in_float64():
    shift = np.array([0.5, 1 / 3, -2.0])
    for module in layers():
        LinearView(module).subtract_bias(shift)
        expected = (np.array([1.0, 2.0, 3.0]) - shift).astype(np.float32)
        np.testing.assert_array_equal(module.bias.detach().numpy(), expected)


def test_a_layer_without_a_bias_gains_one():
    module = torch.nn.Linear(5, 3, bias=False, dtype=torch.bfloat16)
    LinearView(module).subtract_bias(np.array([0.5, 1.0, -2.0]))
    assert isinstance(module.bias, torch.nn.Parameter) and module.bias.dtype == torch.bfloat16
    assert module.bias.tolist() == [-0.5, -1.0, 2.0] and "bias" in module.state_dict()
