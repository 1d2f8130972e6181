"""The safetensors writer: same bytes as the library's, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref

import pytest
import torch

from ptqkit._units import parse_bytes
from ptqkit.hf.checkpoint.files import TensorPlan, write_tensors


def test_written_files_are_what_safetensors_writes(tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = {
        "odd": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3, dtype=torch.int64),
        "transposed": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).t(),
        "bf16": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
        "flag": torch.tensor([True, False, True]),
    }
    write_tensors(tmp_path, [TensorPlan.of(k, v) for k, v in tensors.items()])
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            start = 8 + length + entry["data_offsets"][0]
            assert start % tensors[name].element_size() == 0, f"{name} is not aligned"
    whole = {k: v.contiguous() for k, v in tensors.items()}
    save_file(whole, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert sizes["model.safetensors"] == sizes["theirs.safetensors"]


def test_the_writer_holds_one_tensor_at_a_time(tmp_path):
    alive: list[weakref.ref] = []

    def make():
        gc.collect()
        assert not any(ref() is not None for ref in alive[:-1]), "an earlier tensor is still held"
        tensor = torch.ones(1000)
        alive.append(weakref.ref(tensor))
        return tensor

    plans = [TensorPlan(f"t{i}", torch.float32, (1000,), make) for i in range(6)]
    write_tensors(tmp_path, plans)
    assert len(alive) == 6


def test_writer_errors(tmp_path):
    one = TensorPlan.of("a", torch.ones(2))
    with pytest.raises(ValueError, match="occur twice: a"):
        write_tensors(tmp_path, [one, one])
    with pytest.raises(ValueError, match="a: planned"):
        write_tensors(tmp_path, [dataclasses.replace(one, shape=(3,))])
    with pytest.raises(ValueError, match="a: on the meta device"):
        TensorPlan.of("a", torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="a: dtype torch.complex64"):
        TensorPlan.of("a", torch.ones(2, dtype=torch.complex64))
    assert parse_bytes("5GB") == 5 * 10**9 and parse_bytes("1.5 MiB") == 3 << 19
    for bad in ("much", "5 PB", 0, -1, True, 1.5):
        with pytest.raises(ValueError, match="max_shard_size"):
            parse_bytes(bad, "max_shard_size")
