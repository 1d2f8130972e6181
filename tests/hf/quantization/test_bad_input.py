"""Large runs that cannot be done, or gone on with: each says in a line what to do."""

from __future__ import annotations

import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from helpers.driver_models import build, tokens
from helpers.forked_groups import in_processes

from ptqkit.errors import PreflightError
from ptqkit.hf import quantize
from ptqkit.hf.quantization import state
from ptqkit.hf.quantization.state import RunState, state_folder

OPTIONS = {"group_size": 16, "batch_size": 2, "progress": False}


@pytest.fixture
def folder(tmp_path):
    build().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def stream(folder, out, **options):
    return quantize(
        folder, "reference", tokens(), out_dir=out, stream=True, **{**OPTIONS, **options}
    )


def stopped(folder, out, monkeypatch):
    """Stop a run before its second block is kept; return its state."""
    keep = RunState.keep

    def stop(self, block):
        if self.finished:
            raise RuntimeError("stop")
        return keep(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "keep", stop)
        with pytest.raises(RuntimeError, match="stop"):
            stream(folder, out)
    return state_folder(out)


def test_a_disk_without_room_is_known_before_the_run(folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    for way in (True, False):
        with pytest.raises(PreflightError, match="the disk has .*MiB free") as error:
            quantize(folder, "reference", tokens(), out_dir=tmp_path / "out", stream=way, **OPTIONS)
        assert error.value.problems[0].kind is OSError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_the_state_has_room_of_its_own(folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    real = shutil.disk_usage

    def full(path):
        return usage(10**9, 10**9, 1000) if "partial" in str(path) else real(path)

    monkeypatch.setattr(state.shutil, "disk_usage", full)
    with pytest.raises(PreflightError, match=r"out\.partial needs about .* while the run goes on"):
        stream(folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_limit_on_files_is_named(folder, tmp_path, monkeypatch):
    def limited(*args, **options):
        raise OSError(27, "File too large")

    monkeypatch.setattr(state, "write_file", limited)
    with pytest.raises(OSError, match=r"ulimit -f.* 0 blocks are done and kept"):
        stream(folder, tmp_path / "out")


@pytest.mark.parametrize("way", [True, False])
def test_a_missing_shard_is_named(way, folder, tmp_path):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        quantize(folder, "rtn", out_dir=tmp_path / "out", stream=way, **OPTIONS)


@pytest.mark.parametrize("text", ["{}", "null", "{"])
def test_a_state_that_is_not_one(text, folder, tmp_path, monkeypatch):
    found = stopped(folder, tmp_path / "out", monkeypatch)
    for name in ("block-00000.json", "run.json"):
        path = found / name
        before = path.read_bytes()
        path.write_text(text)
        with pytest.raises((ValueError, PreflightError), match="remove the folder to start again"):
            stream(folder, tmp_path / "out")
        path.write_bytes(before)
    stream(folder, tmp_path / "out")


def test_a_process_whose_tokens_are_all_padding():
    """Its batches do not count, and are no error."""
    ids = tokens(8)
    mask = torch.ones_like(ids)
    mask[4:] = 0
    batches = [
        {"input_ids": i, "attention_mask": m}
        for i, m in zip(ids.split(2), mask.split(2), strict=True)
    ]
    alone = quantize(build(), "reference", batches[:2], **OPTIONS)

    def call(rank):
        result = quantize(build(), "reference", batches, distributed=True, **OPTIONS)
        return {n: m.codes for n, m in result.matrices.items()}

    for found in in_processes(call):
        assert not isinstance(found, Exception), found
        wrong = sum(int(np.sum(m.codes != found[n])) for n, m in alone.matrices.items())
        assert wrong <= 1e-3 * sum(m.codes.size for m in alone.matrices.values())


def test_processes_that_do_not_divide_the_rows_or_the_batches():
    """Five batches and matrices of 32 to 64 rows on three processes."""
    alone = quantize(build(), "reference", tokens(10), **OPTIONS)

    def call(rank):
        result = quantize(build(), "reference", tokens(10), distributed=True, **OPTIONS)
        return {n: m.codes for n, m in result.matrices.items()}

    for found in in_processes(call, 3):
        wrong = sum(int(np.sum(m.codes != found[n])) for n, m in alone.matrices.items())
        assert wrong <= 1e-3 * sum(m.codes.size for m in alone.matrices.values())
