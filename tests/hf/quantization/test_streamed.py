"""Models that are quantized block by block from their files: equal bytes, resumed, bounded."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from helpers.driver_models import build, padded_batches, tokens
from helpers.stored_runs import files, read_rows
from helpers.stream_calls import in_limited_memory, killed_after, killed_at, quantize_stored

from ptqkit import ActivationQuantization
from ptqkit.errors import PreflightError, UsageError
from ptqkit.hf import open_model, quantize, read_matrices
from ptqkit.hf.quantization import streamed
from ptqkit.hf.quantization.state import RunState, state_folder

OPTIONS = {"group_size": 16, "batch_size": 2}
RECIPES = {
    "gptq": ("quality", {"bits": 3}),
    "static": (
        "reference",
        {
            "symmetric": True,
            "activations": ActivationQuantization(8, "tensor"),
            "bias_correction": True,
        },
    ),
    "rtn": ("rtn", {}),
}


def make(folder, name="llama", layers=None, dtype=None, shards=None):
    """Save a tiny model; a Llama may have more layers, and several files."""
    model = build(name)
    if layers is not None:
        model.config.num_hidden_layers = layers
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(model.config)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder, **({} if shards is None else {"max_shard_size": shards}))
    return folder


def stream(folder, out, data=None, recipe="reference", **options):
    data = tokens() if data is None else data
    options = {**OPTIONS, "progress": False, "stream": True, **options}
    return quantize(folder, recipe, data, out_dir=out, **options)


def in_memory(folder, out, data=None, recipe="reference", **options):
    return stream(folder, out, data, recipe, stream=False, **options)


def rows(folder):
    return read_rows(folder, "damping", "tokens", "bits_per_weight")


@pytest.mark.parametrize(
    "name, recipe", [("llama", "rtn"), ("gpt2", "static"), ("t5", "gptq"), ("opt", "gptq")]
)
def test_files_are_those_of_a_run_in_memory(name, recipe, tmp_path):
    folder = make(tmp_path / "model", name)
    method, options = RECIPES[recipe]
    data = None if recipe == "rtn" else padded_batches(name)
    for out, way in (("memory", False), ("streamed", True)):
        given = {**OPTIONS, **options, "out_dir": tmp_path / out, "progress": False}
        quantize(folder, method, data, stream=way, **given)
    assert files(tmp_path / "streamed") == files(tmp_path / "memory")
    assert rows(tmp_path / "streamed") == rows(tmp_path / "memory")
    assert not state_folder(tmp_path / "streamed").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_several_shards(dtype, tmp_path):
    folder = make(tmp_path / "model", layers=3, dtype=dtype, shards="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    in_memory(folder, tmp_path / "memory")
    stream(folder, tmp_path / "streamed")
    assert files(tmp_path / "streamed") == files(tmp_path / "memory")


def test_head_and_skipped_blocks(tmp_path):
    folder = make(tmp_path / "model", layers=3)
    options = {"include": ("lm_head",), "overrides": {"*.1.*": "skip"}}
    in_memory(folder, tmp_path / "memory", **options)
    result = stream(folder, tmp_path / "streamed", **options)
    assert files(tmp_path / "streamed") == files(tmp_path / "memory")
    assert "lm_head" in read_matrices(result.checkpoint.directory)
    assert all(p.device.type == "meta" for p in result.model.parameters())


def test_outputs_in_files_if_the_budget_says_so(tmp_path, monkeypatch):
    folder = make(tmp_path / "model")
    first = stream(folder, tmp_path / "held")
    needed = first.report.memory["estimate_streamed"]
    second = stream(folder, tmp_path / "spooled", memory_budget=needed - 1)
    assert "outputs of blocks too" in second.report.schedule_reason
    assert "outputs" not in first.report.schedule_reason
    assert second.report.memory["estimate_streamed"] < needed
    assert files(tmp_path / "spooled") == files(tmp_path / "held")
    with pytest.raises(PreflightError, match="one block at a time"):
        stream(folder, tmp_path / "none", memory_budget=1000)
    assert not state_folder(tmp_path / "none").exists()


def test_only_one_block_is_in_memory(tmp_path):
    """Of all parameters, those of one block and the mapped rest are real at any time."""
    folder = make(tmp_path / "model", layers=4)
    seen = set()
    stored = open_model(folder, stream=True)[0]

    def look(event):
        real = [n for n, p in stored.model.named_parameters() if p.device.type != "meta"]
        seen.add(frozenset(n.split(".")[2] for n in real if n.startswith("model.layers.")))

    quantize(stored, "reference", tokens(), out_dir=tmp_path / "out", progress=look, **OPTIONS)
    assert seen == {frozenset(str(i)) for i in range(4)}


def test_a_model_that_does_not_fit_is_streamed_by_itself(tmp_path, monkeypatch):
    folder = make(tmp_path / "model")
    result = quantize(folder, "rtn", out_dir=tmp_path / "one", progress=False, group_size=16)
    assert result.matrices
    monkeypatch.setattr("ptqkit.hf.quantization.opening.available_memory", lambda device: 10_000)
    result = quantize(folder, "rtn", out_dir=tmp_path / "two", progress=False, group_size=16)
    assert not result.matrices
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_models_on_the_meta_device_are_streamed_from_their_folder(tmp_path):
    folder = make(tmp_path / "model")
    in_memory(folder, tmp_path / "memory")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, device_map={"": "meta"})
    quantize(model, "reference", tokens(), out_dir=tmp_path / "out", progress=False, **OPTIONS)
    assert files(tmp_path / "out") == files(tmp_path / "memory")
    offloaded = transformers.LlamaForCausalLM.from_pretrained(
        folder,
        device_map={
            **dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), "cpu"),
            **dict.fromkeys(("model.norm", "lm_head"), "cpu"),
            "model.layers.1": "disk",
        },
        offload_folder=tmp_path / "offload",
    )
    assert any(p.device.type == "meta" for p in offloaded.parameters())
    quantize(offloaded, "reference", tokens(), out_dir=tmp_path / "off", progress=False, **OPTIONS)
    assert files(tmp_path / "off") == files(tmp_path / "memory")
    with torch.no_grad():
        offloaded.model.norm.weight += 1
    with pytest.raises(PreflightError, match="model.norm.weight has other values there"):
        quantize(offloaded, "reference", tokens(), out_dir=tmp_path / "x", progress=False)
    offloaded.name_or_path = ""
    with pytest.raises(PreflightError, match="the folder of the model is not known"):
        quantize(offloaded, "reference", tokens(), out_dir=tmp_path / "x", progress=False)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of data are Linux's")
def test_a_model_four_times_the_limit_of_the_process(tmp_path):
    if "IN_A_FRESH_PROCESS" not in os.environ:
        # The heap of this one has room that other tests left.
        test = f"{__file__}::test_a_model_four_times_the_limit_of_the_process"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        environment = {**os.environ, "IN_A_FRESH_PROCESS": "1"}
        done = subprocess.run(
            [*command, test], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout
        return
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=28,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    size = sum(p.stat().st_size for p in (tmp_path / "model").glob("*.safetensors"))
    limit = size // 4
    few = {"*": "skip", "*.down_proj": {}}
    options = {**OPTIONS, "overrides": few, "diagnostics": False}
    quantize_stored(make(tmp_path / "tiny"), tmp_path / "first", tokens(), options)
    bounded = {**options, "memory_budget": limit}
    args = (tmp_path / "model", tmp_path / "out", tokens(), bounded)
    assert in_limited_memory(limit, quantize_stored, *args) == 0
    held = {**options, "stream": False}
    args = (tmp_path / "model", tmp_path / "memory", tokens(), held)
    assert in_limited_memory(limit, quantize_stored, *args) != 0, "the limit does not hold"
    quantize_stored(*args)
    assert files(tmp_path / "out") == files(tmp_path / "memory")


def test_killed_before_a_file_operation_and_resumed(tmp_path):
    """Whatever file operation a kill comes before, the same call goes on to equal bytes."""
    folder = make(tmp_path / "model", layers=3)
    options = {**OPTIONS, "bias_correction": True, "memory_budget": 10**9}
    args = (folder, tmp_path / "out", tokens(), options)
    quantize_stored(folder, tmp_path / "whole", tokens(), options)
    draw = random.Random(0)
    for low, high in ((0, 12), (8, 25), (5, 20)):
        assert killed_at(draw.randint(low, high), quantize_stored, *args) == -signal.SIGKILL
    finished = len(list(state_folder(tmp_path / "out").glob("block-*.json")))
    assert finished
    quantize_stored(*args)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "whole"]


@pytest.mark.slow
def test_killed_at_30_random_moments(tmp_path):
    folder = make(tmp_path / "model", layers=12)
    args = (folder, tmp_path / "out", tokens(24), OPTIONS)
    quantize_stored(folder, tmp_path / "whole", *args[2:])
    draw, kills, blocks = random.Random(1), 0, 0
    moment = 1.0
    while kills < 30:
        code = killed_after(draw.uniform(0.1, moment), quantize_stored, *args)
        if code == 0:
            assert files(tmp_path / "out") == files(tmp_path / "whole")
            moment *= 0.7
            (tmp_path / "out").rename(tmp_path / f"out-{kills}")
            continue
        kills += 1
        done = len(list(state_folder(tmp_path / "out").glob("block-*.json")))
        moment *= 1.2 if done <= blocks else 1.0
        blocks = done
    if not (tmp_path / "out").exists():
        quantize_stored(*args)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_stopped_while_the_checkpoint_is_written(tmp_path, monkeypatch):
    folder = make(tmp_path / "model", layers=2)
    stream(folder, tmp_path / "whole")

    def full(*args, **kwargs):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("ptqkit.hf.quantization.driver.save_checkpoint", full)
        with pytest.raises(OSError, match="no space"):
            stream(folder, tmp_path / "out")
    stream(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def interrupted(folder, out, monkeypatch, after=2, **options):
    """Stop a run after some blocks; its state stays."""
    keep = RunState.keep

    def stop(self, block):
        if self.finished == after:
            raise RuntimeError("stop")
        return keep(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "keep", stop)
        with pytest.raises(RuntimeError, match="stop"):
            stream(folder, out, **options)
    return state_folder(out)


def test_another_input_is_refused_with_what_changed(tmp_path, monkeypatch):
    folder = make(tmp_path / "model", layers=3)
    state = interrupted(folder, tmp_path / "out", monkeypatch)
    before = sorted(p.name for p in state.iterdir())
    with pytest.raises(PreflightError, match=r"recipe.bits was 4, is 3\. Give the same input"):
        stream(folder, tmp_path / "out", bits=3)
    with pytest.raises(PreflightError, match="calibration.values differs"):
        stream(folder, tmp_path / "out", data=tokens(seed=1))
    weights = folder / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-4] + b"\0\0\0\1")
    with pytest.raises(PreflightError, match="model.tensors.model.norm.weight was"):
        stream(folder, tmp_path / "out")
    weights.write_bytes(original)
    monkeypatch.setattr(streamed, "__version__", "0")
    with pytest.raises(PreflightError, match=r'versions.ptqkit was ".*", is "0"'):
        stream(folder, tmp_path / "out")
    monkeypatch.undo()
    assert sorted(p.name for p in state.iterdir()) == before
    stream(folder, tmp_path / "out", memory_budget="1GiB", threads=2)
    assert not state.exists()


def test_damaged_state_is_refused(tmp_path, monkeypatch):
    folder = make(tmp_path / "model", layers=3)
    state = interrupted(folder, tmp_path / "out", monkeypatch)
    outputs = next(state.glob("outputs-*/*"))
    for path in (state / "block-00001.safetensors", outputs, state / "block-00000.json"):
        content = path.read_bytes()
        for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            if damaged is None and path.suffix == ".json":
                continue  # the block was not finished then: that is no damage
            with pytest.raises(ValueError, match="remove the folder to start again"):
                stream(folder, tmp_path / "out")
            path.write_bytes(content)


def test_files_of_others_stay(tmp_path, monkeypatch):
    folder = make(tmp_path / "model", layers=3)
    state = state_folder(tmp_path / "out")
    state.mkdir()
    (state / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        stream(folder, tmp_path / "out")
    assert (state / "notes.txt").read_text() == "mine"
    (state / "notes.txt").unlink()
    interrupted(folder, tmp_path / "out", monkeypatch)
    (state / "notes.txt").write_text("mine")
    stream(folder, tmp_path / "out")
    assert [p.name for p in state.iterdir()] == ["notes.txt"]


def test_two_processes_do_not_share_a_state(tmp_path):
    folder = make(tmp_path / "model")
    with RunState(state_folder(tmp_path / "out")).opened() as state:
        (state.root / "run.json").write_text("{}")
        with pytest.raises(UsageError, match="another process works on"):
            stream(folder, tmp_path / "out")


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    folder = make(tmp_path / "model", layers=3)
    whole = stream(folder, tmp_path / "whole")
    replace, left = os.replace, [3]

    def full(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="1 blocks are done and kept; make room"):
            stream(folder, tmp_path / "out")
    stream(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(whole.checkpoint.directory)


def test_missing_and_damaged_files_of_the_model(tmp_path):
    folder = make(tmp_path / "model", layers=3, shards="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {shard.name} of"):
        stream(folder, tmp_path / "out")
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="is damaged: it has"):
        stream(folder, tmp_path / "out")
    shard.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="not a safetensors file"):
        stream(folder, tmp_path / "out")
    assert not state_folder(tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_found_before_the_run(tmp_path):
    model = build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(PreflightError, match="layers.1.mlp.up_proj: 1 of its 64x32 weights"):
        stream(tmp_path / "model", tmp_path / "out")


def test_what_cannot_be_streamed_says_so(tmp_path):
    folder = make(tmp_path / "model")
    with pytest.raises(PreflightError, match="equalization scales the whole model"):
        stream(folder, tmp_path / "out", recipe="aweq", per_tensor=True, group_size=None)
    with pytest.raises(PreflightError, match="needs out_dir"):
        stream(folder, None)
    with pytest.raises(PreflightError, match="needs the model in memory"):
        stream(folder, tmp_path / "out", schedule="one-pass")
    with pytest.raises(UsageError, match="give its path"):
        quantize(build(), "rtn", stream=True)
