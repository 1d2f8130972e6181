"""The tables of layer kinds: models, methods and statistics on tiny made-up data."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
import torch

import ptqkit
from benchmarks.kinds import cases, encoder, resnet, run, tables
from benchmarks.kinds.adaround import adaround


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise in the form of Fashion-MNIST, and two authors who use other words."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (folder / "fashion-mnist").mkdir()
    for split, count in (("train", 20), ("t10k", 10)):
        images = draw.integers(0, 256, (count, 784), dtype=np.uint8)
        for what, head, values in (
            ("images-idx3", 16, images.tobytes()),
            ("labels-idx1", 8, bytes(range(10)) * (count // 10)),
        ):
            path = folder / "fashion-mnist" / f"{split}-{what}-ubyte.gz"
            path.write_bytes(gzip.compress(bytes(head) + values))
    (folder / "gutenberg").mkdir()
    words = [["sea", "ship", "wind", "sail"], ["law", "court", "judge", "case"]]
    texts = [" ".join(draw.choice(w, 1500)) + "\n" for w in words]
    lines, offset = ["split\toffset\tbytes\ttitle\tauthor"], 0
    for author, text in enumerate(texts):
        lines.append(f"train\t{offset}\t{len(text)}\tt\tauthor {author}")
        offset += len(text)
    (folder / "gutenberg" / "index.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "gutenberg" / "train.txt.gz").write_bytes(gzip.compress("".join(texts).encode()))
    return folder


def test_a_resnet_is_trained_saved_and_measured(data, tmp_path):
    facts = resnet.train(data / "fashion-mnist", tmp_path, "cpu", epochs=1, limit=16)
    model = resnet.load(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == 272_186
    images, labels = resnet.read_split(data / "fashion-mnist", "t10k")
    assert images.shape == (10, 1, 28, 28) and labels[:3].tolist() == [0, 1, 2]
    assert facts["accuracy"] == resnet.correct(model, images, labels).mean()
    assert (tmp_path / "resnet.safetensors").stat().st_size < 4e6


def test_an_encoder_is_trained_saved_and_measured(data, tmp_path):
    facts = encoder.train(data / "gutenberg", tmp_path, "cpu", epochs=1, limit=32)
    arrays = np.load(tmp_path / "windows.npz")
    assert arrays["train_ids"].shape[1] == 64 and set(arrays["test_labels"]) == {0, 1}
    names = json.loads((tmp_path / "authors.json").read_text())
    assert sorted(names) == ["author 0", "author 1"]
    ids, labels = (
        torch.from_numpy(arrays[f"test_{k}"].astype(np.int64)) for k in ("ids", "labels")
    )
    assert facts["accuracy"] == encoder.correct(encoder.load(tmp_path), ids, labels).mean()
    tokens = {label: set(arrays["train_ids"][arrays["train_labels"] == label].ravel().tolist())
              for label in (0, 1)}  # fmt: skip
    assert len(tokens[0] & tokens[1]) < 5  # start, end, and hardly a word
    assert (tmp_path / "encoder.safetensors").stat().st_size < 4e6


def test_every_method_quantizes_a_small_resnet(monkeypatch):
    torch.manual_seed(0)
    model = resnet.ResNet(width=4, depth=1).eval()
    images = torch.randn(8, 1, 12, 12)
    case = cases.Case(model, lambda seed: [images], lambda m: (None, None), False, {}, {})
    real = cases.adaround
    monkeypatch.setattr(cases, "adaround", lambda *a, **k: real(*a, **k, steps=20))
    with torch.no_grad():
        before, outputs = model(images), {}
        for method in case.methods():
            quantized = case.quantize(method, 3, 0)
            outputs[method] = quantized(images)
            for name in ("stem", "blocks.2.conv1", "head"):
                weight = quantized.get_submodule(name).weight
                assert all(len(row.unique()) <= 8 for row in weight.flatten(1)), (method, name)
    assert {"rtn", "gptq", "obq", "adaround"} <= outputs.keys() and "best" not in outputs
    errors = {m: float((y - before).square().sum()) for m, y in outputs.items()}
    assert all(e > 0 for e in errors.values()) and errors["obq"] < errors["rtn"]


def test_adaround_learns_to_round_better_than_nearest():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(200, 24)) @ draw.normal(size=(24, 24))
    H = (2 / len(x) * x.T @ x).astype(np.float32)
    W = draw.normal(size=(12, 24)).astype(np.float32)
    nearest = ptqkit.rtn(W, H=H, bits=3, group_size=None)
    found = adaround(W, H, 3, steps=300)
    steps = (found - W) / nearest.scales
    assert np.abs(steps).max() < 1.01  # up or down
    codes = found / nearest.scales
    np.testing.assert_allclose(codes, codes.round(), atol=1e-4)
    assert ptqkit.objective(W, found, H).sum() < 0.8 * nearest.objective


def test_a_table_has_paired_errors(tmp_path):
    right = {"net|0|float|-1": np.array([1, 1, 1, 0], bool)}
    right["net|4|gptq|0"] = np.array([1, 1, 0, 0], bool)
    right["net|4|gptq|1"] = np.array([1, 0, 0, 1], bool)
    np.savez_compressed(tmp_path / "items.npz", **right)
    rows = [[*key.split("|"), f"{v.mean()}", "", "1.0"] for key, v in right.items()]
    text = "\n".join(",".join(row) for row in [run.COLUMNS, *rows])
    (tmp_path / "runs.csv").write_text(text + "\n", encoding="utf-8")
    base, line = tables.lines(tmp_path)
    change = np.array([0, -0.5, -1, 0.5])
    assert (base["accuracy"], base["error"]) == (75, 100 * math.sqrt(0.75 * 0.25 / 4))
    assert (line["accuracy"], line["loss"], line["draws"]) == (50, 25, 2)
    assert line["error"] == pytest.approx(100 * change.std(ddof=1) / 2)
    assert "| net | 4 | gptq | 2 | 50.00 ± 0.00 | 25.00 ± " in tables.table([base, line])
    tables.draw([base, line], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_cells_leave_out_what_there_is_not():
    found = run.cells(["resnet", "minilm"], [4], ["rtn", "gptq", "best", "adaround"], 2)
    assert [c for c in found if c[2] == "float"] == [("resnet", 0, "float", -1),
                                                    ("minilm", 0, "float", -1)]  # fmt: skip
    assert sorted((c[0], c[2]) for c in found if c[3] == 1) == [
        ("minilm", "best"),
        ("minilm", "gptq"),
        ("resnet", "adaround"),
        ("resnet", "gptq"),
    ]
