"""What the softmax benchmarks conclude from their rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.data import ROOT

from benchmarks.papers import sbc

with pytest.MonkeyPatch.context() as patch:
    # The scripts import their neighbours by name.
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    import softmax_lm
    import softmax_samples


def losses(values):
    return {"losses": list(values), "calibration_db": 1.0, "held_out_db": 1.0}


def test_paired_errors_are_those_of_leaving_out_windows():
    rng = np.random.default_rng(0)
    a = rng.normal(2, 0.3, 40)
    b = a + rng.normal(0.1, 0.02, 40)
    gap, error = softmax_lm.paired(losses(b), losses(a))
    assert gap == math.exp(b.mean()) - math.exp(a.mean())
    left = np.array([np.delete(b, i).mean() for i in range(40)])
    right = np.array([np.delete(a, i).mean() for i in range(40)])
    each = np.exp(left) - np.exp(right)
    jackknife = math.sqrt(39 / 40 * ((each - each.mean()) ** 2).sum())
    assert error == pytest.approx(jackknife, rel=0.02)
    assert softmax_lm.paired(losses(a), losses(a)) == (0.0, 0.0)


def test_the_share_given_back_has_the_jackknife_over_windows():
    rng = np.random.default_rng(1)
    kept = rng.normal(2, 0.3, 30)
    lost, left = kept + rng.normal(0.1, 0.02, 30), kept + rng.normal(0.01, 0.02, 30)

    def share(*windows):
        a, b, c = (math.exp(w.mean()) for w in windows)
        return (a - b) / (a - c)

    each = np.array([share(*(np.delete(w, i) for w in (lost, left, kept))) for i in range(30)])
    want = math.sqrt(29 / 30 * ((each - each.mean()) ** 2).sum())
    found = softmax_lm.share_error(losses(lost), losses(left), losses(kept))
    assert found == pytest.approx(want, rel=1e-9)


def row(variant, bits, lost, error, given_back=None):
    found = {"label": "", "bits": bits, "variant": variant, "lost": lost, "lost_error": error}
    if given_back is None:
        return found
    return {**found, "given_back": given_back, "given_back_error": 0.02}


def test_goals_take_the_better_row_correction_where_something_is_lost():
    rows = [
        {"model": "FP32"},
        row("none", 8, 0.1, 0.04),
        row("row_sum", 8, 0.01, 0.01, 0.9),
        row("before/row_sum", 8, 0.0005, 0.01, 0.995),
        row("none", 4, 0.1, 0.06),
        row("row_sum", 4, 0.002, 0.01, 0.98),
        row("before/row_sum", 4, 0.05, 0.01, 0.5),
        row("none", 3, 9.0, 0.1),
    ]
    eight, four = softmax_lm.goals(rows)
    assert eight["applies"] and eight["best"] == "before/row_sum" and eight["reached"]
    assert eight["left"] == 0.0005 and eight["left_error"] == 0.01
    assert eight["given_back_error"] == 0.02
    assert not four["applies"] and four["best"] == "row_sum" and not four["reached"]


def test_sampled_rows_show_the_largest_keys_and_others():
    p = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)).tril()
    first, last = softmax_samples.sampled_rows(p, 2 * p, rows=2, keys=2)
    assert (first["query"], last["query"]) == (4, 7)
    key = int(p[7].argmax())
    assert last["largest"][0] == [key, float(p[7, key]), float(2 * p[7, key])]
    assert len(last["sampled"]) == 2 and last["row_sum"] == pytest.approx(float(2 * p[7].sum()))
    assert all(k <= 4 for k, _, _ in first["sampled"])


def test_the_page_says_where_the_goal_is_reached():
    def case(bits, *shares, lost=0.5, error=0.1):
        rows = [row("none", bits, lost, error)]
        for variant, share in zip(sbc.ROW_SUMS, shares, strict=True):
            rows.append(row(variant, bits, lost * (1 - share), error, share))
        return [{"of": "m", **r} for r in rows]

    records = [
        *case(8, 0.5, 0.995, 0.999),
        *case(6, 0.5, 0.98, 0.992),
        *case(4, -1.0, 0.9, 0.97),
        *case(5, 0.1, 0.1, 0.1, lost=0.15),  # not more than two errors
    ]
    shares, left = sbc.before_tables(records)
    assert (
        [r[0] for r in shares.rows]
        == [f"m, float, {b} bits" for b in (8, 6, 4)]
        == [r[0] for r in left.rows]
    )
    assert shares.rows[1][-1] == "99.2 ± 2.0" and left.rows[2][2].startswith("0.05")
    assert "Of 3 cases" in shares.note and "99 % are reached in 2" in shares.note
    assert "row sum 0, before + row sum 1, squares + row sum 2" in shares.note
