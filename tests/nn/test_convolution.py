"""Convolutions as matrix products, against the twin, torch's unfold and torch's convolution."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from ptqkit.nn import unfold_inputs
from ptqkit.nn.convolution import ConvolutionView, pad_inputs
from ptqkit.nn.linear import LinearView
from ptqkit.reference import im2col

CASES = {
    "plain": (nn.Conv2d, {"kernel_size": 3}, (9, 8)),
    "strided": (nn.Conv2d, {"kernel_size": 3, "stride": (2, 3), "padding": (1, 2)}, (9, 8)),
    "dilated": (nn.Conv2d, {"kernel_size": (3, 2), "dilation": (2, 3), "padding": 2}, (9, 8)),
    "grouped": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "padding": 1}, (5, 6)),
    "depthwise": (nn.Conv2d, {"kernel_size": 3, "groups": 4, "stride": 2}, (7, 7)),
    "pointwise": (nn.Conv2d, {"kernel_size": 1, "stride": 2}, (5, 5)),
    "same": (nn.Conv2d, {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)}, (6, 7)),
    "valid": (nn.Conv2d, {"kernel_size": 2, "padding": "valid"}, (6, 7)),
    "reflect": (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}, (5, 6)),
    "replicate": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}, (5, 6)),
    "circular": (
        nn.Conv2d,
        {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "circular", "groups": 2},
        (5, 6),
    ),
    "1d": (nn.Conv1d, {"kernel_size": 4, "stride": 3, "padding": 2, "groups": 2}, (17,)),
    "1d circular": (nn.Conv1d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (9,)),
    "1d dilated": (nn.Conv1d, {"kernel_size": 3, "dilation": 4, "padding": "same"}, (9,)),
    "3d": (nn.Conv3d, {"kernel_size": (2, 3, 1), "stride": (1, 2, 1), "padding": 1}, (4, 5, 3)),
}


def case(name, seed=0):
    kind, options, size = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(4, 6 if options.get("groups") != 4 else 8, **options), torch.randn(3, 4, *size)


def sides(module):
    """Padding before and behind per dimension, found from what comes out of padding."""
    zeros = torch.zeros(1, 4, *[9] * len(module.kernel_size))
    total = [n - 9 for n in pad_inputs(zeros, module).shape[2:]]
    if isinstance(module.padding, str):
        return [(n // 2, n - n // 2) for n in total]
    return [(p, p) for p in module.padding]


@pytest.mark.parametrize("name", CASES)
def test_patches_are_the_twins(name):
    module, x = case(name)
    found = unfold_inputs(x, module)
    want = im2col(
        x.numpy(),
        module.kernel_size,
        module.stride,
        sides(module),
        module.dilation,
        module.groups,
        module.padding_mode,
    )
    np.testing.assert_array_equal(found.numpy(), want)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@torch.no_grad()
def test_patches_times_the_matrix_are_the_convolution(name):
    module, x = case(name)
    module.double()
    columns = unfold_inputs(x.double(), module)
    weight = module.weight.flatten(1).view(module.groups, -1, columns.shape[2])
    found = (columns @ weight.mT).movedim(0, 1)  # (rows, groups, out / groups)
    found = found.reshape(len(x), -1, module.out_channels) + module.bias
    want = module(x.double()).flatten(2).mT
    np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, (kind, *_) in CASES.items() if kind is nn.Conv2d])
def test_patches_are_those_of_torch(name):
    module, x = case(name)
    padded = pad_inputs(x, module)
    want = nn.functional.unfold(
        padded, module.kernel_size, dilation=module.dilation, stride=module.stride
    )
    want = want.mT.reshape(-1, module.groups, want.shape[1] // module.groups).transpose(0, 1)
    assert torch.equal(unfold_inputs(x, module), want)


def test_a_sample_without_a_batch_is_a_batch_of_one():
    module, x = case("strided")
    assert torch.equal(unfold_inputs(x[1], module), unfold_inputs(x[1:2], module))


def test_pieces_are_the_whole(monkeypatch):
    module, x = case("grouped")
    view = ConvolutionView(module)
    (whole,) = view.columns(x)
    monkeypatch.setattr("ptqkit.nn.convolution._PIECE", 2 * 9 * x[0].numel())
    pieces = list(view.columns(x))
    assert [p.shape[1] for p in pieces] == [60, 30]
    assert torch.equal(torch.cat(pieces, dim=1), whole)


@pytest.mark.parametrize("name", ["plain", "grouped", "depthwise", "1d", "3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_weight_is_read_and_written_as_a_matrix(name, dtype):
    module, _ = case(name)
    module.to(dtype)
    if module.weight.dim() == 4:
        module.to(memory_format=torch.channels_last)
    view, before = ConvolutionView(module), module.weight.clone()
    matrix = view.read()
    assert matrix.shape == view.shape and matrix.dtype == np.float32
    row = next(itertools.islice(before[2].float().flatten(), 3, None))
    assert matrix[2, 3] == row
    view.write(2 * matrix)
    assert torch.equal(module.weight, 2 * before)
    bias = module.bias.clone()
    view.subtract_bias(np.arange(len(matrix), dtype=np.float64))
    assert torch.equal(module.bias, (bias.double() - torch.arange(len(matrix))).to(dtype))


def test_it_is_a_view_like_that_of_linear_layers():
    assert issubclass(ConvolutionView, LinearView)
    assert not ConvolutionView(nn.Conv1d(2, 3, 2)).transposed
