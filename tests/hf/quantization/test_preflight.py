"""One report before the first forward, of everything that can be known by then."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from helpers.driver_models import build, tokens

import ptqkit
from ptqkit.errors import CalibrationError, PreflightError, Problems, UsageError, by_cause
from ptqkit.hf.checkpoint import save as save_module
from ptqkit.hf.models.structure import find_structure
from ptqkit.hf.quantization import preflight
from ptqkit.hf.quantization.preflight import checkpoint_bytes
from ptqkit.recipe.options import ActivationQuantization
from ptqkit.recipe.recipe import Recipe

OPTIONS = {"bits": 4, "group_size": 16, "progress": False}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.ff = torch.nn.Linear(16, 16)

    def forward(self, x):
        return self.ff(x)


class Net(torch.nn.Module):
    """A model that is not of transformers."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(64, 16)
        self.layers = torch.nn.ModuleList([Block(), Block()])

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def problems(model=None, recipe="quality", data=None, **changes):
    """Problems of a run that stops before the model runs."""
    model = build() if model is None else model

    def forward(*args, **kwargs):
        raise AssertionError("the model ran")

    model.forward = forward
    with pytest.raises(PreflightError) as error:
        ptqkit.quantize(model, recipe, tokens() if data is None else data, **OPTIONS | changes)
    return error.value.problems


def test_arguments_data_and_place_are_one_report(tmp_path):
    (tmp_path / "file").touch()
    found = problems(
        recipe="qualty",
        data="none.txt",
        schedule="onepass",
        on_error="ignore",
        checkpoint_format="gguf",
        memory_budget="much",
        stored_dtype="int8",
        bit=4,
        out_dir=tmp_path / "file",
    )
    text = "\n".join(found)
    for part in (
        "schedule must be one of",
        "on_error must be one of",
        "checkpoint_format must be one of",
        "memory_budget must be bytes",
        "recipe has no option 'bit'",
        "'qualty'",
        "dtype must be a floating-point type",
        "calibration 'none.txt' is neither a file",
        "out_dir 'file' is a file",
    ):
        assert text.count(part) == 1, (part, text)
    assert len(found) == 9


