"""Softmax into arrays larger than the caches, which are written past them: the same bits."""

from __future__ import annotations

import pytest

import ptqkit

STREAMED = """
import sys
import numpy as np, ptqkit
assert ptqkit.show_config()["cpu_level"] == sys.argv[1]
heads, q, k = 17, 1000, 517  # more than 2**23 entries; rows at every offset from a line
grid = ptqkit.softmax_grid(8)
x = np.random.default_rng(0).standard_normal((heads, q, k), np.float32)
holes = np.where(x > 1, np.float32(-np.inf), x)
memory = np.empty(x.size + 16, np.float32)
for scores, first in ((x, 0), (x, 3), (holes, 1)):
    for options in ({}, {"causal": True}, {"allowed": x > 0}):
        memory.fill(7)
        out = memory[first : first + x.size].reshape(x.shape)
        ptqkit.softmax_on_grid(scores, grid, correction="row_sum", out=out, **options)
        for h in range(heads):
            part = {key: v if v is True else v[h] for key, v in options.items()}
            y = ptqkit.softmax_on_grid(scores[h], grid, correction="row_sum", **part)
            assert np.array_equal(y, out[h]), (h, first, list(options))
        assert (memory[:first] == 7).all() and (memory[first + x.size :] == 7).all()
"""


@pytest.mark.parametrize("level", ptqkit.show_config()["cpu_levels"])
def test_large_outputs_are_the_same_bits(script, level):
    script(STREAMED, level, PTQKIT_CPU=level)
