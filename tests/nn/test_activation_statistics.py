"""Statistics accumulated by torch against those of the core."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ptqkit
from ptqkit.errors import CalibrationError
from ptqkit.nn import activation_statistics
from ptqkit.nn.activation_statistics import TorchActivationStatistics, statistics_accumulator

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_to_the_core(dtype, device, monkeypatch):
    monkeypatch.setattr(activation_statistics, "_CHUNK", 37 * 5)
    generator = torch.Generator().manual_seed(0)
    X = (torch.randn(3, 20, 37, generator=generator) * 4).to(dtype)
    X[0, 1] = 0.5
    X[0, 2] = 0
    mask = torch.rand(3, 20, generator=generator) < 0.8
    core = ptqkit.ActivationStatistics(37)
    other = TorchActivationStatistics(37, device)
    for part, rows in ((X[:1], None), (X[1:], mask[1:])):
        core.update(part, rows)
        other.update(part.to(device), rows)
    found = other.finish()
    assert found.tokens == core.tokens
    for name in ("rms", "rmse_token", "rmse_tensor", "std", "kurtosis"):
        np.testing.assert_allclose(getattr(found, name), getattr(core, name), rtol=1e-6)
    for name in ("channel_absmax", "channel_counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(core, name))
    np.testing.assert_array_equal(found.histogram(32)[1], core.histogram(32)[1])
    assert found.median == core.median
    assert [v for v, _, _ in found.largest] == [v for v, _, _ in core.largest]
    kept = torch.cat([X[0], X[1:][mask[1:]]]).abs()
    assert all(kept[token, channel] == value for value, token, channel in found.largest)


def test_not_finite_and_nothing():
    other = TorchActivationStatistics(4, "cpu")
    assert other.finish().tokens == 0
    other.update(torch.tensor([[1.0, 2.0, float("nan"), 0.0]]))
    with pytest.raises(CalibrationError, match="not finite"):
        other.finish()
    made = statistics_accumulator(4, torch.device("cpu"), bits=4)
    assert isinstance(made, ptqkit.ActivationStatistics) and made.bits == 4
