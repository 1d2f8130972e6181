"""The demo as a whole, on little text."""

from __future__ import annotations

import json

import pytest

from ptqkit.cli import main

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
pytest.importorskip("accelerate")


def test_quick_demo(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, out = tmp_path / "demo.json", tmp_path / "demo"
    before = torch.random.get_rng_state()
    threads = torch.get_num_threads()
    assert main(["demo", "--quick", "--out", str(out), "--json", str(file)]) == 0
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert "GPTQ, quality recipe" in printed and "Loaded with plain transformers" in printed
    found = json.loads(file.read_text(encoding="utf-8"))
    excess = {row["recipe"]: row["excess"] for row in found["rows"]}
    assert excess["float"] == 0.0 < excess["quality"] < excess["reference"] < excess["rtn"]
    assert found["checkpoint"]["logits_difference"] == 0.0
    assert found["checkpoint"]["format"] == "compressed-tensors"
    assert found["checkpoint"]["text"].startswith("def ")
    assert (out / "demo.png").stat().st_size > 5_000
    assert (out / "checkpoint" / "model.safetensors").stat().st_size < 6_000_000


def test_generate_repeats_with_its_seed():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ptqkit.demo import MODEL_DIR
    from ptqkit.demo.run import generate

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    first, again, other = (generate(model, tokenizer, "import ", 8, seed=s) for s in (0, 0, 3))
    assert first == again != other
    # Next to no temperature: the likeliest token, as a plain forward pass gives it.
    ids = tokenizer("import ", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = model(input_ids=ids).logits[0, -1].argmax()
    greedy = generate(model, tokenizer, "import ", 1, temperature=1e-4)
    assert greedy == tokenizer.decode([*ids[0].tolist(), int(best)], skip_special_tokens=True)


def test_every_quantization_starts_from_the_float_weights():
    from ptqkit.demo.workbench import demo_workbench

    bench = demo_workbench(test_windows=1, calibration_windows=1)
    first = bench.measure("rtn", bits=2, group_size=128)
    bench.measure("reference", bits=3, group_size=64)
    again = bench.measure("rtn", bits=2, group_size=128)
    assert again.perplexity == first.perplexity > bench.float_row.perplexity


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_demo_leaves_no_folder(tmp_path, capsys, monkeypatch, error):
    def stop(*args, **kwargs):
        raise error("stopped")

    monkeypatch.setattr("ptqkit.demo.run.run_demo", stop)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "mine").mkdir()
    for out in ([], ["--out", str(tmp_path / "a/b")], ["--out", str(tmp_path / "mine")]):
        assert main(["demo", *out]) == (130 if error is KeyboardInterrupt else 1)
        assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_the_demo_checks_its_folder_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ptqkit.demo.run.run_demo", None)
    (tmp_path / "file").touch()
    for name, message in (("file", "exists already"), ("file/x", "is a file"), ("n" * 250, "long")):
        assert main(["demo", "--out", str(tmp_path / name)]) == 3
        assert message in capsys.readouterr().err


def test_demo_keeps_what_is_there(tmp_path, capsys):
    (tmp_path / "mine").write_text("x", encoding="utf-8")
    assert main(["demo", "--out", str(tmp_path)]) == 3
    assert "exists already" in capsys.readouterr().err
    assert main(["demo", "--picture", str(tmp_path / "no" / "p.png")]) == 2
