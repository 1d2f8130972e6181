"""Propagated errors while a model is streamed: the float model is a twin that streams along."""

from __future__ import annotations

import pytest
from helpers import expert_models
from helpers.driver_models import build, padded_batches
from helpers.stored_runs import files, read_rows

from ptqkit.hf import quantize
from ptqkit.hf.quantization.state import RunState

OPTIONS = {"group_size": 16, "row_coupling": 0, "progress": False}


def run(folder, out, way, recipe="best", data=None, **options):
    given = {**OPTIONS, **options, "stream": way, "out_dir": out}
    return quantize(str(folder), recipe, data or padded_batches(), **given)


def rows(folder):
    return read_rows(folder, "target", "tokens")


def same(folder, tmp_path, **options):
    for out, way in (("memory", False), ("streamed", True)):
        run(folder, tmp_path / out, way, **options)
    assert rows(tmp_path / "streamed") == rows(tmp_path / "memory")
    assert files(tmp_path / "streamed") == files(tmp_path / "memory")
    return rows(tmp_path / "streamed")


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_codes_are_those_of_a_run_in_memory(name, tmp_path):
    build(name).save_pretrained(tmp_path / "model")
    found = same(tmp_path / "model", tmp_path, data=padded_batches(name), bits=3)
    targets = {row["target"] for row in found if row["target"]}
    assert any(t.startswith("residual") for t in targets) and len(targets) == 2


def test_experts_that_see_all_tokens(tmp_path):
    expert_models.build("mixtral").save_pretrained(tmp_path / "model")
    found = same(
        tmp_path / "model",
        tmp_path,
        recipe="quality",
        data=expert_models.batches(2),
        bits=4,
        group_size=8,
        error_propagation=0.5,
        calibrate_all_experts=True,
    )
    assert all(row["target"] for row in found if ".experts." in row["name"])


def test_a_run_that_was_stopped_goes_on_with_outputs_in_files(tmp_path, monkeypatch):
    build().save_pretrained(tmp_path / "model")
    first = run(tmp_path / "model", tmp_path / "whole", True)
    budget = first.report.memory["estimate_streamed"] - 1
    keep = RunState.keep

    def stop(self, block):
        if self.finished == 1:
            raise RuntimeError("stop")
        return keep(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "keep", stop)
        with pytest.raises(RuntimeError, match="stop"):
            run(tmp_path / "model", tmp_path / "out", True, memory_budget=budget)
    result = run(tmp_path / "model", tmp_path / "out", True, memory_budget=budget)
    assert "outputs of blocks too" in result.report.schedule_reason
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")


def test_the_twin_is_counted(tmp_path):
    build().save_pretrained(tmp_path / "model")
    sizes = []
    for alpha in (0.0, 0.5):
        result = run(
            tmp_path / "model", tmp_path / str(alpha), True, "quality", error_propagation=alpha
        )
        sizes.append(result.report.memory["estimate_streamed"])
    assert sizes[1] > 1.3 * sizes[0]
