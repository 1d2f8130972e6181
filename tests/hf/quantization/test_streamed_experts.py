"""Mixtures of experts that are streamed from their files: equal bytes, for every kind of file."""

from __future__ import annotations

import pytest
import torch
from helpers.expert_models import batches, build
from helpers.stored_runs import files, read_rows

from ptqkit.hf import quantize
from ptqkit.hf.quantization.state import RunState, state_folder

OPTIONS = {"bits": 4, "group_size": 8, "symmetric": True, "progress": False}


def run(folder, out, way, data=None, **options):
    given = {**OPTIONS, **options, "stream": way, "out_dir": out}
    return quantize(str(folder), "quality", data or batches(), **given)


def rows(folder):
    return read_rows(folder, "damping", "tokens", "rule")


def same(folder, tmp_path, **options):
    for out, way in (("memory", False), ("streamed", True)):
        run(folder, tmp_path / out, way, **options)
    assert files(tmp_path / "streamed") == files(tmp_path / "memory")
    assert rows(tmp_path / "streamed") == rows(tmp_path / "memory")
    return rows(tmp_path / "streamed")


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
def test_files_are_those_of_a_run_in_memory(kind, tmp_path):
    build(kind).save_pretrained(tmp_path / "model")
    found = same(tmp_path / "model", tmp_path, data=batches(2, 1, 24))
    assert any(".experts." in row["name"] and row["rule"] for row in found)
    assert not state_folder(tmp_path / "streamed").exists()


def test_experts_that_stay_float_and_half_precision(tmp_path):
    build("gpt_oss").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    overrides = {"*.0.mlp.experts.1.*": "skip", "*.1.mlp.experts": "skip"}
    found = same(tmp_path / "model", tmp_path, overrides=overrides)
    names = {row["name"] for row in found if ".experts." in row["name"]}
    assert names and any(row["status"].startswith("skipped") for row in found)


def test_all_tokens_calibrate_every_expert(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    found = same(tmp_path / "model", tmp_path, calibrate_all_experts=True)
    assert all(row["tokens"] == 192 for row in found if ".experts." in row["name"])


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    build("mixtral").save_pretrained(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "whole", True)
    keep = RunState.keep

    def stop(self, block):
        if self.finished == 1:
            raise RuntimeError("stop")
        return keep(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "keep", stop)
        with pytest.raises(RuntimeError, match="stop"):
            run(tmp_path / "model", tmp_path / "out", True)
    run(tmp_path / "model", tmp_path / "out", True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")


def test_rounding_to_nearest_needs_no_data(tmp_path):
    build("olmoe").save_pretrained(tmp_path / "model")
    for out, way in (("memory", False), ("streamed", True)):
        quantize(str(tmp_path / "model"), "rtn", stream=way, out_dir=tmp_path / out, **OPTIONS)
    assert files(tmp_path / "streamed") == files(tmp_path / "memory")
