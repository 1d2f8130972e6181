"""Accumulators by torch, and meters of outputs: exceptions, threads, batches that are bad."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
import torch

from ptqkit.arrays.metrics import SQNR
from ptqkit.errors import CalibrationError
from ptqkit.nn import statistics
from ptqkit.nn.activation_statistics import TorchActivationStatistics
from ptqkit.nn.softmax.compare import OutputSQNR
from ptqkit.nn.statistics import TorchDrift, TorchHessian, TorchRanges

X = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))


class Timeout(Exception):
    """What a signal handler of the user raises."""


def interrupt(monkeypatch, where, name):
    """Make a function raise after it has done its work; restore it at ``monkeypatch.undo()``."""
    real = getattr(where, name)

    def interrupted(*arguments, **options):
        real(*arguments, **options)
        raise Timeout

    monkeypatch.setattr(where, name, interrupted)


@pytest.mark.parametrize("kind", [TorchHessian, TorchDrift])
def test_an_interrupted_sum_says_so(kind, monkeypatch):
    seen = kind(8, "cpu") if kind is TorchHessian else kind(8, 8, "cpu")
    update = (X,) if kind is TorchHessian else (X, X + 1)
    read = seen.finish
    seen.update(*update)
    read()
    interrupt(monkeypatch, torch, "isfinite")
    with pytest.raises(Timeout):
        seen.update(*update)
    monkeypatch.undo()
    for use in (read, lambda: seen.update(*update)):
        with pytest.raises(CalibrationError, match=r"interrupted.*a new one"):
            use()


def test_interrupted_ranges_are_as_before(monkeypatch):
    seen = TorchRanges(8, "cpu")
    seen.update(X)
    before = seen.finish()
    interrupt(monkeypatch, torch, "maximum")
    with pytest.raises(Timeout):
        seen.update(X * 2 - 9)
    monkeypatch.undo()
    after = seen.finish()
    assert after.tokens == before.tokens == 50
    for name in ("minimum", "maximum", "mean"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_interrupted_statistics_are_as_before(monkeypatch):
    def values():
        found = seen.finish()
        return found.tokens, found.rms, found.largest, found.histogram()[1].sum()

    seen = TorchActivationStatistics(8, "cpu")
    seen.update(X)
    before = values()
    interrupt(monkeypatch, torch, "bincount")
    with pytest.raises(Timeout):
        seen.update(X * 2)
    monkeypatch.undo()
    assert values() == before


def test_an_interrupted_meter_has_the_batch_in_both_ratios_or_in_none(monkeypatch):
    x = X.numpy()
    seen = OutputSQNR("o")
    seen.update(x, x + 1)
    before = seen.decibel, seen.total
    for at in (1, 2):
        calls = []
        real = SQNR.update

        def update(meter, *pair, calls=calls, real=real, at=at):
            real(meter, *pair)
            calls.append(meter)
            if len(calls) == at:
                raise Timeout

        monkeypatch.setattr(SQNR, "update", update)
        with pytest.raises(Timeout):
            seen.update(x, x + 2)
        monkeypatch.undo()
        assert (seen.decibel, seen.total) == before


MAKE = {
    "hessian": (lambda: TorchHessian(8, "cpu"), lambda a: a.update(X), lambda a: a.finish().matrix),
    "drift": (
        lambda: TorchDrift(8, 8, "cpu"),
        lambda a: a.update(X, X + 1),
        lambda a: a.finish().matrix,
    ),
    "ranges": (lambda: TorchRanges(8, "cpu"), lambda a: a.update(X), lambda a: a.finish().mean),
    "statistics": (
        lambda: TorchActivationStatistics(8, "cpu", threshold=1.0),
        lambda a: a.update(X),
        lambda a: a.finish().channel_counts,
    ),
    "meter": (
        lambda: OutputSQNR("o"),
        lambda a: a.update(X.numpy(), X.numpy() + 1),
        lambda a: [a.decibel, a.total, a._meters[0].count],
    ),
}


@pytest.mark.parametrize("kind", MAKE)
def test_threads_may_share_an_accumulator(kind):
    make, update, values = MAKE[kind]
    one, shared = make(), make()
    for _ in range(4 * 100):
        update(one)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    work = [threading.Thread(target=lambda: [update(shared) for _ in range(100)]) for _ in range(4)]
    try:
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert getattr(shared, "tokens", 0) == getattr(one, "tokens", 0)
    np.testing.assert_allclose(values(shared), values(one), rtol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e19])
def test_the_batch_that_is_not_finite_or_overflows_is_named(value):
    bad = X.clone()
    bad[3, 2] = value
    hessian, drift = TorchHessian(8, "cpu"), TorchDrift(8, 8, "cpu")
    for batch in (X, X, bad, X):
        hessian.update(batch)
        drift.update(batch, batch + 1 if np.isfinite(value) else batch)
    with pytest.raises(CalibrationError, match="overflow float32, first in batch 3 of 4"):
        hessian.finish()
    if not np.isfinite(value):
        with pytest.raises(CalibrationError, match="first in batch 3 of 4"):
            drift.finish()


def test_the_default_dtype_of_the_caller_is_not_taken():
    before = torch.get_default_dtype()
    found = {}
    try:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            ranges = TorchRanges(8, "cpu")
            ranges.update(X)
            found[dtype] = [t.dtype for t in ranges._seen[:3]]
            hessian = TorchHessian(8, "cpu")
            hessian.update(X)
            assert hessian._sum.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    assert len({tuple(v) for v in found.values()}) == 1
    assert statistics.accumulator(8, torch.device("cpu")).tokens == 0
