"""What ``ptqkit demo`` works on: a small trained language model and text to try it with."""

from __future__ import annotations

from pathlib import Path

from ptqkit.demo.corpus import files, split_of, text

__all__ = ["DEMO", "MODEL_DIR", "files", "split_of", "text"]

DEMO = "demo"
"""Name that stands for the embedded model, and for its texts."""

MODEL_DIR = Path(__file__).resolve().parent / "model"
"""Folder of the embedded model and its tokenizer, in the transformers layout."""
