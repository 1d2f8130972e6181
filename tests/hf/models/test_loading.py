"""Folders of models: dtype and device they run with."""

from __future__ import annotations

import json

import pytest

from ptqkit.errors import UsageError

pytest.importorskip("torch")

from ptqkit.hf.models import dtypes
from ptqkit.hf.models.loading import (
    compute_dtype,
    load_tokenizer,
    model_folder,
    pick_device,
    stored_dtype,
)


def test_arithmetic_follows_the_stored_dtype():
    assert compute_dtype("auto", "float16", "cpu") == "float32"
    assert compute_dtype("auto", "float16", "cuda") == "float16"
    assert compute_dtype("float16", "float32", "cpu") == "float16"
    assert compute_dtype("auto", "nonsense", "cpu") == "nonsense"  # refused where it is used


@pytest.mark.parametrize(
    ("machine", "levels", "expected"),
    [
        ("x86_64", ["base", "avx512", "avx512_vnni"], "float32"),
        ("AMD64", ["base", "avx2"], "float32"),
        ("x86_64", ["base", "avx512_bf16"], "bfloat16"),
        ("aarch64", ["base", "neon"], "bfloat16"),
    ],
)
def test_bfloat16_runs_as_float32_where_a_cpu_has_no_instructions_for_it(
    monkeypatch, machine, levels, expected
):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(dtypes, "show_config", lambda: {"cpu_levels": levels})
    assert compute_dtype("auto", "bfloat16", "cpu") == expected
    assert compute_dtype("auto", "bfloat16", "cpu", room=False) == "bfloat16"
    assert compute_dtype("auto", "bfloat16", "cuda") == "bfloat16"
    assert compute_dtype("bfloat16", "bfloat16", "cpu") == "bfloat16"


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "float16"}, "float16"), ({}, "float32")],
)
def test_stored_dtype(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert stored_dtype(tmp_path) == expected
    assert model_folder(tmp_path) == tmp_path and load_tokenizer(tmp_path) is None


def test_what_is_not_a_model(tmp_path):
    with pytest.raises(UsageError, match="has no config.json, so it is not a model"):
        model_folder(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match="is not valid JSON"):
        stored_dtype(tmp_path)
    with pytest.raises(UsageError, match="there is no such folder"):
        model_folder(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["./none", "../none", ".none", "-none/model"])
def test_what_cannot_be_a_name_is_not_looked_for_elsewhere(name):
    with pytest.raises(UsageError, match="there is no such folder$"):
        model_folder(name)


def test_device():
    assert pick_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="device nowhere cannot be used here"):
        pick_device("nowhere")
