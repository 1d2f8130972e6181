"""What other software has stored, reproduced where our grids can express it.

Not expressible: ggml Q5_1 groups whose minimum lies above, or maximum below zero (its ranges need
not hold zero), and its float16 minima; Q5_0, whose step has the sign of the largest entry;
CTranslate2's codes, which are truncated where everything here is rounded (only the steps are).
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers.core_cases import vector

import ptqkit

safetensors = pytest.importorskip("safetensors.numpy")


def test_ggml_q5_1_steps_and_codes():
    tensors = safetensors.load_file(vector("ggml_q5_rwkv4.safetensors"))
    names = [key.removeprefix("f32/") for key in tensors if key.startswith("f32/")]
    assert len(names) >= 10
    used = weights = 0
    for name in names:
        W = tensors[f"f32/{name}"].astype(np.float32)
        codes = tensors[f"q5_1/{name}"].reshape(W.shape)
        groups = W.reshape(len(W), -1, 32)
        q = ptqkit.rtn(W, bits=5, group_size=32)
        low, high = groups.min(2), groups.max(2)
        spans_zero = (low <= 0) & (high >= 0)
        # d = (max - min) / 31 in float32, stored in float16: the step itself is reproduced
        stored = tensors[f"q5_1_d/{name}"].reshape(low.shape).astype(np.float32)
        np.testing.assert_array_equal(
            q.scales.astype(np.float16)[spans_zero], stored.astype(np.float16)[spans_zero]
        )
        # ggml counts steps from the minimum, we from zero: the codes agree where the minimum is
        # a whole number of steps away, to within the offset of the zero-point's own rounding
        offset = -low / q.scales - q.zero_points
        mine = q.codes.reshape(groups.shape).astype(int)
        theirs = codes.reshape(groups.shape).astype(int)
        steps = groups / q.scales[..., None]
        exact = steps + (-low / q.scales)[..., None]  # unrounded code of ggml
        expected = np.floor(exact + 0.5)
        near = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
        assert np.all((expected == theirs) | near)  # our step gives ggml's codes
        assert np.abs(mine - theirs)[spans_zero].max() <= 1
        close = spans_zero & (np.abs(offset) < 0.02)
        clear = np.abs(exact - np.floor(exact) - 0.5) > 0.021
        np.testing.assert_array_equal(mine[close][clear[close]], theirs[close][clear[close]])
        used += int(clear[close].sum())
        weights += W.size
    assert used > 0.02 * weights


def test_ctranslate2_int8_steps():
    tensors = safetensors.load_file(vector("ctranslate2_w8_w16.safetensors"))
    names = [key.removeprefix("i8/") for key in tensors if key.startswith("i8/")]
    assert len(names) >= 60
    for name in names:
        W = tensors[f"f32/{name}"]
        W = W.reshape(len(W), -1).astype(np.float32)
        scale = tensors[f"i8_scale/{name}"].reshape(-1)  # 127 / absmax; ours: absmax / 127.5
        stored = tensors[f"i8/{name}"].reshape(W.shape).astype(int)
        q = ptqkit.rtn(W, bits=8, group_size=None, symmetric=True)
        live = np.abs(W).max(axis=1) > 0
        np.testing.assert_allclose(
            q.scales[live, 0] * 127.5, 127 / scale[live].astype(np.float64), rtol=1e-6
        )
        # both are within a step of the weight, theirs truncated towards zero
        mine = q.codes.astype(int) - 128
        assert np.abs(mine - stored).max() <= 2
        error = np.abs(W - q.dequantize())[live]
        theirs = np.abs(W - stored / scale[:, None])[live]
        assert (error**2).mean() < 0.5 * (theirs**2).mean()


def test_a_published_gptq_layer_is_a_fixed_point():
    # Codes that lie on a grid come back from RTN on that grid: min-max of the stored weights.
    tensors = safetensors.load_file(vector("autogptq_q4.safetensors"))
    for key in (k for k in tensors if k.endswith("qweight")):
        words = tensors[key].view(np.uint32)
        codes = ptqkit.unpack_rows(np.ascontiguousarray(words.T), 4, 8 * len(words))
        np.testing.assert_array_equal(ptqkit.pack_rows(codes, 4).T, words)
        W = 0.002 * (codes.astype(np.float32) - 1)
        full = (codes.min(axis=1) == 0) & (codes.max(axis=1) == 15)
        q = ptqkit.rtn(W, bits=4, group_size=None)
        np.testing.assert_array_equal(q.codes[full], codes[full])
        np.testing.assert_array_equal(q.zero_points[full], 1)
        assert full.any()
