"""Valid calls of the softmax and SQNR functions of the core, for test_core_calls.py."""

from __future__ import annotations

from typing import Any

import numpy as np

SOFTMAX_OUTPUTS = {
    "softmax_quantize": [6, 7, 8],
    "softmax_statistics": [6],
    "softmax_exp": [1],
    "energy": [2],
    "energy_columns": [2],
}
SOFTMAX_OPTIONAL = {
    ("softmax_quantize", 1),
    ("softmax_quantize", 7),
    ("softmax_quantize", 8),
    ("softmax_statistics", 1),
    ("softmax_statistics", 2),
}


def softmax_calls() -> dict[str, list[Any]]:
    """Name -> arguments; new arrays every time."""
    shape, grid = (2, 3, 4, 5), (1 / 255, 0, 255)
    P, mask = np.full(shape, 0.2, np.float32), np.ones((2, 1, 4, 5), bool)
    x = np.ones((3, 8), np.float32)
    return {
        "softmax_quantize": [
            P,
            mask,
            0,
            grid,
            1,
            np.zeros((3, 6)),
            np.zeros_like(P),
            np.zeros(24, np.float32),
            np.zeros(24, np.float32),
            0,
            1,
        ],
        "softmax_statistics": [
            P,
            mask,
            np.ones((2, 4), bool),
            0,
            grid,
            1e-3,
            np.zeros((3, 240, 4), np.int64),
            1,
        ],
        "softmax_exp": [-np.ones(8, np.float32), np.zeros(8, np.float32), 1],
        "energy": [x, x, np.zeros((3, 2)), 1],
        "energy_columns": [x, x, np.zeros((2, 8)), 1],
    }
