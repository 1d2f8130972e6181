"""The embedded model on a workbench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptqkit._defaults import BATCH_SIZE, FORWARD_BATCH_SIZE
from ptqkit.demo import MODEL_DIR, text
from ptqkit.hf.equalization.outliers import inject_outliers
from ptqkit.hf.workbench import Workbench

__all__ = ["WINDOW", "demo_workbench"]

WINDOW = 512
"""Tokens per window, the start token included."""


def demo_workbench(
    test_windows: int = 20,
    calibration_windows: int = 24,
    threads: int = 0,
    outliers: Mapping[str, Any] | None = None,
) -> Workbench:
    """Open a workbench with the embedded model and its texts.

    Parameters
    ----------
    test_windows, calibration_windows : int
        Windows of 512 tokens to measure and to calibrate on.
    threads : int
        Of the solver; 0 is its own policy.
    outliers : mapping, optional
        Inject outliers, which leaves the float model the same: options of
        :func:`ptqkit.hf.inject_outliers`, such as ``{"factor": 30}``.

    Examples
    --------
    >>> bench = demo_workbench(test_windows=4, calibration_windows=4)
    >>> row = bench.measure("quality", bits=3, group_size=64)
    """
    bench = Workbench.load(
        MODEL_DIR,
        dtype="float32",
        device="cpu",
        calibration=[text("calibration")],
        calibration_options={
            "samples": calibration_windows,
            "sequence_length": WINDOW,
            "batch_size": FORWARD_BATCH_SIZE,
        },
        test=text("test"),
        test_options={"window": WINDOW, "windows": test_windows, "batch_size": BATCH_SIZE},
        threads=threads,
    )
    if outliers is not None:
        inject_outliers(bench.model, bench.calibration, **outliers)
    return bench