def test_a_misspelt_choice_beside_a_missing_file():
    found = problems(data="none.txt", schedule="onepass")
    assert len(found) == 2 and found[1].kind.__mro__[1] is CalibrationError
    with pytest.raises(ValueError, match="^schedule must be one of"):
        ptqkit.quantize(build(), "quality", tokens(), schedule="onepass", **OPTIONS)
    with pytest.raises(UsageError, match="^memory_budget must be"):
        ptqkit.quantize(build(), "quality", tokens(), memory_budget="much", **OPTIONS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "is a file"),
        ("/dev/null", "is a device"),
        ("n" * 250, "the name is too long"),
        ("loop", "lead in a circle"),
        ("/proc/x", "cannot be created in /proc"),
        (".", "is the current directory"),
    ],
)
def test_places_where_nothing_can_be_written(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    [found] = problems(out_dir=name, overwrite=True)
    assert message in found and found.startswith("out_dir ")
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_the_models_own_folder_stays(tmp_path):
    build().save_pretrained(tmp_path / "float")
    model = type(build()).from_pretrained(tmp_path / "float")
    before = (tmp_path / "float/model.safetensors").read_bytes()
    [found] = problems(model, out_dir=tmp_path / "float", overwrite=True)
    assert "is the folder of the model itself" in found
    result = ptqkit.quantize(
        type(model).from_pretrained(tmp_path / "float"), "quality", tokens(), **OPTIONS
    )
    with pytest.raises(FileExistsError, match="is the folder of the model itself"):
        result.save(tmp_path / "float", overwrite=True)
    assert (tmp_path / "float/model.safetensors").read_bytes() == before


def test_what_no_format_holds_is_one_line(tmp_path):
    [found] = problems(build().double(), out_dir=tmp_path / "out")
    assert "model.layers.0.self_attn.q_proj: weights of dtype float64" in found
    assert found.endswith("(and 13 more layers)")
    # In memory that is no problem.
    ptqkit.quantize(build().double(), "quality", tokens(), **OPTIONS)


def test_a_model_without_configuration(tmp_path):
    [found] = problems(Net(), out_dir=tmp_path / "out")
    assert "Net is no transformers model with a configuration" in found
    ptqkit.quantize(Net(), "quality", tokens(), **OPTIONS)


def test_tensors_and_hooks_that_no_file_holds(tmp_path):
    model = build()
    model.register_buffer("wave", torch.zeros(3, dtype=torch.complex64))
    assert (
        "wave: dtype torch.complex64 has no safetensors code"
        in problems(model, out_dir=tmp_path / "out")[0]
    )
    ptqkit.quantize(model_with_heads(), "rtn", **OPTIONS)
    [found] = problems(model_with_heads(), out_dir=tmp_path / "out")
    assert "has an attention hook that no file can hold" in found


def model_with_heads():
    """A model with an attention hook that is nobody's quantizer."""
    from ptqkit.hf import find_attention, install_attention
    from ptqkit.nn.attention import AttentionHook

    model = build()
    install_attention(model, {name: AttentionHook() for name in find_attention(model)})
    return model


@pytest.mark.parametrize(
    ("checkpoint_format", "changes"),
    [
        ("compressed-tensors", {"symmetric": True}),
        ("compressed-tensors", {"symmetric": True, "bits": 3}),
        (
            "compressed-tensors",
            {
                "bits": 8,
                "group_size": None,
                "symmetric": True,
                "activations": ActivationQuantization(8),
            },
        ),
        ("gptq", {"order": "act"}),
        ("gptq_v2", {"group_size": 8}),
        ("ptqkit", {"group_size": 8, "bits": 3, "order": "act"}),
        ("ptqkit", {"bits": "ternary"}),
        ("ptqkit", {"method": "rtn", "group_size": None, "bits": 2}),
        ("ptqkit", {"bias_correction": True, "activations": ActivationQuantization(8, "tensor")}),
    ],
)
def test_the_room_that_is_asked_for_before_is_enough(
    tmp_path, monkeypatch, checkpoint_format, changes
):
    model, asked = build(), []
    monkeypatch.setattr(save_module, "room_needed", lambda size, *rest: asked.append(size) or size)
    recipe = Recipe.preset("reference", **{"bits": 4, "group_size": 16, **changes})
    estimate = checkpoint_bytes(model, find_structure(model, recipe).targets)
    result = ptqkit.quantize(
        model,
        recipe,
        tokens(),
        progress=False,
        out_dir=tmp_path / "out",
        checkpoint_format=checkpoint_format,
    )
    written = result.checkpoint.tensor_bytes
    assert asked[-1] == written <= estimate < 1.35 * written
    assert save_module.room_needed(0, 14) < 1 << 25


def test_everything_the_writer_needs_counts(tmp_path, monkeypatch):
    """A disk on which the tensors alone would fit is refused before the run, not at its end."""
    model = build()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size))
    [found] = problems(model, out_dir=tmp_path / "out")
    assert "the checkpoint needs about" in found


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_the_limit_of_file_sizes_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.resource, "getrlimit", lambda which: (30_000, 30_000))
    [found] = problems(out_dir=tmp_path / "out")
    assert "the limit of this process (ulimit -f) is 30,000" in found


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_result_that_cannot_be_saved_is_not_lost(tmp_path, monkeypatch, error):
    def failing(*args):
        raise error("no")

    with monkeypatch.context() as patch:
        patch.setattr(save_module, "write_tensors", failing)
        with pytest.raises(error, match="no") as caught:
            ptqkit.quantize(
                build(), "quality", tokens(), out_dir=tmp_path / "out", symmetric=True, **OPTIONS
            )
    assert any("error.result.save" in note for note in getattr(caught.value, "__notes__", ["x"]))
    assert list(tmp_path.iterdir()) == []
    info = caught.value.result.save(tmp_path / "again")
    assert info.quantized_layers == 14


def test_one_cause_is_one_line():
    layers = [f"layers.{i}.linear" for i in range(56)]
    texts = [f"{name}: too wide" for name in layers]
    texts += ["joint: of no layer", f"an option: {layers[0]}: {{}} odd", f"{layers[1]}: too thin"]
    texts += [f"{name}: pair" for name in layers[:2]]
    assert by_cause(texts, set(layers)) == [
        "layers.0.linear: too wide (and 55 more layers)",
        "joint: of no layer",
        "an option: layers.0.linear: {} odd",
        "layers.1.linear: too thin",
        "layers.0.linear: pair (and layers.1.linear)",
    ]


def test_an_error_that_is_alone_is_raised_as_it_was():
    found, error = Problems(), UsageError("wrong")
    found.raise_if_any()
    with found.noting():
        raise error
    with pytest.raises(UsageError) as caught:
        found.raise_if_any()
    assert caught.value is error
    with found.noting():
        raise PreflightError(["one", "two"])
    with pytest.raises(PreflightError) as caught:
        found.raise_if_any()
    assert caught.value.problems == ["wrong", "one", "two"]
