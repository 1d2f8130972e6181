"""Models in the type of their files, for as long as they are written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ptqkit.hf.models import dtypes
from ptqkit.hf.models.dtypes import (
    as_dtype,
    dtype_name,
    dtype_of,
    slow_arithmetic,
    stored_as,
)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("kept", torch.full((3,), 1 / 3))
        self.register_buffer("rotary", torch.full((3,), 1 / 3), persistent=False)
        self.register_buffer("count", torch.arange(3))


def test_names():
    assert as_dtype("float16") is as_dtype(torch.float16) is torch.float16
    assert dtype_name(torch.bfloat16) == "bfloat16"
    for bad in ("float99", "int8", torch.int8, "nn", None):
        with pytest.raises(ValueError, match="dtype must be a floating-point type"):
            as_dtype(bad)


def test_stored_as_converts_what_is_saved_and_back():
    model = Tied().half().float()
    model.rotary.fill_(1 / 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError), stored_as(model, torch.float16):
        assert dtype_of(model) == torch.float16 and model.second.weight is model.first.weight
        assert model.kept.dtype == torch.float16 and model.count.dtype == torch.int64
        assert model.rotary.dtype == torch.float32
        raise KeyError
    assert dtype_of(model) == torch.float32 and model.rotary[0] == torch.tensor(1 / 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_stored_as_the_same_type_does_nothing():
    model = Tied()
    data = model.first.weight.data_ptr()
    with stored_as(model, torch.float32):
        assert model.first.weight.data_ptr() == data


def test_slow_arithmetic_is_told(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(dtypes, "show_config", lambda: {"cpu_levels": ["base", "avx2"]})
    (text,) = slow_arithmetic(Tied().bfloat16())
    assert "bfloat16 on a CPU" in text and "stored_dtype='bfloat16'" in text
    assert slow_arithmetic(Tied()) == slow_arithmetic(Tied().to("meta").bfloat16()) == []
    monkeypatch.setattr(dtypes, "show_config", lambda: {"cpu_levels": ["base", "avx512_bf16"]})
    assert slow_arithmetic(Tied().bfloat16()) == []
