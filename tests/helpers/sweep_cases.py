"""Sweep files, a tiny model folder, and a stand-in for models, for the tests of sweeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

WORDS = "the quick brown fox jumps over the lazy dog while def read(path): return path\n"

HEAD = """
name = "study"

[calibration]
text = "train.txt"
samples = 2
sequence_length = 16

[[models]]
name = "small"
path = "model"

[[tasks]]
name = "wiki"
kind = "perplexity"
text = "test.txt"
max_tokens = 60
window = 32
"""

RTN = """
[[recipes]]
name = "RTN"
preset = "rtn"
bits = 4
group_size = "channel"
"""

ZERO_SHOT = """
[[tasks]]
name = "choice"
kind = "zero-shot"
file = "choice.jsonl"
"""


def words(count: int, seed: int = 0) -> str:
    """Text of so many words, ten to a line."""
    chosen = np.random.default_rng(seed).choice(WORDS.split(), count)
    return "\n".join(" ".join(chosen[i : i + 10]) for i in range(0, count, 10))


def folder(path: Path) -> Path:
    """Make the files that :data:`HEAD` names, but for the model's weights."""
    (path / "model").mkdir(exist_ok=True)
    (path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (path / "train.txt").write_text(words(400), encoding="utf-8")
    (path / "test.txt").write_text(words(200, 1), encoding="utf-8")
    choices(path / "choice.jsonl")
    return path


def choices(path: Path, count: int = 6) -> None:
    """Write items with two or three choices."""
    items = [
        {
            "context": words(4 + i, i).replace("\n", " "),
            "choices": [words(1 + k, 10 * i + k) for k in range(2 + i % 2)],
            "gold": i % 2,
            "id": i,
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(i) + "\n" for i in items), encoding="utf-8")


def write(path: Path, *parts: str) -> Path:
    """Write a sweep file into a folder made by :func:`folder`."""
    file = path / "study.toml"
    file.write_text("".join(parts), encoding="utf-8")
    return file


def tiny_model(path: Path, seed: int = 1, **sizes: int) -> None:
    """Save a random LLaMA with the tokenizer of the demo, float16."""
    import torch
    import transformers

    from ptqkit.demo import MODEL_DIR

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    shape = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64, **sizes}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
        **shape,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).half()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


class FakeBench:
    """Stands for a model: a value per recipe and task, and a log of what was asked."""

    log: list[str] = []  # noqa: RUF012
    fail: dict[str, Exception] = {}  # noqa: RUF012

    def __init__(self, plan, device="cpu", threads=0):
        self.name = plan.name
        # What a task is measured with leads back here.
        self.cached_tokenizer = self
        self._note(f"load {plan.name}")

    @classmethod
    def _note(cls, text: str) -> None:
        cls.log.append(text)
        if text in cls.fail:
            raise cls.fail[text]

    def float_model(self):
        return self._quantized(10.0, 16.0)

    def quantized_copy(self, recipe, seed):
        drawn = f" seed {seed}" if seed else ""
        self._note(f"quantize {self.name}/{recipe.name}{drawn}")
        value = 10.0 + 8.0 / recipe.resolved["bits"] + seed
        return self._quantized(value, recipe.resolved["bits"])

    def _quantized(self, model, bits):
        from ptqkit.study.engine import Quantized

        return Quantized(model, float(bits), 16.0, 0.5)

    def measure(self, model, task):
        from ptqkit.study.measured import Measured

        self._note(f"measure {self.name}/{task.name} {model:g}")
        if task.kind == "zero-shot":
            return Measured(5 / model, "acc", True, 6, 0, 0, 0.5)
        return Measured(model, "perplexity", False, 60)

    @classmethod
    def install(cls, monkeypatch):
        """Let sweeps open a bench of this class."""
        monkeypatch.setattr("ptqkit.sweep.run.open_bench", cls)
        for name in ("float_model", "quantized_copy"):
            monkeypatch.setattr(f"ptqkit.sweep.run.{name}", getattr(cls, name))
        monkeypatch.setattr(
            "ptqkit.sweep.run.measure", lambda m, bench, task: bench.measure(m, task)
        )
