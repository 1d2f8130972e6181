"""What a checkpoint may replace, and what it never touches."""

from __future__ import annotations

import json

import pytest

from ptqkit._places import claim_place


def checkpoint(folder, quantized=True, **files):
    folder.mkdir(parents=True)
    config = {"quantization_config": {}} if quantized else {}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json", *files.get("more", ())):
        (folder / name).write_text("x")
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.is_file() and p.read_text() for p in folder.rglob("*")}


def refused(message, target, source=None):
    with pytest.raises(FileExistsError, match=message) as error:
        claim_place(target, True, source)
    assert "\n" not in str(error.value) and str(target) in str(error.value)


def test_the_source_stays(tmp_path):
    # As if it were a checkpoint, so that nothing else protects it.
    source = checkpoint(tmp_path / "above/model")
    (tmp_path / "above/config.json").write_text('{"quantization_config": {}}')
    inside = checkpoint(source / "w4")
    (tmp_path / "link").symlink_to(source)
    refused("is the folder of the model itself, kept: give another", source, source)
    refused("is the folder of the model itself", source, tmp_path / "link")
    refused(f"holds the folder of the model, {source}", source.parent, source)
    refused(f"lies in the folder of the model, {source}", inside, source)
    with pytest.raises(FileExistsError, match="is the folder of the model itself"):
        claim_place(tmp_path / "link", True, source)
    assert claim_place(source / "new", True, source) == source / "new"


def test_the_current_directory_stays(tmp_path, monkeypatch):
    target = checkpoint(tmp_path / "w4")
    (target / "sub").mkdir()
    monkeypatch.chdir(target / "sub")
    refused("holds the current directory, kept", target)
    monkeypatch.chdir(target)
    refused("is the current directory, kept", target)
    for name in (".", ""):
        with pytest.raises(FileExistsError, match="is the current directory"):
            claim_place(name, True)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    refused("is the current directory", tmp_path / "empty")


def test_the_cache_of_the_hub_stays(tmp_path):
    snapshot = checkpoint(tmp_path / "models--a--b/snapshots/abc")
    (tmp_path / "link").symlink_to(snapshot)
    refused("lies in the cache of the Hugging Face Hub, kept", snapshot)
    with pytest.raises(FileExistsError, match="cache of the Hugging Face Hub"):
        claim_place(tmp_path / "link", True)
    refused("cache of the Hugging Face Hub", snapshot / "new")
    refused("cache of the Hugging Face Hub", snapshot.parent)
    assert claim_place(tmp_path / "models--mine", True) == tmp_path / "models--mine"


@pytest.mark.parametrize(
    "name",
    [
        "notes.md",
        "README.md",
        "pytorch_model.bin",
        "adapter_config.json",
        ".git",
        "run.log",
        "a.gguf",
    ],
)
def test_files_that_no_checkpoint_consists_of_stay(tmp_path, name):
    target = checkpoint(tmp_path / "w4", more=[name])
    refused(f"holds what no checkpoint consists of, kept: {name}; move that away", target)


def test_many_such_files_are_counted(tmp_path):
    target = checkpoint(tmp_path / "w4", more=[f"{i}.txt" for i in range(9)])
    refused("kept: 0.txt, 1.txt, 2.txt and 6 more;", target)


def test_float_models_and_other_folders_stay(tmp_path):
    refused("holds a float model, not a quantized one", checkpoint(tmp_path / "m", False))
    broken = checkpoint(tmp_path / "broken")
    (broken / "config.json").write_text("[")
    refused("holds a float model, not a quantized one", broken)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("x")
    refused("holds no config.json", tmp_path / "other")


def test_a_checkpoint_is_replaced_if_asked(tmp_path):
    files = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "merges.txt"]
    files += ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
    files += ["ptqkit_recipe.json", "ptqkit_report.json", "ptqkit_softmax.json", "vocab.json"]
    files += ["added_tokens.json", "chat_template.jinja", "tokenizer.model", "spiece.model"]
    target = checkpoint(tmp_path / "w4", more=files)
    before = contents(tmp_path)
    assert claim_place(target, True) == target
    with pytest.raises(FileExistsError, match="is not empty: give overwrite=True"):
        claim_place(target)
    assert contents(tmp_path) == before
