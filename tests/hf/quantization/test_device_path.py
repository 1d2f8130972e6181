"""What a GPU would do of a run, done by torch on the host: as good as the core's own."""

from __future__ import annotations

import pytest
from helpers.driver_models import build, padded_batches

from ptqkit.hf import quantize
from ptqkit.hf.quantization import moments, solve
from ptqkit.nn import statistics

OPTIONS = {"bits": 3, "group_size": 16, "progress": False}


@pytest.mark.parametrize("recipe", ["reference", "best"])
def test_results_are_as_good_as_those_of_the_host(recipe, monkeypatch):
    host = quantize(build(), recipe, padded_batches(), **OPTIONS)
    monkeypatch.setattr(solve, "computes", lambda device: True)
    monkeypatch.setattr(moments, "accumulator", statistics.TorchHessian)
    monkeypatch.setattr(moments, "drift_accumulator", statistics.TorchDrift)
    found = quantize(build(), recipe, padded_batches(), **OPTIONS)
    rows = zip(host.report.quantized, found.report.quantized, strict=True)
    for one, two in rows:
        assert (one.name, one.target, one.tokens) == (two.name, two.target, two.tokens)
        assert two.objective == pytest.approx(one.objective, rel=0.25), one.name
        assert two.objective_rtn == pytest.approx(one.objective_rtn, rel=0.25), one.name
        assert two.weight_sqnr_db == pytest.approx(one.weight_sqnr_db, abs=0.5), one.name
        shapes = [r.matrices[one.name].row_objectives.shape for r in (host, found)]
        assert shapes[0] == shapes[1]
    totals = [sum(r.objective for r in x.report.quantized) for x in (host, found)]
    assert totals[1] == pytest.approx(totals[0], rel=0.05)


def test_reports_say_where_layers_were_solved(monkeypatch):
    monkeypatch.setattr(solve, "computes", lambda device: True)
    overrides = {"*.v_proj": {"beam_width": 2}, "*.mlp.*": "skip", "*.o_proj": {"method": "rtn"}}
    found = quantize(build(), "reference", padded_batches(), overrides=overrides, **OPTIONS)
    rows = {row.name.rsplit(".", 1)[1]: row.solved_on for row in found.report.quantized}
    expected = {"q_proj": "cpu", "k_proj": "cpu"}
    assert rows == expected | {"v_proj": "cpu: beam_width=2", "o_proj": "cpu: method 'rtn'"}
